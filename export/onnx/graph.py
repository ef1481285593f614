"""The operators we emit: a small builder of ONNX graphs, and Whisper's parts written with it.

A value is its name. Products run in float32, or in int8 or int4 with weights quantised here (by
quantise.py) and activations quantised as they come. The runtime's fused operators are chosen on
purpose (domain com.microsoft): MultiHeadAttention, DynamicQuantizeMatMul for int8, MatMulNBits for
int4, Gelu. MultiHeadAttention wants
keys and values of one width where they come in heads (cached or from the encoder); other shapes
take MatMul and Softmax. All graphs have batch 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export import quantise as quantisers
from export.artifact_files import Spec
from export.quantise import Scheme
from export.weights import Floats, Heads, Linear

FUSED = "com.microsoft"
OPSETS = {"": 18, FUSED: 1}
IR_VERSION = 9
PRECISIONS = ("fp32", "fp16", "int8", "int4")
INT8, INT4, FLOAT = Scheme(8), Scheme(4), Scheme(32)
DTYPES = {
    "bool": TensorProto.BOOL,
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
SPARE = 32
"""Room behind the encoder's keys and values: so many tokens can be decoded in one step."""
SMOOTHING = 0.75
"""How much of the range of a token table's columns is moved to what is multiplied with them."""
GELU_DEPTH = 0.17
"""No value of GELU is below minus this."""
CHANNELS = "PER_CHANNEL"
PIECE_BYTES = 2**21
"""What is wide on its way (frames of sound, hidden units) is computed for so much of it at a time.
Measured on whisper-tiny, hidden units in pieces: a peak 16 MB lower, 2 to 4 % less time."""


class Graph:
    """Nodes and constants of one graph under construction. Equal constants are stored once.

    `schemes` says how single weights are stored, by what they belong to, where the graph quantises
    (int8 and int4); the others store all of them as float32, or as float16 (fp16).
    """

    def __init__(
        self,
        precision: str,
        schemes: Mapping[Any, Scheme] | None = None,
        int8_cache: bool = True,
    ) -> None:
        self.quantises = precision in ("int8", "int4")
        self.int8_cache = self.quantises and int8_cache
        """The encoder's keys and values are int8."""
        self.halves = precision != "fp32"
        """Floats are stored as float16, and widened by the runtime as it loads the graph."""
        self.matrices = {"int8": INT8, "int4": INT4}.get(precision, FLOAT)
        self.schemes = schemes or {}
        self._nodes: list[onnx.NodeProto] = []
        self._quantised: dict[str, list[str]] = {}
        self._constants: dict[bytes, onnx.TensorProto] = {}
        self._prefix = ""

    def constant(self, value: NDArray | float | int | Sequence[int]) -> str:
        """A stored array; Python integers become int64, floats float32."""
        array = np.asarray(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        array = np.array(array, order="C")  # ascontiguousarray would give scalars an axis
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return self._constants[key].name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """One operator with one output; returns the output's name."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: str,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: object,
    ) -> list[str]:
        """One operator with several outputs: how many, or their names."""
        name = f"{self._prefix}{kind}_{len(self._nodes)}"
        if isinstance(outputs, int):
            outputs = [f"{name}.{i}" for i in range(outputs)]
        node = helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes)
        self._nodes.append(node)
        return list(outputs)

    def scheme(self, wanted: Scheme | None, usual: Scheme | None = None) -> Scheme:
        """How a weight is stored for which that is wanted; `usual`: other than matrices are."""
        return wanted or usual or self.matrices if self.quantises else FLOAT

    def quantised(self, value: str) -> list[str]:
        """A value in 8 bits with its scale and zero point; the same ones whenever it is asked."""
        if value not in self._quantised:
            self._quantised[value] = self.ops("DynamicQuantizeLinear", value, outputs=3)
        return self._quantised[value]

    def name(self, value: str, name: str) -> str:
        """Give a value a name that readers of the graph can rely on."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if old == value else old for old in names]
        return name

    @contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Names of the nodes made inside begin with `prefix/`: a profiler can tell them apart."""
        before, self._prefix = self._prefix, f"{self._prefix}{prefix}/"
        yield
        self._prefix = before

    def model(self, name: str, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(spec) for spec in inputs],
            [_value_info(spec) for spec in outputs],
            list(self._constants.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgewhisper"
        )


def _value_info(spec: Spec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype], spec.shape)


# -------------------------------------------------------------------------------- linear layers


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


# ------------------------------------------------------------------------------ tables and norms


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


def sinusoids(g: Graph, length: str, rates: Floats) -> str:
    """Whisper's positions: length (1,) int64, angles per position (d / 2,) -> (length, d)."""
    stop = g.op("Squeeze", length, g.constant([0]))
    places = g.op("Range", g.constant(0), stop, g.constant(1))
    column = g.op("Unsqueeze", g.op("Cast", places, to=TensorProto.FLOAT), g.constant([1]))
    angles = g.op("Mul", column, g.constant(rates))  # (length, d / 2)
    return g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=1)


