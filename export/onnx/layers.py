"""Linear layers, layer norm and GELU of the ONNX graphs, in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from export import quantise as quantisers
from export.onnx.graph import FUSED, INT8, Graph
from export.quantise import Scheme
from export.weights import Floats, Linear

GELU_DEPTH = 0.17
"""GELU is never below minus this."""


def quantise(weight: Floats, scheme: Scheme = INT8) -> tuple[NDArray[np.integer], Floats]:
    """Quantise a weight (out, in) to codes (out, in) and scales: (out,), or (out, blocks) in 4
    bits."""
    codes, scale = quantisers.quantise(torch.from_numpy(weight), scheme)
    scales = scale.contiguous().numpy()
    return codes.numpy(), scales if scheme.bits == 4 else scales[:, 0].copy()


def linear(g: Graph, x: str, layers: Sequence[Linear], gather: bool = False) -> str:
    """Apply linear layers in sequence (a low-rank layer is two): x (1, n, in) -> (1, n, out).

    A layer that reads only some inputs gets zero rows for the others when the graph is loaded. With
    `gather` the inputs are picked at run time instead. That is faster for a single row, where
    reading the weights dominates, and slower for hundreds of rows (measured: twice the whole int8
    product).
    """
    for layer in layers:
        if gather and layer.inputs is not None:
            x = g.op("Gather", x, g.constant(layer.inputs), axis=-1)
            layer = replace(layer, inputs=None)
        x = _product(g, x, [layer])
    return x


def row_scaled_linear(g: Graph, x: str, layers: Sequence[Linear]) -> str:
    """Apply linear layers to hidden units after GELU, whose rows differ much in size.

    x (1, n, in) -> (1, n, out), as `linear`. int8 activations have one scale for all rows. In
    Whisper's encoders some rows, mostly in the silence after the speech, are forty times as large
    as those of speech. So each row is divided by its largest value, and its product is multiplied
    by it. Measured on tiny.en: the encoder takes 3 % longer, and the loss of int8 falls from 1.2 to
    0.2 points of WER, together with the column scales of TokenTable.
    """
    *inner, last = layers
    if g.scheme(layers[0].scheme).bits != 8 or any(layer.bias is not None for layer in inner):
        return linear(g, x, layers)
    largest = g.op("ReduceMax", x, g.constant([-1]), keepdims=1)
    largest = g.op("Max", largest, g.constant(GELU_DEPTH))
    y = linear(g, g.op("Div", x, largest), [*inner, replace(last, bias=None)])
    y = g.op("Mul", y, largest)
    return y if last.bias is None else g.op("Add", y, g.constant(last.bias))


def joint_linear(g: Graph, x: str, branches: Sequence[Sequence[Linear]]) -> list[str]:
    """Apply several linear layers to one input of few rows (q, k and v of new tokens). Layers that
    are stored alike become one matrix product, which saves operators. The first factor of a
    low-rank layer takes part in it; the second follows."""
    alike: dict[Any, list[int]] = {}
    for i, branch in enumerate(branches):
        alike.setdefault(_kind(g, branch[0]), []).append(i)
    parts: dict[int, str] = {}
    for members in alike.values():
        first = [branches[i][0] for i in members]
        y = _product(g, x, first)
        widths = g.constant([len(layer.weight) for layer in first])
        split = [y] if len(first) == 1 else g.ops("Split", y, widths, outputs=len(first), axis=-1)
        parts |= dict(zip(members, split, strict=True))
    return [linear(g, parts[i], branch[1:]) for i, branch in enumerate(branches)]


def separate_linear(g: Graph, x: str, branches: Sequence[Sequence[Linear]]) -> list[str]:
    """Apply several linear layers to one input of hundreds of rows, as separate products. Splitting
    a joint product would cost more (measured: a third of q, k and v together). The input is
    quantised once for all of them."""
    return [linear(g, _shared_product(g, x, first), rest) for first, *rest in branches]


def layer_norm(g: Graph, x: str, weight: Floats, bias: Floats, epsilon: float) -> str:
    """Normalise the last axis."""
    return g.op(
        "LayerNormalization", x, g.constant(weight), g.constant(bias), axis=-1, epsilon=epsilon
    )


def gelu(g: Graph, x: str) -> str:
    """Apply the exact GELU with erf, as Whisper does."""
    return g.op("Gelu", x, domain=FUSED)


def _shared_product(g: Graph, x: str, layer: Linear) -> str:
    """Multiply, as `_product`, an input that other layers read too."""
    scheme = g.scheme(layer.scheme)
    if scheme.bits != 8:
        return _product(g, x, [layer])
    codes, scale = quantise(layer.weight, scheme)
    matrix = _joint_matrix(g, [layer], [codes])
    q, q_scale, zero = g.quantised(x)
    inputs = [q, matrix, q_scale, g.constant(scale), zero]
    inputs += [] if layer.bias is None else ["", g.constant(layer.bias)]
    return g.op("MatMulIntegerToFloat", *inputs, domain=FUSED)


def _kind(g: Graph, layer: Linear) -> Any:
    """Return a key that is equal for layers that can be part of one product."""
    scheme = g.scheme(layer.scheme)
    if scheme.bits > 4:
        return scheme.bits
    return scheme.block, None if layer.inputs is None else layer.inputs.tobytes()


def _product(g: Graph, x: str, layers: Sequence[Linear]) -> str:
    """Multiply one input with layers stored alike: x (1, n, in) -> (1, n, sum of out)."""
    bias = _joint_bias(layers)
    added = [] if bias is None else [g.constant(bias)]
    scheme = g.scheme(layers[0].scheme)
    if scheme.bits == 4:
        return _int4_product(g, x, layers, scheme, added)
    if scheme.bits == 32:
        x = g.op("MatMul", x, _joint_matrix(g, layers, [layer.weight for layer in layers]))
        return g.op("Add", x, *added) if added else x
    parts = [quantise(layer.weight, scheme) for layer in layers]
    matrix = _joint_matrix(g, layers, [q for q, _ in parts])
    scale = g.constant(np.concatenate([scale for _, scale in parts]))
    if scheme.bits == 16:
        x = g.op("MatMul", x, g.op("Mul", g.op("Cast", matrix, to=TensorProto.FLOAT), scale))
        return g.op("Add", x, *added) if added else x
    zero = [""] if added else []  # empty name: no zero points, because the weights are symmetric
    return g.op("DynamicQuantizeMatMul", x, matrix, scale, *zero, *added, domain=FUSED)


def _int4_product(
    g: Graph, x: str, layers: Sequence[Linear], scheme: Scheme, added: list[str]
) -> str:
    """Multiply in 4 bits. Blocks lie along the inputs that are read, so these are always
    gathered."""
    inputs = layers[0].inputs
    if inputs is not None:
        x = g.op("Gather", x, g.constant(inputs), axis=-1)
    parts = [quantise(layer.weight, scheme) for layer in layers]
    codes, scales = (np.concatenate(both) for both in zip(*parts, strict=True))
    packed = quantisers.pack(torch.from_numpy(codes), scheme).numpy()
    out, features = codes.shape
    y = nbits_product(g, x, g.constant(packed), scale_table(g, scales), scheme, (features, out))
    return g.op("Add", y, *added) if added else y


def nbits_product(
    g: Graph, x: str, packed: str, scales: str, scheme: Scheme, shape: tuple[int, int]
) -> str:
    """Multiply x (..., in) with packed 4-bit codes; `shape` is (in, out). Activations are int8 with
    a scale per block of a row."""
    return g.op(
        "MatMulNBits",
        x,
        packed,
        scales,
        domain=FUSED,
        K=shape[0],
        N=shape[1],
        bits=4,
        block_size=scheme.block,
        accuracy_level=4,
    )


def scale_table(g: Graph, scales: Floats) -> str:
    """Store 4-bit scales, as float16 if it holds them exactly. The runtime widens them once."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if (halves.astype(np.float32) != scales).any():
        return g.constant(scales)
    return g.op("Cast", g.constant(halves), to=TensorProto.FLOAT)


