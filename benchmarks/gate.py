"""The gate: the finished artifact, in its own runtime, must say what its checkpoint says.

fp32 has to give the same greedy tokens on every window of every clip, and logits that are close.
Other precisions may differ in words, but must not lose more than 0.5 points of word error rate
against the clips' labels. Of a Core ML package every part is held against the checkpoint: log-mel,
encoder states, caches, logits. In fp16 it has to give the same tokens on 98 % of the clips; what
weights of few bits lose is recorded and told.

The manifest keeps what it takes to ask again without the checkpoint: which clips they were, the
artifact's error rate on them, and a hash of its tokens of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.metadata import clips_hash, digest
from benchmarks.normalizers import name_for
from benchmarks.speech import Clip
from benchmarks.stock import Encoder, open_artifact
from benchmarks.wer import score
from devices.runner.audio import split
from devices.runner.check import Hearing
from devices.runner.text import join
from export.problem import Problem

MAX_WER_LOSS = 0.5
"""In points: hundredths of the word error rate."""
PARTS = {
    "mel": "log-mel features",
    "states": "encoder states",
    "key_cache": "keys in the decoder's cache",
    "value_cache": "values in the decoder's cache",
    "logits": "logits",
}
"""What an artifact may show of itself, in the order of computation."""

Tokens = Callable[[np.ndarray], list[int]]
"""pcm (samples,) of one window -> the checkpoint's greedy tokens, without prompt and end."""

Parts = Callable[[np.ndarray, list[int]], dict[str, np.ndarray]]
"""pcm, tokens -> the checkpoint's PARTS by name: its raw logits before each token and after the
last, (n+1, vocab), and others."""


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


class Error(NamedTuple):
    """The largest difference between two arrays, infinite for NaN, and the largest number."""

    size: float
    scale: float


@dataclass(frozen=True)
class Heard:
    """One clip, in both versions."""

    name: str
    label: str
    wanted: list[list[int]]
    """The checkpoint's tokens, one list a window."""
    found: list[list[int]]
    wanted_text: str
    found_text: str
    errors: dict[str, Error]
    """Of each part."""


