"""The operators of a Whisper's ONNX graphs with their costs, from the shapes of its layers.

An operator is a kind and its sizes. It is counted as often as the graphs repeat it: low-rank layers
are two products, hidden units are computed in pieces, heads are padded to the width of the caches.
Its cost is multiply-accumulates, as in cost.py, and bytes read and written. For operators of one
token, weights and cached keys and values are not counted as bytes, because each is read once per
product:

    log_mel      frames, mel bands             the front end
    stem         frames, mel bands, width      both convolutions, GELU, positions
    linear       rows, inputs, outputs         over the positions of a window
    attention    positions, heads, qk, v       self-attention of a window; bytes are the scores
    norm         rows, width                   LayerNorm and the sum before it
    gelu         rows, width
    keys         positions, heads, width       keys or values in the form the decoder reads
    pad          rows, heads, width            heads padded to a multiple of 8, or cut again
    begin        positions, width              look-up of a token, and the mask
    product      inputs, outputs               a linear layer of one token
    past         tokens, heads, width          self-attention of one token
    cross        positions, heads, width       cross-attention of one token
    logits       tokens, width                 a product with the token table

Weights stored in other bits than usual for the graph count as the usual ones. Layers that read some
inputs read all of them on many rows, as in the graphs. Shared keys count as any attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import nn

from export.onnx.attention import SPARE
from export.onnx.graph import pieces_of
from export.shrink import layer_shapes, windows_of
from export.weights import cache_width

EMPTY = "empty"
"""The kind of a graph without operators: the fixed cost of running one."""
CONTEXT = 32
"""Tokens that a decoding step attends to, as in cost.macs()."""
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 4.0, "int8": 1.0, "int4": 0.625}
"""Bytes read per weight of a product; in 4 bits including a scale for every 32."""


class Operator(NamedTuple):
    kind: str
    sizes: tuple[int, ...]


class Work(NamedTuple):
    macs: float
    bytes: float


def work(operator: Operator, precision: str) -> Work:
    """Return what an operator computes and moves in a graph of that precision."""
    return KINDS[operator.kind](WEIGHT_BYTES[precision], *operator.sizes)


def _log_mel(weight: float, frames: int, bands: int) -> Work:
    taps, bins = 400, 101  # a quarter of the plain DFT: see log_mel.py
    return Work(frames * bins * (taps + 2 * bands), 4 * frames * (2 * taps + bands))


def _stem(weight: float, frames: int, bands: int, width: int) -> Work:
    macs = 3 * width * (frames * bands + frames // 2 * width)
    return Work(macs, 4 * (3 * width * (bands + width) + frames * (bands + 3 * width)))


def _linear(weight: float, rows: int, inputs: int, outputs: int) -> Work:
    return Work(rows * inputs * outputs, weight * inputs * outputs + 4 * rows * (inputs + outputs))


def _product(weight: float, inputs: int, outputs: int) -> Work:
    return Work(inputs * outputs, 4 * (inputs + outputs))


def _attention(weight: float, rows: int, heads: int, qk: int, v: int) -> Work:
    return Work(rows**2 * heads * (qk + v), 4 * heads * rows * (rows + 2 * qk + 2 * v))


def _rows(weight: float, rows: int, *widths: int) -> Work:
    return Work(0, 8 * rows * prod(widths))


def _begin(weight: float, positions: int, width: int) -> Work:
    return Work(0, 4 * (positions + SPARE) + 12 * width)


def _past(weight: float, tokens: int, heads: int, width: int) -> Work:
    return Work(2 * tokens * heads * width, 4 * heads * (tokens + 4 * width))


def _cross(weight: float, positions: int, heads: int, width: int) -> Work:
    return Work(2 * positions * heads * width, 4 * heads * positions)


def _logits(weight: float, tokens: int, width: int) -> Work:
    return Work(tokens * width, 4 * tokens)


KINDS: dict[str, Callable[..., Work]] = {
    "log_mel": _log_mel,
    "stem": _stem,
    "linear": _linear,
    "attention": _attention,
    "norm": _rows,
    "gelu": _rows,
    "keys": _rows,
    "pad": _rows,
    "begin": _begin,
    "product": _product,
    "past": _past,
    "cross": _cross,
    "logits": _logits,
}
"""Kind -> its cost, given the bytes of a weight and the sizes."""


def of_a_token(operator: Operator) -> bool:
    """Return whether an operator belongs to a decoding step of one token."""
    kind, sizes = operator
    return kind in ("begin", "product", "past", "cross", "logits") or sizes[:1] == (1,)


# ------------------------------------------------------------------------------------- of a model


@dataclass(frozen=True)
class Shapes:
    """All that the operators of a model depend on."""

    layers: Mapping[str, Any]
    """As shrink.layer_shapes() returns them and the manifest stores them."""
    width: int
    """d_model"""
    bands: int
    vocabulary: int
    positions: int
    """Encoder positions of the full window."""
    stages: tuple[int, int] | None = None
    """Rank and number of candidates of logits in two stages."""

    @property
    def windows(self) -> list[int]:
        return list(self.layers.get("windows", [self.positions]))


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shapes of a Whisper, dense or slim."""
    config = model.config
    return Shapes(
        layer_shapes(model),
        config.d_model,
        config.num_mel_bins,
        config.vocab_size,
        windows_of(config)[-1],
    )


