"""The gate: the finished artifact, in its own runtime, must say what its checkpoint says.

Each clip is prompted for its own language in both versions; artifacts of runtimes with one fixed
prompt are compared under that one. fp32 has to give the same greedy tokens on every window of every
clip, and logits that are close. Other precisions may differ in words, see `too_much`. Of a Core ML
package every part is compared with the checkpoint's: log-mel, encoder states, caches, logits. In
fp16 it has to give the same tokens on 98 % of the clips; what weights of few bits lose is recorded
and reported.

The manifest keeps what it takes to run the gate again without the checkpoint: which clips they
were, the checkpoint's word errors in each, and a hash of the artifact's tokens of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.metadata import clips_hash, digest
from benchmarks.normalizers import name_for
from benchmarks.reference_runtimes import Encoder, open_artifact
from benchmarks.speech.clips import Clip
from benchmarks.wer import interval, word_errors
from devices.runner.audio import split
from devices.runner.decode.text import join
from devices.runner.measure.check import Hearing, window_in
from devices.runner.recognizer import Recognizer
from export.problem import Problem

MAX_WER_LOSS = 0.5
"""In points: hundredths of the word error rate."""
GROSS_LOSS = 10.0
"""Points beyond the limit that fail the gate whatever the interval: few clips have a wide one."""
FEWEST_WORDS = 3
"""Fewer additional word errors than this never fail the gate."""
FOREIGN_WER = 0.6
"""A checkpoint with more word errors than this does not know the speech."""
MOST_CLIPS = 100
BATCH = 8
PARTS_CLIPS = 16
"""At most so many clips, evenly chosen, have their parts compared: every part of every clip takes
as long as all the rest."""
SHOWN = 100
"""Characters of a text in an error message."""
PARTS = {
    "mel": "log-mel features",
    "states": "encoder states",
    "key_cache": "keys in the decoder's cache",
    "value_cache": "values in the decoder's cache",
    "logits": "logits",
}
"""What an artifact may show of itself, in the order of computation."""

Windows = Sequence[Sequence[int]]
"""The tokens of one clip, a list for each window."""

Languages = Sequence[str | None]
"""What prompts each clip; None for the artifact's own prompt."""

Tokens = Callable[[Sequence[np.ndarray], Languages], list[list[int]]]
"""A batch of windows, (samples,) each, and their languages -> the checkpoint's greedy tokens of
each, without prompt and end."""

Parts = Callable[[np.ndarray, list[int], str | None], dict[str, np.ndarray]]
"""pcm, tokens, language -> the checkpoint's PARTS by name: its raw logits before each token and
after the last, (n+1, vocab), and others."""

Progress = Callable[[int, str], None]
"""Is called with the number of clips that are done, and a note."""


def no_progress(done: int, note: str) -> None:
    pass


@dataclass(frozen=True)
class Bounds:
    """How close an artifact has to come to its checkpoint."""

    same: float = 0.0
    """Least share of clips that get the same tokens."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Part -> its largest difference."""
    scaled: bool = False
    """Whether differences may grow with numbers beyond 1, as rounding does."""
    wer_loss: float = MAX_WER_LOSS
    strict: bool = True
    """Whether a larger loss of words fails the gate, or is only told."""


EXACT = Bounds(1.0, {"logits": 1e-3})
COREML = {
    "fp32": Bounds(1.0, dict.fromkeys(PARTS, 1e-4), scaled=True),
    "fp16": Bounds(0.98),
    "int8": Bounds(),
}
"""Bounds of Core ML packages by precision; others are Bounds(strict=False)."""


def bounds_for(target: str, precision: str) -> Bounds:
    if target == "coreml":
        return COREML.get(precision, Bounds(strict=False))
    return EXACT if precision == "fp32" else Bounds()


class GateFailure(Problem):
    """The artifact does not say what its checkpoint says; the message shows the first clip."""

    figures: dict[str, Any] | None = None
    """The gate's figures, as far as there are any."""


