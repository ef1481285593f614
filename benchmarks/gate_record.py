"""Repeat a gate without the checkpoint: compare an artifact with the record in its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gate import (
    FAILED,
    MOST_CLIPS,
    NOT_RUN,
    GateFailure,
    Windows,
    evenly,
    tokens_record,
)
from benchmarks.gate_loss import errors_of, loss, rate, too_much
from benchmarks.metadata import clips_hash
from benchmarks.speech.clips import Clip
from benchmarks.text_difference import cut
from export.problem import Problem

MAX_STATE_ERROR = 0.02
"""Processors round float16 states differently, up to this much."""
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
"""Fields that the record must have, and their types."""
CHANGED = (
    "the artifact or its runtime has changed: export it again, or give --checkpoint to compare "
    "with the model itself"
)


def gate_again(
    gate: dict[str, Any], clips: Sequence[Clip], tokens: Sequence[Windows], texts: Sequence[str]
) -> str:
    """Compare an artifact's tokens and texts with its gate's record; return a sentence.

    The tokens must be equal. If the gate compared words only, other tokens pass while the loss of
    words stays within the gate's bound: processors round int8 products differently.

    Raises Problem if the record cannot be compared, GateFailure if the artifact differs.
    """
    check_record(gate, clips)
    now = tokens_record(tokens)
    if now["tokens_hash"] == gate["tokens_hash"]:
        return f"the tokens of all {len(clips)} clips are those of the gate"
    pairs = zip(clips, now["clip_tokens"], gate["clip_tokens"], texts, strict=True)
    changed = [(clip, text) for clip, mine, recorded, text in pairs if mine != recorded]
    clip, text = changed[0] if changed else (clips[0], texts[0])
    errors = errors_of(clips, texts, gate["normalizer"])
    words = [count for _, count in errors]
    lost = loss(list(zip(gate["checkpoint_errors"], words, strict=True)), errors)
    wer = 100 * rate(errors)
    message = f"{len(changed)} of {len(clips)} clips get other tokens than at the gate"
    if gate["exact"] or too_much(lost, gate["max_wer_loss_points"]):
        raise GateFailure(
            f"{message}; WER {wer:.2f} %, at the gate {100 * gate['artifact_wer']:.2f} %. The "
            f"first:\nclip:        {clip.audio.name} ({clip.lang})\n"
            f"reference:   {cut(clip.text)!r}\nartifact:    {cut(text)!r}",
            hint=CHANGED,
        )
    return f"{message}; WER {wer:.2f} %, within the gate's {gate['max_wer_loss_points']:g} points"


def states_again(
    gate: dict[str, Any], clips: Sequence[Clip], states: Sequence[Sequence[float]]
) -> str:
    """Compare the states of an encoder without a decoder with its gate's record; see gate_again."""
    check_record(gate, clips)
    then, now = np.array(gate.get("clip_states", ())), np.array(states)
    error = np.abs(now - then).max() if then.shape == now.shape and then.size else np.inf
    if not error <= MAX_STATE_ERROR:
        raise GateFailure(
            f"the encoder's states of {len(clips)} clips differ by {error:.2g} from those at the "
            f"gate; rounding explains at most {MAX_STATE_ERROR:g}",
            hint=CHANGED,
        )
    return f"the encoder's states of all {len(clips)} clips are those of the gate"


def check_record(gate: dict[str, Any], clips: Sequence[Clip]) -> None:
    """Raise Problem if the record is incomplete or of other clips, GateFailure if the artifact
    failed its gate."""
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
                f"the gate's record has no valid `{name}`, so there is nothing to compare with",
                hint="give --checkpoint to run the gate again, or export the checkpoint again",
            )
    lists = (gate["clip_tokens"], gate["checkpoint_errors"])
    counted = all(type(n) is int and 0 <= n < 2**31 for n in gate["checkpoint_errors"])
    if gate["clips_hash"] != clips_hash(clips) or {*map(len, lists)} != {len(clips)} or not counted:
        raise Problem(
            f"the gate was run on {len(gate['clip_tokens'])} other clips than these {len(clips)} "
            f"(hash {gate['clips_hash'][:12]}, not {clips_hash(clips)[:12]})",
            hint="name with --speech the clips that `edgewhisper export` was given, or give "
            "--checkpoint to run the gate again on these",
        )


def same_clips(gate: Mapping[str, Any], clips: Sequence[Clip]) -> list[Clip]:
    """Return the clips that the gate chose, if the manifest has as many clips as then."""
    chosen = gate.get("clips")
    known = type(chosen) is int and chosen > 0 and gate.get("clips_available") == len(clips)
    return evenly(clips, int(chosen or 0) if known else MOST_CLIPS)
