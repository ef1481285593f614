"""The gate: the exported artifact, in its own runtime, must transcribe as its checkpoint does.

Each clip is prompted for its own language in both versions; artifacts for runtimes with one fixed
prompt are compared under that prompt.

    fp32               the same greedy tokens on every window, and logits within a bound
    other ONNX         a limited loss of words; see gate_loss.too_much
    Core ML            every part is compared with the checkpoint's: log-mel, encoder states,
                       caches, logits
    Core ML, fp16      the same tokens on 98 % of the clips
    Core ML, few bits  the loss of words is recorded and reported

The manifest records what a later run without the checkpoint needs (gate_record.py): a hash of the
clips, the checkpoint's word errors in each, and a hash of the artifact's tokens of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gate_loss import MAX_WER_LOSS, errors_of, loss, normalizer_for, rate, too_much
from benchmarks.metadata import clips_hash, digest
from benchmarks.reference_runtimes import Encoder
from benchmarks.speech.clips import Clip
from benchmarks.text_difference import around_difference, common_length, cut
from devices.runner.audio import split
from devices.runner.decode.text import join
from devices.runner.measure.check import WindowDecoder, window_in
from devices.runner.recognizer import Recognizer
from export.problem import Problem

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
"""Values of the gate's `result` in the manifest."""
FOREIGN_WER = 0.6
"""A checkpoint with a higher word error rate does not know the speech."""
MOST_CLIPS = 100
BATCH = 8
PARTS_CLIPS = 16
"""The most clips, evenly chosen, whose parts are compared; comparing all parts of a clip takes as
long as everything else."""
PARTS = {
    "mel": "log-mel features",
    "states": "encoder states",
    "key_cache": "keys in the decoder's cache",
    "value_cache": "values in the decoder's cache",
    "logits": "logits",
}
"""Intermediate results that an artifact may return, in the order of computation."""

Windows = Sequence[Sequence[int]]
"""The tokens of one clip, a list for each window."""

Languages = Sequence[str | None]
"""The prompt language of each clip; None for the artifact's own prompt."""

Tokens = Callable[[Sequence[np.ndarray], Languages], list[list[int]]]
"""Function from a batch of windows, (samples,) each, and their languages to the checkpoint's greedy
tokens of each, without prompt and end."""

Parts = Callable[[np.ndarray, list[int], str | None], dict[str, np.ndarray]]
"""Function from pcm, tokens and language to the checkpoint's PARTS by name. Logits are raw, before
each token and after the last, (n+1, vocab)."""

Progress = Callable[[int, str], None]
"""Called with the number of finished clips and a note."""


def no_progress(done: int, note: str) -> None:
    pass


@dataclass(frozen=True)
class Bounds:
    """How much an artifact may differ from its checkpoint."""

    same: float = 0.0
    """The smallest share of clips that must get the same tokens."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Part -> the largest allowed difference."""
    scaled: bool = False
    """Whether allowed differences grow with values above 1, as rounding errors do."""
    wer_loss: float = MAX_WER_LOSS
    strict: bool = True
    """Whether a larger loss of words fails the gate instead of giving a warning."""


EXACT = Bounds(1.0, {"logits": 1e-3})
COREML = {
    "fp32": Bounds(1.0, dict.fromkeys(PARTS, 1e-4), scaled=True),
    "fp16": Bounds(0.98),
    "int8": Bounds(),
}
"""Bounds of Core ML packages by precision; others have Bounds(strict=False)."""


def bounds_for(target: str, precision: str) -> Bounds:
    """Return the bounds for a target and precision."""
    if target == "coreml":
        return COREML.get(precision, Bounds(strict=False))
    return EXACT if precision == "fp32" else Bounds()


class GateFailure(Problem):
    """The artifact differs too much from its checkpoint; the message shows the first such clip."""

    figures: dict[str, Any] | None = None
    """The gate's figures, if they were computed."""


class ForeignSpeech(GateFailure):
    """The checkpoint itself does not know the speech, so there is nothing to compare."""


class Error(NamedTuple):
    """The largest difference between two arrays (infinite for NaN) and the largest value."""

    size: float
    scale: float


