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


def linear(g: Graph, x: str, layers: Sequence[Linear], few_rows: bool = False) -> str:
    """Apply linear layers in sequence (a low-rank layer is two): x (1, n, in) -> (1, n, out).

    A layer that reads only some inputs gets zero rows for the others when the graph is loaded. With
    `few_rows` (new tokens) the inputs are picked at run time instead. That is faster for a single
    row, where reading the weights dominates, and slower for hundreds of rows (measured: twice the
    whole int8 product). Weights in 4 bits are multiplied as they are with `few_rows`, and in 8 bits
    otherwise, if their scales have steps.
    """
    for layer in layers:
        if few_rows and layer.inputs is not None:
            x = g.op("Gather", x, g.constant(layer.inputs), axis=-1)
            layer = replace(layer, inputs=None)
        x = _product(g, x, [layer], few_rows)
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
    if not _in_8_bits(g.scheme(layers[0].scheme)) or any(layer.bias is not None for layer in inner):
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
        y = _product(g, x, first, few_rows=True)
        widths = g.constant([len(layer.weight) for layer in first])
        split = [y] if len(first) == 1 else g.ops("Split", y, widths, outputs=len(first), axis=-1)
        parts |= dict(zip(members, split, strict=True))
    return [linear(g, parts[i], branch[1:], few_rows=True) for i, branch in enumerate(branches)]


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
    if not _in_8_bits(scheme):
        return _product(g, x, [layer])
    matrix, scale = _matrix(g, [layer], scheme)
    q, q_scale, zero = g.quantised(x)
    inputs = [q, matrix, q_scale, scale, zero]
    inputs += [] if layer.bias is None else ["", g.constant(layer.bias)]
    return g.op("MatMulIntegerToFloat", *inputs, domain=FUSED)


def _kind(g: Graph, layer: Linear) -> Any:
    """Return a key that is equal for layers that can be part of one product."""
    scheme = g.scheme(layer.scheme)
    if scheme.bits > 4:
        return scheme.bits
    return scheme.block, scheme.steps, None if layer.inputs is None else layer.inputs.tobytes()


def _in_8_bits(scheme: Scheme) -> bool:
    """Return whether products of many rows are int8."""
    return scheme.bits == 8 or (scheme.bits == 4 and scheme.steps > 0)


def _product(g: Graph, x: str, layers: Sequence[Linear], few_rows: bool = False) -> str:
    """Multiply one input with layers stored alike: x (1, n, in) -> (1, n, sum of out)."""
    bias = _joint_bias(layers)
    added = [] if bias is None else [g.constant(bias)]
    scheme = g.scheme(layers[0].scheme)
    if scheme.bits == 4 and (few_rows or not scheme.steps):
        return _int4_product(g, x, layers, scheme, added)
    if scheme.bits == 32:
        x = g.op("MatMul", x, _joint_matrix(g, layers, [layer.weight for layer in layers]))
        return g.op("Add", x, *added) if added else x
    matrix, scale = _matrix(g, layers, scheme)
    if scheme.bits == 16:
        x = g.op("MatMul", x, g.op("Mul", g.op("Cast", matrix, to=TensorProto.FLOAT), scale))
        return g.op("Add", x, *added) if added else x
    zero = [""] if added else []  # empty name: no zero points, because the weights are symmetric
    return g.op("DynamicQuantizeMatMul", x, matrix, scale, *zero, *added, domain=FUSED)


def _matrix(g: Graph, layers: Sequence[Linear], scheme: Scheme) -> tuple[str, str]:
    """Return codes (all inputs, sum of out) and scales (sum of out,) of layers stored alike."""
    if scheme.bits == 4:
        assert len(layers) == 1
        return _widened_matrix(g, layers[0], scheme)
    parts = [quantise(layer.weight, scheme) for layer in layers]
    matrix = _joint_matrix(g, layers, [q for q, _ in parts])
    return matrix, g.constant(np.concatenate([scale for _, scale in parts]))


