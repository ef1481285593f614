"""Check what a Core ML export is asked for and decide everything left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from export import layouts
from export.checks import check_choice
from export.coreml.graph import TARGETS, Graph
from export.coreml.weights import needs_blocks
from export.problem import Problem
from export.quantise import Scheme, schemes
from export.shrink import windows_of
from export.weights import alignment_heads

SAMPLE_LENGTH = 224
"""Default of WhisperKit's DecodingOptions.sampleLength, in tokens; caches must hold as many."""


@dataclass(frozen=True)
class Plan:
    """A checked request in which every default is filled in."""

    precision: str
    target: str
    positions: int
    """Encoder positions, of two mel frames each."""
    room: int
    """Positions in the decoder's caches."""
    stateful: bool
    neural_engine: bool
    alignment: list[list[int]]
    """The alignment heads of every decoder layer; empty without word timestamps."""

    @property
    def dtype(self) -> str:
        """The type of floats in inputs and outputs."""
        return "float32" if self.precision == "fp32" else "float16"

    def graph(self, model: nn.Module) -> Graph:
        """Return an empty graph for the model."""
        return Graph(self.precision, self.target, _schemes(model), self.neural_engine)


def make_plan(
    model: nn.Module,
    extractor: Any,
    precision: str,
    layout: str,
    *,
    deployment_target: str | None = None,
    stateful: bool = False,
    word_timestamps: bool | None = None,
    neural_engine: bool = False,
    window: float | None = None,
    max_tokens: int | None = None,
) -> Plan:
    """Check a request and fill in its defaults.

    `deployment_target` defaults to the oldest that supports the request, `word_timestamps` to
    whether the model has alignment heads, `window` (in seconds) to the model's longest, and
    `max_tokens` to all positions of the decoder. Raises Problem for an unknown name and for a
    request that Core ML or the layout does not support.
    """
    optional = {
        "stateful": stateful,
        "word_timestamps": word_timestamps,
        "max_tokens": max_tokens,
        "window": window,
    }
    _check_request(precision, layout, optional)
    return Plan(
        precision,
        _target(model, precision, deployment_target, stateful),
        _positions(model, extractor, window),
        _room(model, max_tokens),
        stateful,
        neural_engine,
        _alignment(model, word_timestamps),
    )


def _check_request(precision: str, layout: str, optional: dict[str, Any]) -> None:
    check_choice("precision", precision, layouts.TARGETS["coreml"].precisions, "Core ML")
    check_choice("layout", layout, layouts.layouts_of("coreml"), "Core ML")
    given = [name for name, value in optional.items() if value]
    if layout == "encoder" and given:
        raise Problem(
            f"layout 'encoder' does not support {' and '.join(given)}: whisper.cpp has its own "
            "decoder and one window",
            hint="remove the option, or export with --layout whisperkit",
        )
    if optional["stateful"] and precision == "fp32":
        raise Problem(
            "a stateful decoder in fp32 is impossible: Core ML stores states as float16",
            hint="export with --precision fp16, or without --stateful",
        )


def _target(model: nn.Module, precision: str, requested: str | None, stateful: bool) -> str:
    """Return the deployment target; by default the oldest that supports the request."""
    if requested is not None and requested not in TARGETS:
        raise Problem(
            f"unknown deployment target {requested!r}", hint=f"choose one of: {', '.join(TARGETS)}"
        )
    reasons = []
    if stateful:
        reasons.append("a stateful cache")
    if needs_blocks(precision, schemes(model)):
        whose = "" if precision == "int4" else " (the checkpoint names 4 bits for some layers)"
        reasons.append(f"4-bit weights in blocks{whose}")
    if reasons and requested not in (None, "iOS18"):
        raise Problem(
            f"deployment target {requested} does not support {' and '.join(reasons)}, new in iOS18",
            hint="export with --deployment-target iOS18 (macOS 15), or for older systems with "
            "--precision pal4 and without --stateful",
        )
    return requested or ("iOS18" if reasons else "iOS16")


def _positions(model: nn.Module, extractor: Any, window: float | None) -> int:
    """Return the encoder positions of the requested window in seconds."""
    known = windows_of(model.config)
    if window is None:
        return known[-1]
    position_s = 2 * extractor.hop_length / extractor.sampling_rate
    positions = round(window / position_s)
    if positions not in known:
        raise Problem(
            f"the model has no window of {window:g} s; it was made for "
            f"{' and '.join(f'{n * position_s:g}' for n in known)} s",
            hint="choose one of these; the method `short` trains a model for others",
        )
    return positions


def _room(model: nn.Module, requested: int | None) -> int:
    limit = model.config.max_target_positions
    room = limit if requested is None else requested
    if not 1 <= room <= limit:
        raise Problem(
            f"max_tokens {room}: the model has {limit} decoder positions",
            hint=f"choose from 1 to {limit}",
        )
    return room


def _alignment(model: nn.Module, requested: bool | None) -> list[list[int]]:
    """Return the alignment heads of every decoder layer; empty if there are none or not
    requested."""
    heads = alignment_heads(model)
    if requested and not any(heads):
        raise Problem(
            f"word timestamps need alignment heads; {_heads_summary(model)}",
            hint="set alignment_heads there, or export without --word-timestamps",
        )
    return heads if any(heads) and requested is not False else []


def _named_heads(model: nn.Module) -> list[tuple[int, int]]:
    named = getattr(model.generation_config, "alignment_heads", None) or []
    return sorted({(layer, head) for layer, head in named})


def _heads_summary(model: nn.Module) -> str:
    named, existing = len(_named_heads(model)), sum(map(len, alignment_heads(model)))
    return f"generation_config.json names {named or 'none'}" + (
        f", of which the model has {existing or 'none'}" if named else ""
    )


def decoder_limits(model: nn.Module, plan: Plan) -> list[str]:
    """Return what a program that runs the decoder needs to know."""
    limits = []
    if plan.room < SAMPLE_LENGTH:
        limits.append(
            f"its caches hold {plan.room} tokens, so WhisperKit's DecodingOptions.sampleLength, "
            f"{SAMPLE_LENGTH} by default, must be at most {plan.room}"
        )
    if sum(map(len, alignment_heads(model))) < len(_named_heads(model)) or not _named_heads(model):
        kind = "fewer alignment heads" if plan.alignment else "no word timestamps"
        limits.append(f"{kind}: {_heads_summary(model)}")
    return limits


def _schemes(model: nn.Module) -> dict[nn.Module, Scheme]:
    """Return how the checkpoint stores its weights. If it names any bits but none for the stem, the
    stem was trained in floats and becomes float16."""
    named, encoder = schemes(model), model.model.encoder
    stem = dict.fromkeys((encoder.conv1, encoder.conv2), Scheme(16)) if named else {}
    return stem | named
