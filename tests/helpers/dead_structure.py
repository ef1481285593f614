"""Ways to kill structure in a Whisper: each zeroes some weights of every layer, drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn


def layers(model: nn.Module) -> Iterator[nn.Module]:
    yield from model.model.encoder.layers
    yield from model.model.decoder.layers


def attentions(model: nn.Module) -> Iterator[nn.Module]:
    for layer in layers(model):
        yield layer.self_attn
        if hasattr(layer, "encoder_attn"):
            yield layer.encoder_attn


def some(rng: np.random.Generator, count: int, least: int = 1) -> np.ndarray:
    """A random selection of 0 ... count - 1: at least `least` where there are more, never all."""
    return rng.permutation(count)[: rng.integers(min(least, count - 1), count)]


def fc2_columns(model: nn.Module, rng: np.random.Generator) -> None:
    for layer in layers(model):
        layer.fc2.weight[:, some(rng, layer.fc2.in_features)] = 0


def fc1_rows(model: nn.Module, rng: np.random.Generator) -> None:
    for layer in layers(model):
        layer.fc1.weight[some(rng, layer.fc1.out_features)] = 0


def out_proj_columns(model: nn.Module, rng: np.random.Generator) -> None:
    _channels(model, rng, lambda attention, i: attention.out_proj.weight[:, i].zero_())


def value_rows(model: nn.Module, rng: np.random.Generator) -> None:
    _channels(model, rng, lambda attention, i: attention.v_proj.weight[i].zero_())


def key_rows(model: nn.Module, rng: np.random.Generator) -> None:
    _channels(model, rng, lambda attention, i: attention.k_proj.weight[i].zero_())


def query_rows_and_biases(model: nn.Module, rng: np.random.Generator) -> None:
    def kill_channel(attention: nn.Module, i: int) -> None:
        attention.q_proj.weight[i] = 0
        attention.q_proj.bias[i] = 0

    _channels(model, rng, kill_channel)


def whole_heads(model: nn.Module, rng: np.random.Generator) -> None:
    for attention in attentions(model):
        dim = attention.v_proj.out_features // attention.num_heads
        for head in some(rng, attention.num_heads):
            attention.v_proj.weight[head * dim : (head + 1) * dim] = 0


def input_columns(model: nn.Module, rng: np.random.Generator) -> None:
    for layer in layers(model):
        readers = [layer.fc1]
        for name in ("self_attn", "encoder_attn"):
            attention = getattr(layer, name, None)
            if attention is not None:
                readers += [attention.q_proj, attention.k_proj, attention.v_proj]
        for reader in readers:
            width = reader.in_features
            reader.weight[:, some(rng, width, least=width // 4)] = 0


def all_kinds(model: nn.Module, rng: np.random.Generator) -> None:
    for kill in KINDS.values():
        if kill is not all_kinds:
            kill(model, rng)


KINDS: dict[str, Callable[[nn.Module, np.random.Generator], None]] = {
    "fc2_columns": fc2_columns,
    "fc1_rows": fc1_rows,
    "out_proj_columns": out_proj_columns,
    "value_rows": value_rows,
    "key_rows": key_rows,
    "query_rows_and_biases": query_rows_and_biases,
    "whole_heads": whole_heads,
    "input_columns": input_columns,
    "all_kinds": all_kinds,
}


@torch.no_grad()
def kill(model: nn.Module, kind: str, rng: np.random.Generator) -> nn.Module:
    KINDS[kind](model, rng)
    return model


def _channels(
    model: nn.Module,
    rng: np.random.Generator,
    kill_channel: Callable[[nn.Module, int], object],
) -> None:
    """Kill some channels of every head of every attention, not equally many in each."""
    for attention in attentions(model):
        dim = attention.v_proj.out_features // attention.num_heads
        for head in range(attention.num_heads):
            for channel in some(rng, dim):
                kill_channel(attention, head * dim + int(channel))