class ForeignSpeech(GateFailure):
    """The checkpoint itself does not know the speech, so there is nothing to compare."""


class Error(NamedTuple):
    """The largest difference between two arrays, infinite for NaN, and the largest number."""

    size: float
    scale: float


@dataclass(frozen=True)
class Heard:
    """One clip, in both versions."""

    clip: Clip
    wanted: Windows
    """The checkpoint's tokens."""
    found: Windows
    wanted_text: str
    found_text: str
    errors: dict[str, Error]
    """Of each part."""


# --------------------------------------------------------------------------------- the checkpoint


def evenly(clips: Sequence[Clip], most: int) -> list[Clip]:
    """At most so many of the clips, evenly spread over the manifest; always the same ones."""
    return [clips[place] for place in places(len(clips), most)]


def places(length: int, most: int) -> list[int]:
    """At most so many places, evenly spread, from the first on."""
    count = min(most, length)
    return [number * length // count for number in range(count)]


def checkpoint_tokens(
    tokens: Tokens,
    clips: Sequence[Clip],
    window_samples: int,
    languages: Languages | None = None,
    progress: Progress = no_progress,
) -> list[list[list[int]]]:
    """The checkpoint's tokens of every clip. Windows of one language and of like length are decoded
    together."""
    spoken = spoken_in(clips, languages)
    work = [
        (number, pcm[piece], language)
        for number, (clip, language) in enumerate(zip(clips, spoken, strict=True))
        for pcm in [clip.pcm()]
        for piece in split(pcm, window_samples)
    ]
    order = sorted(range(len(work)), key=lambda i: (work[i][2] or "", len(work[i][1])))
    found: list[list[int]] = [[] for _ in work]
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        said = tokens([work[i][1] for i in batch], [work[i][2] for i in batch])
        for i, one in zip(batch, said, strict=True):
            found[i] = one
        progress((start + len(batch)) * len(clips) // len(work), "")
    by_clip: list[list[list[int]]] = [[] for _ in clips]
    for (number, _, _), one in zip(work, found, strict=True):
        by_clip[number].append(one)
    return by_clip


def spoken_in(clips: Sequence[Clip], languages: Languages | None) -> Languages:
    return [None] * len(clips) if languages is None else languages


def refuse_foreign(clips: Sequence[Clip], texts: Sequence[str]) -> None:
    """Raise ForeignSpeech where the checkpoint's own texts are mostly wrong."""
    counts = errors_of(clips, texts, normalizer_for(clips))
    errors, words = np.array(counts).sum(axis=0)
    if errors <= FOREIGN_WER * words:
        return
    wrong = next(number for number, (errors, _) in enumerate(counts) if errors)
    raise ForeignSpeech(
        f"the gate cannot judge: the checkpoint's own word error rate on these {len(clips)} clips "
        f"is {100 * rate(counts):.0f} %, at most {100 * FOREIGN_WER:.0f} % is allowed, so these "
        "clips are not this model's speech.\n"
        f"clip:        {clips[wrong].audio.name} ({clips[wrong].lang})\n"
        f"its text:    {cut(clips[wrong].text)!r}\n"
        f"checkpoint:  {cut(texts[wrong])!r}",
        hint="name clips in the model's language with --speech, with the right `lang` in each "
        "line; or export without a comparison with --gate off",
    )


def normalizer_for(clips: Sequence[Clip]) -> str:
    return name_for(clips, otherwise="none")


def errors_of(
    clips: Sequence[Clip], texts: Sequence[str], normalizer: str
) -> list[tuple[int, int]]:
    """Word errors and words of each clip. Raises Problem where no clip has a word."""
    counts = word_errors(
        [clip.text for clip in clips], list(texts), normalizer, [clip.lang for clip in clips]
    )
    if not sum(words for _, words in counts):
        raise Problem(
            f"the texts of the gate's {len(clips)} clips hold no words, so there is no error rate",
            hint="name clips with texts with --speech, or use --gate off",
        )
    return counts


# ----------------------------------------------------------------------------------- the artifact


def run_gate(
    artifact_dir: Path,
    reference: Sequence[Windows],
    clips: Sequence[Clip],
    bounds: Bounds,
    parts: Parts | None = None,
    threads: int | None = None,
    languages: Languages | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The gate's figures, for the manifest. Raises GateFailure.

    `reference` are the checkpoint's tokens (checkpoint_tokens). `parts` are the checkpoint's; those
    that the artifact shows of itself are compared.
    """
    recognizer = open_artifact(artifact_dir, threads)
    return judge(recognizer, reference, clips, bounds, parts, languages, progress)


def judge(
    recognizer: Hearing,
    reference: Sequence[Windows],
    clips: Sequence[Clip],
    bounds: Bounds,
    parts: Parts | None = None,
    languages: Languages | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The same of an artifact that is open."""
    if not clips:
        raise Problem("the gate got no clips to compare on", hint="give a speech manifest")
    heard: list[Heard] = []
    sample = places(len(clips), PARTS_CLIPS)
    for clip, wanted, language in zip(clips, reference, spoken_in(clips, languages), strict=True):
        shown = parts if len(heard) in sample else None
        heard.append(listen(recognizer, clip, wanted, shown, language))
        progress(len(heard), "")
    figures = measure(heard, normalizer_for(clips))
    figures |= {"exact": bounds.same == 1, "max_wer_loss_points": bounds.wer_loss}
    figures |= {"clips_hash": clips_hash(clips), **tokens_record([clip.found for clip in heard])}
    try:
        check_tokens(heard, bounds.same)
        check_parts(heard, bounds)
        check_loss(figures, heard, bounds)
    except GateFailure as failure:
        failure.figures = figures
        raise
    if not bounds.strict:  # what was reported is no reason to fail the artifact later
        figures["max_wer_loss_points"] = max(bounds.wer_loss, figures["wer_loss_points"])
    return figures


def listen(
    recognizer: Hearing,
    clip: Clip,
    wanted: Windows,
    parts: Parts | None,
    language: str | None = None,
) -> Heard:
    """Both versions of one clip, over the same windows. Parts that a layout does not show, or
    changes by design, are not compared."""
    pcm = clip.pcm()
    windows = [pcm[piece] for piece in split(pcm, recognizer.window_samples)]
    found = list(map(window_in(recognizer, language), windows))
    errors: dict[str, Error] = {}
    if parts is not None and hasattr(recognizer, "parts"):
        show = recognizer.parts
        if isinstance(recognizer, Recognizer):
            show = partial(show, language=language)
        for pcm, tokens in zip(windows, wanted, strict=True):
            for name, error in differences(show(pcm, tokens), parts(pcm, list(tokens), language)):
                errors[name] = max(error, errors.get(name, error))
    return Heard(
        clip=clip,
        wanted=wanted,
        found=found,
        wanted_text=join([recognizer.text(list(tokens)) for tokens in wanted]),
        found_text=join([recognizer.text(tokens) for tokens in found]),
        errors=errors,
    )


def differences(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Error]]:
    """Of each part. Caches of a package may have channels behind those of the checkpoint, which
    must be zero."""
    for name in found.keys() & wanted.keys():
        whole = wanted[name]
        if name.endswith("_cache"):
            whole = np.pad(whole, [(0, len(found[name]) - len(whole)), (0, 0)])
        size = float(np.abs(found[name] - whole).max())
        yield name, Error(size if np.isfinite(size) else float("inf"), float(np.abs(whole).max()))


def measure(heard: Sequence[Heard], normalizer: str = "whisper-basic") -> dict[str, Any]:
    """Shares, error rates (fractions) and the loss between them (points)."""
    clips = [clip.clip for clip in heard]
    errors = {
        name: max(clip.errors[name] for clip in heard if clip.errors).size
        for name in PARTS
        if name in heard[0].errors
    }
    before = errors_of(clips, [clip.wanted_text for clip in heard], normalizer)
    after = errors_of(clips, [clip.found_text for clip in heard], normalizer)
    return {
        "clips": len(heard),
        "windows": sum(len(clip.wanted) for clip in heard),
        "identical_tokens": float(np.mean([same(clip) for clip in heard])),
        "identical_texts": float(np.mean([clip.wanted_text == clip.found_text for clip in heard])),
        "checkpoint_wer": rate(before),
        "artifact_wer": rate(after),
        **loss(before, after),
        "checkpoint_errors": [errors for errors, _ in before],
        "max_logits_error": errors.get("logits"),
        "normalizer": normalizer,
        **({"max_errors": errors} if errors.keys() - {"logits"} else {}),
    }


def same(clip: Heard) -> bool:
    return [*map(list, clip.wanted)] == [*map(list, clip.found)]


def rate(counts: Sequence[tuple[int, int]]) -> float:
    errors, words = np.array(counts).sum(axis=0)
    return float(errors / words)


def loss(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many more words are wrong after than before, in all, in points of the word error rate,
    and the 95 % interval of these points: a paired bootstrap over clips."""
    (first, words), (second, _) = np.array(before).T, np.array(after).T
    more = second - first
    low, high = interval(more, words)
    return {
        "word_loss": int(more.sum()),
        "wer_loss_points": 100 * float(more.sum() / words.sum()),
        "wer_loss_interval": [100 * low, 100 * high],
    }


def too_much(lost: Mapping[str, Any], limit: float) -> bool:
    """Whether a loss of words is beyond the limit, in points, by more than chance.

    That is where the whole 95 % interval of the loss lies above the limit: one word in 41 is no
    reason to fail. An interval over few clips, or over one clip that went wrong altogether, says
    little, so a loss of GROSS_LOSS points beyond the limit fails as well. Less than FEWEST_WORDS
    additional errors never do.
    """
    if lost["word_loss"] < FEWEST_WORDS:
        return False
    return lost["wer_loss_interval"][0] > limit or lost["wer_loss_points"] > limit + GROSS_LOSS


def check_tokens(heard: Sequence[Heard], least: float) -> None:
    """All tokens must agree on a share of the clips."""
    wrong = [clip for clip in heard if not same(clip)]
    if len(heard) - len(wrong) < least * len(heard):
        allowed = f", {least:.0%} must get the same" if least < 1 else ""
        raise GateFailure(
            f"{len(wrong)} of {len(heard)} clips get other tokens from the artifact than from "
            f"the checkpoint{allowed}. The first:\n{show(wrong[0])}",
            hint="the artifact computes something else than the model: export it again; if that "
            "does not help, report this clip",
        )


def check_parts(heard: Sequence[Heard], bounds: Bounds) -> None:
    """Every number of every part must be close, and a number."""
    for name in PARTS:
        for clip in heard:
            size, scale = clip.errors.get(name, Error(0.0, 0.0))
            most = bounds.errors.get(name, float("inf")) * max(1, scale if bounds.scaled else 1)
            if size > most or size == float("inf"):
                raise GateFailure(
                    f"the artifact's {PARTS[name]} differ by {size:.2g} from the checkpoint's, "
                    f"allowed is {most:g}. The first clip:\n{show(clip)}",
                    hint="the artifact computes something else than the model: report this clip",
                )


def check_loss(figures: dict[str, Any], heard: Sequence[Heard], bounds: Bounds) -> None:
    """The word error rate may rise by so many points; see too_much."""
    if not too_much(figures, bounds.wer_loss):
        return
    first = next((clip for clip in heard if clip.wanted_text != clip.found_text), heard[0])
    message = f"{compared(figures)}, allowed are {bounds.wer_loss:g}. The first:\n{show(first)}"
    if bounds.strict:
        raise GateFailure(
            message,
            hint="export with a higher --precision; if fp32 passes, this model needs training for "
            "fewer bits (a `qat` step), or keep the artifact with --gate warn",
        )
    warnings.warn(message, stacklevel=2)


def compared(figures: Mapping[str, Any]) -> str:
    """Both error rates and the loss, in words."""
    low, high = figures["wer_loss_interval"]
    return (
        f"the artifact's word error rate is {100 * figures['artifact_wer']:.2f} %, the "
        f"checkpoint's {100 * figures['checkpoint_wer']:.2f} %: a loss of "
        f"{figures['wer_loss_points']:.2f} points (95 % interval {low:.2f} to {high:.2f}; "
        f"{figures['word_loss']} words)"
    )


def show(heard: Heard) -> str:
    """A clip and what both made of it, in three lines."""
    wanted, found = around_difference(heard.wanted_text, heard.found_text)
    return (
        f"clip:        {heard.clip.audio.name} ({heard.clip.lang}{token_difference(heard)})\n"
        f"checkpoint:  {wanted!r}\n"
        f"artifact:    {found!r}"
    )


def token_difference(heard: Heard) -> str:
    """Where the tokens differ first, if they do."""
    for number, (wanted, found) in enumerate(zip(heard.wanted, heard.found, strict=True), start=1):
        if list(wanted) != list(found):
            place = common(wanted, found)
            one, other = (
                f"{tokens[place]}" if place < len(tokens) else "the end"
                for tokens in (wanted, found)
            )
            window = f" of window {number}" if len(heard.wanted) > 1 else ""
            return f"; token {place + 1}{window}: {one}, artifact {other}"
    return ""


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of what both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def around_difference(one: str, other: str) -> tuple[str, str]:
    """Both texts, cut so that their first difference is seen."""
    start = common(one, other) - SHOWN // 2
    if start <= 0 or max(len(one), len(other)) <= SHOWN:
        return cut(one), cut(other)
    return cut("..." + one[start:]), cut("..." + other[start:])


def cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ------------------------------------------------------------------ again, without the checkpoint


def tokens_record(tokens: Sequence[Windows]) -> dict[str, Any]:
    """What the manifest keeps of an artifact's tokens: a hash of all, and a short one a clip."""
    hashes = [digest(" ".join(map(str, window)) for window in clip) for clip in tokens]
    return {"tokens_hash": digest(hashes), "clip_tokens": [one[:8] for one in hashes]}


def gate_again(
    gate: dict[str, Any], clips: Sequence[Clip], tokens: Sequence[Windows], texts: Sequence[str]
) -> str:
    """What an artifact says now against what its gate recorded of the same clips; a sentence.

    The tokens must be the same. Only where the gate was about words and another processor rounds
    int8 products in another way, other tokens pass as long as the gate's bound on words holds.
    Raises Problem where there is nothing to compare with, GateFailure where it fails.
    """
    check_record(gate, clips)
    now = tokens_record(tokens)
    if now["tokens_hash"] == gate["tokens_hash"]:
        return f"the tokens of all {len(clips)} clips are those of the gate"
    pairs = zip(clips, now["clip_tokens"], gate["clip_tokens"], texts, strict=True)
    other = [(clip, text) for clip, mine, wanted, text in pairs if mine != wanted]
    clip, text = other[0] if other else (clips[0], texts[0])
    now_wrong = errors_of(clips, texts, gate["normalizer"])
    words = [count for _, count in now_wrong]
    lost = loss(list(zip(gate["checkpoint_errors"], words, strict=True)), now_wrong)
    wer = 100 * rate(now_wrong)
    message = f"{len(other)} of {len(clips)} clips get other tokens than at the gate"
    if gate["exact"] or too_much(lost, gate["max_wer_loss_points"]):
        raise GateFailure(
            f"{message}; WER {wer:.2f} %, at the gate {100 * gate['artifact_wer']:.2f} %. The "
            f"first:\nclip:        {clip.audio.name} ({clip.lang})\n"
            f"its text:    {cut(clip.text)!r}\nartifact:    {cut(text)!r}",
            hint="the artifact or its runtime has changed: export it again, or give --checkpoint "
            "to compare with the model itself",
        )
    return f"{message}; WER {wer:.2f} %, within the gate's {gate['max_wer_loss_points']:g} points"


def with_states(figures: dict[str, Any], encoder: Encoder, clips: Sequence[Clip]) -> dict[str, Any]:
    """A gate's figures and what it takes to ask an encoder without a decoder again: some numbers of
    its states of every clip."""
    return figures | {"clip_states": [encoder.some_states(clip.pcm()) for clip in clips]}


def states_again(
    gate: dict[str, Any], clips: Sequence[Clip], states: Sequence[Sequence[float]]
) -> str:
    """As gate_again, of an encoder without a decoder."""
    check_record(gate, clips)
    then, now = np.array(gate.get("clip_states", ())), np.array(states)
    apart = np.abs(now - then).max() if then.shape == now.shape and then.size else np.inf
    if not apart <= SAME_STATES:
        raise GateFailure(
            f"the encoder's states of {len(clips)} clips differ by {apart:.2g} from those at the "
            f"gate, {SAME_STATES:g} is taken for rounding",
            hint="the artifact or its runtime has changed: export it again, or give --checkpoint "
            "to compare with the model itself",
        )
    return f"the encoder's states of all {len(clips)} clips are those of the gate"


SAME_STATES = 0.02
"""Float16 rounds the same states otherwise on another processor."""
RECORDED = {
    "clips_hash": str,
    "tokens_hash": str,
    "clip_tokens": list,
    "normalizer": str,
    "checkpoint_errors": list,
    "artifact_wer": float,
    "max_wer_loss_points": float,
    "exact": bool,
}


def check_record(gate: dict[str, Any], clips: Sequence[Clip]) -> None:
    """Raise Problem where the gate's record lacks something, or is of other clips than these, and
    GateFailure where the artifact did not pass."""
    if gate.get("result") == NOT_RUN:
        raise Problem(
            "the artifact was exported with --gate off, so there is no record to compare with",
            hint="give --checkpoint to run the gate now, or export the checkpoint again",
        )
    if gate.get("result") == FAILED:
        raise GateFailure(
            f"the artifact failed its gate when it was exported (--gate warn): {gate.get('error')}",
            hint="export the checkpoint again, or give --checkpoint to run the gate now",
        )
    for name, kind in RECORDED.items():
        if not isinstance(gate.get(name), (float, int) if kind is float else kind):
            raise Problem(
                f"the gate's record says no {name}, so there is nothing to compare with",
                hint="give --checkpoint to run the gate anew, or export the checkpoint again",
            )
    lists = (gate["clip_tokens"], gate["checkpoint_errors"])
    counted = all(type(n) is int and 0 <= n < 2**31 for n in gate["checkpoint_errors"])
    if gate["clips_hash"] != clips_hash(clips) or {*map(len, lists)} != {len(clips)} or not counted:
        raise Problem(
            f"the gate heard {len(gate['clip_tokens'])} other clips than these {len(clips)} "
            f"(hash {gate['clips_hash'][:12]}, not {clips_hash(clips)[:12]})",
            hint="name with --speech the clips that `edgewhisper export` was given, or give "
            "--checkpoint to run the gate anew on these",
        )


def same_clips(gate: Mapping[str, Any], clips: Sequence[Clip]) -> list[Clip]:
    """The clips that the gate chose of a manifest, where it is the same manifest by its length."""
    chosen = gate.get("clips")
    known = type(chosen) is int and chosen > 0 and gate.get("clips_available") == len(clips)
    return evenly(clips, int(chosen or 0) if known else MOST_CLIPS)


PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
"""What the manifest says of the gate, as its `result`."""
