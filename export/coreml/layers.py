"""Weights, linear layers, layer norm, GELU and convolutions of the Core ML programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.coreml import weights as forms
from export.coreml.graph import Graph, Var
from export.quantise import Scheme
from export.weights import Floats, Linear


def stored(
    g: Graph,
    weight: Floats,
    scheme: Scheme | None = None,
    table: bool = False,
    transposed: bool = False,
) -> Var:
    """Store a weight (out, in, ...) in its form, with `transposed` as (in, out, ...). `table` marks
    the token table and the kernels of the stem."""
    rows = weight.reshape(len(weight), -1)
    form = forms.form_of(g.precision, scheme, table, rows.shape[1])
    g.stored[form.name] += weight.size
    if form.note:
        g.notes.append(f"{g.place}: {form.name} instead of 4 bits, because {form.note}")

    def turned(array: NDArray) -> NDArray:
        """Arrange an array that has one number per weight or per group of weights."""
        every = array.size == weight.size
        shape = weight.shape if every else (*array.shape, *[1] * (weight.ndim - 2))
        whole = array.reshape(shape)
        return np.ascontiguousarray(whole.swapaxes(0, 1) if transposed else whole)

    if form.kind == "float":
        return g.constant(turned(weight))
    forms.halved(weight, g.place)  # all other forms compute in float16
    if form.kind == "palette":
        return _palette(g, rows, form.bits, turned)
    if form.name == "int8":
        codes, scale = forms.int8(rows, form.scheme)
        axis = np.int32(1 if transposed else 0)
        given = {"quantized_data": turned(codes), "zero_point": np.int8(0), "scale": scale}
        return g.op("constexpr_affine_dequantize", **given, axis=axis)
    codes, scale = forms.int4(rows, form.scheme)
    data = turned(codes).astype(_dtype("int4"))
    return g.op("constexpr_blockwise_shift_scale", data=data, scale=turned(scale))


def _palette(g: Graph, rows: Floats, bits: int, turned: Callable[[NDArray], NDArray]) -> Var:
    share = forms.PALETTE_ROWS
    grouped = g.target == "iOS18" and bits < 8 and len(rows) % share == 0
    indices, numbers = forms.palettes(rows, bits, len(rows) // share if grouped else 1)
    indices = turned(indices)
    if g.target != "iOS18":
        shape = np.array(indices.shape, np.uint32)
        given = {"indices": forms.packed(indices, bits), "lut": numbers[0], "shape": shape}
        return g.op("constexpr_lut_to_dense", **given)
    places = turned(np.arange(len(numbers))[:, None]).shape  # a palette for each group of rows
    lut = numbers.reshape(*places, numbers.shape[1], 1)
    return g.op("constexpr_lut_to_dense", indices=indices.astype(_dtype(f"uint{bits}")), lut=lut)


def _dtype(name: str) -> Any:
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))


def linear(g: Graph, x: Var, layers: Sequence[Linear]) -> Var:
    """Apply linear layers in sequence (a low-rank layer is two) to all positions. A layer that
    reads only some inputs gathers them, so that no zeros are stored. In channels-first programs its
    weights already contain the zeros; see `padding.aligned`."""
    for layer in layers:
        bias = np.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        if g.channels_first:
            kernel = stored(g, layer.weight[:, :, None, None], layer.scheme)
            x = g.op("conv", x=x, weight=kernel, bias=g.constant(bias))
            continue
        x = _picked(g, x, layer, -1)
        weight = stored(g, layer.weight, layer.scheme)
        x = g.op("linear", x=x, weight=weight, bias=g.constant(bias))
    return x


def _picked(g: Graph, x: Var, layer: Linear, axis: int) -> Var:
    return x if layer.inputs is None else g.gather(x, layer.inputs, axis)


def layer_norm(g: Graph, x: Var, weight: Floats, bias: Floats, epsilon: float) -> Var:
    """Normalise the features."""
    gamma, beta = g.constant(weight), g.constant(bias)
    given = {"axes": [g.features], "gamma": gamma, "beta": beta, "epsilon": g.dtype(epsilon)}
    return g.op("layer_norm", x=x, **given)


def gelu(g: Graph, x: Var) -> Var:
    """Apply the exact GELU with erf, as Whisper does."""
    return g.op("gelu", x=x, mode="EXACT")


def conv(g: Graph, x: Var, kernel: Floats, bias: Floats, stride: int, scheme: Scheme | None) -> Var:
    """Convolve x (1, in, n) or (1, in, 1, n) with kernel (out, in, 3): n becomes n / stride."""
    strides, pad = [stride], [1, 1]
    if g.channels_first:
        kernel, strides, pad = kernel[:, :, None], [1, stride], [0, 0, 1, 1]
    weight = stored(g, kernel, scheme, table=True)
    given = {"strides": strides, "pad_type": "custom", "pad": pad}
    return g.op("conv", x=x, weight=weight, bias=g.constant(bias), **given)
