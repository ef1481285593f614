"""The MIL programs of every Core ML layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from export.coreml.blocks import encode
from export.coreml.decoder import decode, decoder_contract, states_spec
from export.coreml.graph import Graph, Var, Work, program
from export.coreml.log_mel import log_mel
from export.coreml.plan import Plan, decoder_limits
from export.manifest import Spec


@dataclass(frozen=True)
class Made:
    """A program, what goes in and what comes out, and what the graph noted of its weights."""

    graph: Graph
    program: Any
    inputs: list[Spec]
    outputs: list[Spec]
    states: list[Spec]


def mel_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """Samples to features."""
    features = _features(model, plan)
    audio = Spec("audio", (features.shape[3] * extractor.hop_length,), plan.dtype)
    g = Graph("fp32", plan.target)

    def work(given: dict[str, Var]) -> list[Var]:
        pcm = g.cast(given["audio"], "float32")
        mel = log_mel(g, pcm, extractor)
        return [g.cast(g.reshape(mel, *features.shape), plan.dtype)]

    return _made(g, [audio], [features], work)


def encoder_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """Features to the encoder's states."""
    features, states = _features(model, plan), states_spec(model, plan)
    g = plan.graph(model)

    def work(given: dict[str, Var]) -> list[Var]:
        x = encode(g, model, plan, given[features.name])
        if not plan.neural_engine:
            x = g.transpose(x, 0, 2, 1)
        return [g.reshape(x, *states.shape)]

    return _made(g, [features], [states], work)


def lone_encoder_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """The same as whisper.cpp hands it over: it copies float32 rows of states."""
    _, mels, _, frames = _features(model, plan).shape
    logmel = Spec("logmel_data", (1, mels, frames), "float32")
    output = Spec("output", (1, plan.positions, model.config.d_model), "float32")
    g = plan.graph(model)

    def work(given: dict[str, Var]) -> list[Var]:
        mel = g.reshape(g.cast(given[logmel.name], plan.dtype), 1, mels, 1, frames)
        x = encode(g, model, plan, mel)
        if plan.neural_engine:
            x = g.transpose(g.op("squeeze", x=x, axes=[2]), 0, 2, 1)
        return [g.cast(x, "float32")]

    return _made(g, [logmel], [output], work)


def decoder_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """A token and the caches to its logits and what is to be written into the caches."""
    g = plan.graph(model)
    g.said += decoder_limits(model, plan)
    inputs, outputs, states = decoder_contract(model, plan)

    def work(given: dict[str, Var]) -> list[Var]:
        return decode(g, model, plan, given)

    return _made(g, inputs, outputs, work, states)


LAYOUTS = {
    "whisperkit": {
        "MelSpectrogram": mel_program,
        "AudioEncoder": encoder_program,
        "TextDecoder": decoder_program,
    },
    "encoder": {"coreml-encoder": lone_encoder_program},
}


def _made(
    g: Graph,
    inputs: list[Spec],
    outputs: list[Spec],
    work: Work,
    states: Sequence[Spec] = (),
) -> Made:
    return Made(g, program(g, inputs, outputs, work, states), inputs, outputs, list(states))


def _features(model: nn.Module, plan: Plan) -> Spec:
    shape = (1, model.config.num_mel_bins, 1, 2 * plan.positions)
    return Spec("melspectrogram_features", shape, plan.dtype)