def in_pieces(g: Graph, x: str, pieces: int, work: Callable[[str], str], axis: int = 1) -> str:
    """What `work` makes of x, for so many parts of the positions along `axis` one by one."""
    if pieces == 1:
        return work(x)
    parts = g.ops("Split", x, outputs=pieces, axis=axis, num_outputs=pieces)
    return g.op("Concat", *(work(part) for part in parts), axis=axis)


def pieces_of(width: int, lengths: Sequence[int]) -> int:
    """In how many pieces windows of these lengths are computed, of so many floats a position.

    Split rounds the pieces' length up: there are so many that none is empty in any window.
    """
    wanted = -(-4 * width * max(lengths) // PIECE_BYTES)
    return next(n for n in range(wanted, 0, -1) if all(-(-m // -(-m // n)) == n for m in lengths))


def layer_norm(g: Graph, x: str, weight: Floats, bias: Floats, epsilon: float) -> str:
    return g.op(
        "LayerNormalization", x, g.constant(weight), g.constant(bias), axis=-1, epsilon=epsilon
    )


def gelu(g: Graph, x: str) -> str:
    """The exact one, with erf, as Whisper has it."""
    return g.op("Gelu", x, domain=FUSED)


def column_scales(table: Floats) -> Floats:
    """Powers of two, (columns,), near the largest magnitude of each to the power of SMOOTHING."""
    largest = np.maximum(np.abs(table).max(0), 2.0**-100)
    return np.exp2(np.round(SMOOTHING * np.log2(largest))).astype(np.float32)


class TokenTable:
    """The tied token table, stored once, (vocab, d_model): rows are looked up and multiplied.

    In int8 every token has its own scale, which both uses share. A few columns of Whisper's tables
    are far larger than the others and would take the range of the codes. So columns are divided by
    powers of two, and what meets them is multiplied by these, as SmoothQuant moves range from one
    factor to the other (arXiv 2211.10438, eq. 3). A table whose scheme the checkpoint names is
    stored as it is. One operator alone multiplies with rows as they lie; the runtime's packed copy
    of them is what its product reads, and look-ups touch few rows, so of a table that is mapped
    from a file little stays in memory.
    """

    def __init__(self, g: Graph, weight: Floats, scheme: Scheme | None = None) -> None:
        self.g, self.vocab = g, len(weight)
        self.scale: str | None = None
        self.columns: str | None = None
        if scheme is None and g.quantises:
            columns = column_scales(weight)
            weight, self.columns = weight / columns, g.constant(columns)
        scheme = g.scheme(scheme, INT8)
        if scheme.bits == 8:
            q, scale = quantise(weight, scheme)
            self.table, self.scale = g.constant(q), g.constant(scale)
        else:
            self.table = widened(g, weight, scheme)

    def look_up(self, ids: str) -> str:
        """ids (b, s) -> (b, s, d_model)."""
        return self._scaled(self.g.op("Gather", self.table, ids), ids)

    def widened(self) -> str:
        """The whole table in float32, (vocab, d_model)."""
        return self._scaled(self.table)

    def _scaled(self, rows: str, ids: str = "") -> str:
        g = self.g
        if self.scale is None:
            return rows
        scale = g.op("Gather", self.scale, ids) if ids else self.scale
        column = g.op("Unsqueeze", scale, g.constant([-1]))
        rows = g.op("Mul", g.op("Cast", rows, to=TensorProto.FLOAT), column)
        return g.op("Mul", rows, self.columns) if self.columns else rows

    def logits(self, x: str) -> str:
        """x (b, n, d_model) -> (b, n, vocab)."""
        g = self.g
        shape = g.op("Concat", g.op("Shape", x, end=-1), g.constant([self.vocab]), axis=0)
        x = g.op("Flatten", x, axis=-1)
        if self.scale is None:
            return g.op("Reshape", g.op("Gemm", x, self.table, transB=1), shape)
        q, scale, zero = g.quantised(g.op("Mul", x, self.columns) if self.columns else x)
        none = g.constant(np.zeros(1, np.int8))  # the weights are symmetric
        zeros = g.op("Expand", none, g.constant([self.vocab]))
        weights = [self.table, self.scale, zeros]
        y = g.op("QGemm", q, scale, zero, *weights, domain=FUSED, transB=1)
        return g.op("Reshape", y, shape)


class FactorisedTable:
    """The tied token table as a product, rows (vocab, r) and basis (r, d_model), each stored once.

    In int8 every token and every row of the basis has its own scale. Logits are two int8 products;
    for look-ups the runtime widens the basis once, as it loads the graph, so that embeddings are
    multiplied in float32.
    """

    def __init__(self, g: Graph, rows: Floats, basis: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.rows, self.basis = TokenTable(g, rows, scheme), TokenTable(g, basis, scheme)

    def look_up(self, ids: str) -> str:
        """ids (b, s) -> (b, s, d_model)."""
        return self.g.op("MatMul", self.rows.look_up(ids), self.basis.widened())

    def logits(self, x: str) -> str:
        """x (b, n, d_model) -> (b, n, vocab)."""
        return self.rows.logits(self.basis.logits(x))


# ------------------------------------------------------------------------------------- attention


def split_heads(g: Graph, x: str, heads: int, dim: int) -> str:
    """(1, n, heads * dim) -> (1, heads, n, dim)."""
    x = g.op("Reshape", x, g.constant([0, 0, heads, dim]))
    return g.op("Transpose", x, perm=[0, 2, 1, 3])


def self_attention(g: Graph, q: str, k: str, v: str, heads: Heads) -> str:
    """Over a whole sequence: q, k (1, n, heads * qk_dim), v (1, n, heads * v_dim)."""
    return g.op("MultiHeadAttention", q, k, v, domain=FUSED, **_fused(heads))


def shared_attention(g: Graph, q: str, k: str, v: str, heads: Heads) -> str:
    """One key and one value for all heads: q (1, n, heads * qk_dim), k (1, n, qk_dim), v likewise.

    No fused operator has keys for all heads at once in a width of their own; MatMul spreads them.
    """
    one_head = g.constant([1])
    keys, values = (g.op("Unsqueeze", x, one_head) for x in (k, v))  # (1, 1, n, dim)
    return _plain_attention(g, q, keys, values, heads)


def ends(g: Graph, ids: str, length: str) -> tuple[str, str]:
    """How many positions a cache holds after the new ones, less one (1,) and as it is (): what
    cached_attention asks for. ids (1, s) are new, `length` (1,) int32 positions are there."""
    new = g.op("Cast", g.op("Shape", ids, start=1, end=2), to=TensorProto.INT32)
    total = g.op("Add", length, new)
    one, first = g.constant(np.array([1], np.int32)), g.constant([0])
    return g.op("Sub", total, one), g.op("Squeeze", total, first)


def cached_attention(
    g: Graph,
    qkv: Sequence[str],
    cache: Sequence[str],
    present: Sequence[str],
    ends: Sequence[str],
    heads: Heads,
    bias: str = "",
) -> str:
    """Causal attention of s new positions over the cached ones and themselves.

    qkv (1, s, heads * dim) each. `cache` is keys and values (1, heads, room, cache_dim), filled as
    far as `ends` says, and where they are int8 the scales of both, (heads * cache_dim,). Writes
    `present`, the same with s more. A caller that binds one buffer as both has it filled in place.
    """
    room = heads.cache_dim
    dims = heads.qk_dim, heads.qk_dim, heads.qk_dim if bias else heads.v_dim
    q, k, v = (padded(g, x, heads.count, room, dim) for x, dim in zip(qkv, dims, strict=True))
    inputs = [q, k, v, *cache[:2], *ends, "", "", "", bias, "", *cache[2:]]
    while not inputs[-1]:
        inputs.pop()
    int8 = {"kv_cache_bit_width": 8, "k_quant_type": CHANNELS, "v_quant_type": CHANNELS}
    y = g.ops(
        "GroupQueryAttention",
        *inputs,
        outputs=[f"{present[0]}.attention", *present],
        domain=FUSED,
        kv_num_heads=heads.count,
        **(int8 if cache[2:] else {}),
        **_fused(heads),
    )[0]
    if heads.v_dim == room:
        return y
    y = g.op("Reshape", y, g.constant([0, 0, heads.count, room]))
    y = g.op("Slice", y, *(g.constant([end]) for end in (0, heads.v_dim, 3)))
    return g.op("Reshape", y, g.constant([0, 0, heads.count * heads.v_dim]))


def cross_attention(
    g: Graph,
    q: str,
    cache: Sequence[str],
    present: Sequence[str],
    ends: Sequence[str],
    heads: Heads,
    bias: str,
) -> str:
    """q (1, s, heads * qk_dim) over the encoder's keys and values, as encoder_cache leaves them.

    The operator puts a key into the cache for every query. There is none to put, so the queries
    stand for them: they fill the spare room behind the encoder's, and `bias` (unseen) hides them.
    """
    return cached_attention(g, [q, q, q], cache, present, ends, heads, bias)


def encoder_cache(g: Graph, x: str, heads: Heads, dim: int) -> list[str]:
    """Keys or values of a whole window, (1, T, heads * dim), as cross_attention reads them.

    (1, heads, T + SPARE, cache_dim); where the graph has an int8 cache, int8, and
    (heads * cache_dim,) scales.
    """
    x = padded(g, x, heads.count, heads.cache_dim, dim)
    scales = []
    if g.int8_cache:
        loudest = g.op("ReduceMax", g.op("Abs", x), g.constant([0, 1]), keepdims=0)
        scale = g.op("Max", g.op("Mul", loudest, g.constant(1 / 127)), g.constant(1e-10))
        # divided beforehand: the operator's own scales along an axis are fifty times as slow
        x = g.op("Mul", x, g.op("Reciprocal", scale))
        x = g.op("QuantizeLinear", x, g.constant(1.0), g.constant(np.array(0, np.int8)))
        scales = [scale]
    x = split_heads(g, x, heads.count, heads.cache_dim)
    return [g.op("Pad", x, g.constant([0, 0, 0, 0, 0, 0, SPARE, 0])), *scales]


def unseen(g: Graph, ids: str, filled: str) -> str:
    """0 for the `filled` (1,) int64 positions of a cache, -1e30 for s behind: (1, 1, s, all)."""
    new = g.op("Shape", ids, start=1, end=2)
    ones = g.constant([1, 1])
    seen = g.op("ConstantOfShape", g.op("Concat", ones, new, filled, axis=0))
    hidden = g.op("Expand", g.constant(-1e30), g.op("Concat", ones, new, new, axis=0))
    return g.op("Concat", seen, hidden, axis=3)


def padded(g: Graph, x: str, heads: int, room: int, dim: int) -> str:
    """(1, n, heads * dim) -> (1, n, heads * room), zeros behind every head's own."""
    if dim == room:
        return x
    x = g.op("Reshape", x, g.constant([0, 0, heads, dim]))
    x = g.op("Pad", x, g.constant([0, 0, 0, 0, 0, 0, 0, room - dim]))
    return g.op("Reshape", x, g.constant([0, 0, heads * room]))


def _fused(heads: Heads) -> dict[str, int | float]:
    return {"num_heads": heads.count, "scale": heads.scale}


def _plain_attention(g: Graph, q: str, keys: str, values: str, heads: Heads) -> str:
    q = split_heads(g, g.op("Mul", q, g.constant(heads.scale)), heads.count, heads.qk_dim)
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), values)
    mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return g.op("Reshape", mixed, g.constant([0, 0, heads.count * heads.v_dim]))


# --------------------------------------------------------------------------------------- log-mel


def log_mel(g: Graph, pcm: str, extractor: Any, lengths: Sequence[int]) -> str:
    """Whisper's front end: pcm (1, samples) -> (1, n_mels, samples / hop), named `log_mel`.

    A Hann-windowed DFT, mel filters (n_fft / 2 + 1, n_mels), log10, and at most 8 below the
    loudest; `extractor` is a WhisperFeatureExtractor. `samples` must be one of the `lengths` times
    its hop length, n_fft a multiple of 4 (Whisper: 3000, 160 and 400).
    """
    n_fft, hop = extractor.n_fft, extractor.hop_length
    filters = _split_filters(extractor.mel_filters.T.astype(np.float32))
    pieces = pieces_of(n_fft, lengths)
    with g.scope("log_mel"):
        frames = _frames(g, pcm, n_fft, hop)
        mel = in_pieces(g, frames, pieces, lambda piece: _mel(g, piece, n_fft, filters))
        log = g.op("Log", g.op("Max", mel, g.constant(1e-10)))
        log10 = g.op("Mul", log, g.constant(1 / np.log(10)))
        loudest = g.op("ReduceMax", log10, keepdims=1)
        log10 = g.op("Max", log10, g.op("Sub", loudest, g.constant(8.0)))
        scaled = g.op("Mul", g.op("Add", log10, g.constant(4.0)), g.constant(0.25))
        return g.name(g.op("Unsqueeze", scaled, g.constant([0])), "log_mel")


def _mel(g: Graph, frames: str, n_fft: int, filters: Sequence[Floats]) -> str:
    """frames (n_fft, n) -> their power in mel bands, (n_mels, n)."""
    halves = zip(filters, _power(g, frames, n_fft), strict=True)  # (n_fft / 4 + 1, n) each
    return g.op("Add", *(g.op("MatMul", g.constant(bands), power) for bands, power in halves))


def _frames(g: Graph, pcm: str, n_fft: int, hop: int) -> str:
    """Overlapping windows, a column each: (1, samples) -> (n_fft, samples / hop), mirrored at both
    ends.

    In columns of `hop` samples, frame f is column f above column f + 1, and so on: what follows
    takes whole rows, every second one or from last to first, and copies nothing sample by sample.
    The last frame of a centred transform is left out, as transformers does.
    """
    pieces = -(-n_fft // hop)
    pads = g.constant([0, n_fft // 2, 0, (pieces - 1) * hop - n_fft // 2])
    rows = g.op("Reshape", g.op("Pad", pcm, pads, mode="reflect"), g.constant([-1, hop]))
    columns = g.op("Transpose", rows, perm=[1, 0])
    shifted = []
    for piece in range(pieces):
        end = [min(hop, n_fft - piece * hop), piece - pieces + 1 or 2**31 - 1]
        shifted.append(
            g.op("Slice", columns, g.constant([0, piece]), g.constant(end), g.constant([0, 1]))
        )
    return g.op("Concat", *shifted, axis=0)


def _power(g: Graph, frames: str, n_fft: int) -> tuple[str, str]:
    """Power spectrum of windowed frames at bins k and at bins n_fft / 2 - k, k = 0 ... n_fft / 4.

    A quarter of the plain DFT's products, by two symmetries. Cosine, sine and Hann window are even
    or odd about n_fft / 2, so samples n and n_fft - n are added or subtracted first; and bin
    n_fft / 2 - k has the cosines and sines of bin k with every second sign turned, so even and odd
    n are summed apart and give one bin by their sum, the other by their difference.
    """
    half = n_fft // 2
    bins = n_fft // 4 + 1
    cosines, sines = [], []
    for first in (2, 1):  # even and odd n
        left = _rows(g, frames, first, half, 2)  # n
        right = _rows(g, frames, n_fft - first, half, -2)  # n_fft - n
        taps = np.arange(first, half, 2)
        odd = g.op("MatMul", _kernel(g, np.sin, taps, n_fft, bins), g.op("Sub", left, right))
        even = g.op("Add", left, right)
        if first == 2:  # the middle sample is its own mirror image; sample 0 is windowed away
            even = g.op("Concat", even, _rows(g, frames, half, half + 1, 1), axis=0)
            taps = np.append(taps, half)
        cosines.append(g.op("MatMul", _kernel(g, np.cos, taps, n_fft, bins), even))
        sines.append(odd)
    low, high = ([g.op(kind, *part) for part in (cosines, sines)] for kind in ("Add", "Sub"))
    return _squared_length(g, *low), _squared_length(g, *high)


def _rows(g: Graph, x: str, start: int, end: int, step: int) -> str:
    return g.op("Slice", x, *(g.constant([value]) for value in (start, end, 0, step)))


def _squared_length(g: Graph, x: str, y: str) -> str:
    return g.op("Add", g.op("Mul", x, x), g.op("Mul", y, y))


def _kernel(g: Graph, wave: Callable, taps: NDArray, n_fft: int, bins: int) -> str:
    """wave(2 pi n k / n_fft) * hann(n) for these n and k < bins: (bins, taps) float32.

    Float64 products rounded once. The runtime makes them as it loads the graph (constant folding):
    one period of the wave is stored, not the matrix.
    """
    angle = 2 * np.pi * np.arange(n_fft) / n_fft
    k = g.op("Range", g.constant(0), g.constant(bins), g.constant(1))
    turn = g.op("Mul", g.op("Unsqueeze", k, g.constant([1])), g.constant(taps))
    window = g.constant(0.5 - 0.5 * np.cos(angle[taps]))
    period = g.op("Gather", g.constant(wave(angle)), g.op("Mod", turn, g.constant(n_fft)))
    return g.op("Cast", g.op("Mul", period, window), to=TensorProto.FLOAT)


def _split_filters(filters: Floats) -> tuple[Floats, Floats]:
    """(n_mels, n_fft / 2 + 1) -> columns of bins k, and of bins n_fft / 2 - k, k <= n_fft / 4.

    The bin in the middle is in both; it counts in the first only.
    """
    bins = filters.shape[1] // 2 + 1
    rising, falling = filters[:, :bins].copy(), filters[:, ::-1][:, :bins].copy()
    falling[:, -1] = 0
    return rising, falling
