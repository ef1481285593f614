"""The operators we emit for Core ML: a small builder of MIL programs, and Whisper's parts with it.

A value is a variable of coremltools' MIL builder. All programs have batch 1 and fixed shapes, and
every dtype is chosen here: float16, or float32 in a program of that precision, and coremltools'
passes, which would change them, are left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.onnx_graph import Floats, Heads, Linear, Spec
from export.problem import Problem
from export.quantise import Scheme

TARGETS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
"""Deployment target -> version of the specification that it brought. The systems of the same year
(macOS 13, 14, 15) go with them."""
PRECISIONS = ("fp32", "fp16", "int8", "int4", "pal4", "pal6", "pal8")
HIDDEN = -1e4
"""Added to the scores of positions that are not to be seen: -inf would turn into NaN in float16."""

Var = Any
"""A value of the program under construction."""


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
            hint="pip install coremltools, on macOS or on x86-64, or export with --target onnx",
        ) from error
    return coremltools


class Graph:
    """The operators of one program under construction.

    `schemes` says how single weights are stored, by what they belong to, where the program's
    weights are quantised.
    """

    def __init__(
        self, precision: str, target: str, schemes: Mapping[Any, Scheme] | None = None
    ) -> None:
        self.dtype: Any = np.float32 if precision == "fp32" else np.float16
        self.precision, self.target, self.schemes = precision, target, schemes or {}
        self._constants: dict[tuple[Any, ...], Var] = {}
        self._count = 0
        self._prefix = ""

    def op(self, kind: str, **inputs: Any) -> Any:
        """One operator; returns its output, or a list of them."""
        from coremltools.converters.mil import Builder

        self._count += 1
        return getattr(Builder, kind)(name=f"{self._prefix}{kind}_{self._count}", **inputs)

    def constant(self, value: NDArray | float) -> Var:
        """Floats in the program's dtype; small ones that are equal are stored once."""
        array = np.asarray(value, self.dtype)
        key = (array.shape, array.tobytes()) if array.size < 2**16 else (id(array),)
        if key not in self._constants:
            self._constants[key] = self.op("const", val=array)
        return self._constants[key]

    def binary(self, kind: str, x: Var, y: NDArray | float | Var) -> Var:
        """An elementwise operator whose second operand may be numbers."""
        numbers = isinstance(y, float | np.ndarray)
        return self.op(kind, x=x, y=self.constant(y) if numbers else y)

    def add(self, x: Var, y: NDArray | float | Var) -> Var:
        return self.binary("add", x, y)

    def mul(self, x: Var, y: NDArray | float | Var) -> Var:
        return self.binary("mul", x, y)

    def reshape(self, x: Var, *shape: int) -> Var:
        return x if tuple(x.shape) == shape else self.op("reshape", x=x, shape=list(shape))

    def transpose(self, x: Var, *perm: int) -> Var:
        return self.op("transpose", x=x, perm=list(perm))

    def matmul(self, x: Var, y: Var, transpose_y: bool = False) -> Var:
        return self.op("matmul", x=x, y=y, transpose_y=transpose_y)

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


Work = Callable[[Graph, dict[str, Var]], Sequence[Var]]


def program(g: Graph, inputs: Sequence[Spec], outputs: Sequence[Spec], work: Work) -> Any:
    """A MIL program: `work` makes of its inputs, by name, the outputs in their order."""
    ct = toolbox()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}
    places = {s.name: Builder.placeholder(s.shape, kinds[s.dtype]) for s in inputs}
    function = Function(places, opset_version=ct.target[g.target])
    with function:
        made = list(work(g, function.inputs))
        for value, spec in zip(made, outputs, strict=True):
            found = (tuple(value.shape), value.dtype)
            if found != (spec.shape, kinds[spec.dtype]):
                raise AssertionError(f"{spec.name} is {found}, not {spec.shape} {spec.dtype}")
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
    spec.description.metadata.shortDescription = description
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(
        spec.SerializeToString(deterministic=True)
    )
    _name_by_path(path / "Manifest.json")


