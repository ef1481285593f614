"""Parts of Whisper that the layouts share.

Encoder blocks, norms, linear layers and the token table are those of the native graphs (blocks.py).
Layouts differ in where keys and values come from and go to: each passes `decode` a function for
self-attention and one for cross-attention. All parts accept a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import helper
from torch import nn

from export.manifest import Spec
from export.onnx import blocks
from export.onnx.attention import fused, plain_attention, split_heads
from export.onnx.graph import DTYPES, FUSED, Graph
from export.onnx.layers import float_table, joint_linear, linear, separate_linear
from export.quantise import schemes
from export.shrink import windows_of
from export.weights import Heads, array, chain, chains, heads_of

SelfAttention = Callable[[int, list[str], Heads], str]
"""Number of a decoder layer, its q, k and v (b, s, heads * dim) -> mixed values (b, s, heads *
v_dim)."""

CrossAttention = Callable[[int, str, Heads], str]
"""Number of a decoder layer, its q (b, s, heads * qk_dim) -> mixed values (b, s, heads * v_dim)."""


def new_graph(model: nn.Module, precision: str) -> Graph:
    """Return an empty graph with the model's quantisation schemes."""
    return Graph(precision, schemes(model))


def encode(g: Graph, model: nn.Module, mel: str) -> str:
    """Return the encoder's last states (b, T, d_model) of a log-mel window (b, n_mels, frames)."""
    encoder = model.model.encoder
    x = blocks.stem(g, mel, encoder, blocks.positions_of(model))
    for layer in encoder.layers:
        x = blocks.encoder_layer(g, x, layer, windows_of(model.config))
    return blocks.norm(g, x, encoder.layer_norm)


def cross_projections(g: Graph, model: nn.Module, number: int, x: str) -> list[str]:
    """Return keys and values of one decoder layer, (b, T, heads * dim) each, from the encoder
    states."""
    return separate_linear(
        g, x, chains(g.schemes, model.model.decoder.layers[number].encoder_attn, "kv")
    )


def cross_caches(g: Graph, model: nn.Module, number: int, x: str) -> list[str]:
    """Return keys and values of one decoder layer split into heads, (b, heads, T, dim)."""
    heads = cross_heads(model, number)
    both = zip(cross_projections(g, model, number, x), widths(heads), strict=True)
    return [split_heads(g, part, heads.count, dim) for part, dim in both]


def decode(
    g: Graph,
    model: nn.Module,
    ids: str,
    start: str,
    attend_self: SelfAttention,
    attend_cross: CrossAttention,
    last: bool = False,
) -> str:
    """Return logits (b, s, vocab), or of the last position only, for ids (b, s) int64. `start` (1,)
    is the number of tokens before them."""
    decoder = model.model.decoder
    table = blocks.token_table(g, decoder.embed_tokens)
    positions = float_table(g, array(decoder.embed_positions.weight))
    end = g.op("Add", start, g.op("Shape", ids, start=1, end=2))
    x = g.op("Add", table.look_up(ids), g.op("Slice", positions, start, end))
    for number, layer in enumerate(decoder.layers):
        y = blocks.norm(g, x, layer.self_attn_layer_norm)
        qkv = joint_linear(g, y, chains(g.schemes, layer.self_attn, "qkv"))
        y = attend_self(number, qkv, heads_of(layer.self_attn))
        x = g.op("Add", x, blocks.attention_output(g, y, layer.self_attn, few_rows=True))
        y = blocks.norm(g, x, layer.encoder_attn_layer_norm)
        q = linear(
            g, y, chain(g.schemes, layer.encoder_attn.q_proj, layer.embed_dim), few_rows=True
        )
        y = attend_cross(number, q, heads_of(layer.encoder_attn))
        x = g.op("Add", x, blocks.attention_output(g, y, layer.encoder_attn, few_rows=True))
        x = blocks.feed_forward(g, x, layer, few_rows=True)
    if last:
        x = g.op("Slice", x, g.constant([-1]), g.constant([2**31 - 1]), g.constant([1]))
    return table.logits(blocks.norm(g, x, decoder.layer_norm))


def own_heads(model: nn.Module, number: int) -> Heads:
    """Return the shape of the self-attention of a decoder layer."""
    return heads_of(model.model.decoder.layers[number].self_attn)


