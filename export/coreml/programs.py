"""The MIL programs of every Core ML layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from export.coreml.blocks import encode
from export.coreml.decoder import decode, decoder_contract, states_spec
from export.coreml.graph import Build, Graph, Var, program
from export.coreml.log_mel import log_mel
from export.coreml.plan import Plan, decoder_limits
from export.manifest import Spec


@dataclass(frozen=True)
class BuiltProgram:
    """A program with its inputs, outputs and states, and the graph that recorded its weights."""

    graph: Graph
    program: Any
    inputs: list[Spec]
    outputs: list[Spec]
    states: list[Spec]


def mel_program(model: nn.Module, extractor: Any, plan: Plan) -> BuiltProgram:
    """Build the program from samples to features."""
    features = _features(model, plan)
    audio = Spec("audio", (features.shape[3] * extractor.hop_length,), plan.dtype)
    g = Graph("fp32", plan.target)

    def build(given: dict[str, Var]) -> list[Var]:
        pcm = g.cast(given["audio"], "float32")
        mel = log_mel(g, pcm, extractor)
        return [g.cast(g.reshape(mel, *features.shape), plan.dtype)]

    return _build(g, [audio], [features], build)


def encoder_program(model: nn.Module, extractor: Any, plan: Plan) -> BuiltProgram:
    """Build the program from features to the encoder's states."""
    features, states = _features(model, plan), states_spec(model, plan)
    g = plan.graph(model)

    def build(given: dict[str, Var]) -> list[Var]:
        x = encode(g, model, plan, given[features.name])
        if not plan.neural_engine:
            x = g.transpose(x, 0, 2, 1)
        return [g.reshape(x, *states.shape)]

    return _build(g, [features], [states], build)


def lone_encoder_program(model: nn.Module, extractor: Any, plan: Plan) -> BuiltProgram:
    """Build the encoder for whisper.cpp, which copies float32 rows of states."""
    _, mels, _, frames = _features(model, plan).shape
    logmel = Spec("logmel_data", (1, mels, frames), "float32")
    output = Spec("output", (1, plan.positions, model.config.d_model), "float32")
    g = plan.graph(model)

    def build(given: dict[str, Var]) -> list[Var]:
        mel = g.reshape(g.cast(given[logmel.name], plan.dtype), 1, mels, 1, frames)
        x = encode(g, model, plan, mel)
        if plan.neural_engine:
            x = g.transpose(g.op("squeeze", x=x, axes=[2]), 0, 2, 1)
        return [g.cast(x, "float32")]

    return _build(g, [logmel], [output], build)


def decoder_program(model: nn.Module, extractor: Any, plan: Plan) -> BuiltProgram:
    """Build the program from a token and the caches to its logits and the cache updates."""
    g = plan.graph(model)
    g.notes += decoder_limits(model, plan)
    inputs, outputs, states = decoder_contract(model, plan)

    def build(given: dict[str, Var]) -> list[Var]:
        return decode(g, model, plan, given)

    return _build(g, inputs, outputs, build, states)


PROGRAMS = {
    "whisperkit": {
        "MelSpectrogram": mel_program,
        "AudioEncoder": encoder_program,
        "TextDecoder": decoder_program,
    },
    "encoder": {"coreml-encoder": lone_encoder_program},
}
"""Layout -> package name -> the function that builds its program."""


def _build(
    g: Graph,
    inputs: list[Spec],
    outputs: list[Spec],
    build: Build,
    states: Sequence[Spec] = (),
) -> BuiltProgram:
    return BuiltProgram(
        g, program(g, inputs, outputs, build, states), inputs, outputs, list(states)
    )


def _features(model: nn.Module, plan: Plan) -> Spec:
    shape = (1, model.config.num_mel_bins, 1, 2 * plan.positions)
    return Spec("melspectrogram_features", shape, plan.dtype)
