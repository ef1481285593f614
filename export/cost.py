"""Parameters and multiply-accumulates (MACs) of a Whisper model, dense or slim, from its shapes.

A linear layer costs the elements of its weights (of both factors if it is low-rank) at every
position it runs on. Attention costs heads * (qk_dim + v_dim) for every pair of positions. With T
encoder positions, 2 T mel frames, and one token that attends to `context` tokens:

    encoder            T * linear + T^2 * attention + convolution stem (kernel 3, strides 1 and 2)
    cross              T * (k_proj + v_proj) of every cross-attention, once per window
    decoder_per_token  linear + context * attention + T * cross-attention + token table

A token table of V tokens costs V * d_model. A factorised table (V, r) (r, d_model) costs V * r + 2
* r * d_model, because look-ups multiply its rows with the basis too.

For whisper-tiny, `encoder` is 10.62 + 6.91 + 0.94 GMAC, `cross` 1.77 GMAC, and `decoder_per_token`
13.0 + 19.9 MMAC at 32 tokens. Biases, LayerNorms, softmax, gathers and the log-mel front end are
not counted. Input columns that a layer skips are not counted either, although the ONNX graphs
multiply them by zero where that is faster than gathering the others. For whisper-small, the encoder
costs 0.28 times as much for 10 s of audio as for 30 s, and 0.13 times for 5 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from export.shrink import ATTENTIONS, layer_shapes, windows_of

STORED_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.53125}
"""Bytes of a stored weight; in 4 bits including a scale of 8 bits for every 32."""
OTHER_BYTES = {"fp32": 4, "fp16": 2, "int8": 2, "int4": 2}
"""Bytes of a weight of the convolutions and of the decoder's positions."""
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters in total, in the tied token table, and in the rest. Each
    tensor counts once. Fixed positions count, as in Whisper's published sizes; gather indices do
    not."""
    total = sum(parameter.numel() for parameter in model.parameters())
    table = sum(p.numel() for p in model.model.decoder.embed_tokens.parameters())
    return {"total": total, "token_table": table, "rest": total - table}


def macs_by_window(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the `macs` of each of the model's windows, by encoder positions (as JSON keys)."""
    return {str(n): macs(model, positions=n) for n in windows_of(model.config)}


def macs(
    model: nn.Module, context: int = 32, positions: int | None = None, cached: bool = True
) -> dict[str, int]:
    """Return the MACs of one window and of one token; see the module's docstring. `positions` is
    the number of encoder positions, by default those of the full window. Without `cached`, every
    token pays for the encoder's keys and values, as in the Core ML packages."""
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


def artifact_bytes(model: nn.Module, precision: str) -> float:
    """Return the predicted bytes of the weights of a native artifact."""
    encoder, decoder = model.model.encoder, model.model.decoder
    convolutions = encoder.conv1.weight.numel() + encoder.conv2.weight.numel()
    table = list(decoder.embed_tokens.parameters())
    shapes, width = layer_shapes(model), model.config.d_model
    return (
        OTHER_BYTES[precision] * (convolutions + decoder.embed_positions.weight.numel())
        + sum(matrix_bytes(p.shape[0], p.shape[1], precision) for p in table)
        + sum(layer_bytes(e, width, precision) for s in ATTENTIONS for e in shapes[s])
    )


def layer_bytes(layer: Mapping[str, Any], width: int, precision: str) -> float:
    """Return the bytes of a layer's matrices, given its entry of `layer_shapes`."""
    ranks, total = layer.get("ranks") or {}, 0.0
    for name, outputs, inputs in _matrices(layer, width):
        rank = ranks.get(name)
        pairs = [(outputs, inputs)] if rank is None else [(outputs, rank), (rank, inputs)]
        total += sum(matrix_bytes(rows, columns, precision) for rows, columns in pairs)
    return total


def matrix_bytes(outputs: int, inputs: int, precision: str) -> float:
    """Return the bytes of a matrix with a scale and a bias for each output."""
    return STORED_BYTES[precision] * outputs * inputs + 8 * outputs


def _matrices(layer: Mapping[str, Any], width: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, outputs and inputs of a layer's matrices."""
    for name in {"self_attn", "encoder_attn"} & layer.keys():
        shape = layer[name]
        heads, keys = shape["heads"], 1 if shape.get("shared") else shape["heads"]
        yield f"{name}.q_proj", heads * shape["qk_dim"], width
        yield f"{name}.k_proj", keys * shape["qk_dim"], width
        yield f"{name}.v_proj", keys * shape["v_dim"], width
        yield f"{name}.out_proj", width, heads * shape["v_dim"]
    yield "fc1", layer["ffn"], width
    yield "fc2", width, layer["ffn"]


def window_macs(counted: dict[str, int], tokens: int = 32) -> int:
    """Return the MACs of one full window with this many tokens, from the result of `macs`."""
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
    """Return the MACs of a decoder layer without the scores and sums of its cross-attention."""
    linear = _weights(layer.self_attn, LINEARS) + _weights(layer, ("fc1", "fc2"))
    linear += _weights(layer.encoder_attn, ("q_proj", "out_proj"))
    return linear + context * _pair(layer.self_attn)


def _cached_cross(attention: nn.Module, positions: int) -> int:
    """Return the MACs of cross-attention over cached keys and values."""
    return positions * _pair(attention)


def _cross(attention: nn.Module, positions: int) -> int:
    """Return the MACs of cross-attention over the encoder states; see coreml/attention.py."""
    both = [getattr(attention, name) for name in ("k_proj", "v_proj")]
    read = sum(getattr(linear, "down", linear).weight.shape[1] for linear in both)
    weights = _weights(attention, ("k_proj", "v_proj"))
    return attention.num_heads * (weights + positions * read)


def _pair(attention: nn.Module) -> int:
    """Return the MACs of one query and one key, score and sum: heads * (qk_dim + v_dim)."""
    queries = getattr(attention.q_proj, "up", attention.q_proj).weight.shape[0]
    mixed = getattr(attention.out_proj, "down", attention.out_proj).weight.shape[1]
    return queries + mixed


def _weights(module: nn.Module, names: tuple[str, ...]) -> int:
    """Return the number of elements in the weight matrices of these linear layers, without
    biases."""
    linears = [getattr(module, name) for name in names]
    return sum(p.numel() for linear in linears for p in linear.parameters() if p.dim() == 2)