def cross_heads(model: nn.Module, number: int) -> Heads:
    """Return the shape of the cross-attention of a decoder layer."""
    return heads_of(model.model.decoder.layers[number].encoder_attn)


def widths(heads: Heads) -> tuple[int, int]:
    """Return the widths of the keys and the values of one head."""
    return heads.qk_dim, heads.v_dim


def layers_of(model: nn.Module) -> range:
    """Return the indices of the decoder layers."""
    return range(len(model.model.decoder.layers))


# ------------------------------------------------------------------------------------- attention


def grown_attention(
    g: Graph,
    qkv: Sequence[str],
    past: Sequence[str] | None,
    present: Sequence[str],
    heads: Heads,
    start: str,
) -> str:
    """Attend from s new positions to past ones and to themselves, causally; write the longer cache.
    qkv are (b, s, heads * dim) each; past keys and values (b, heads, p, dim), or None. `start` (1,)
    is p. Writes `present`, (b, heads, p + s, dim)."""
    q, k, v = qkv
    if past is not None and heads.qk_dim == heads.v_dim:
        return g.ops(
            "MultiHeadAttention",
            *(q, k, v, "", "", "", *past),
            outputs=[f"{present[0]}.attention", *present],
            domain=FUSED,
            unidirectional=1,
            **fused(heads),
        )[0]
    caches = []
    for i, (x, width) in enumerate(zip((k, v), widths(heads), strict=True)):
        old = [] if past is None else [past[i]]
        new = split_heads(g, x, heads.count, width)
        caches += g.ops("Concat", *old, new, outputs=[present[i]], axis=2)
    return attention(g, q, caches, heads, causal_mask(g, start, q))


def attention(g: Graph, q: str, caches: Sequence[str], heads: Heads, mask: str = "") -> str:
    """Attend from q (b, s, heads * qk_dim) to keys (b, heads, t, qk_dim) and values (b, heads, t,
    v_dim). The fused operator needs keys and values of one width; others use MatMul and Softmax."""
    keys, values = caches
    if heads.qk_dim == heads.v_dim and not mask:
        return g.op("MultiHeadAttention", q, keys, values, domain=FUSED, **fused(heads))
    return plain_attention(g, q, keys, values, heads, mask)


def causal_mask(g: Graph, start: str, new: str) -> str:
    """Return a mask (s, start + s): 0 where position start + i attends to j <= start + i, else
    -inf. `new` is (b, s, ...)."""
    zero, one = g.constant(0), g.constant(1)
    begin = g.op("Squeeze", start, g.constant([0]))
    stop = g.op("Add", begin, g.op("Squeeze", g.op("Shape", new, start=1, end=2), g.constant([0])))
    queries = g.op("Unsqueeze", g.op("Range", begin, stop, one), g.constant([1]))
    visible = g.op("LessOrEqual", g.op("Range", zero, stop, one), queries)
    return g.op("Where", visible, g.constant(0.0), g.constant(-np.inf))


# ----------------------------------------------------------------------------------- suppression


def forbidden(g: Graph, ids: Sequence[int], vocab: int) -> str:
    """Return what is added to logits to forbid these tokens, (vocab,): -inf for them, else 0."""
    zeros = g.op("ConstantOfShape", g.constant([vocab]))
    if not ids:
        return zeros
    places = g.constant(list(ids))
    return g.op("ScatterElements", zeros, places, g.constant(np.full(len(ids), -np.inf, "f4")))


# ------------------------------------------------------------------------------------- subgraphs


class Branch(Graph):
    """Nodes of the subgraph of an If or a Loop. Its constants are stored in the enclosing graph, so
    that branches share them. Its other values are not visible outside."""

    def __init__(self, outer: Graph, prefix: str) -> None:
        self.__dict__.update(outer.__dict__)
        self._nodes, self._prefix = [], f"{prefix}/"
        self._quantised = dict(outer._quantised)

    def subgraph(self, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> onnx.GraphProto:
        infos = [
            [helper.make_tensor_value_info(s.name, DTYPES[s.dtype], s.shape) for s in specs]
            for specs in (inputs, outputs)
        ]
        return helper.make_graph(self._nodes, self._prefix.rstrip("/"), *infos)