def run_gate(
    artifact_dir: Path,
    reference: Tokens,
    clips: Sequence[Clip],
    bounds: Bounds,
    parts: Parts | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """The gate's figures, for the manifest. Raises GateFailure.

    `parts` are the checkpoint's; those that the artifact shows of itself are compared.
    """
    return judge(open_artifact(artifact_dir, threads), reference, clips, bounds, parts)


def judge(
    recognizer: Hearing,
    reference: Tokens,
    clips: Sequence[Clip],
    bounds: Bounds,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """The same of an artifact that is open."""
    if not clips:
        raise Problem("the gate got no clips to compare on", hint="give a speech manifest")
    heard = [listen(recognizer, clip, reference, parts) for clip in clips]
    figures = measure(heard, name_for(clips, otherwise="none"))
    check_tokens(heard, bounds.same)
    check_parts(heard, bounds)
    check_loss(figures, heard, bounds)
    figures |= {"exact": bounds.same == 1, "max_wer_loss_points": bounds.wer_loss}
    if not bounds.strict:  # what was told is no reason to fail the artifact later
        figures["max_wer_loss_points"] = max(bounds.wer_loss, figures["wer_loss_points"])
    record = tokens_record([clip.found for clip in heard])
    return figures | {"clips_hash": clips_hash(clips), **record}


def listen(recognizer: Hearing, clip: Clip, reference: Tokens, parts: Parts | None) -> Heard:
    """Both versions of one clip, over the same windows. Parts that a layout does not show, or
    changes by design, are not compared."""
    pcm = clip.pcm()
    windows = [pcm[piece] for piece in split(pcm, recognizer.window_samples)]
    wanted = [reference(window) for window in windows]
    found = [recognizer.window(window) for window in windows]
    errors: dict[str, Error] = {}
    if parts is not None and hasattr(recognizer, "parts"):
        for pcm, tokens in zip(windows, wanted, strict=True):
            for name, error in differences(recognizer.parts(pcm, tokens), parts(pcm, tokens)):
                errors[name] = max(error, errors.get(name, error))
    return Heard(
        name=clip.audio.name,
        label=clip.text,
        wanted=wanted,
        found=found,
        wanted_text=join([recognizer.text(tokens) for tokens in wanted]),
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
    labels = [clip.label for clip in heard]
    errors = {
        name: max(clip.errors[name] for clip in heard).size
        for name in PARTS
        if name in heard[0].errors
    }
    before = score(labels, [clip.wanted_text for clip in heard], normalizer)
    after = score(labels, [clip.found_text for clip in heard], normalizer)
    return {
        "clips": len(heard),
        "windows": sum(len(clip.wanted) for clip in heard),
        "identical_tokens": float(np.mean([clip.wanted == clip.found for clip in heard])),
        "identical_texts": float(np.mean([clip.wanted_text == clip.found_text for clip in heard])),
        "checkpoint_wer": before.wer,
        "artifact_wer": after.wer,
        "wer_loss_points": 100 * (after.wer - before.wer),
        "max_logits_error": errors.get("logits"),
        "normalizer": before.normalizer,
        **({"max_errors": errors} if errors.keys() - {"logits"} else {}),
    }


def check_tokens(heard: Sequence[Heard], least: float) -> None:
    """All tokens must agree on a share of the clips."""
    wrong = [clip for clip in heard if clip.wanted != clip.found]
    if len(heard) - len(wrong) < least * len(heard):
        allowed = f", {least:.0%} must get the same" if least < 1 else ""
        raise GateFailure(
            f"{len(wrong)} of {len(heard)} clips get other tokens from the artifact than from "
            f"the checkpoint{allowed}. {show(wrong[0])}",
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
                    f"allowed is {most:g}. {show(clip)}",
                    hint="the artifact computes something else than the model: report this clip",
                )


def check_loss(figures: dict[str, Any], heard: Sequence[Heard], bounds: Bounds) -> None:
    """The word error rate may rise by so many points."""
    loss = figures["wer_loss_points"]
    if loss <= bounds.wer_loss:
        return
    first = next(clip for clip in heard if clip.wanted_text != clip.found_text)
    letter = (
        f"the artifact's word error rate is {100 * figures['artifact_wer']:.2f} %, the "
        f"checkpoint's {100 * figures['checkpoint_wer']:.2f} %: a loss of {loss:.2f} points, "
        f"allowed are {bounds.wer_loss:g}. {show(first)}"
    )
    if bounds.strict:
        raise GateFailure(
            letter,
            hint="export in fp32 to see whether quantisation is the cause, or train the "
            "checkpoint further",
        )
    warnings.warn(letter, stacklevel=2)


def show(clip: Heard) -> str:
    """A clip and what both made of it."""
    return (
        f"First: {clip.name}, checkpoint says {clip.wanted_text!r} {clip.wanted}, "
        f"artifact says {clip.found_text!r} {clip.found}"
    )


# ------------------------------------------------------------------ again, without the checkpoint

Windows = Sequence[Sequence[int]]
"""The tokens of one clip, a list for each window."""


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
    told = (
        f"{len(other)} of {len(clips)} clips get other tokens than at the gate (first: "
        f"{clip.audio.name}, {clip.text!r}, artifact says {text!r})"
    )
    found = score([clip.text for clip in clips], list(texts), gate["normalizer"]).wer
    loss = 100 * (found - gate["checkpoint_wer"])
    if gate["exact"] or loss > gate["max_wer_loss_points"]:
        raise GateFailure(
            f"{told}; WER {100 * found:.2f} %, at the gate {100 * gate['artifact_wer']:.2f} %",
            hint="the artifact or its runtime has changed: export it again, or give --checkpoint "
            "to compare with the model itself",
        )
    return (
        f"{told}; WER {100 * found:.2f} %, within the gate's {gate['max_wer_loss_points']:g} points"
    )


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
    "checkpoint_wer": float,
    "artifact_wer": float,
    "max_wer_loss_points": float,
    "exact": bool,
}


def check_record(gate: dict[str, Any], clips: Sequence[Clip]) -> None:
    """Raise Problem where the gate's record lacks something, or is of other clips than these."""
    for name, kind in RECORDED.items():
        if not isinstance(gate.get(name), (float, int) if kind is float else kind):
            raise Problem(
                f"the gate's record says no {name}, so there is nothing to compare with",
                hint="give --checkpoint to run the gate anew, or export the checkpoint again",
            )
    if gate["clips_hash"] != clips_hash(clips) or len(gate["clip_tokens"]) != len(clips):
        raise Problem(
            f"the gate heard {len(gate['clip_tokens'])} other clips than these {len(clips)} "
            f"(hash {gate['clips_hash'][:12]}, not {clips_hash(clips)[:12]})",
            hint="name with --speech the clips that `edgewhisper export` was given, or give "
            "--checkpoint to run the gate anew on these",
        )
