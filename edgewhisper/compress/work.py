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

AT_ONCE = 8
"""Clips in a batch of the evaluation. Where keys and values differ in width, torch makes the scores
of all pairs of positions: 16 clips of tiny.en then take 3 GB."""


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

    scores: "dict[str, Score]" = field(default_factory=dict)
    """Dev scores by a hash of the model and the clips: what was evaluated once is not again."""

    def wer(self, model: "WhisperForConditionalGeneration") -> "Score":
        """The model's greedy transcripts of the dev clips against their texts."""
        key = self._key(model)
        if key not in self.scores:
            self.scores[key] = self._evaluate(model)
        return self.scores[key]

    def _evaluate(self, model: "WhisperForConditionalGeneration") -> "Score":
        from benchmarks.normalizers import name_for
        from benchmarks.speech import Samples
        from benchmarks.wer import score
        from edgewhisper import decoding
        from edgewhisper.progress import progress_bar
        from edgewhisper.runs import main_process

        pcms, languages = Samples(self.dev), [clip.lang for clip in self.dev]
        limit = self._most_tokens()
        with progress_bar(len(pcms), None, main_process(), "dev WER") as show:
            texts = decoding.transcribe(
                model,
                self.processor,
                pcms,
                languages,
                batch_size=AT_ONCE,
                max_tokens=limit,
                done=lambda clips: show(clips, ""),
            )
        labels = [clip.text for clip in self.dev]
        return score(labels, texts, name_for(self.dev, otherwise="none"), languages)

    def _most_tokens(self) -> int:
        """Tokens that a dev clip may take: twice the longest reference and 32 more. A model that
        repeats itself is stopped there instead of at 444 tokens a clip."""
        tokenizer = self.processor.tokenizer
        lengths = [len(tokenizer(c.text, add_special_tokens=False).input_ids) for c in self.dev]
        return 2 * max(lengths) + 32

    def _key(self, model: "WhisperForConditionalGeneration") -> str:
        from edgewhisper.resume import digest

        shapes = getattr(model.config, "edgewhisper", None)
        clips = [[str(clip.audio), clip.text, clip.lang] for clip in self.dev]
        prompts = [getattr(model.generation_config, n, None) for n in ("language", "task")]
        return digest(model.state_dict(), [shapes, clips, prompts])