@dataclass(frozen=True)
class Comparison:
    """One clip, transcribed by the checkpoint and by the artifact."""

    clip: Clip
    expected: Windows
    """The checkpoint's tokens."""
    actual: Windows
    """The artifact's tokens."""
    expected_text: str
    actual_text: str
    errors: dict[str, Error]
    """Part -> its error."""

    @property
    def same_tokens(self) -> bool:
        return [*map(list, self.expected)] == [*map(list, self.actual)]


# --------------------------------------------------------------------------------- the checkpoint


def evenly(clips: Sequence[Clip], most: int) -> list[Clip]:
    """Return at most `most` clips, evenly spread over the manifest; always the same ones."""
    return [clips[place] for place in places(len(clips), most)]


def places(length: int, most: int) -> list[int]:
    """Return at most `most` evenly spread indices below `length`, beginning with 0."""
    count = min(most, length)
    return [number * length // count for number in range(count)]


def checkpoint_tokens(
    tokens: Tokens,
    clips: Sequence[Clip],
    window_samples: int,
    languages: Languages | None = None,
    progress: Progress = no_progress,
) -> list[list[list[int]]]:
    """Return the checkpoint's tokens of every clip, a list for each window.

    A batch has windows of one language and similar length.
    """
    windows = [
        (number, pcm[piece], language)
        for number, (clip, language) in enumerate(
            zip(clips, prompt_languages(clips, languages), strict=True)
        )
        for pcm in [clip.pcm()]
        for piece in split(pcm, window_samples)
    ]
    by_length = sorted(range(len(windows)), key=lambda i: (windows[i][2] or "", len(windows[i][1])))
    decoded: list[list[int]] = [[] for _ in windows]
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        outputs = tokens([windows[i][1] for i in batch], [windows[i][2] for i in batch])
        for i, output in zip(batch, outputs, strict=True):
            decoded[i] = output
        progress((start + len(batch)) * len(clips) // len(windows), "")
    by_clip: list[list[list[int]]] = [[] for _ in clips]
    for (number, _, _), output in zip(windows, decoded, strict=True):
        by_clip[number].append(output)
    return by_clip


def prompt_languages(clips: Sequence[Clip], languages: Languages | None) -> Languages:
    return [None] * len(clips) if languages is None else languages


def refuse_foreign(clips: Sequence[Clip], texts: Sequence[str]) -> None:
    """Raise ForeignSpeech if the checkpoint's own texts are mostly wrong."""
    counts = errors_of(clips, texts, normalizer_for(clips))
    if rate(counts) <= FOREIGN_WER:
        return
    wrong = next(number for number, (errors, _) in enumerate(counts) if errors)
    raise ForeignSpeech(
        f"the gate cannot compare: the checkpoint's own word error rate on these {len(clips)} "
        f"clips is {100 * rate(counts):.0f} %, at most {100 * FOREIGN_WER:.0f} % is allowed; "
        "these clips are not this model's speech\n"
        f"clip:        {clips[wrong].audio.name} ({clips[wrong].lang})\n"
        f"reference:   {cut(clips[wrong].text)!r}\n"
        f"checkpoint:  {cut(texts[wrong])!r}",
        hint="name clips in the model's language with --speech, with the right `lang` in each "
        "line; or export without a comparison with --gate off",
    )


# ----------------------------------------------------------------------------------- the artifact


def judge(
    recognizer: WindowDecoder,
    reference: Sequence[Windows],
    clips: Sequence[Clip],
    bounds: Bounds,
    parts: Parts | None = None,
    languages: Languages | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compare an open artifact with the checkpoint and return the figures for the manifest.

    `reference` holds the checkpoint's tokens (checkpoint_tokens). `parts` computes the
    checkpoint's parts; those that the artifact returns are compared. Raises GateFailure.
    """
    if not clips:
        raise Problem("the gate got no clips to compare on", hint="give a speech manifest")
    comparisons: list[Comparison] = []
    sample = places(len(clips), PARTS_CLIPS)
    prompts = prompt_languages(clips, languages)
    for clip, expected, language in zip(clips, reference, prompts, strict=True):
        compared_parts = parts if len(comparisons) in sample else None
        comparisons.append(compare_clip(recognizer, clip, expected, compared_parts, language))
        progress(len(comparisons), "")
    figures = measure(comparisons, normalizer_for(clips))
    figures |= {"exact": bounds.same == 1, "max_wer_loss_points": bounds.wer_loss}
    figures |= {"clips_hash": clips_hash(clips)}
    figures |= tokens_record([comparison.actual for comparison in comparisons])
    try:
        check_tokens(comparisons, bounds.same)
        check_parts(comparisons, bounds)
        check_loss(figures, comparisons, bounds)
    except GateFailure as failure:
        failure.figures = figures
        raise
    if not bounds.strict:  # a loss that gave a warning must not fail the artifact later
        figures["max_wer_loss_points"] = max(bounds.wer_loss, figures["wer_loss_points"])
    return figures


def compare_clip(
    recognizer: WindowDecoder,
    clip: Clip,
    expected: Windows,
    parts: Parts | None,
    language: str | None = None,
) -> Comparison:
    """Transcribe a clip with the artifact, over the checkpoint's windows.

    Parts are compared if the artifact's layout returns them unchanged.
    """
    pcm = clip.pcm()
    windows = [pcm[piece] for piece in split(pcm, recognizer.window_samples)]
    actual = list(map(window_in(recognizer, language), windows))
    errors: dict[str, Error] = {}
    if parts is not None and hasattr(recognizer, "parts"):
        own_parts = recognizer.parts
        if isinstance(recognizer, Recognizer):
            own_parts = partial(own_parts, language=language)
        for pcm, tokens in zip(windows, expected, strict=True):
            pair = own_parts(pcm, tokens), parts(pcm, list(tokens), language)
            for name, error in differences(*pair):
                errors[name] = max(error, errors.get(name, error))
    return Comparison(
        clip=clip,
        expected=expected,
        actual=actual,
        expected_text=join([recognizer.text(list(tokens)) for tokens in expected]),
        actual_text=join([recognizer.text(tokens) for tokens in actual]),
        errors=errors,
    )


def differences(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Error]]:
    """Yield each common part and its error.

    A package's cache may have more channels than the checkpoint's; they must be zero.
    """
    for name in actual.keys() & expected.keys():
        reference = expected[name]
        if name.endswith("_cache"):
            padding = [(0, len(actual[name]) - len(reference)), (0, 0)]
            reference = np.pad(reference, padding)
        size = float(np.abs(actual[name] - reference).max())
        scale = float(np.abs(reference).max())
        yield name, Error(size if np.isfinite(size) else float("inf"), scale)


def measure(comparisons: Sequence[Comparison], normalizer: str = "whisper-basic") -> dict[str, Any]:
    """Return shares of equal clips, error rates (fractions) and the loss between them (points)."""
    clips = [one.clip for one in comparisons]
    errors = {
        name: max(one.errors[name] for one in comparisons if one.errors).size
        for name in PARTS
        if name in comparisons[0].errors
    }
    before = errors_of(clips, [one.expected_text for one in comparisons], normalizer)
    after = errors_of(clips, [one.actual_text for one in comparisons], normalizer)
    same_texts = [one.expected_text == one.actual_text for one in comparisons]
    return {
        "clips": len(comparisons),
        "windows": sum(len(one.expected) for one in comparisons),
        "identical_tokens": float(np.mean([one.same_tokens for one in comparisons])),
        "identical_texts": float(np.mean(same_texts)),
        "checkpoint_wer": rate(before),
        "artifact_wer": rate(after),
        **loss(before, after),
        "checkpoint_errors": [errors for errors, _ in before],
        "max_logits_error": errors.get("logits"),
        "normalizer": normalizer,
        **({"max_errors": errors} if errors.keys() - {"logits"} else {}),
    }


def tokens_record(tokens: Sequence[Windows]) -> dict[str, Any]:
    """Return the manifest's record of an artifact's tokens: one hash of all, a short one per
    clip."""
    hashes = [digest(" ".join(map(str, window)) for window in clip) for clip in tokens]
    return {"tokens_hash": digest(hashes), "clip_tokens": [one[:8] for one in hashes]}


def with_states(figures: dict[str, Any], encoder: Encoder, clips: Sequence[Clip]) -> dict[str, Any]:
    """Return the figures with sampled encoder states of every clip, the record of an encoder
    without a decoder."""
    return figures | {"clip_states": [encoder.some_states(clip.pcm()) for clip in clips]}


# ------------------------------------------------------------------------------------- the bounds


def check_tokens(comparisons: Sequence[Comparison], least: float) -> None:
    """Raise GateFailure unless a share of at least `least` of the clips have equal tokens."""
    wrong = [one for one in comparisons if not one.same_tokens]
    if len(comparisons) - len(wrong) < least * len(comparisons):
        allowed = f", {least:.0%} must get the same" if least < 1 else ""
        raise GateFailure(
            f"{len(wrong)} of {len(comparisons)} clips get other tokens from the artifact than "
            f"from the checkpoint{allowed}. The first:\n{describe(wrong[0])}",
            hint="the artifact computes something else than the model: export it again; if that "
            "does not help, report this clip",
        )


def check_parts(comparisons: Sequence[Comparison], bounds: Bounds) -> None:
    """Raise GateFailure unless the errors of all parts are finite and within their bounds."""
    for name in PARTS:
        for one in comparisons:
            size, scale = one.errors.get(name, Error(0.0, 0.0))
            limit = bounds.errors.get(name, float("inf")) * max(1, scale if bounds.scaled else 1)
            if size > limit or size == float("inf"):
                raise GateFailure(
                    f"the artifact's {PARTS[name]} differ by {size:.2g} from the checkpoint's; at "
                    f"most {limit:g} is allowed. The first clip:\n{describe(one)}",
                    hint="the artifact computes something else than the model: report this clip",
                )


def check_loss(figures: dict[str, Any], comparisons: Sequence[Comparison], bounds: Bounds) -> None:
    """Raise GateFailure, or warn if the bounds are not strict, for a loss of too many words."""
    if not too_much(figures, bounds.wer_loss):
        return
    first = next((one for one in comparisons if one.expected_text != one.actual_text), None)
    example = describe(first or comparisons[0])
    message = (
        f"{compared(figures)}; at most {bounds.wer_loss:g} points are allowed. The first:\n"
        f"{example}"
    )
    if bounds.strict:
        raise GateFailure(
            message,
            hint="export with a higher --precision; if fp32 passes, this model needs training for "
            "fewer bits (a `qat` step), or keep the artifact with --gate warn",
        )
    warnings.warn(message, stacklevel=2)


# ----------------------------------------------------------------------------------- messages


def compared(figures: Mapping[str, Any]) -> str:
    """Return both error rates and the loss as a sentence."""
    low, high = figures["wer_loss_interval"]
    return (
        f"the artifact's word error rate is {100 * figures['artifact_wer']:.2f} %, the "
        f"checkpoint's {100 * figures['checkpoint_wer']:.2f} %: a loss of "
        f"{figures['wer_loss_points']:.2f} points (95 % interval {low:.2f} to {high:.2f}; "
        f"{figures['word_loss']} words)"
    )


def describe(one: Comparison) -> str:
    """Return three lines: the clip, the checkpoint's text and the artifact's text."""
    expected, actual = around_difference(one.expected_text, one.actual_text)
    return (
        f"clip:        {one.clip.audio.name} ({one.clip.lang}{token_difference(one)})\n"
        f"checkpoint:  {expected!r}\n"
        f"artifact:    {actual!r}"
    )


def token_difference(one: Comparison) -> str:
    """Return the first token that differs, as a suffix for the clip's line; "" if none does."""
    for number, pair in enumerate(zip(one.expected, one.actual, strict=True), start=1):
        place = common_length(*pair)
        if list(pair[0]) != list(pair[1]):
            first, second = (
                f"{tokens[place]}" if place < len(tokens) else "the end" for tokens in pair
            )
            window = f" of window {number}" if len(one.expected) > 1 else ""
            return f"; token {place + 1}{window}: {first}, artifact {second}"
    return ""
