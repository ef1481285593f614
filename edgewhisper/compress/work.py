"""What a method is given besides the model and its options."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech import Clip
    from benchmarks.wer import Score
    from edgewhisper.alignment import Reference


@dataclass
class Work:
    """The speech, the place to keep state in, and the record of what was done.

    `dev` is what thresholds are chosen on; clips that judge the result are not in here.
    """

    processor: "WhisperProcessor"
    train: "Sequence[Clip]"
    dev: "Sequence[Clip]"
    run_dir: Path
    seed: int = 0
    original: "WhisperForConditionalGeneration | None" = None
    """The model that the recipe began with, where it is at hand: a teacher for later steps."""
    record: dict[str, Any] = field(default_factory=dict)
    """Figures that a step adds; they end up in compression.json."""
    timed: "Reference | None" = None
    """Dev speech with the times of its words, which timestamps are judged by."""

    def wer(self, model: "WhisperForConditionalGeneration") -> "Score":
        """The model's greedy transcripts of the dev clips against their texts."""
        from benchmarks.normalizers import name_for
        from benchmarks.wer import score
        from edgewhisper import decoding

        pcms, languages = [clip.pcm() for clip in self.dev], [clip.lang for clip in self.dev]
        texts = decoding.transcribe(model, self.processor, pcms, languages)
        labels = [clip.text for clip in self.dev]
        return score(labels, texts, name_for(self.dev, otherwise="none"), languages)
