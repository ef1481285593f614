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
"""No value of GELU is below minus this."""


def quantise(weight: Floats, scheme: Scheme = INT8) -> tuple[NDArray[np.integer], Floats]:
    """weight (out, in) -> codes (out, in) and scales: (out,), or (out, blocks) in 4 bits."""
    codes, scale = quantisers.quantise(torch.from_numpy(weight), scheme)
    found = scale.contiguous().numpy()
    return codes.numpy(), found if scheme.bits == 4 else found[:, 0].copy()


def linear(g: Graph, x: str, layers: Sequence[Linear], gather: bool = False) -> str:
    """Linear layers one after the other (a low-rank layer is two): x (1, n, in) -> (1, n, out).

    A layer that reads some inputs only gets zeros for the others as the graph is loaded, unless
    `gather`: picking features out of rows pays on a single row, where reading the weights is the
    work, and costs more than it saves on hundreds (measured: twice the whole int8 product).
    """
    for layer in layers:
        if gather and layer.inputs is not None:
            x = g.op("Gather", x, g.constant(layer.inputs), axis=-1)
            layer = replace(layer, inputs=None)
        x = _product(g, x, [layer])
    return x


def by_rows(g: Graph, x: str, layers: Sequence[Linear]) -> str:
    """Linear layers of hidden units after GELU, whose rows differ much in size.

    x (1, n, in) -> (1, n, out), as `linear`.

    int8 activations have one scale for all rows. Whisper's encoders have some rows, mostly in the
    silence behind the sound, that are forty times as large as those of speech. So each row is
    divided by its largest value, and its product is multiplied by it. Measured on tiny.en: the
    encoder takes 3 % longer, and the loss of all int8 falls from 1.2 to 0.2 points of WER together
    with the columns of TokenTable.
    """
    *inner, last = layers
    if g.scheme(layers[0].scheme).bits != 8 or any(layer.bias is not None for layer in inner):
        return linear(g, x, layers)
    largest = g.op("ReduceMax", x, g.constant([-1]), keepdims=1)
    largest = g.op("Max", largest, g.constant(GELU_DEPTH))
    y = linear(g, g.op("Div", x, largest), [*inner, replace(last, bias=None)])
    y = g.op("Mul", y, largest)
    return y if last.bias is None else g.op("Add", y, g.constant(last.bias))


def parallel(g: Graph, x: str, branches: Sequence[Sequence[Linear]]) -> list[str]:
    """Several linear layers of one input of a few rows (q, k and v of new tokens): one product of
    all that are stored alike, so that there are few operators.

    A low-rank layer's first factor takes part, and its second one follows.
    """
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


def apart(g: Graph, x: str, branches: Sequence[Sequence[Linear]]) -> list[str]:
    """The same for hundreds of rows, where splitting a product costs more than several products
    (measured: a third of q, k and v together); x is quantised once for all of them."""
    return [linear(g, _shared_product(g, x, first), rest) for first, *rest in branches]


def layer_norm(g: Graph, x: str, weight: Floats, bias: Floats, epsilon: float) -> str:
    return g.op(
        "LayerNormalization", x, g.constant(weight), g.constant(bias), axis=-1, epsilon=epsilon
    )


def gelu(g: Graph, x: str) -> str:
    """The exact one, with erf, as Whisper has it."""
    return g.op("Gelu", x, domain=FUSED)


def _shared_product(g: Graph, x: str, layer: Linear) -> str:
    """As _product, of an input that other layers read too."""
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
    """What layers of one product have in common."""
    scheme = g.scheme(layer.scheme)
    if scheme.bits > 4:
        return scheme.bits
    return scheme.block, None if layer.inputs is None else layer.inputs.tobytes()


def _product(g: Graph, x: str, layers: Sequence[Linear]) -> str:
    """Layers of one input, stored alike, side by side: x (1, n, in) -> (1, n, sum of out)."""
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
    zero = [""] if added else []  # the empty name: no zero points, the weights are symmetric
    return g.op("DynamicQuantizeMatMul", x, matrix, scale, *zero, *added, domain=FUSED)


def _int4_product(
    g: Graph, x: str, layers: Sequence[Linear], scheme: Scheme, added: list[str]
) -> str:
    """Blocks lie along the inputs that are read, so these are picked, on many rows too."""
    inputs = layers[0].inputs
    if inputs is not None:
        x = g.op("Gather", x, g.constant(inputs), axis=-1)
    parts = [quantise(layer.weight, scheme) for layer in layers]
    codes, scales = (np.concatenate(both) for both in zip(*parts, strict=True))
    packed = quantisers.pack(torch.from_numpy(codes), scheme).numpy()
    out, features = codes.shape
    y = g.op(
        "MatMulNBits",
        x,
        g.constant(packed),
        g.constant(scales),
        domain=FUSED,
        K=features,
        N=out,
        bits=4,
        block_size=scheme.block,
        accuracy_level=4,  # activations in int8, a scale for every block of a row
    )
    return g.op("Add", y, *added) if added else y


def _joint_matrix(g: Graph, layers: Sequence[Linear], weights: Sequence[NDArray]) -> str:
    """Weights (out, in) of several layers as one matrix (all inputs, sum of out)."""
    if all(layer.inputs is None for layer in layers):
        return _stored(g, np.concatenate(weights).T)
    pairs = zip(layers, weights, strict=True)
    wide = [_all_inputs(g, weight, layer.inputs, layer.features) for layer, weight in pairs]
    return wide[0] if len(wide) == 1 else g.op("Concat", *wide, axis=1)


def _all_inputs(g: Graph, weight: NDArray, inputs: NDArray | None, features: int) -> str:
    """weight (out, in) -> (features, out) with zeros where no input is read.

    Only the rows that are read are stored, and one of zeros: the runtime spreads them once, as it
    loads the graph (constant folding).
    """
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
    """Positions, kernels, matrices that stay floats: as float16 where the graph halves them.

    The runtime widens them once, as it loads the graph: half the bytes, and an error of 2**-11.
    Values beyond the range of float16 stay as they are.
    """
    if not g.halves or np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        return g.constant(array)
    return g.op("Cast", g.constant(array.astype(np.float16)), to=TensorProto.FLOAT)


def _stored(g: Graph, matrix: NDArray) -> str:
    """Codes, or floats: those that a graph leaves where it quantises were asked for as they are."""
    halved = matrix.dtype == np.float32 and not g.quantises
    return float_table(g, matrix) if halved else g.constant(matrix)


def widened(g: Graph, weight: Floats, scheme: Scheme | None) -> str:
    """A weight that floats are multiplied with: floats as float_table has them, or codes for each
    row, which the runtime widens once, as it loads the graph."""
    if scheme is None or not g.quantises:
        return float_table(g, weight)
    if scheme.bits == 32:
        return g.constant(weight)
    q, scale = quantise(weight.reshape(len(weight), -1), scheme)
    scales = g.constant(scale.reshape(-1, *[1] * (weight.ndim - 1)))
    codes = g.constant(q.reshape(weight.shape))
    return g.op("Mul", g.op("Cast", codes, to=TensorProto.FLOAT), scales)
