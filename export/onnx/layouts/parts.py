"""Parts of Whisper that the layouts have in common.

Encoder blocks, norms, linear layers and the token table are the native graphs' own (to_onnx.py), so
that a faster operator there is one here. What differs is where keys and values come from and go to:
a layout hands `decode` a function for each of the two attentions. All parts take a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import helper
from torch import nn

from export.manifest import Spec
from export.onnx.attention import fused, plain_attention, split_heads
from export.onnx.blocks import (
    attention_output,
    encoder_layer,
    feed_forward,
    norm,
    positions_of,
    stem,
    token_table,
)
from export.onnx.graph import DTYPES, FUSED, Graph
from export.onnx.layers import apart, float_table, linear, parallel
from export.quantise import schemes
from export.shrink import windows_of
from export.weights import Heads, array, chain, chains, heads_of

Own = Callable[[int, list[str], Heads], str]
"""Number of a decoder layer, its q, k and v (b, s, heads * dim) -> values mixed by self-attention,
(b, s, heads * v_dim)."""

Heard = Callable[[int, str, Heads], str]
"""Number of a decoder layer, its q (b, s, heads * qk_dim) -> values mixed by cross-attention."""


def new_graph(model: nn.Module, precision: str) -> Graph:
    return Graph(precision, schemes(model))


def encode(g: Graph, model: nn.Module, mel: str) -> str:
    """Log-mel (b, n_mels, frames) of a window -> the encoder's last states (b, T, d_model)."""
    encoder = model.model.encoder
    x = stem(g, mel, encoder, positions_of(model))
    for layer in encoder.layers:
        x = encoder_layer(g, x, layer, windows_of(model.config))
    return norm(g, x, encoder.layer_norm)


def heard_parts(g: Graph, model: nn.Module, number: int, x: str) -> list[str]:
    """The encoder's states to one decoder layer's keys and values, (b, T, heads * dim) each."""
    return apart(g, x, chains(g.schemes, model.model.decoder.layers[number].encoder_attn, "kv"))


def heard_caches(g: Graph, model: nn.Module, number: int, x: str) -> list[str]:
    """The same in heads, (b, heads, T, dim)."""
    heads = cross_heads(model, number)
    both = zip(heard_parts(g, model, number, x), widths(heads), strict=True)
    return [split_heads(g, part, heads.count, dim) for part, dim in both]


def decode(
    g: Graph, model: nn.Module, ids: str, start: str, own: Own, heard: Heard, last: bool = False
) -> str:
    """ids (b, s) int64 behind `start` (1,) others -> logits (b, s, vocab), or of the last only."""
    decoder = model.model.decoder
    table = token_table(g, decoder.embed_tokens)
    positions = float_table(g, array(decoder.embed_positions.weight))
    end = g.op("Add", start, g.op("Shape", ids, start=1, end=2))
    x = g.op("Add", table.look_up(ids), g.op("Slice", positions, start, end))
    for number, layer in enumerate(decoder.layers):
        y = norm(g, x, layer.self_attn_layer_norm)
        qkv = parallel(g, y, chains(g.schemes, layer.self_attn, "qkv"))
        y = own(number, qkv, heads_of(layer.self_attn))
        x = g.op("Add", x, attention_output(g, y, layer.self_attn))
        y = norm(g, x, layer.encoder_attn_layer_norm)
        q = linear(g, y, chain(g.schemes, layer.encoder_attn.q_proj, layer.embed_dim), gather=True)
        y = heard(number, q, heads_of(layer.encoder_attn))
        x = g.op("Add", x, attention_output(g, y, layer.encoder_attn))
        x = feed_forward(g, x, layer, gather=True)
    if last:
        x = g.op("Slice", x, g.constant([-1]), g.constant([2**31 - 1]), g.constant([1]))
    return table.logits(norm(g, x, decoder.layer_norm))


def own_heads(model: nn.Module, number: int) -> Heads:
    """Of the self-attention of a decoder layer."""
    return heads_of(model.model.decoder.layers[number].self_attn)


def cross_heads(model: nn.Module, number: int) -> Heads:
    return heads_of(model.model.decoder.layers[number].encoder_attn)


def widths(heads: Heads) -> tuple[int, int]:
    """Of one head: its keys' and its values'."""
    return heads.qk_dim, heads.v_dim


def layers_of(model: nn.Module) -> range:
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
    """Causal attention of s new positions over past ones and themselves.

    qkv (b, s, heads * dim) each; past keys and values (b, heads, p, dim), None: there are none.
    Writes `present`, (b, heads, p + s, dim). `start` is p, (1,).
    """
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
    """q (b, s, heads * qk_dim) over keys (b, heads, t, qk_dim) and values (b, heads, t, v_dim).

    The fused operator wants keys and values of one width; others take MatMul and Softmax.
    """
    keys, values = caches
    if heads.qk_dim == heads.v_dim and not mask:
        return g.op("MultiHeadAttention", q, keys, values, domain=FUSED, **fused(heads))
    return plain_attention(g, q, keys, values, heads, mask)


def causal_mask(g: Graph, start: str, new: str) -> str:
    """0 where position start + i may see position j <= start + i, else -inf: (s, start + s), where
    `new` is (b, s, ...)."""
    zero, one = g.constant(0), g.constant(1)
    begin = g.op("Squeeze", start, g.constant([0]))
    stop = g.op("Add", begin, g.op("Squeeze", g.op("Shape", new, start=1, end=2), g.constant([0])))
    queries = g.op("Unsqueeze", g.op("Range", begin, stop, one), g.constant([1]))
    seen = g.op("LessOrEqual", g.op("Range", zero, stop, one), queries)
    return g.op("Where", seen, g.constant(0.0), g.constant(-np.inf))


# ----------------------------------------------------------------------------------- suppression


def forbidden(g: Graph, ids: Sequence[int], vocab: int) -> str:
    """What is added to logits so that these tokens are never chosen: -inf and zeros, (vocab,)."""
    zeros = g.op("ConstantOfShape", g.constant([vocab]))
    if not ids:
        return zeros
    places = g.constant(list(ids))
    return g.op("ScatterElements", zeros, places, g.constant(np.full(len(ids), -np.inf, "f4")))


# ------------------------------------------------------------------------------------- subgraphs


class Branch(Graph):
    """Nodes of a subgraph (of an If, of a Loop). Its constants stand in the graph around it, so
    that branches share them; other values of its own are not to be seen outside."""

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
