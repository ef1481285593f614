"""A small builder of ONNX graphs.

A value is represented by its name. Matrix products run in float32, or in int8 or int4 with weights
quantised by quantise.py and activations quantised at run time. The graphs use fused operators of
onnxruntime (domain com.microsoft): MultiHeadAttention, DynamicQuantizeMatMul for int8, MatMulNBits
for new tokens in int4, Gelu. MultiHeadAttention needs keys and values of one width if they come in
heads (cached or from the encoder); other shapes use MatMul and Softmax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.manifest import Spec
from export.quantise import LAYER_STEPS, Scheme

FUSED = "com.microsoft"
OPSETS = {"": 18, FUSED: 1}
IR_VERSION = 9
INT8, INT4, FLOAT = Scheme(8), Scheme(4, steps=LAYER_STEPS), Scheme(32)
DTYPES = {
    "bool": TensorProto.BOOL,
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}

PIECE_BYTES = 2**21
"""Target size of a wide intermediate value (audio frames, hidden units). Measured for hidden units
on whisper-tiny: the peak memory is 16 MB lower and the time 2 to 4 % shorter."""


class Graph:
    """Nodes and constants of one graph under construction. Equal constants are stored once.
    `schemes` names how single weights are stored in int8 and int4. fp32 stores all weights as
    float32 and fp16 as float16."""

    def __init__(
        self,
        precision: str,
        schemes: Mapping[Any, Scheme] | None = None,
        int8_cache: bool = True,
        mapped: bool = False,
    ) -> None:
        self.mapped = mapped
        """Whether large constants are stored in a file that the runtime maps into memory."""
        self.quantises = precision in ("int8", "int4")
        self.int8_cache = self.quantises and int8_cache
        """Whether the encoder's keys and values are int8."""
        self.halves = precision != "fp32"
        """Whether floats are stored as float16. The runtime widens them when it loads the graph."""
        self.matrices = {"int8": INT8, "int4": INT4}.get(precision, FLOAT)
        self.schemes = schemes or {}
        self._nodes: list[onnx.NodeProto] = []
        self._quantised: dict[str, list[str]] = {}
        self._constants: dict[bytes, onnx.TensorProto] = {}
        self.parts: dict[str, tuple[str, int]] = {}
        """Names of constants that are a part of another -> its name and the first byte there."""
        self._prefix = ""

    def constant(self, value: NDArray | float | int | Sequence[int]) -> str:
        """Store an array and return its name; Python integers become int64, floats float32."""
        array = np.asarray(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        array = np.array(array, order="C")  # ascontiguousarray would add an axis to scalars
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return self._constants[key].name

    def part(self, whole: str, array: NDArray, start: int) -> str:
        """Store an array that is a part of another constant, from its byte `start` on, and return
        its name. A file of mapped weights holds these bytes once."""
        name = self.constant(array)
        self.parts[name] = whole, start
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """Add an operator with one output and return the output's name."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: str,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: object,
    ) -> list[str]:
        """Add an operator with several outputs, given as a number or as names, and return their
        names."""
        name = f"{self._prefix}{kind}_{len(self._nodes)}"
        if isinstance(outputs, int):
            outputs = [f"{name}.{i}" for i in range(outputs)]
        node = helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes)
        self._nodes.append(node)
        return list(outputs)

    def scheme(self, named: Scheme | None, default: Scheme | None = None) -> Scheme:
        """Return how a weight is stored: as `named`, else as `default`, else like all matrices."""
        return named or default or self.matrices if self.quantises else FLOAT

    def quantised(self, value: str) -> list[str]:
        """Return a value in 8 bits with its scale and zero point. Each value is quantised once."""
        if value not in self._quantised:
            self._quantised[value] = self.ops("DynamicQuantizeLinear", value, outputs=3)
        return self._quantised[value]

    def name(self, value: str, name: str) -> str:
        """Rename a value, so that readers of the graph can rely on the name."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if old == value else old for old in names]
        return name

    @contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Prefix the names of nodes made inside with `prefix/`, so that a profiler can group
        them."""
        before, self._prefix = self._prefix, f"{self._prefix}{prefix}/"
        yield
        self._prefix = before

    def model(self, name: str, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> onnx.ModelProto:
        """Return the graph as an ONNX model."""
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


def in_pieces(g: Graph, x: str, pieces: int, compute: Callable[[str], str]) -> str:
    """Apply `compute` to `pieces` parts of x along axis 1 one after the other and join the
    results."""
    if pieces == 1:
        return compute(x)
    parts = g.ops("Split", x, outputs=pieces, axis=1, num_outputs=pieces)
    return g.op("Concat", *(compute(part) for part in parts), axis=1)


def pieces_of(width: int, lengths: Sequence[int]) -> int:
    """Return the number of pieces for `width` floats per position and windows of these lengths.
    Split rounds the length of a piece up; the number is chosen so that no piece is empty in any
    window."""
    most = -(-4 * width * max(lengths) // PIECE_BYTES)
    return next(n for n in range(most, 0, -1) if all(-(-m // -(-m // n)) == n for m in lengths))
