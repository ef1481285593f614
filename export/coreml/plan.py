"""What a Core ML export is asked for, checked, with every open choice decided."""

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
from export.weights import heads_of

SAMPLE_LENGTH = 224
"""Tokens that WhisperKit's DecodingOptions ask for unless told otherwise; caches must hold them."""


@dataclass(frozen=True)
class Plan:
    """What is asked for, with everything that was left open decided."""

    precision: str
    target: str
    positions: int
    """Of the encoder: two mel frames each."""
    room: int
    """Positions in the decoder's caches."""
    stateful: bool
    neural_engine: bool
    alignment: list[list[int]]
    """Of every decoder layer the alignment heads; empty where no word timestamps are wanted."""

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == "fp32" else "float16"

    def graph(self, model: nn.Module) -> Graph:
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
    """Check a request and fill in its defaults; the parameters are those of `export_coreml`.

    Raises Problem for an unknown name and for combinations that Core ML cannot run.
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
            f"the layout 'encoder' is whisper.cpp's, for its own decoder and its one window of "
            f"audio; {' and '.join(given)} cannot be chosen for it",
            hint="leave that out, or export with --layout whisperkit",
        )
    if optional["stateful"] and precision == "fp32":
        raise Problem(
            "Core ML keeps states in float16, and a stateful decoder in fp32 was asked for",
            hint="export with --precision fp16, or without --stateful",
        )


def _target(model: nn.Module, precision: str, asked: str | None, stateful: bool) -> str:
    """The deployment target, or the oldest one that can do what is asked."""
    if asked is not None and asked not in TARGETS:
        raise Problem(
            f"there is no deployment target {asked!r}", hint=f"choose one of: {', '.join(TARGETS)}"
        )
    reasons = []
    if stateful:
        reasons.append("a stateful cache")
    if needs_blocks(precision, schemes(model)):
        whose = "" if precision == "int4" else " (the checkpoint names 4 bits for some layers)"
        reasons.append(f"4-bit weights in blocks{whose}")
    if reasons and asked not in (None, "iOS18"):
        raise Problem(
            f"{' and '.join(reasons)} came with iOS18, and the deployment target {asked} was asked "
            "for",
            hint="export with --deployment-target iOS18, which macOS 15 has too, or for older "
            "systems with --precision pal4 and without --stateful",
        )
    return asked or ("iOS18" if reasons else "iOS16")


def _positions(model: nn.Module, extractor: Any, window: float | None) -> int:
    """Encoder positions of the window that is asked for, in seconds."""
    known = windows_of(model.config)
    if window is None:
        return known[-1]
    position_s = 2 * extractor.hop_length / extractor.sampling_rate
    positions = round(window / position_s)
    if positions not in known:
        raise Problem(
            f"the model has no window of {window:g} s; it was made for "
            f"{' and '.join(f'{n * position_s:g}' for n in known)} s",
            hint="choose one of these; the method `short` teaches a model others",
        )
    return positions


def _room(model: nn.Module, asked: int | None) -> int:
    limit = model.config.max_target_positions
    room = limit if asked is None else asked
    if not 1 <= room <= limit:
        raise Problem(
            f"a cache of {room} tokens was asked for; the model has {limit} positions",
            hint=f"choose from 1 to {limit}",
        )
    return room


def _alignment(model: nn.Module, asked: bool | None) -> list[list[int]]:
    """Of every decoder layer the alignment heads; empty where none are there, or wanted."""
    heads = _heads_there(model)
    if asked and not any(heads):
        raise Problem(
            f"word timestamps come from alignment heads; {_heads_told(model)}",
            hint="set alignment_heads there, or export without --word-timestamps",
        )
    return heads if any(heads) and asked is not False else []


def _heads_named(model: nn.Module) -> list[tuple[int, int]]:
    named = getattr(model.generation_config, "alignment_heads", None) or []
    return sorted({(layer, head) for layer, head in named})


def _heads_there(model: nn.Module) -> list[list[int]]:
    """Of every decoder layer the alignment heads that are named and that it has."""
    counts = [heads_of(layer.encoder_attn).count for layer in model.model.decoder.layers]
    named = _heads_named(model)
    return [[h for n, h in named if n == i and h < count] for i, count in enumerate(counts)]


def _heads_told(model: nn.Module) -> str:
    named, there = len(_heads_named(model)), sum(map(len, _heads_there(model)))
    return f"generation_config.json names {named or 'none'}" + (
        f", of which the model has {there or 'none'}" if named else ""
    )


def decoder_limits(model: nn.Module, plan: Plan) -> list[str]:
    """What whoever runs the decoder must know."""
    said = []
    if plan.room < SAMPLE_LENGTH:
        said.append(
            f"its caches hold {plan.room} tokens, so WhisperKit's DecodingOptions.sampleLength, "
            f"{SAMPLE_LENGTH} by default, must be at most {plan.room}"
        )
    if sum(map(len, _heads_there(model))) < len(_heads_named(model)) or not _heads_named(model):
        kind = "fewer alignment heads" if plan.alignment else "no word timestamps"
        said.append(f"{kind}: {_heads_told(model)}")
    return said


def _schemes(model: nn.Module) -> dict[nn.Module, Scheme]:
    """What the checkpoint asks for; where it names any bits but none for the stem, the stem was
    trained in floats."""
    found, encoder = schemes(model), model.model.encoder
    stem = dict.fromkeys((encoder.conv1, encoder.conv2), Scheme(16)) if found else {}
    return stem | found
