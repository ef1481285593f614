"""The operators we emit for Core ML: a small builder of MIL programs, and Whisper's parts with it.

A value is a variable of coremltools' MIL builder. All programs have batch 1 and fixed shapes. Every
dtype is chosen here, and how each weight is stored (mil_weights.py); coremltools' passes, which
would change them, are left out.

Values stand in one of two arrangements, n positions of d features each:

    plain            (1, n, d)      `linear`, and one product for all heads of an attention
    channels first   (1, d, 1, n)   1x1 convolutions, and products for each head by itself

The second is the one that Apple's notes on transformers and whisperkit have for the Neural Engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artifact_files import Dim, Spec
from export.coreml import weights as forms
from export.problem import Problem
from export.quantise import Scheme
from export.weights import Floats, Heads, Linear

TARGETS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
"""Deployment target -> version of the specification that it brought. macOS 13, 14 and 15 are of
the same years."""
CHUNK = 16384
"""Rows of a token table that the Neural Engine does not take at once."""

Var = Any
"""A value of the program under construction."""
Work = Callable[[dict[str, Var]], Sequence[Var]]
"""Makes of inputs and states, by name, the outputs in their order."""


@cache
def toolbox() -> Any:
    """coremltools, imported when it is first needed: that takes seconds, and it talks.

    Raises Problem where it is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import coremltools
    except ImportError as error:
        raise Problem(
            f"Core ML packages are written with coremltools, which cannot be imported ({error})",
            hint="pip install 'coremltools>=9,<10' on macOS or x86-64, or export --target onnx",
        ) from error
    return coremltools


