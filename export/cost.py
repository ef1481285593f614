"""Parameters and multiply-accumulates of a Whisper, dense or slim, from its real shapes.

Counted per linear layer as the elements of its weights (two where it is low-rank) for every
position it runs on; attention as heads * (qk_dim + v_dim) for every pair of positions. With T
encoder positions, 2 T mel frames, and one token that sees `context` tokens:

    encoder            T * linear + T^2 * attention + convolution stem (kernel 3, strides 1 and 2)
    cross              T * (k_proj + v_proj) of every cross-attention, once per window
    decoder_per_token  linear + context * attention + T * cross-attention + token table

A token table of V tokens costs V * d_model; one that is a product (V, r) (r, d_model) costs
V * r + 2 * r * d_model, since its rows are multiplied out when tokens are looked up, too.

On whisper-tiny: 10.62 + 6.91 + 0.94 GMAC, 1.77 GMAC, and 13.0 + 19.9 MMAC at 32 tokens.
Biases, LayerNorms, softmax, gathers and the log-mel front end are not counted. Input columns that
a layer does not read are not counted either, though a runtime may multiply them by zero (our ONNX
graphs do wherever that is faster than picking the others). On whisper-small, 10 s of audio cost
0.28 times as much as 30 s in the encoder, and 5 s 0.13 times.
"""

from __future__ import annotations

from torch import nn

from export.shrink import windows_of

LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters, each tensor once: in total, in the tied token table, and the rest.

    Fixed positions count, as they do in Whisper's published sizes; indices of gathers do not.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    table = sum(p.numel() for p in model.model.decoder.embed_tokens.parameters())
    return {"total": total, "token_table": table, "rest": total - table}


def macs_by_window(model: nn.Module, context: int = 32) -> dict[str, dict[str, int]]:
    """Encoder positions of each of the model's windows, in digits for JSON -> its `macs`."""
    return {str(n): macs(model, context, n) for n in windows_of(model.config)}


def macs(
    model: nn.Module, context: int = 32, positions: int | None = None, cached: bool = True
) -> dict[str, int]:
    """Multiply-accumulates of one window and one token, see the module's docstring.

    The window has so many encoder positions; None: it is the full one. Where the keys and values of
    the encoder are not `cached`, every token pays for them, as in our Core ML packages.
    """
    encoder, decoder = model.model.encoder, model.model.decoder
    positions = positions or model.config.max_source_positions
    attend = _cached_cross if cached else _cross
    return {
        "encoder": _stem(encoder, positions)
        + sum(_encoder_layer(layer, positions) for layer in encoder.layers),
        "cross": sum(
            positions * _weights(layer.encoder_attn, ("k_proj", "v_proj"))
            for layer in decoder.layers
            if cached
        ),
        "decoder_per_token": _token_table(decoder.embed_tokens)
        + sum(
            _decoder_layer(layer, context) + attend(layer.encoder_attn, positions)
            for layer in decoder.layers
        ),
    }


def window_macs(counted: dict[str, int], tokens: int = 32) -> int:
    """Of what macs() says: one full window and so many tokens."""
    return counted["encoder"] + counted["cross"] + tokens * counted["decoder_per_token"]


def _token_table(table: nn.Module) -> int:
    if hasattr(table, "rows"):
        return table.rows.weight.numel() + 2 * table.up.weight.numel()
    return table.weight.numel()


def _stem(encoder: nn.Module, positions: int) -> int:
    return 2 * positions * encoder.conv1.weight.numel() + positions * encoder.conv2.weight.numel()


def _encoder_layer(layer: nn.Module, positions: int) -> int:
    linear = _weights(layer.self_attn, LINEARS) + _weights(layer, ("fc1", "fc2"))
    return positions * (linear + positions * _pair(layer.self_attn))


def _decoder_layer(layer: nn.Module, context: int) -> int:
    """Without cross-attention's scores and mixes."""
    linear = _weights(layer.self_attn, LINEARS) + _weights(layer, ("fc1", "fc2"))
    linear += _weights(layer.encoder_attn, ("q_proj", "out_proj"))
    return linear + context * _pair(layer.self_attn)


def _cached_cross(attention: nn.Module, positions: int) -> int:
    """Over keys and values that are there."""
    return positions * _pair(attention)


def _cross(attention: nn.Module, positions: int) -> int:
    """Over the encoder's states: see mil_graph.cross_attention."""
    both = [getattr(attention, name) for name in ("k_proj", "v_proj")]
    read = sum(getattr(linear, "down", linear).weight.shape[1] for linear in both)
    weights = _weights(attention, ("k_proj", "v_proj"))
    return attention.num_heads * (weights + positions * read)


def _pair(attention: nn.Module) -> int:
    """Score and mix of one query and one key, over all heads: heads * (qk_dim + v_dim)."""
    queries = getattr(attention.q_proj, "up", attention.q_proj).weight.shape[0]
    mixed = getattr(attention.out_proj, "down", attention.out_proj).weight.shape[1]
    return queries + mixed


def _weights(module: nn.Module, names: tuple[str, ...]) -> int:
    """Elements of the weight matrices of these linear layers; biases are no products."""
    linears = [getattr(module, name) for name in names]
    return sum(p.numel() for linear in linears for p in linear.parameters() if p.dim() == 2)
