"""Attention in the ONNX graphs: self-attention, with and without a cache, and cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from export.onnx.graph import FUSED, Graph
from export.weights import Heads

KINDS = ("key", "value")
SPARE = 32
"""Free positions after the encoder's keys and values; the largest number of tokens in one step."""
CHANNELS = "PER_CHANNEL"


def self_attention(
    g: Graph, q: str, k: str, v: str, heads: Heads, weights: str | None = None
) -> str:
    """Attend over a whole sequence: q, k (1, n, heads * qk_dim), v (1, n, heads * v_dim). `weights`
    (n,) are added to the scores of each position."""
    if weights is not None:
        # as one more dimension of each head: the fastest kernel takes no attention bias
        one = g.op("Unsqueeze", weights, g.constant([0, 2, 3]))  # (1, n, 1, 1)
        k = longer(g, k, g.op("Mul", one, g.constant(1 / heads.scale)), heads)
        q = longer(g, q, g.constant(np.ones((1, 1, 1, 1), np.float32)), heads)
    return g.op("MultiHeadAttention", q, k, v, domain=FUSED, **fused(heads))


def longer(g: Graph, x: str, more: str, heads: Heads) -> str:
    """Append `more` (1, n, 1, 1) to each head of x (1, n, heads * qk_dim)."""
    x = g.op("Reshape", x, g.constant([0, 0, heads.count, heads.qk_dim]))
    like = g.op("Concat", g.op("Shape", x, end=3), g.constant([1]), axis=0)
    x = g.op("Concat", x, g.op("Expand", more, like), axis=3)
    return g.op("Reshape", x, g.constant([0, 0, heads.count * (heads.qk_dim + 1)]))


def shared_attention(
    g: Graph, q: str, k: str, v: str, heads: Heads, weights: str | None = None
) -> str:
    """Attend with one key and one value for all heads: q (1, n, heads * qk_dim), k, v (1, n, dim).
    No fused operator takes one key for all heads with a width of its own; MatMul broadcasts it.
    `weights` (n,) are added to the scores of each position."""
    one_head = g.constant([1])
    keys, values = (g.op("Unsqueeze", x, one_head) for x in (k, v))  # (1, 1, n, dim)
    return plain_attention(g, q, keys, values, heads, weights or "")


def cached_attention(
    g: Graph,
    qkv: Sequence[str],
    cache: Sequence[str],
    present: Sequence[str],
    lengths: Sequence[str],
    heads: Heads,
    bias: str = "",
) -> str:
    """Attend from s new positions to the cached ones and to themselves, causally.

    `qkv` are (1, s, heads * dim) each. `cache` holds keys and values (1, heads, room, cache_dim),
    of which `lengths` are filled, and the scales of both, (heads * cache_dim,), if they are int8.
    The result of writing the new positions is `present`. A caller that binds one buffer as both
    `cache` and `present` has it filled in place.
    """
    room = heads.cache_dim
    dims = heads.qk_dim, heads.qk_dim, heads.qk_dim if bias else heads.v_dim
    q, k, v = (padded(g, x, heads.count, room, dim) for x, dim in zip(qkv, dims, strict=True))
    inputs = [q, k, v, *cache[:2], *lengths, "", "", "", bias, "", *cache[2:]]
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
    lengths: Sequence[str],
    heads: Heads,
    bias: str,
) -> str:
    """Attend from q (1, s, heads * qk_dim) to the encoder's keys and values from `encoder_cache`.

    The operator writes a key into the cache for every query. There are no new keys, so the queries
    are written into the spare positions after the encoder's, and `bias` (from `spare_mask`) hides
    them.
    """
    return cached_attention(g, [q, q, q], cache, present, lengths, heads, bias)


def encoder_cache(g: Graph, x: str, heads: Heads, dim: int) -> list[str]:
    """Return keys or values of a window, (1, T, heads * dim), in the form that cross_attention
    reads. The form is (1, heads, T + SPARE, cache_dim), and for an int8 cache also scales (heads *
    cache_dim,)."""
    x = padded(g, x, heads.count, heads.cache_dim, dim)
    scales = []
    if g.int8_cache:
        largest = g.op("ReduceMax", g.op("Abs", x), g.constant([0, 1]), keepdims=0)
        scale = g.op("Max", g.op("Mul", largest, g.constant(1 / 127)), g.constant(1e-10))
        # scaled first: QuantizeLinear with scales along an axis is fifty times as slow
        x = g.op("Mul", x, g.op("Reciprocal", scale))
        x = g.op("QuantizeLinear", x, g.constant(1.0), g.constant(np.array(0, np.int8)))
        scales = [scale]
    x = split_heads(g, x, heads.count, heads.cache_dim)
    return [g.op("Pad", x, g.constant([0, 0, 0, 0, 0, 0, SPARE, 0])), *scales]


def ends(g: Graph, ids: str, length: str) -> tuple[str, str]:
    """Return the lengths that `cached_attention` needs: positions after this step less one (1,),
    and (). `ids` (1, s) are the new tokens and `length` (1,) int32 the cached positions."""
    new = g.op("Cast", g.op("Shape", ids, start=1, end=2), to=TensorProto.INT32)
    total = g.op("Add", length, new)
    one, first = g.constant(np.array([1], np.int32)), g.constant([0])
    return g.op("Sub", total, one), g.op("Squeeze", total, first)


def spare_mask(g: Graph, ids: str, filled: str, weights: str | None = None) -> str:
    """Return an attention bias (1, 1, s, all): 0 or the `weights` (1, 1, 1, filled) for the
    `filled` (1,) int64 positions, -1e30 after them."""
    new = g.op("Shape", ids, start=1, end=2)
    ones = g.constant([1, 1])
    shape = g.op("Concat", ones, new, filled, axis=0)
    visible = g.op("Expand", weights, shape) if weights else g.op("ConstantOfShape", shape)
    hidden = g.op("Expand", g.constant(-1e30), g.op("Concat", ones, new, new, axis=0))
    return g.op("Concat", visible, hidden, axis=3)


def padded(g: Graph, x: str, heads: int, room: int, dim: int) -> str:
    """Pad every head with zeros: (1, n, heads * dim) -> (1, n, heads * room)."""
    if dim == room:
        return x
    x = g.op("Reshape", x, g.constant([0, 0, heads, dim]))
    x = g.op("Pad", x, g.constant([0, 0, 0, 0, 0, 0, 0, room - dim]))
    return g.op("Reshape", x, g.constant([0, 0, heads * room]))


def split_heads(g: Graph, x: str, heads: int, dim: int) -> str:
    """Reshape (1, n, heads * dim) to (1, heads, n, dim)."""
    x = g.op("Reshape", x, g.constant([0, 0, heads, dim]))
    return g.op("Transpose", x, perm=[0, 2, 1, 3])


def plain_attention(g: Graph, q: str, keys: str, values: str, heads: Heads, mask: str = "") -> str:
    """Attention from MatMul and Softmax, for shapes that MultiHeadAttention does not take. q (b, s,
    heads * qk_dim), keys (b, heads or 1, t, qk_dim), values (b, heads or 1, t, v_dim) and an
    additive mask (s, t) or (t,) -> (b, s, heads * v_dim)."""
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