def _name_by_path(manifest: Path) -> None:
    """coremltools draws the identifiers of a package's items at random."""
    told = json.loads(manifest.read_text(encoding="utf-8"))
    items = sorted(told["itemInfoEntries"].items(), key=lambda item: item[1]["path"])
    named = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in items}
    told["itemInfoEntries"] = {named[old].upper(): item for old, item in items}
    told["rootModelIdentifier"] = named[told["rootModelIdentifier"]].upper()
    manifest.write_text(json.dumps(told, indent=4) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------- linear layers


def matrix(g: Graph, weight: Floats, scheme: Scheme | None = None) -> Var:
    """A weight (out, in) as it is stored."""
    return g.constant(weight)


def linear(g: Graph, x: Var, layers: Sequence[Linear]) -> Var:
    """Linear layers one after the other (a low-rank layer is two): x (1, n, in) -> (1, n, out)."""
    for layer in layers:
        if layer.inputs is not None:
            x = g.op("gather", x=x, indices=layer.inputs.astype(np.int32), axis=-1)
        bias = np.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        weight = matrix(g, layer.weight, layer.scheme)
        x = g.op("linear", x=x, weight=weight, bias=g.constant(bias))
    return x


def layer_norm(g: Graph, x: Var, weight: Floats, bias: Floats, epsilon: float) -> Var:
    return g.op(
        "layer_norm",
        x=x,
        axes=[-1],
        gamma=g.constant(weight),
        beta=g.constant(bias),
        epsilon=g.dtype(epsilon),
    )


def gelu(g: Graph, x: Var) -> Var:
    """The exact one, with erf, as Whisper has it."""
    return g.op("gelu", x=x, mode="EXACT")


def conv(g: Graph, x: Var, kernel: Floats, bias: Floats, stride: int) -> Var:
    """x (1, in, n) -> (1, out, n / stride), three wide."""
    return g.op(
        "conv",
        x=x,
        weight=matrix(g, kernel),
        bias=g.constant(bias),
        strides=[stride],
        pad_type="custom",
        pad=[1, 1],
    )


class TokenTable:
    """The tied token table, stored once, (vocab, d_model): rows are looked up and multiplied."""

    def __init__(self, g: Graph, weight: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.table = matrix(g, weight, scheme)

    def look_up(self, ids: Var) -> Var:
        """ids (1,) -> (1, d_model)."""
        return self.g.op("gather", x=self.table, indices=ids, axis=0)

    def logits(self, x: Var) -> Var:
        """x (1, 1, d_model) -> (1, 1, vocab)."""
        return self.g.matmul(x, self.table, transpose_y=True)


class FactorisedTable:
    """The tied token table as a product, rows (vocab, r) and basis (r, d_model), each stored once."""

    def __init__(self, g: Graph, rows: Floats, basis: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.rows, self.basis = TokenTable(g, rows, scheme), matrix(g, basis, scheme)

    def look_up(self, ids: Var) -> Var:
        """ids (1,) -> (1, d_model)."""
        return self.g.matmul(self.rows.look_up(ids), self.basis)

    def logits(self, x: Var) -> Var:
        """x (1, 1, d_model) -> (1, 1, vocab)."""
        return self.rows.logits(self.g.matmul(x, self.basis, transpose_y=True))


# ------------------------------------------------------------------------------------- attention


def self_attention(g: Graph, q: Var, k: Var, v: Var, heads: Heads) -> Var:
    """Over a whole sequence: q, k (1, n, heads * qk_dim), v (1, n, heads * v_dim).

    k (1, n, qk_dim) and v (1, n, v_dim) are one key and one value for all heads.
    """
    q, k = (_in_heads(g, x, heads.qk_dim) for x in (g.mul(q, float(heads.scale)), k))
    v = _in_heads(g, v, heads.v_dim)
    weights = g.op("softmax", x=g.matmul(q, k, transpose_y=True), axis=-1)
    mixed = g.transpose(g.matmul(weights, v), 0, 2, 1, 3)  # (1, n, heads, v_dim)
    return g.reshape(mixed, 1, mixed.shape[1], heads.count * heads.v_dim)


def _in_heads(g: Graph, x: Var, dim: int) -> Var:
    """(1, n, heads * dim) -> (1, heads, n, dim)."""
    _, n, width = x.shape
    return g.transpose(g.reshape(x, 1, n, width // dim, dim), 0, 2, 1, 3)


def written(g: Graph, cache: Var, new: Var, here: Var) -> Var:
    """cache (1, width, 1, room) with `new` (1, width, 1, 1) where `here` (1, 1, 1, room) is 1."""
    kept = g.mul(cache, g.op("sub", x=g.constant(1.0), y=here))
    return g.add(kept, g.mul(new, here))


def cached_attention(g: Graph, q: Var, keys: Var, values: Var, mask: Var, heads: Heads) -> Var:
    """Of one position: q (1, 1, heads * qk_dim), keys (1, heads * qk_dim, 1, room), values alike,
    mask (1, 1, 1, room) -> (1, 1, heads * v_dim)."""
    room = keys.shape[3]
    q = g.reshape(g.mul(q, float(heads.scale)), 1, heads.count, 1, heads.qk_dim)
    keys = g.reshape(keys, 1, heads.count, heads.qk_dim, room)
    values = g.reshape(values, 1, heads.count, heads.v_dim, room)
    weights = g.op("softmax", x=g.add(g.matmul(q, keys), mask), axis=-1)
    return g.reshape(g.matmul(weights, values, transpose_y=True), 1, 1, heads.count * heads.v_dim)


def cross_attention(
    g: Graph, q: Var, states: Var, key: Sequence[Linear], value: Sequence[Linear], heads: Heads
) -> tuple[Var, Var]:
    """Of one position over the encoder's `states` (1, d_model, positions): q (1, 1, heads * qk_dim)
    -> values mixed (1, 1, heads * v_dim), and the heads' weights (1, heads, positions).

    Keys and values of all positions are never made. With W_k and W_v the rows of one head, and X
    the states, a column each,

        scores = q^T (W_k X)   = (W_k^T q)^T X
        mixed  = (W_v X) p + b = W_v (X p) + b

    for the weights p of a head sum to one; a bias of keys adds the same to all scores, which a
    softmax does not see. The right-hand sides cost heads * d_model * (d_model + positions) products
    each, the left-hand ones d_model**2 * positions: at Whisper's sizes thirty to fifty times more.
    Heads are kept apart by masks of ones and zeros, so that matrices stay whole as they are stored.
    """
    q = g.mul(g.mul(q, float(heads.scale)), _block_mask(heads.count, heads.qk_dim))
    for layer in reversed(key):  # (1, heads, heads * qk_dim) -> (1, heads, d_model)
        q = g.matmul(q, matrix(g, _all_inputs(layer), layer.scheme))
    weights = g.op("softmax", x=g.matmul(q, states), axis=-1)
    mixed = g.matmul(weights, states, transpose_y=True)  # (1, heads, d_model)
    *first, last = value
    mixed = linear(g, mixed, [*first, Linear(last.weight, None, last.inputs, last.features)])
    own = g.mul(mixed, _block_mask(heads.count, heads.v_dim))
    mixed = g.op("reduce_sum", x=own, axes=[1], keep_dims=True)
    return (mixed if last.bias is None else g.add(mixed, last.bias)), weights


def _block_mask(heads: int, dim: int) -> Floats:
    """Which channels are a head's: ones and zeros, (1, heads, heads * dim)."""
    return np.kron(np.eye(heads, dtype=np.float32), np.ones((1, dim), np.float32))[None]


def _all_inputs(layer: Linear) -> Floats:
    """The weight with zeros for the inputs that it does not read."""
    if layer.inputs is None:
        return layer.weight
    wide = np.zeros((len(layer.weight), layer.features), layer.weight.dtype)
    wide[:, layer.inputs] = layer.weight
    return wide


# --------------------------------------------------------------------------------------- log-mel


def log_mel(g: Graph, pcm: Var, extractor: Any) -> Var:
    """Whisper's front end in float32: pcm (samples,) -> (1, n_mels, samples / hop).

    A Hann-windowed DFT as a convolution, mel filters, log10, at most 8 below the loudest.
    """
    n_fft, hop, (samples,) = extractor.n_fft, extractor.hop_length, pcm.shape
    bins = n_fft // 2 + 1
    x = g.reshape(pcm, 1, 1, samples)
    # mirrored at both ends; the last frame of a centred transform is left out, as in transformers
    pads = [0, 0, 0, 0, n_fft // 2, n_fft // 2 - hop]
    x = g.op("pad", x=x, pad=pads, mode="reflect")
    waves = g.op(
        "conv", x=x, weight=_waves(n_fft), strides=[hop], pad_type="valid"
    )  # (1, 2 * bins, frames)
    cosines, sines = g.split(g.op("mul", x=waves, y=waves), [bins, bins], axis=1)
    filters = extractor.mel_filters.astype(np.float32).T[None]  # (1, n_mels, bins)
    mel = g.matmul(g.op("const", val=filters), g.op("add", x=cosines, y=sines))
    mel = g.op("maximum", x=mel, y=np.float32(1e-10))
    log10 = g.op("mul", x=g.op("log", x=mel, epsilon=np.float32(0)), y=np.float32(1 / np.log(10)))
    loudest = g.op("reduce_max", x=log10, axes=[1, 2], keep_dims=True)
    floor = g.op("add", x=loudest, y=np.float32(-8))
    log10 = g.op("maximum", x=log10, y=floor)
    return g.op("mul", x=g.op("add", x=log10, y=np.float32(4)), y=np.float32(0.25))


def _waves(n_fft: int) -> Floats:
    """hann(n) cos(2 pi k n / n_fft) for k = 0 ... n_fft / 2, then sines: (n_fft + 2, 1, n_fft)."""
    n, k = np.arange(n_fft), np.arange(n_fft // 2 + 1)[:, None]
    angle = 2 * np.pi * (k * n % n_fft) / n_fft
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft)
    waves = np.concatenate([np.cos(angle), np.sin(angle)]) * window
    return waves[:, None].astype(np.float32)
