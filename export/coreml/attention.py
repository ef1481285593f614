"""Attention in the Core ML programs, in both arrangements of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from export.coreml.graph import Graph, Var
from export.coreml.layers import _picked, linear, stored
from export.weights import Floats, Heads, Linear


def self_attention(g: Graph, q: Var, k: Var, v: Var, heads: Heads) -> Var:
    """Attend over a whole sequence; q is already scaled. The widths are heads * qk_dim for q and k
    and heads * v_dim for v; if k and v are shared by all heads, they have the width of one head."""
    if g.channels_first:
        return _head_by_head(g, q, k, v, heads)
    q, k, v = (
        _in_heads(g, x, dim) for x, dim in ((q, heads.qk_dim), (k, heads.qk_dim), (v, heads.v_dim))
    )
    weights = g.softmax(g.matmul(q, k, transpose_y=True), -1)
    mixed = g.transpose(g.matmul(weights, v), 0, 2, 1, 3)  # (1, n, heads, v_dim)
    return g.reshape(mixed, 1, mixed.shape[1], heads.count * heads.v_dim)


def cached_attention(g: Graph, q: Var, keys: Var, values: Var, mask: Var, heads: Heads) -> Var:
    """Attend from one position; q is already scaled. `keys` are (1, heads * qk_dim, 1, room),
    `values` alike, and `mask` (1, room) is 0 or very negative."""
    room = keys.shape[3]
    if g.channels_first:
        return _head_by_head(g, q, keys, values, heads, g.reshape(mask, 1, room, 1, 1))
    q = g.reshape(q, 1, heads.count, 1, heads.qk_dim)
    keys = g.reshape(keys, 1, heads.count, heads.qk_dim, room)
    values = g.reshape(values, 1, heads.count, heads.v_dim, room)
    weights = g.softmax(g.add(g.matmul(q, keys), g.reshape(mask, 1, 1, 1, room)), -1)
    return g.reshape(g.matmul(weights, values, transpose_y=True), 1, 1, heads.count * heads.v_dim)


def cross_attention(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    """Attend from one position to the encoder's `states` (1, d_model, 1, positions); q is already
    scaled.

    Returns the mixed values, of width heads * v_dim, and the attention weights: (1, heads,
    positions), or channels first (1, positions, 1, heads). Keys and values of the positions are
    never computed. With W_k and W_v the rows of one head, X the states as columns, and p the
    attention weights of the head,

        scores = q^T (W_k X)   = (W_k^T q)^T X
        mixed  = (W_v X) p + b = W_v (X p) + b

    because p sums to one. A bias of the keys would add the same to all scores, which a softmax
    ignores. The right-hand sides take heads * d_model * (d_model + positions) products each, the
    left-hand sides d_model**2 * positions for every token: thirty to fifty times as many at
    Whisper's sizes. In float16 both have the same error (tested on states with channels 200 times
    as large as others). Masks of ones and zeros separate the heads, so that W_k and W_v are not
    split.
    """
    attend = _cross_channels_first if g.channels_first else _cross_plain
    *first, last = value
    mixed, weights = attend(g, q, states, key, [*first, replace(last, bias=None)], heads)
    if last.bias is None:
        return mixed, weights
    bias = last.bias[:, None, None] if g.channels_first else last.bias
    return g.add(mixed, bias), weights


def mean_weights(g: Graph, weights: Sequence[Var], chosen: Sequence[Sequence[int]]) -> Var:
    """Return the mean of the cross-attention weights over chosen heads of each layer: (1,
    positions)."""
    axis, parts = (3 if g.channels_first else 1), []
    for value, heads in zip(weights, chosen, strict=True):
        if heads:
            mask = np.zeros(value.shape[axis], np.float32)
            mask[list(heads)] = 1
            parts.append(g.sum(g.mul(value, mask if axis == 3 else mask[:, None]), axis))
    total = parts[0]
    for more in parts[1:]:
        total = g.add(total, more)
    mean = g.mul(total, 1 / sum(map(len, chosen)))
    return g.reshape(mean, 1, int(np.prod(mean.shape)))


def updated_cache(g: Graph, cache: Var, new: Var, here: Var) -> Var:
    """Return cache (1, width, 1, room) with `new` (1, width, 1, 1) where `here` (1, 1, 1, room) is
    1."""
    kept = g.mul(cache, g.op("sub", x=g.constant(1.0), y=here))
    return g.add(kept, g.mul(new, here))


def _in_heads(g: Graph, x: Var, dim: int) -> Var:
    """Reshape (1, n, heads * dim) to (1, heads, n, dim)."""
    _, n, width = x.shape
    return g.transpose(g.reshape(x, 1, n, width // dim, dim), 0, 2, 1, 3)


def _head_by_head(
    g: Graph, q: Var, keys: Var, values: Var, heads: Heads, mask: Var | None = None
) -> Var:
    """Attend head by head: q (1, width, 1, n), keys, values (1, width, 1, m), mask (1, m, 1, 1)."""

    def parts(x: Var, dim: int, axis: int) -> list[Var]:
        cut = g.split(x, [dim] * (x.shape[axis] // dim), axis)
        return cut if len(cut) == heads.count else cut * heads.count

    turned = g.transpose(keys, 0, 3, 2, 1)  # (1, m, 1, width)
    mixed = []
    for query, key, value in zip(
        parts(q, heads.qk_dim, 1),
        parts(turned, heads.qk_dim, 3),
        parts(values, heads.v_dim, 1),
        strict=True,
    ):
        scores = g.einsum(key, query)  # (1, m, 1, n)
        weights = g.softmax(scores if mask is None else g.add(scores, mask), 1)
        mixed.append(g.einsum(value, weights))
    return g.concat(mixed, 1)


def _cross_plain(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    states = g.op("squeeze", x=states, axes=[2])
    q = g.mul(q, _own_channels(heads.count, heads.qk_dim)[None])
    for layer in reversed(key):  # (1, heads, heads * qk_dim) -> (1, heads, d_model)
        q = g.matmul(q, stored(g, layer.weight, layer.scheme))
    weights = g.softmax(g.matmul(q, _picked(g, states, key[0], 1)), -1)
    mixed = g.matmul(weights, _picked(g, states, value[0], 1), transpose_y=True)
    mixed = linear(g, mixed, [replace(layer, inputs=None) for layer in value])
    own = g.mul(mixed, _own_channels(heads.count, heads.v_dim)[None])
    return g.sum(own, 1), weights


def _cross_channels_first(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    q = g.mul(q, _own_channels(heads.count, heads.qk_dim).T[None, :, None])
    for layer in reversed(key):  # (1, heads * qk_dim, 1, heads) -> (1, d_model, 1, heads)
        kernel = stored(g, layer.weight[:, :, None, None], layer.scheme, transposed=True)
        q = g.op("conv", x=q, weight=kernel)
    weights = g.softmax(g.einsum(g.transpose(states, 0, 3, 2, 1), q), 1)
    mixed = linear(g, g.einsum(states, weights), value)  # (1, heads * v_dim, 1, heads)
    own = g.mul(mixed, _own_channels(heads.count, heads.v_dim).T[None, :, None])
    return g.sum(own, 3), weights


def _own_channels(heads: int, dim: int) -> Floats:
    """Return ones for the channels of each head and zeros elsewhere, (heads, heads * dim)."""
    return np.eye(heads, dtype=np.float32).repeat(dim, axis=1)