class Graph:
    """The operators of one program under construction.

    `schemes` says how single weights are stored, by what they belong to, where the precision
    compresses them.
    """

    def __init__(
        self,
        precision: str,
        target: str,
        schemes: Mapping[Any, Scheme] | None = None,
        channels_first: bool = False,
    ) -> None:
        self.dtype: Any = np.float32 if precision == "fp32" else np.float16
        self.precision, self.target, self.schemes = precision, target, schemes or {}
        self.channels_first = channels_first
        self.features = 1 if channels_first else -1
        """The axis on which features stand."""
        self.stored: Counter[str] = Counter()
        """Form -> weights (single numbers) stored so."""
        self.said: list[str] = []
        """What was asked for and could not be done."""
        self._constants: dict[tuple[Any, ...], Var] = {}
        self._count = 0
        self._prefix = ""

    def op(self, kind: str, **inputs: Any) -> Any:
        """One operator; returns its output, or a list of them."""
        from coremltools.converters.mil import Builder

        self._count += 1
        return getattr(Builder, kind)(name=f"{self._prefix}{kind}_{self._count}", **inputs)

    def constant(self, value: NDArray | float) -> Var:
        """Floats in the program's dtype; equal ones are stored once."""
        wide = np.asarray(value, np.float32)
        array: NDArray = forms.halved(wide, self.place) if self.dtype == np.float16 else wide
        key = (array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self.op("const", val=array)
        return self._constants[key]

    @property
    def place(self) -> str:
        """Where in the model the operators belong that are made now."""
        return self._prefix.rstrip("_")

    def add(self, x: Var, y: Floats | float | Var) -> Var:
        return self._elementwise("add", x, y)

    def mul(self, x: Var, y: Floats | float | Var) -> Var:
        return self._elementwise("mul", x, y)

    def _elementwise(self, kind: str, x: Var, y: Floats | float | Var) -> Var:
        """Of which the second operand may be numbers."""
        numbers = isinstance(y, float | np.ndarray)
        return self.op(kind, x=x, y=self.constant(y) if numbers else y)

    def cast(self, x: Var, dtype: str) -> Var:
        """To float16 or float32, or as it is."""
        kind = {"float16": "fp16", "float32": "fp32"}[dtype]
        known = x.dtype.__name__ == kind
        return x if known else self.op("cast", x=x, dtype=kind)

    def reshape(self, x: Var, *shape: Dim) -> Var:
        return x if tuple(x.shape) == shape else self.op("reshape", x=x, shape=list(shape))

    def transpose(self, x: Var, *perm: int) -> Var:
        return self.op("transpose", x=x, perm=list(perm))

    def matmul(self, x: Var, y: Var, transpose_y: bool = False) -> Var:
        return self.op("matmul", x=x, y=y, transpose_y=transpose_y)

    def einsum(self, x: Var, y: Var) -> Var:
        """The product of channels-first values: x (1, c, 1, k), y (1, k, 1, n) -> (1, c, 1, n)."""
        return self.op("einsum", values=(x, y), equation="nchw,nwhu->nchu")

    def softmax(self, x: Var, axis: int) -> Var:
        return self.op("softmax", x=x, axis=axis)

    def sum(self, x: Var, axis: int) -> Var:
        return self.op("reduce_sum", x=x, axes=[axis], keep_dims=True)

    def gather(self, x: Var, places: NDArray[np.integer] | Var, axis: int) -> Var:
        if isinstance(places, np.ndarray):
            places = places.astype(np.int32)
        return self.op("gather", x=x, indices=places, axis=axis)

    def split(self, x: Var, sizes: Sequence[int], axis: int) -> list[Var]:
        if len(sizes) == 1:
            return [x]
        return self.op("split", x=x, split_sizes=list(sizes), axis=axis)

    def concat(self, parts: Sequence[Var], axis: int) -> Var:
        return parts[0] if len(parts) == 1 else self.op("concat", values=list(parts), axis=axis)

    @contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Names of the operators made inside begin with `prefix_`: readers can tell the parts."""
        before, self._prefix = self._prefix, f"{self._prefix}{prefix}_"
        yield
        self._prefix = before


def program(
    g: Graph,
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    work: Work,
    states: Sequence[Spec] = (),
) -> Any:
    """A MIL program, checked against its contract."""
    ct = toolbox()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}
    places = {s.name: Builder.placeholder(s.shape, kinds[s.dtype]) for s in inputs}
    places |= {s.name: Builder.state_tensor_placeholder(s.shape, kinds[s.dtype]) for s in states}
    function = Function(places, opset_version=ct.target[g.target])
    with function:
        made = list(work(function.inputs))
        for value, spec in zip(made, outputs, strict=True):
            found = (tuple(value.shape), value.dtype)
            assert found == (spec.shape, kinds[spec.dtype]), (spec, found)
            value.name = spec.name
        function.set_outputs(made)
    whole = Program()
    whole.add_function("main", function)
    return whole


def save(made: Any, target: str, path: Path, description: str) -> None:
    """Write a program as the package `path`: the same program gives the same bytes."""
    ct = toolbox()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = ct.convert(
            made,
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,  # adds no casts: float16 stays what it is
            minimum_deployment_target=ct.target[target],
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))
    spec = model.get_spec()
    told = spec.description.metadata
    told.shortDescription = description
    told.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    bare = spec.SerializeToString(deterministic=True)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(bare)
    _name_by_path(path / "Manifest.json")


def _name_by_path(manifest: Path) -> None:
    """coremltools draws the identifiers of a package's items at random, and writes the file again,
    with sorted keys, wherever it opens the package: then it must find it so."""
    told = json.loads(manifest.read_text(encoding="utf-8"))
    items = told["itemInfoEntries"]
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, items[old]["path"])).upper() for old in items}
    told["itemInfoEntries"] = {names[old]: item for old, item in items.items()}
    told["rootModelIdentifier"] = names[told["rootModelIdentifier"]]
    manifest.write_text(json.dumps(told, indent=4, sort_keys=True) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------- weights


def stored(
    g: Graph,
    weight: Floats,
    scheme: Scheme | None = None,
    table: bool = False,
    transposed: bool = False,
) -> Var:
    """A weight (out, in, ...) as its form stores it; `transposed`: as (in, out, ...).

    `table`: it is the token table, or a kernel of the stem.
    """
    rows = weight.reshape(len(weight), -1)
    form = forms.form_of(g.precision, scheme, table, rows.shape[1])
    g.stored[form.name] += weight.size
    if form.said:
        g.said.append(f"{g.place}: {form.name} in the place of 4 bits, because {form.said}")

    def turned(array: NDArray) -> NDArray:
        """One number for each weight, or for each group of them."""
        every = array.size == weight.size
        shape = weight.shape if every else (*array.shape, *[1] * (weight.ndim - 2))
        whole = array.reshape(shape)
        return np.ascontiguousarray(whole.swapaxes(0, 1) if transposed else whole)

    if form.kind == "float":
        return g.constant(turned(weight))
    forms.halved(weight, g.place)  # all others are float16 at work
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


# -------------------------------------------------------------------------------- linear layers


def linear(g: Graph, x: Var, layers: Sequence[Linear]) -> Var:
    """Linear layers one after the other (a low-rank layer is two), of all positions.

    A layer that reads some inputs only picks them, so that no zeros are stored; channels first it
    has been given the zeros, see `aligned_inputs`.
    """
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
    gamma, beta = g.constant(weight), g.constant(bias)
    given = {"axes": [g.features], "gamma": gamma, "beta": beta, "epsilon": g.dtype(epsilon)}
    return g.op("layer_norm", x=x, **given)


def gelu(g: Graph, x: Var) -> Var:
    """The exact one, with erf, as Whisper has it."""
    return g.op("gelu", x=x, mode="EXACT")


def conv(g: Graph, x: Var, kernel: Floats, bias: Floats, stride: int, scheme: Scheme | None) -> Var:
    """x (1, in, n) or (1, in, 1, n) -> (1, out, n / stride) or likewise; kernel (out, in, 3)."""
    strides, pad = [stride], [1, 1]
    if g.channels_first:
        kernel, strides, pad = kernel[:, :, None], [1, stride], [0, 0, 1, 1]
    weight = stored(g, kernel, scheme, table=True)
    given = {"strides": strides, "pad_type": "custom", "pad": pad}
    return g.op("conv", x=x, weight=weight, bias=g.constant(bias), **given)


class TokenTable:
    """The tied token table, stored once, (vocab, d_model): rows are looked up and multiplied.

    Channels first it stands in chunks that the Neural Engine takes.
    """

    def __init__(self, g: Graph, weight: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        count = -(-len(weight) // (CHUNK - 1)) if g.channels_first else 1
        self.chunks = [
            stored(g, chunk, scheme, table=True) for chunk in np.array_split(weight, count)
        ]

    def look_up(self, ids: Var) -> Var:
        """ids (1,) -> (1, d_model)."""
        if len(self.chunks) == 1:
            return self.g.gather(self.chunks[0], ids, 0)
        start, found = 0, []
        for chunk in self.chunks:
            found.append(self._row_or_zeros(chunk, ids, start))
            start += chunk.shape[0]
        return self.g.sum(self.g.concat(found, 0), 0)

    def _row_or_zeros(self, chunk: Var, ids: Var, start: int) -> Var:
        g = self.g
        place = g.op("sub", x=ids, y=np.int32(start))
        last = np.int32(chunk.shape[0] - 1)
        near = g.op("minimum", x=g.op("maximum", x=place, y=np.int32(0)), y=last)
        inside = g.cast(g.op("equal", x=place, y=near), np.dtype(g.dtype).name)
        return g.mul(g.gather(chunk, near, 0), g.reshape(inside, 1, 1))

    def logits(self, x: Var) -> Var:
        """x (1, 1, d_model) -> (1, 1, vocab)."""
        parts = [self.g.matmul(x, chunk, transpose_y=True) for chunk in self.chunks]
        return self.g.concat(parts, 2)


class FactorisedTable:
    """The tied token table as a product, rows (vocab, r) and basis (r, d_model), each once."""

    def __init__(self, g: Graph, rows: Floats, basis: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.rows, self.basis = TokenTable(g, rows, scheme), stored(g, basis, scheme, table=True)

    def look_up(self, ids: Var) -> Var:
        """ids (1,) -> (1, d_model)."""
        return self.g.matmul(self.rows.look_up(ids), self.basis)

    def logits(self, x: Var) -> Var:
        """x (1, 1, d_model) -> (1, 1, vocab)."""
        return self.rows.logits(self.g.matmul(x, self.basis, transpose_y=True))


# ------------------------------------------------------------------ shapes that the engine favours

ALIGNED = 64
"""What inner dimensions are a multiple of, channels first."""


def aligned_dim(heads: int, dim: int) -> int:
    """The width of a head from `dim` on with which all heads together are aligned."""
    step = ALIGNED // gcd(ALIGNED, heads)
    return -(-dim // step) * step


def more_outputs(layers: Sequence[Linear], dim: int, wide: int) -> list[Linear]:
    """Each group of `dim` outputs filled up to `wide`, with outputs that are always zero."""
    *first, last = layers
    weight = _filled(last.weight, dim, wide)
    bias = None if last.bias is None else _filled(last.bias, dim, wide)
    return [*first, replace(last, weight=weight, bias=bias)]


def more_inputs(g: Graph, layers: Sequence[Linear], dim: int, wide: int) -> list[Linear]:
    """Each group of `dim` inputs filled up to `wide`, with inputs that do not count."""
    first, *rest = layers
    several = first.weight.shape[1] > dim
    if several and wide > dim:  # behind the last one, they move none
        first = _without_blocks(g, first)
    return [replace(first, weight=_filled(first.weight.T, dim, wide).T), *rest]


def aligned(g: Graph, layers: Sequence[Linear]) -> list[Linear]:
    """All inputs are read, with zeros for those that do not count, and ranks are aligned."""
    first, *rest = layers
    if first.inputs is not None:
        wide = np.zeros((len(first.weight), first.features), np.float32)
        wide[:, first.inputs] = first.weight
        first = replace(_without_blocks(g, first), weight=wide, inputs=None)
    if not rest:
        return [first]
    rank = len(first.weight)
    room = aligned_dim(1, rank)
    return [*more_outputs([first], rank, room), *more_inputs(g, rest, rank, room)]


def _without_blocks(g: Graph, layer: Linear) -> Linear:
    """A checkpoint's own 4-bit grid, whose blocks would be torn apart, is stored in 8 bits."""
    if layer.scheme is None or layer.scheme.bits != 4:
        return layer
    g.said.append(f"{g.place}: int8 in the place of 4 bits, because zeros stand between its inputs")
    return replace(layer, scheme=replace(layer.scheme, bits=8))


def _filled(array: Floats, dim: int, wide: int) -> Floats:
    """Groups of `dim` rows -> groups of `wide`, zeros behind every group's own."""
    groups = array.reshape(-1, dim, *array.shape[1:])
    pads = [(0, 0), (0, wide - dim), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(groups, pads).reshape(-1, *array.shape[1:])


# ------------------------------------------------------------------------------------- attention


def self_attention(g: Graph, q: Var, k: Var, v: Var, heads: Heads) -> Var:
    """Over a whole sequence, of q that has its scale; widths heads * qk_dim, twice, and heads *
    v_dim, or where k and v have the width of one head, that is for all."""
    if g.channels_first:
        return _head_by_head(g, q, k, v, heads)
    q, k, v = (
        _in_heads(g, x, dim) for x, dim in ((q, heads.qk_dim), (k, heads.qk_dim), (v, heads.v_dim))
    )
    weights = g.softmax(g.matmul(q, k, transpose_y=True), -1)
    mixed = g.transpose(g.matmul(weights, v), 0, 2, 1, 3)  # (1, n, heads, v_dim)
    return g.reshape(mixed, 1, mixed.shape[1], heads.count * heads.v_dim)


def _in_heads(g: Graph, x: Var, dim: int) -> Var:
    """(1, n, heads * dim) -> (1, heads, n, dim)."""
    _, n, width = x.shape
    return g.transpose(g.reshape(x, 1, n, width // dim, dim), 0, 2, 1, 3)


def _head_by_head(
    g: Graph, q: Var, keys: Var, values: Var, heads: Heads, mask: Var | None = None
) -> Var:
    """q (1, width, 1, n), keys and values (1, width, 1, m), mask (1, m, 1, 1)."""

    def parts(x: Var, dim: int, axis: int) -> list[Var]:
        cut = g.split(x, [dim] * (x.shape[axis] // dim), axis)
        return cut if len(cut) == heads.count else cut * heads.count

    turned = g.transpose(keys, 0, 3, 2, 1)  # (1, m, 1, width)
    mixed = []
    for query, key, value in zip(
        parts(q, heads.qk_dim, 1),
        parts(turned, heads.qk_dim, 3),
        parts(values, heads.v_dim, 1),
        strict=True,
    ):
        scores = g.einsum(key, query)  # (1, m, 1, n)
        weights = g.softmax(scores if mask is None else g.add(scores, mask), 1)
        mixed.append(g.einsum(value, weights))
    return g.concat(mixed, 1)


def written(g: Graph, cache: Var, new: Var, here: Var) -> Var:
    """cache (1, width, 1, room) with `new` (1, width, 1, 1) where `here` (1, 1, 1, room) is 1."""
    kept = g.mul(cache, g.op("sub", x=g.constant(1.0), y=here))
    return g.add(kept, g.mul(new, here))


def cached_attention(g: Graph, q: Var, keys: Var, values: Var, mask: Var, heads: Heads) -> Var:
    """Of one position, q with its scale: keys (1, heads * qk_dim, 1, room), values alike, mask
    (1, room), 0 or very negative."""
    room = keys.shape[3]
    if g.channels_first:
        return _head_by_head(g, q, keys, values, heads, g.reshape(mask, 1, room, 1, 1))
    q = g.reshape(q, 1, heads.count, 1, heads.qk_dim)
    keys = g.reshape(keys, 1, heads.count, heads.qk_dim, room)
    values = g.reshape(values, 1, heads.count, heads.v_dim, room)
    weights = g.softmax(g.add(g.matmul(q, keys), g.reshape(mask, 1, 1, 1, room)), -1)
    return g.reshape(g.matmul(weights, values, transpose_y=True), 1, 1, heads.count * heads.v_dim)


def cross_attention(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    """Of one position, q with its scale, over the encoder's `states`, (1, d_model, 1, positions).

    Returns what is mixed, of width heads * v_dim, and the heads' weights: (1, heads, positions), or
    channels first (1, positions, 1, heads). Keys and values of the positions are never made. With
    W_k and W_v a head's rows, X the states, a column each, and p the weights of the head,

        scores = q^T (W_k X)   = (W_k^T q)^T X
        mixed  = (W_v X) p + b = W_v (X p) + b

    for p sums to one; a bias of the keys would add the same to all scores, which a softmax does not
    see. The right-hand sides take heads * d_model * (d_model + positions) products each and the
    left-hand ones d_model**2 * positions: at Whisper's sizes, thirty to fifty times as many, for
    every token anew. Rounded to float16, both are off by as much (tried on states with channels 200
    times as loud as others). Masks of ones and zeros keep the heads apart, so that W_k and W_v stay
    whole.
    """
    attend = _cross_channels_first if g.channels_first else _cross_plain
    *first, last = value
    mixed, weights = attend(g, q, states, key, [*first, replace(last, bias=None)], heads)
    if last.bias is None:
        return mixed, weights
    bias = last.bias[:, None, None] if g.channels_first else last.bias
    return g.add(mixed, bias), weights


def _cross_plain(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    states = g.op("squeeze", x=states, axes=[2])
    q = g.mul(q, _own_channels(heads.count, heads.qk_dim)[None])
    for layer in reversed(key):  # (1, heads, heads * qk_dim) -> (1, heads, d_model)
        q = g.matmul(q, stored(g, layer.weight, layer.scheme))
    weights = g.softmax(g.matmul(q, _picked(g, states, key[0], 1)), -1)
    mixed = g.matmul(weights, _picked(g, states, value[0], 1), transpose_y=True)
    mixed = linear(g, mixed, [replace(layer, inputs=None) for layer in value])
    own = g.mul(mixed, _own_channels(heads.count, heads.v_dim)[None])
    return g.sum(own, 1), weights


def _cross_channels_first(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    q = g.mul(q, _own_channels(heads.count, heads.qk_dim).T[None, :, None])
    for layer in reversed(key):  # (1, heads * qk_dim, 1, heads) -> (1, d_model, 1, heads)
        kernel = stored(g, layer.weight[:, :, None, None], layer.scheme, transposed=True)
        q = g.op("conv", x=q, weight=kernel)
    weights = g.softmax(g.einsum(g.transpose(states, 0, 3, 2, 1), q), 1)
    mixed = linear(g, g.einsum(states, weights), value)  # (1, heads * v_dim, 1, heads)
    own = g.mul(mixed, _own_channels(heads.count, heads.v_dim).T[None, :, None])
    return g.sum(own, 3), weights


def _own_channels(heads: int, dim: int) -> Floats:
    """Which channels are a head's: ones and zeros, (heads, heads * dim)."""
    return np.eye(heads, dtype=np.float32).repeat(dim, axis=1)


def mean_weights(g: Graph, weights: Sequence[Var], chosen: Sequence[Sequence[int]]) -> Var:
    """Of layers' cross-attention weights the mean over some heads of each: (1, positions)."""
    axis, found = (3 if g.channels_first else 1), []
    for value, heads in zip(weights, chosen, strict=True):
        if heads:
            mask = np.zeros(value.shape[axis], np.float32)
            mask[list(heads)] = 1
            found.append(g.sum(g.mul(value, mask if axis == 3 else mask[:, None]), axis))
    total = found[0]
    for more in found[1:]:
        total = g.add(total, more)
    mean = g.mul(total, 1 / sum(map(len, chosen)))
    return g.reshape(mean, 1, int(np.prod(mean.shape)))


# --------------------------------------------------------------------------------------- log-mel


def log_mel(g: Graph, pcm: Var, extractor: Any) -> Var:
    """Whisper's front end in float32: pcm (samples,) -> (1, n_mels, samples / hop).

    A Hann-windowed DFT as a convolution, mel filters, log10, and at most 8 below the loudest.
    """
    n_fft, hop, (samples,) = extractor.n_fft, extractor.hop_length, pcm.shape
    bins = n_fft // 2 + 1
    # mirrored at both ends; the last frame of a centred transform is left out, as transformers does
    pad = [0, 0, 0, 0, n_fft // 2, n_fft // 2 - hop]
    x = g.op("pad", x=g.reshape(pcm, 1, 1, samples), pad=pad, mode="reflect")
    x = g.op("conv", x=x, weight=stored(g, _waves(n_fft)), strides=[hop], pad_type="valid")
    cosines, sines = g.split(g.mul(x, x), [bins, bins], 1)  # (1, bins, frames)
    filters = g.constant(extractor.mel_filters.T[None])  # (1, n_mels, bins)
    mel = g.op("maximum", x=g.matmul(filters, g.add(cosines, sines)), y=np.float32(1e-10))
    log10 = g.mul(g.op("log", x=mel), 1 / float(np.log(10)))
    loudest = g.op("reduce_max", x=log10, axes=[1, 2], keep_dims=True)
    log10 = g.op("maximum", x=log10, y=g.add(loudest, -8.0))
    return g.mul(g.add(log10, 4.0), 0.25)


def _waves(n_fft: int) -> Floats:
    """hann(n) cos(2 pi k n / n_fft) for k = 0 ... n_fft / 2, then sines: (n_fft + 2, 1, n_fft).

    float64 products rounded once.
    """
    n, k = np.arange(n_fft), np.arange(n_fft // 2 + 1)[:, None]
    angle = 2 * np.pi * (k * n % n_fft) / n_fft
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft)
    return (np.concatenate([np.cos(angle), np.sin(angle)]) * hann)[:, None].astype(np.float32)
