"""ONNX files that no artifact should hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(nodes: list, constants: list = (), domains: tuple[str, ...] = ("",)) -> onnx.ModelProto:
    """x (1,) -> y."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], list(constants))
    opsets = [helper.make_opsetid(domain, 1 if domain else 18) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def shape(*sizes: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(sizes, np.int64), "shape")


def add(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """x + w, where w is what is wrong."""
    tensor.name = "w"
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def outside(location: str) -> onnx.ModelProto:
    """A weight in another file."""
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return add(tensor)


def library() -> onnx.ModelProto:
    return model([helper.make_node("Evil", ["x"], ["y"], domain="evil.ops")], [], ("", "evil.ops"))


def undeclared_library() -> onnx.ModelProto:
    return model([helper.make_node("Evil", ["x"], ["y"], domain="evil.ops")])


def endless_loop() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("Identity", ["a"], ["b"]),
        ],
        "body",
        [value("n", TensorProto.INT64, []), value("go", 9, []), value("a", 1, [1])],
        [value("again", 9, []), value("b", 1, [1])],
    )
    true = numpy_helper.from_array(np.array(True), "true")
    return model([helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)], [true])


def function() -> onnx.ModelProto:
    found = model([helper.make_node("Identity", ["x"], ["y"])])
    nodes = [helper.make_node("Identity", ["a"], ["b"])]
    found.functions.append(
        helper.make_function("", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 18)])
    )
    return found


def constant_node(size: int) -> onnx.ModelProto:
    """The shape is a Constant node's, not an initializer."""
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=shape(size)),
        helper.make_node("ConstantOfShape", ["shape"], ["y"]),
    ]
    return model(nodes)


def sparse() -> onnx.ModelProto:
    found = model([helper.make_node("Identity", ["x"], ["y"])])
    found.graph.sparse_initializer.add().dims.append(10**12)
    return found


def deep() -> bytes:
    """Attributes within graphs within attributes, as far down as protobuf would follow."""
    inner = b""
    for _ in range(200):
        attribute = field(5, field(1, b"body") + field(6, inner))
        inner = field(1, field(4, b"Loop") + attribute)
    return field(7, inner)


def field(number: int, body: bytes) -> bytes:
    size, length = len(body), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + body


GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "weights-up": (
        lambda: outside("../secret"),
        r"'w' is stored in '../secret', which is not a file",
    ),
    "weights-absolute": (lambda: outside("/etc/passwd"), r"'/etc/passwd', which is not a file"),
    "weights-unlisted": (lambda: outside("other.bin"), r"'other.bin', which is not a file"),
    "weights-in-a-folder": (lambda: outside("."), r"'.', which is not a file"),
    "library": (library, "operators of 'evil.ops', which need a library"),
    "library-undeclared": (
        undeclared_library,
        "the operator Evil of 'evil.ops' needs a library",
    ),
    "loop": (endless_loop, "a loop or a branch"),
    "functions": (function, "functions or training steps"),
    "sparse": (sparse, "sparse constants"),
    "deep": (deep, "a loop or a branch"),
    "terabytes": (
        lambda: model([helper.make_node("ConstantOfShape", ["shape"], ["y"])], [shape(10**12)]),
        "creates 1000000000000 elements",
    ),
    "terabytes-by-product": (
        lambda: model([helper.make_node("Expand", ["x", "shape"], ["y"])], [shape(10**6, 10**6)]),
        "creates 1000000000000 elements",
    ),
    "terabytes-by-node": (lambda: constant_node(10**12), "creates 1000000000000 elements"),
    "large-attribute": (
        lambda: model([helper.make_node("MatMulNBits", ["x"], ["y"], K=2**50)]),
        "with the number 1125899906842624",
    ),
    "no-data": (
        lambda: add(onnx.TensorProto(data_type=1, dims=[1000, 1000])),
        r"shape \[1000, 1000\] needs 4000000 bytes and has 0",
    ),
    "huge-constant": (
        lambda: add(onnx.TensorProto(data_type=1, dims=[10**6, 10**6])),
        r"has the shape \[1000000, 1000000\]",
    ),
    "negative": (
        lambda: add(onnx.TensorProto(data_type=1, dims=[-4], raw_data=b"0123")),
        r"has the shape \[-4\]",
    ),
    "too-much-data": (
        lambda: add(onnx.TensorProto(data_type=1, dims=[1], raw_data=b"01234567")),
        "needs 4 bytes and has 8",
    ),
    "text": (
        lambda: add(onnx.TensorProto(data_type=8, dims=[1], string_data=[b"x"])),
        "data type 8, not numbers",
    ),
    "many-axes": (
        lambda: add(onnx.TensorProto(data_type=1, dims=[1] * 3000, raw_data=b"0123")),
        "a constant of 9 or more axes",
    ),
    "not-utf-8": (
        lambda: field(7, field(1, field(3, b"\xff\xfe"))),
        "damaged or truncated ONNX graph",
    ),
    "long-name": (lambda: field(7, field(1, field(3, b"x" * 10**6))), "a name of 1000000 bytes"),
    "many-nodes": (lambda: field(7, b"\x0a\x00" * 30_000), "more than 20000 operators"),
    "other-content": (lambda: b"MZ\x90\x00" * 100, "damaged or truncated ONNX graph"),
    "zeros": (lambda: b"\0" * 100, "damaged or truncated ONNX graph"),
    "empty-model": (lambda: model([]), "damaged or truncated ONNX graph"),
}
"""Name -> the file, and what its letter says."""


def write(path: Path, made: onnx.ModelProto | bytes) -> None:
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())


def greedy_for_memory(encoder: Path, elements: int = 2**30) -> None:
    """Make an encoder ask for that many float32 by a computed shape, which no reader can foresee;
    what it computes stays the same."""
    found = onnx.load(encoder)
    graph = found.graph
    target = next(o.name for o in graph.output if o.name.endswith("key_scale"))
    for node in graph.node:
        node.output[:] = ["honest" if name == target else name for name in node.output]
    half = numpy_helper.from_array(np.array([2**15], np.int64), "half")
    rest = numpy_helper.from_array(np.array([elements // 2**15], np.int64), "rest")
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    graph.initializer.extend([half, rest, zero])
    graph.node.extend(
        [
            helper.make_node("Mul", ["half", "rest"], ["many"]),
            helper.make_node("ReduceMax", ["honest"], ["loudest"], keepdims=0),
            helper.make_node("Expand", ["loudest", "many"], ["wide"]),
            helper.make_node("ReduceMax", ["wide"], ["narrow"], keepdims=0),
            helper.make_node("Mul", ["narrow", "zero"], ["nothing"]),
            helper.make_node("Add", ["honest", "nothing"], [target]),
        ]
    )
    onnx.save(found, encoder)
