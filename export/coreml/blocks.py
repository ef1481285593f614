"""The encoder of a Whisper as MIL operators, and the parts that its decoder shares."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from export.coreml.attention import self_attention
from export.coreml.graph import Graph, Var
from export.coreml.layers import conv, gelu, layer_norm, linear
from export.coreml.padding import aligned, aligned_dim, more_inputs, more_outputs
from export.coreml.plan import Plan
from export.coreml.tables import FactorisedTable, TokenTable
from export.shrink import outputs_of
from export.weights import Heads, Linear, array, chain, chains, heads_of, scaled

Table = TokenTable | FactorisedTable


@dataclass(frozen=True)
class Attention:
    """The linear layers of an attention as the graph stores them; the scale is part of q."""

    q: list[Linear]
    k: list[Linear]
    v: list[Linear]
    out: list[Linear]
    heads: Heads


def encode(g: Graph, model: nn.Module, plan: Plan, mel: Var) -> Var:
    """Encode features (1, n_mels, 1, frames) into states in the graph's arrangement."""
    encoder = model.model.encoder
    with g.scope("stem"):
        x = _stem(g, mel, encoder, plan.positions)
    for i, layer in enumerate(encoder.layers):
        with g.scope(f"layers_{i}"):
            x = _encoder_layer(g, x, layer)
    with g.scope("layer_norm"):
        return norm(g, x, encoder.layer_norm)


def _stem(g: Graph, x: Var, encoder: nn.Module, positions: int) -> Var:
    """Apply two convolutions and add positions."""
    if not g.channels_first:
        x = g.op("squeeze", x=x, axes=[2])
    for module, stride in ((encoder.conv1, 1), (encoder.conv2, 2)):
        kernel, bias = array(module.weight), array(module.bias)
        x = gelu(g, conv(g, x, kernel, bias, stride, g.schemes.get(module)))
    table = array(encoder.embed_positions.weight)[:positions]
    if g.channels_first:
        return g.add(x, table.T[None, :, None])
    return g.add(g.transpose(x, 0, 2, 1), table[None])


def _encoder_layer(g: Graph, x: Var, layer: nn.Module) -> Var:
    attention = linears_of(g, layer.self_attn)
    y = norm(g, x, layer.self_attn_layer_norm)
    q, k, v = (linear(g, y, part) for part in (attention.q, attention.k, attention.v))
    y = self_attention(g, q, k, v, attention.heads)
    x = g.add(x, linear(g, y, attention.out))
    return feed_forward(g, x, layer)


def token_table(g: Graph, table: nn.Module) -> Table:
    if hasattr(table, "rows"):
        rows, basis = array(table.rows.weight), array(table.up.weight.T)
        return FactorisedTable(g, rows, basis, g.schemes.get(table.rows))
    scheme = g.schemes.get(table)
    # Core ML programs have no factors of columns, and one precision for a table
    if scheme is not None and (scheme.columns or scheme.rows_in_8_bits):
        scheme = None
    return TokenTable(g, array(table.weight), scheme)


def linears_of(g: Graph, attention: nn.Module, cached: bool = False) -> Attention:
    was, now = heads_of(attention), padded_heads(attention, g.channels_first, cached)
    q, k, v = chains(g.schemes, attention, "qkv")
    out = chain(g.schemes, attention.out_proj, was.count * was.v_dim)
    q = scaled(q, was.scale)
    if g.channels_first:
        q, k, v, out = (aligned(g, part) for part in (q, k, v, out))
        q, k = (more_outputs(part, was.qk_dim, now.qk_dim) for part in (q, k))
        v = more_outputs(v, was.v_dim, now.v_dim)
        out = more_inputs(g, out, was.v_dim, now.v_dim)
    return Attention(q, k, v, out, now)


def padded_heads(attention: nn.Module, aligned: bool, cached: bool = False) -> Heads:
    """Return the heads, padded if they have to be aligned; cached keys and values get one width."""
    heads = heads_of(attention)
    if not aligned:
        return heads
    dims = heads.qk_dim, heads.v_dim
    qk, v = (max(dims), max(dims)) if cached else dims
    wide = (aligned_dim(heads.count, dim) for dim in (qk, v))
    return replace(heads, **dict(zip(("qk_dim", "v_dim"), wide, strict=True)))


def feed_forward(g: Graph, x: Var, layer: nn.Module) -> Var:
    width = outputs_of(layer.fc1)
    fc1, fc2 = chain(g.schemes, layer.fc1, layer.embed_dim), chain(g.schemes, layer.fc2, width)
    with g.scope("feed_forward"):
        if g.channels_first:
            room = aligned_dim(1, width)
            fc1 = more_outputs(aligned(g, fc1), width, room)
            fc2 = more_inputs(g, aligned(g, fc2), width, room)
        y = gelu(g, linear(g, norm(g, x, layer.final_layer_norm), fc1))
        return g.add(x, linear(g, y, fc2))


def norm(g: Graph, x: Var, norm: nn.Module) -> Var:
    return layer_norm(g, x, array(norm.weight), array(norm.bias), norm.eps)