def _widened_matrix(g: Graph, layer: Linear, scheme: Scheme) -> tuple[str, str]:
    """Return a layer stored in 4 bits as codes in 8 bits with one scale per output, exactly: codes
    times the steps of their scales (QServe, arXiv:2405.04532). The runtime multiplies these once,
    when it loads the graph. For hundreds of rows, int8 products are faster than MatMulNBits: the
    encoder of tiny.en takes 31 instead of 77 ms for a clip of 5 s on one thread."""
    codes, scales = quantise(layer.weight, scheme)
    counts, step = (part.numpy() for part in quantisers.in_steps(torch.from_numpy(scales)))
    out, inputs = codes.shape
    filled = np.pad(codes, [(0, 0), (0, -inputs % scheme.block)]) + 8
    low, high = filled.T.reshape(-1, 2, scheme.block // 2, out).transpose(1, 0, 2, 3)
    packed = g.constant((low | high << 4).astype(np.uint8))  # (blocks, block / 2, out)
    halves = (
        g.op("BitwiseAnd", packed, g.constant(np.array(15, np.uint8))),
        g.op("BitShift", packed, g.constant(np.array(4, np.uint8)), direction="RIGHT"),
    )
    wide = g.op("Cast", g.op("Concat", *halves, axis=1), to=TensorProto.INT8)
    wide = g.op("Sub", wide, g.constant(np.array(8, np.int8)))
    wide = g.op("Mul", wide, g.constant(counts.T[:, None]))  # (blocks, 1, out)
    rows = g.op("Reshape", wide, g.constant([-1, out]))
    if inputs % scheme.block:
        rows = g.op("Slice", rows, g.constant([0]), g.constant([inputs]))
    if layer.inputs is not None:
        zeros = g.constant(np.zeros((1, out), np.int8))
        rows = _all_inputs(g, layer, g.op("Concat", rows, zeros, axis=0))
    return rows, g.constant(step)


def unpacked(g: Graph, packed: str) -> str:
    """Unpack 4-bit codes: (..., blocks, block / 2) uint8 -> (..., blocks, block) float32."""
    low = g.op("BitwiseAnd", packed, g.constant(np.array(15, np.uint8)))
    high = g.op("BitShift", packed, g.constant(np.array(4, np.uint8)), direction="RIGHT")
    both = [g.op("Unsqueeze", half, g.constant([-1])) for half in (low, high)]
    codes = g.op("Cast", g.op("Concat", *both, axis=-1), to=TensorProto.FLOAT)
    shape = g.op("Concat", g.op("Shape", packed, end=-1), g.constant([-1]), axis=0)
    return g.op("Sub", g.op("Reshape", codes, shape), g.constant(8.0))


def joined(g: Graph, blocks: str, width: int, scheme: Scheme, axes: int = 2) -> str:
    """Join blocks: (..., blocks, block) -> (..., width), which has so many axes."""
    shape = g.op("Concat", g.op("Shape", blocks, end=-2), g.constant([-1]), axis=0)
    rows = g.op("Reshape", blocks, shape)
    if width % scheme.block == 0:
        return rows
    return g.op("Slice", rows, *(g.constant([end]) for end in (0, width, axes - 1)))


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
    y = nbits_product(
        g, x, g.constant(packed), scale_table(g, scales, scheme), scheme, (features, out)
    )
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


def scale_table(g: Graph, scales: Floats, scheme: Scheme) -> str:
    """Store 4-bit scales (out, blocks): integers and a step per row, or as float16 if it holds them
    exactly. The runtime widens them once."""
    if scheme.steps:
        counts, step = (part.numpy() for part in quantisers.in_steps(torch.from_numpy(scales)))
        wide = g.op("Cast", g.constant(counts), to=TensorProto.FLOAT)
        return g.op("Mul", wide, _halved(g, step[:, None]))
    return _halved(g, scales)


def _halved(g: Graph, array: Floats) -> str:
    """Store floats as float16 if it holds them exactly."""
    with np.errstate(over="ignore"):
        halves = array.astype(np.float16)
    if (halves.astype(np.float32) != array).any():
        return g.constant(array)
    return g.op("Cast", g.constant(halves), to=TensorProto.FLOAT)


def _joint_matrix(g: Graph, layers: Sequence[Linear], weights: Sequence[NDArray]) -> str:
    """Join weights (out, in) of several layers into one matrix (all inputs, sum of out). Only the
    rows of inputs that are read are stored, and one row of zeros."""
    if all(layer.inputs is None for layer in layers):
        return _stored(g, np.concatenate(weights).T)
    wide = [
        _stored(g, weight.T)
        if layer.inputs is None
        else _all_inputs(g, layer, _stored(g, np.pad(weight.T, [(0, 1), (0, 0)])))
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return wide[0] if len(wide) == 1 else g.op("Concat", *wide, axis=1)


def _all_inputs(g: Graph, layer: Linear, matrix: str) -> str:
    """Expand a matrix (in + 1, out) whose last row is zero to (features, out), with zero rows for
    inputs that are not read. The runtime expands it once, when it loads the graph (constant
    folding)."""
    assert layer.inputs is not None
    source = np.full(layer.features, len(layer.inputs), np.int32)
    source[layer.inputs] = np.arange(len(layer.inputs))
    return g.op("Gather", matrix, g.constant(source), axis=0)


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
