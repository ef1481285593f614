"""The gate: the finished artifact, in its own runtime, must say what its checkpoint says.

fp32 has to give the same greedy tokens on every window of every clip, and logits within
LOGITS_TOLERANCE. Other precisions may differ in words, but must not lose more than 0.5 points of
word error rate against the clips' labels.

The manifest keeps what it takes to ask again without the checkpoint: which clips they were, the
artifact's error rate on them, and a hash of its tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.metadata import clips_hash, digest
from benchmarks.normalizers import name_for
from benchmarks.speech import Clip
from benchmarks.stock import open_artifact
from benchmarks.wer import score
from devices.runner.audio import split
from devices.runner.check import Hearing
from devices.runner.text import join
from export.problem import Problem

LOGITS_TOLERANCE = 1e-3
MAX_WER_LOSS = 0.5
"""In points: hundredths of the word error rate."""

Tokens = Callable[[np.ndarray], list[int]]
"""pcm (samples,) of one window -> the checkpoint's greedy tokens, without prompt and end."""

Logits = Callable[[np.ndarray, list[int]], np.ndarray]
"""pcm, tokens -> the checkpoint's raw logits before each token and after the last, (n+1, vocab)."""


class GateFailure(Problem):
    """The artifact does not say what its checkpoint says; the message shows the first clip."""


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
    logits_error: float | None


def run_gate(
    artifact_dir: Path,
    reference: Tokens,
    clips: Sequence[Clip],
    *,
    logits_reference: Logits | None = None,
    max_wer_loss: float = MAX_WER_LOSS,
    exact: bool,
    threads: int | None = None,
) -> dict[str, Any]:
    """The gate's figures, for the manifest. Raises GateFailure.

    `exact` asks for the same tokens and, where `logits_reference` is given, for close logits;
    otherwise the loss of word error rate is bounded.
    """
    if not clips:
        raise Problem("the gate got no clips to compare on", hint="give a speech manifest")
    recognizer = open_artifact(artifact_dir, threads)
    heard = [listen(recognizer, clip, reference, logits_reference) for clip in clips]
    figures = measure(heard, name_for(clips, otherwise="none"))
    figures |= {"exact": exact, "max_wer_loss_points": max_wer_loss}
    figures |= {"clips_hash": clips_hash(clips), **tokens_record([clip.found for clip in heard])}
    if exact:
        check_tokens(heard)
        check_logits(heard)
    else:
        check_loss(figures, heard, max_wer_loss)
    return figures


def listen(
    recognizer: Hearing, clip: Clip, reference: Tokens, logits_reference: Logits | None
) -> Heard:
    """Both versions of one clip, over the same windows. Logits that a layout changes by design are
    not compared."""
    pcm = clip.pcm()
    windows = [pcm[piece] for piece in split(pcm, recognizer.window_samples)]
    wanted = [reference(window) for window in windows]
    found = [recognizer.window(window) for window in windows]
    errors = None
    if logits_reference is not None and hasattr(recognizer, "logits"):
        pairs = zip(windows, wanted, strict=True)
        errors = max(logits_error(recognizer, logits_reference, *pair) for pair in pairs)
    return Heard(
        name=clip.audio.name,
        label=clip.text,
        wanted=wanted,
        found=found,
        wanted_text=join([recognizer.text(tokens) for tokens in wanted]),
        found_text=join([recognizer.text(tokens) for tokens in found]),
        logits_error=errors,
    )


def logits_error(recognizer: Any, reference: Logits, pcm: np.ndarray, tokens: list[int]) -> float:
    """The largest difference of logits along the checkpoint's own tokens; infinite for NaN."""
    difference = np.abs(recognizer.logits(pcm, tokens) - reference(pcm, tokens)).max()
    return float(difference) if np.isfinite(difference) else float("inf")


def measure(heard: Sequence[Heard], normalizer: str = "whisper-basic") -> dict[str, Any]:
    """Shares, error rates (fractions) and the loss between them (points)."""
    labels = [clip.label for clip in heard]
    errors = [clip.logits_error for clip in heard if clip.logits_error is not None]
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
        "max_logits_error": max(errors) if errors else None,
        "normalizer": before.normalizer,
    }


def check_tokens(heard: Sequence[Heard]) -> None:
    """Every token of every clip must agree."""
    wrong = [clip for clip in heard if clip.wanted != clip.found]
    if wrong:
        raise GateFailure(
            f"{len(wrong)} of {len(heard)} clips get other tokens from the artifact than from "
            f"the checkpoint. {show(wrong[0])}",
            hint="the artifact computes something else than the model: export it again; if that "
            "does not help, report this clip",
        )


def check_logits(heard: Sequence[Heard]) -> None:
    """Every logit must be close."""
    for clip in heard:
        if clip.logits_error is not None and clip.logits_error > LOGITS_TOLERANCE:
            raise GateFailure(
                f"the artifact's logits differ by {clip.logits_error:.2g} from the checkpoint's, "
                f"allowed is {LOGITS_TOLERANCE:g}. {show(clip)}",
                hint="the artifact computes something else than the model: report this clip",
            )


def check_loss(figures: dict[str, Any], heard: Sequence[Heard], max_wer_loss: float) -> None:
    """The word error rate may rise by `max_wer_loss` points."""
    loss = figures["wer_loss_points"]
    if loss > max_wer_loss:
        first = next(clip for clip in heard if clip.wanted_text != clip.found_text)
        raise GateFailure(
            f"the artifact's word error rate is {100 * figures['artifact_wer']:.2f} %, the "
            f"checkpoint's {100 * figures['checkpoint_wer']:.2f} %: a loss of {loss:.2f} points, "
            f"allowed are {max_wer_loss:g}. {show(first)}",
            hint="export in fp32 to see whether quantisation is the cause, or train the "
            "checkpoint further",
        )


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