def _joint_matrix(g: Graph, layers: Sequence[Linear], weights: Sequence[NDArray]) -> str:
    """Join weights (out, in) of several layers into one matrix (all inputs, sum of out)."""
    if all(layer.inputs is None for layer in layers):
        return _stored(g, np.concatenate(weights).T)
    pairs = zip(layers, weights, strict=True)
    wide = [_all_inputs(g, weight, layer.inputs, layer.features) for layer, weight in pairs]
    return wide[0] if len(wide) == 1 else g.op("Concat", *wide, axis=1)


def _all_inputs(g: Graph, weight: NDArray, inputs: NDArray | None, features: int) -> str:
    """Expand weight (out, in) to (features, out) with zero rows for inputs that are not read. Only
    the rows that are read are stored, and one row of zeros. The runtime expands them once, when it
    loads the graph (constant folding)."""
    if inputs is None:
        return _stored(g, weight.T)
    source = np.full(features, len(inputs), np.int32)
    source[inputs] = np.arange(len(inputs))
    rows = np.concatenate([weight.T, np.zeros_like(weight.T[:1])])
    return g.op("Gather", _stored(g, rows), g.constant(source), axis=0)


def _joint_bias(layers: Sequence[Linear]) -> Floats | None:
    if all(layer.bias is None for layer in layers):
        return None
    none = (np.zeros(len(layer.weight), np.float32) for layer in layers)
    return np.concatenate(
        [zeros if x.bias is None else x.bias for x, zeros in zip(layers, none, strict=True)]
    )


def float_table(g: Graph, array: Floats) -> str:
    """Store positions, kernels or matrices that stay floats; as float16 if the graph halves floats.
    The runtime widens them once, when it loads the graph. That halves the bytes, with an error of
    2**-11. Arrays with values beyond the range of float16 stay float32."""
    if not g.halves or np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        return g.constant(array)
    return g.op("Cast", g.constant(array.astype(np.float16)), to=TensorProto.FLOAT)


def _stored(g: Graph, matrix: NDArray) -> str:
    """Store codes, or floats. In a quantised graph the checkpoint asked for these floats, so they
    are not halved."""
    halved = matrix.dtype == np.float32 and not g.quantises
    return float_table(g, matrix) if halved else g.constant(matrix)


def widened(g: Graph, weight: Floats, scheme: Scheme | None) -> str:
    """Store a weight that is multiplied with floats: as floats, or as codes with a scale per row.
    The runtime widens the codes once, when it loads the graph."""
    if scheme is None or not g.quantises:
        return float_table(g, weight)
    if scheme.bits == 32:
        return g.constant(weight)
    q, scale = quantise(weight.reshape(len(weight), -1), scheme)
    scales = g.constant(scale.reshape(-1, *[1] * (weight.ndim - 1)))
    codes = g.constant(q.reshape(weight.shape))
    return g.op("Mul", g.op("Cast", codes, to=TensorProto.FLOAT), scales)
