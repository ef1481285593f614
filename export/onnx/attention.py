"""Attention in the ONNX graphs: self-attention, with and without a cache, and cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from export.onnx.graph import FUSED, Graph
from export.weights import Heads

KINDS = ("key", "value")
SPARE = 32
"""Room behind the encoder's keys and values: so many tokens can be decoded in one step."""
CHANNELS = "PER_CHANNEL"


def self_attention(g: Graph, q: str, k: str, v: str, heads: Heads) -> str:
    """Over a whole sequence: q, k (1, n, heads * qk_dim), v (1, n, heads * v_dim)."""
    return g.op("MultiHeadAttention", q, k, v, domain=FUSED, **fused(heads))


def shared_attention(g: Graph, q: str, k: str, v: str, heads: Heads) -> str:
    """One key and one value for all heads: q (1, n, heads * qk_dim), k (1, n, qk_dim), v likewise.

    No fused operator has keys for all heads at once in a width of their own; MatMul spreads them.
    """
    one_head = g.constant([1])
    keys, values = (g.op("Unsqueeze", x, one_head) for x in (k, v))  # (1, 1, n, dim)
    return plain_attention(g, q, keys, values, heads)


def cached_attention(
    g: Graph,
    qkv: Sequence[str],
    cache: Sequence[str],
    present: Sequence[str],
    ends: Sequence[str],
    heads: Heads,
    bias: str = "",
) -> str:
    """Causal attention of s new positions over the cached ones and themselves.

    qkv (1, s, heads * dim) each. `cache` is keys and values (1, heads, room, cache_dim), filled as
    far as `ends` says, and where they are int8 the scales of both, (heads * cache_dim,). Writes
    `present`, the same with s more. A caller that binds one buffer as both has it filled in place.
    """
    room = heads.cache_dim
    dims = heads.qk_dim, heads.qk_dim, heads.qk_dim if bias else heads.v_dim
    q, k, v = (padded(g, x, heads.count, room, dim) for x, dim in zip(qkv, dims, strict=True))
    inputs = [q, k, v, *cache[:2], *ends, "", "", "", bias, "", *cache[2:]]
    while not inputs[-1]:
        inputs.pop()
    int8 = {"kv_cache_bit_width": 8, "k_quant_type": CHANNELS, "v_quant_type": CHANNELS}
    y = g.ops(
        "GroupQueryAttention",
        *inputs,
        outputs=[f"{present[0]}.attention", *present],
        domain=FUSED,
        kv_num_heads=heads.count,
        **(int8 if cache[2:] else {}),
        **fused(heads),
    )[0]
    if heads.v_dim == room:
        return y
    y = g.op("Reshape", y, g.constant([0, 0, heads.count, room]))
    y = g.op("Slice", y, *(g.constant([end]) for end in (0, heads.v_dim, 3)))
    return g.op("Reshape", y, g.constant([0, 0, heads.count * heads.v_dim]))


def cross_attention(
    g: Graph,
    q: str,
    cache: Sequence[str],
    present: Sequence[str],
    ends: Sequence[str],
    heads: Heads,
    bias: str,
) -> str:
    """q (1, s, heads * qk_dim) over the encoder's keys and values, as encoder_cache leaves them.

    The operator puts a key into the cache for every query. There is none to put, so the queries
    stand for them: they fill the spare room behind the encoder's, and `bias` (unseen) hides them.
    """
    return cached_attention(g, [q, q, q], cache, present, ends, heads, bias)


def encoder_cache(g: Graph, x: str, heads: Heads, dim: int) -> list[str]:
    """Keys or values of a whole window, (1, T, heads * dim), as cross_attention reads them.

    (1, heads, T + SPARE, cache_dim); where the graph has an int8 cache, int8, and
    (heads * cache_dim,) scales.
    """
    x = padded(g, x, heads.count, heads.cache_dim, dim)
    scales = []
    if g.int8_cache:
        loudest = g.op("ReduceMax", g.op("Abs", x), g.constant([0, 1]), keepdims=0)
        scale = g.op("Max", g.op("Mul", loudest, g.constant(1 / 127)), g.constant(1e-10))
        # divided beforehand: the operator's own scales along an axis are fifty times as slow
        x = g.op("Mul", x, g.op("Reciprocal", scale))
        x = g.op("QuantizeLinear", x, g.constant(1.0), g.constant(np.array(0, np.int8)))
        scales = [scale]
    x = split_heads(g, x, heads.count, heads.cache_dim)
    return [g.op("Pad", x, g.constant([0, 0, 0, 0, 0, 0, SPARE, 0])), *scales]


def ends(g: Graph, ids: str, length: str) -> tuple[str, str]:
    """How many positions a cache holds after the new ones, less one (1,) and as it is (): what
    cached_attention asks for. ids (1, s) are new, `length` (1,) int32 positions are there."""
    new = g.op("Cast", g.op("Shape", ids, start=1, end=2), to=TensorProto.INT32)
    total = g.op("Add", length, new)
    one, first = g.constant(np.array([1], np.int32)), g.constant([0])
    return g.op("Sub", total, one), g.op("Squeeze", total, first)


def unseen(g: Graph, ids: str, filled: str) -> str:
    """0 for the `filled` (1,) int64 positions of a cache, -1e30 for s behind: (1, 1, s, all)."""
    new = g.op("Shape", ids, start=1, end=2)
    ones = g.constant([1, 1])
    seen = g.op("ConstantOfShape", g.op("Concat", ones, new, filled, axis=0))
    hidden = g.op("Expand", g.constant(-1e30), g.op("Concat", ones, new, new, axis=0))
    return g.op("Concat", seen, hidden, axis=3)


def padded(g: Graph, x: str, heads: int, room: int, dim: int) -> str:
    """(1, n, heads * dim) -> (1, n, heads * room), zeros behind every head's own."""
    if dim == room:
        return x
    x = g.op("Reshape", x, g.constant([0, 0, heads, dim]))
    x = g.op("Pad", x, g.constant([0, 0, 0, 0, 0, 0, 0, room - dim]))
    return g.op("Reshape", x, g.constant([0, 0, heads * room]))


def split_heads(g: Graph, x: str, heads: int, dim: int) -> str:
    """(1, n, heads * dim) -> (1, heads, n, dim)."""
    x = g.op("Reshape", x, g.constant([0, 0, heads, dim]))
    return g.op("Transpose", x, perm=[0, 2, 1, 3])


def plain_attention(g: Graph, q: str, keys: str, values: str, heads: Heads, mask: str = "") -> str:
    """Attention from MatMul and Softmax, for shapes that MultiHeadAttention does not take.

    q (b, s, heads * qk_dim), keys (b, heads or 1, t, qk_dim), values (b, heads or 1, t, v_dim) and
    an additive mask (s, t) -> (b, s, heads * v_dim).
    """
    q = split_heads(g, g.op("Mul", q, g.constant(heads.scale)), heads.count, heads.qk_dim)
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if mask:
        scores = g.op("Add", scores, mask)
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), values)
    mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return g.op("Reshape", mixed, g.constant([0, 0, heads.count * heads.v_dim]))


def fused(heads: Heads) -> dict[str, int | float]:
    """Attributes that the fused attention operators share."""
    return {"num_heads": heads.count, "scale": heads.scale}