def encoder_operators(shapes: Shapes) -> Iterator[Operator]:
    """Yield the operators of one full window, from audio to the cross-attention's keys and
    values."""
    rows, width = shapes.positions, shapes.width
    yield Operator("log_mel", (2 * rows, shapes.bands))
    yield Operator("stem", (2 * rows, shapes.bands, width))
    for layer in shapes.layers["encoder"]:
        yield from _encoder_layer(layer, rows, shapes)
    yield Operator("norm", (rows, width))
    for layer in shapes.layers["decoder"]:
        attention = layer["encoder_attn"]
        heads, qk, v = attention["heads"], attention["qk_dim"], attention["v_dim"]
        room = cache_width(qk, v)
        for name, dim in (("k_proj", qk), ("v_proj", v)):
            yield from _linears(layer, f"encoder_attn.{name}", width, heads * dim, rows)
            if dim != room:
                yield Operator("pad", (rows, heads, room))
            yield Operator("keys", (rows, heads, room))


def _encoder_layer(layer: Mapping[str, Any], rows: int, shapes: Shapes) -> Iterator[Operator]:
    attention, width, units = layer["self_attn"], shapes.width, layer["ffn"]
    heads, qk, v = (attention[name] for name in ("heads", "qk_dim", "v_dim"))
    keys = 1 if attention.get("shared") else heads
    yield Operator("norm", (rows, width))
    for name, outputs in (("q", heads * qk), ("k", keys * qk), ("v", keys * v)):
        yield from _linears(layer, f"self_attn.{name}_proj", width, outputs, rows)
    yield Operator("attention", (rows, heads, qk, v))
    yield from _linears(layer, "self_attn.out_proj", heads * v, width, rows)
    pieces = pieces_of(units, shapes.windows)
    for _ in range(pieces):
        piece = -(-rows // pieces)
        yield Operator("norm", (piece, width))
        yield from _linears(layer, "fc1", width, units, piece)
        yield Operator("gelu", (piece, units))
        yield from _linears(layer, "fc2", units, width, piece)


def token_operators(shapes: Shapes) -> Iterator[Operator]:
    """Yield the operators of one decoding step that attends to CONTEXT tokens."""
    width = shapes.width
    yield Operator("begin", (shapes.positions, width))
    for layer in shapes.layers["decoder"]:
        own, cross, units = layer["self_attn"], layer["encoder_attn"], layer["ffn"]
        yield Operator("norm", (1, width))
        yield from _joint(layer, own, width)
        yield from _cached("past", CONTEXT, own, queries=3)
        yield from _linears(layer, "self_attn.out_proj", own["heads"] * own["v_dim"], width)
        yield Operator("norm", (1, width))
        yield from _linears(layer, "encoder_attn.q_proj", width, cross["heads"] * cross["qk_dim"])
        yield from _cached("cross", shapes.positions, cross, queries=1)
        yield from _linears(layer, "encoder_attn.out_proj", cross["heads"] * cross["v_dim"], width)
        yield Operator("norm", (1, width))
        yield from _linears(layer, "fc1", width, units)
        yield Operator("gelu", (1, units))
        yield from _linears(layer, "fc2", units, width)
    yield Operator("norm", (1, width))
    rank = shapes.layers.get("token_rank")
    if shapes.stages is not None:
        first, candidates = shapes.stages
        yield Operator("product", (width, first))
        yield Operator("logits", (shapes.vocabulary, first))
        yield Operator("logits", (candidates, width))
    elif rank is None:
        yield Operator("logits", (shapes.vocabulary, width))
    else:
        yield Operator("product", (rank, width))  # the look-up
        yield Operator("logits", (rank, width))
        yield Operator("logits", (shapes.vocabulary, rank))


def _joint(
    layer: Mapping[str, Any], attention: Mapping[str, Any], width: int
) -> Iterator[Operator]:
    """Yield the q, k and v products of one token: the first factors of all three are one
    product."""
    heads, ranks = attention["heads"], layer.get("ranks") or {}
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    dims = [heads * attention[dim] for dim in ("qk_dim", "qk_dim", "v_dim")]
    firsts = [ranks.get(name, outputs) for name, outputs in zip(names, dims, strict=True)]
    yield Operator("product", (width, sum(firsts)))
    for name, outputs in zip(names, dims, strict=True):
        if name in ranks:
            yield Operator("product", (ranks[name], outputs))


def _cached(
    kind: str, positions: int, attention: Mapping[str, Any], queries: int
) -> Iterator[Operator]:
    """Yield the attention of one token over a cache, with the padding of its inputs and output."""
    heads, qk, v = attention["heads"], attention["qk_dim"], attention["v_dim"]
    room = cache_width(qk, v)
    for dim in [*[qk, qk, v][:queries], v]:
        if dim != room:
            yield Operator("pad", (1, heads, room))
    yield Operator(kind, (positions, heads, room))


def _linears(
    layer: Mapping[str, Any], name: str, inputs: int, outputs: int, rows: int | None = None
) -> Iterator[Operator]:
    """Yield the products of a linear layer over `rows` of a window, or over one token without
    `rows`."""
    kind, rest = ("product", ()) if rows is None else ("linear", (rows,))
    read = inputs if rows is not None else (layer.get("inputs") or {}).get(name, inputs)
    rank = (layer.get("ranks") or {}).get(name)
    for pair in [(read, outputs)] if rank is None else [(read, rank), (rank, outputs)]:
        yield Operator(kind, (*rest, *pair))
