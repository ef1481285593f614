"""Texts for speech without texts: a model's own transcripts, without the implausible ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speech.clips import Clip
from devices.runner.decode.fallback import MOST_COMPRESSION, compression_ratio
from edgewhisper.examples import seconds
from edgewhisper.resume import digest
from edgewhisper.transcripts import transcripts
from export.files import new_file
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

TOKENS_PER_S = 12
"""Tokens that a transcript may have for a second of the longest clip."""
CHARACTERS_PER_S = 0.5, 30.0
"""Plausible rates of speech. Fast English has about 20 characters per second."""


def pseudo_labelled(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    cache: Path,
) -> tuple[list[Clip], Counter[str]]:
    """Return the clips with the model's transcripts, and the number that was left out per reason.

    Clips are left out if their transcript is implausible (see `defect`). The transcripts are stored
    in the file `cache`, and read from it if it holds those of this model and these clips. Raises
    Problem if no clip remains.
    """
    texts = cached_transcripts(model, processor, clips, cache)
    defects = [defect(text, seconds(clip)) for text, clip in zip(texts, clips, strict=True)]
    left_out = Counter(reason for reason in defects if reason)
    labelled = [
        replace(clip, text=text)
        for clip, text, reason in zip(clips, texts, defects, strict=True)
        if reason is None
    ]
    if not labelled:
        raise Problem(
            f"the model has no plausible transcript of any of the {len(clips)} clips without "
            f"texts: {reasons(left_out)}",
            hint="check that they are speech in the model's language, or give them texts",
        )
    return labelled, left_out


def cached_transcripts(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    cache: Path,
) -> list[str]:
    """Return the model's transcripts, from the file `cache` if it holds them."""
    key = digest(model.state_dict(), [[str(clip.audio), clip.lang] for clip in clips])
    if cache.is_file():
        stored = json.loads(cache.read_text("utf-8"))
        if stored["key"] == key:
            return stored["texts"]
    limit = 16 + round(TOKENS_PER_S * max(map(seconds, clips)))
    texts = transcripts(model, processor, clips, "transcripts of clips without texts", limit)
    with new_file(cache) as partial:
        partial.write_text(json.dumps({"key": key, "texts": texts}), "utf-8")
    return texts


def defect(text: str, duration_s: float) -> str | None:
    """Return why a transcript is implausible, or None: "empty", "repetitive" or "rate"."""
    text = text.strip()
    if not text:
        return "empty"
    if compression_ratio(text) > MOST_COMPRESSION:  # as in Whisper's decoding
        return "repetitive"
    slowest, fastest = CHARACTERS_PER_S
    return None if slowest <= len(text) / duration_s <= fastest else "rate"


def reasons(left_out: Counter[str]) -> str:
    """Describe the clips that were left out: "2 empty, 1 repetitive, 0 of implausible rate"."""
    return (
        f"{left_out['empty']} empty, {left_out['repetitive']} repetitive, "
        f"{left_out['rate']} of implausible rate"
    )
