"""A checkpoint's transcripts of clips, with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.speech.clips import Clip, Samples
from edgewhisper import decoding
from edgewhisper.progress import progress_bar

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor


def transcripts(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    label: str,
    max_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Return the greedy transcript of each clip, in the clip's language and of at most so many
    tokens. `label` is written before the progress."""
    with progress_bar(len(clips), label) as show:
        return decoding.transcribe(
            model,
            processor,
            Samples(clips),
            [clip.lang for clip in clips],
            batch_size=batch_size,
            max_tokens=max_tokens,
            done=lambda finished: show(finished, ""),
        )
