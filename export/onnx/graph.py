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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.manifest import Spec
from export.quantise import Scheme

FUSED = "com.microsoft"
OPSETS = {"": 18, FUSED: 1}
IR_VERSION = 9
INT8, INT4, FLOAT = Scheme(8), Scheme(4), Scheme(32)
DTYPES = {
    "bool": TensorProto.BOOL,
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


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
