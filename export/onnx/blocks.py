"""The blocks of a Whisper as ONNX operators: stem, encoder layer, feed-forward, norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from export.onnx.attention import self_attention, shared_attention
from export.onnx.graph import Graph, in_pieces, pieces_of
from export.onnx.layers import gelu, layer_norm, linear, row_scaled_linear, separate_linear, widened
from export.onnx.tables import FactorisedTable, SplitTable, TokenTable, encoder_positions
from export.shrink import outputs_of, windows_of
from export.weights import array, chain, chains, heads_of


def positions_of(model: nn.Module) -> int | str:
    """Return the encoder's positions; a symbol if the model has windows of several lengths."""
    windows = windows_of(model.config)
    return windows[0] if len(windows) == 1 else "positions"


def stem(g: Graph, mel: str, encoder: nn.Module, positions: int | str) -> str:
    """Apply two convolutions and add positions: (1, n_mels, frames) -> (1, frames / 2, d_model)."""
    x = convolutions(g, mel, encoder)
    if isinstance(positions, str):
        length = g.op("Shape", x, start=2, end=3)
    else:  # constant: the runtime computes the positions once, when it loads the graph
        length = g.constant([positions])
    here = encoder_positions(g, array(encoder.embed_positions.weight), length)
    return g.op("Add", g.op("Transpose", x, perm=[0, 2, 1]), here)


def convolutions(g: Graph, mel: str, encoder: nn.Module) -> str:
    """Apply the two convolutions: (1, n_mels, frames) -> (1, d_model, frames / 2)."""
    x = mel
    for conv, stride in ((encoder.conv1, 1), (encoder.conv2, 2)):
        kernel = widened(g, array(conv.weight), g.schemes.get(conv))
        bias = g.constant(array(conv.bias))
        x = gelu(g, g.op("Conv", x, kernel, bias, pads=[1, 1], strides=[stride]))
    return x


def encoder_layer(
    g: Graph, x: str, layer: nn.Module, lengths: Sequence[int], weights: str | None = None
) -> str:
    """Apply one encoder layer to (1, n, d_model), where n is one of `lengths`. Hidden units are
    computed for a part of the positions at a time. `weights` (n,) are added to the attention scores
    of each position."""
    attention = layer.self_attn
    y = norm(g, x, layer.self_attn_layer_norm)
    q, k, v = separate_linear(g, y, chains(g.schemes, attention, "qkv"))
    attend = shared_attention if getattr(attention, "shared", False) else self_attention
    y = attend(g, q, k, v, heads_of(attention), weights)
    x = g.op("Add", x, attention_output(g, y, attention))
    # the runtime would widen weights in 4 bits for each piece, and keep every result
    four = any(in_4_bits(g, module) for module in (layer.fc1, layer.fc2))
    pieces = 1 if four else pieces_of(outputs_of(layer.fc1), lengths)
    return in_pieces(g, x, pieces, lambda piece: feed_forward(g, piece, layer))


def in_4_bits(g: Graph, module: nn.Module) -> bool:
    """Return whether a linear module, or a factor of it, is stored in 4 bits."""
    parts = [module.down, module.up] if hasattr(module, "down") else [module]
    return any(g.scheme(g.schemes.get(part)).bits == 4 for part in parts)


def feed_forward(g: Graph, x: str, layer: nn.Module, few_rows: bool = False) -> str:
    """Apply norm, fc1, GELU and fc2, and add the input."""
    with g.scope("feed_forward"):
        y = norm(g, x, layer.final_layer_norm)
        y = gelu(g, linear(g, y, chain(g.schemes, layer.fc1, layer.embed_dim), few_rows))
        second = chain(g.schemes, layer.fc2, outputs_of(layer.fc1))
        y = linear(g, y, second, few_rows) if few_rows else row_scaled_linear(g, y, second)
        return g.op("Add", x, y)


def norm(g: Graph, x: str, norm: nn.Module) -> str:
    """Apply a LayerNorm module."""
    return layer_norm(g, x, array(norm.weight), array(norm.bias), norm.eps)


def attention_output(g: Graph, x: str, attention: nn.Module, few_rows: bool = False) -> str:
    """Apply the output projection of an attention."""
    heads = heads_of(attention)
    out = chain(g.schemes, attention.out_proj, heads.count * heads.v_dim)
    return linear(g, x, out, few_rows)


def token_table(g: Graph, table: nn.Module) -> TokenTable | SplitTable | FactorisedTable:
    """Return the token table: dense, in two precisions, or factorised."""
    if hasattr(table, "rows"):
        rows, basis = array(table.rows.weight), array(table.up.weight.T)
        return FactorisedTable(g, rows, basis, g.schemes.get(table.rows))
    weight, scheme = array(table.weight), g.schemes.get(table)
    if g.quantises and scheme is not None and scheme.rows_in_8_bits:
        return SplitTable(g, weight, scheme)
    return TokenTable(g, weight, scheme)
