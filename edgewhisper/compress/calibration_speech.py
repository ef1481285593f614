"""The calibration speech of methods that run the decoder on the clips' texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgewhisper.calibration import Speech
from edgewhisper.compress.context import Context
from edgewhisper.transcripts import transcripts

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip
    from edgewhisper.whisper import WhisperForConditionalGeneration


def decoder_speech(
    model: "WhisperForConditionalGeneration",
    clips: "Sequence[Clip]",
    own_words: bool,
    context: Context,
    method: str,
    random_tokens: int = 0,
) -> Speech:
    """Return the clips with the texts that the decoder reads. With `own_words`, these are the
    model's transcripts, except for clips of which it transcribes nothing."""
    if own_words and clips:
        limit = 4 * max(len(clip.text.split()) for clip in clips) + 32
        texts = transcripts(model, context.processor, clips, f"{method}: transcripts", limit)
        clips = [
            replace(clip, text=text) if text else clip
            for clip, text in zip(clips, texts, strict=True)
        ]
    return Speech(clips, context.processor, True, random_tokens)
