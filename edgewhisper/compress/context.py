"""The context of a compression step: its speech, its directory, and the record it fills."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip
    from benchmarks.wer import Score
    from edgewhisper.alignment import Reference
    from edgewhisper.training import Training

AT_ONCE = 8
"""Clips in a batch of the evaluation. If keys and values differ in width, torch stores the scores
of all pairs of positions: 16 clips of tiny.en then take 3 GB."""


@dataclass
class Context:
    """What a step receives in addition to the model and its options.

    Thresholds are chosen on `dev`. Test clips are not part of the context.
    """

    processor: "WhisperProcessor"
    train: "Sequence[Clip]"
    dev: "Sequence[Clip]"
    run_dir: Path
    seed: int = 0
    original: "WhisperForConditionalGeneration | None" = None
    """The model before the first step of the recipe, if available: a teacher for later steps."""
    dense_texts: bool = False
    """Whether the texts of `train` are the transcripts of `original`."""
    record: dict[str, Any] = field(default_factory=dict)
    """Results that a step adds; they are saved in compression.json."""
    timed: "Reference | None" = None
    """Dev speech with known word times, against which token timestamps are evaluated."""

    measured_dir: Path | None = None
    """Directory of measurements of the model that later runs reuse. None: they are not stored."""

    scores: "dict[str, Score]" = field(default_factory=dict)
    """Cached dev scores, by a hash of the model and the clips."""

    def calibration_clips(self, method: str, size: int) -> "list[Clip]":
        """Return so many training clips, drawn by the seed; all if there are fewer.

        Raises Problem if there are none. `method` is written before the error.
        """
        if not self.train:
            raise Problem(
                f"{method}: there are no clips to calibrate on", hint="pass speech with --speech"
            )
        return self.drawn(self.train, size)

    def drawn(self, clips: "Sequence[Clip]", size: int) -> "list[Clip]":
        """Return so many of the clips, drawn by the seed; all if there are fewer."""
        from edgewhisper.examples import permutation

        return [clips[i] for i in permutation(self.seed, 0, len(clips))[:size]]

    def trained(
        self,
        model: "WhisperForConditionalGeneration",
        options: "Training",
        name: str,
        *,
        clips: "Sequence[Clip] | None" = None,
        seed: int = 0,
        **rest: Any,
    ) -> dict[str, Any]:
        """Train the model in place, on `train` or on `clips`; return the training's summary.

        Its state is stored in `name` of the run's directory. `seed` is added to the run's seed.
        `rest` is passed to training.train. Raises what training.train raises.
        """
        from edgewhisper.training import train

        speech = self.train if clips is None else clips
        run_dir, seed = self.run_dir / name, self.seed + seed
        log = train(model, self.processor, speech, options, run_dir=run_dir, seed=seed, **rest)
        return log.summary()

    def wer(self, model: "WhisperForConditionalGeneration") -> "Score":
        """Return the dev score of the model: greedy transcripts against the clips' texts."""
        key = self._key(model)
        if key not in self.scores:
            self.scores[key] = self._evaluate(model)
        return self.scores[key]

    def _evaluate(self, model: "WhisperForConditionalGeneration") -> "Score":
        from benchmarks.normalizers import name_for
        from benchmarks.wer import score
        from edgewhisper.transcripts import transcripts

        limit = self.token_limit()
        texts = transcripts(model, self.processor, self.dev, "dev WER", limit, AT_ONCE)
        languages = [clip.lang for clip in self.dev]
        labels = [clip.text for clip in self.dev]
        return score(labels, texts, name_for(self.dev, otherwise="none"), languages)

    def token_limit(self) -> int:
        """Return the token limit of a dev clip: twice the longest reference plus 32.

        It stops a model that repeats itself earlier than Whisper's limit of 444 tokens.
        """
        tokenizer = self.processor.tokenizer
        lengths = [len(tokenizer(c.text, add_special_tokens=False).input_ids) for c in self.dev]
        return 2 * max(lengths) + 32

    def _key(self, model: "WhisperForConditionalGeneration") -> str:
        from edgewhisper.resume import digest

        shapes = getattr(model.config, "edgewhisper", None)
        clips = [[str(clip.audio), clip.text, clip.lang] for clip in self.dev]
        prompts = [getattr(model.generation_config, n, None) for n in ("language", "task")]
        return digest(model.state_dict(), [shapes, clips, prompts])
