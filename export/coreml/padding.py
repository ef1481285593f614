"""Zero padding of weights to the sizes that the Neural Engine prefers: multiples of 64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np

from export.coreml.graph import Graph
from export.weights import Floats, Linear

ALIGNED = 64
"""Inner dimensions of channels-first programs are a multiple of this."""


def aligned_dim(heads: int, dim: int) -> int:
    """Return the smallest head width >= dim at which all heads together are aligned."""
    step = ALIGNED // gcd(ALIGNED, heads)
    return -(-dim // step) * step


def more_outputs(layers: Sequence[Linear], dim: int, wide: int) -> list[Linear]:
    """Pad each group of `dim` outputs to `wide`, with outputs that are always zero."""
    *first, last = layers
    weight = _filled(last.weight, dim, wide)
    bias = None if last.bias is None else _filled(last.bias, dim, wide)
    return [*first, replace(last, weight=weight, bias=bias)]


def more_inputs(g: Graph, layers: Sequence[Linear], dim: int, wide: int) -> list[Linear]:
    """Pad each group of `dim` inputs to `wide`, with inputs that are ignored."""
    first, *rest = layers
    several = first.weight.shape[1] > dim
    if several and wide > dim:  # padding after the last group would move no input
        first = _without_blocks(g, first)
    return [replace(first, weight=_filled(first.weight.T, dim, wide).T), *rest]


def aligned(g: Graph, layers: Sequence[Linear]) -> list[Linear]:
    """Return layers that read all inputs, with zero weights for skipped ones, and have aligned
    ranks."""
    first, *rest = layers
    if first.inputs is not None:
        wide = np.zeros((len(first.weight), first.features), np.float32)
        wide[:, first.inputs] = first.weight
        first = replace(_without_blocks(g, first), weight=wide, inputs=None)
    if not rest:
        return [first]
    rank = len(first.weight)
    room = aligned_dim(1, rank)
    return [*more_outputs([first], rank, room), *more_inputs(g, rest, rank, room)]


def _without_blocks(g: Graph, layer: Linear) -> Linear:
    """Store a 4-bit grid of the checkpoint in 8 bits, because padding would split its blocks."""
    if layer.scheme is None or layer.scheme.bits != 4:
        return layer
    g.notes.append(f"{g.place}: int8 instead of 4 bits, because zeros stand between its inputs")
    return replace(layer, scheme=replace(layer.scheme, bits=8))


def _filled(array: Floats, dim: int, wide: int) -> Floats:
    """Pad groups of `dim` rows to groups of `wide` rows with zeros."""
    groups = array.reshape(-1, dim, *array.shape[1:])
    pads = [(0, 0), (0, wide - dim), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(groups, pads).reshape(-1, *array.shape[1:])
