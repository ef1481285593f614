"""Where the constants of a graph are stored, and which ones an int8 product must not share.

x86 processors without VNNI add pairs of int8 products in 16 bits, which saturate. onnxruntime
avoids that if a session asks for it (session.x64quantprecision): it rewrites int8 weights and zero
points as uint8 when it loads a graph. It cannot do so if two products read one constant or if the
zero point is an omitted input, so `own_constants` gives each product its own constants. Equal
constants are still stored once; see `Weights`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

SMALL = 1024
"""Constants below this number of bytes are stored in the graph file, among them all shapes, which
the runtime must know when it loads the graph."""
LARGE = 2**17
"""Constants from this number of bytes on are stored in a file of their own, to be mapped. The
runtime copies those in the graph. With 2**20, loading tiny.en took 6 to 26 % more CPU time."""
ALIGNMENT = 64

INT8_PRODUCTS = {"DynamicQuantizeMatMul": (1, 3), "MatMulIntegerToFloat": (1, 5), "QGemm": (3, 5)}
"""Operators with an int8 weight -> the positions of the weight and its zero point in their
inputs."""


def own_constants(model: onnx.ModelProto) -> None:
    """Give each int8 product a weight and a zero point that no other product reads."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    read: set[str] = set()

    def add(tensor: onnx.TensorProto) -> str:
        graph.initializer.append(tensor)
        return tensor.name

    for node in graph.node:
        if node.op_type not in INT8_PRODUCTS:
            continue
        weight, zero = INT8_PRODUCTS[node.op_type]
        node.input.extend([""] * (zero + 1 - len(node.input)))
        if not node.input[zero]:
            node.input[zero] = add(numpy_helper.from_array(np.int8(0), f"{node.name}.zero_point"))
        # a weight expanded to more inputs is a Gather from a constant
        spread = made_by.get(node.input[weight])
        reader, place = (spread, 0) if spread and spread.op_type == "Gather" else (node, weight)
        name = reader.input[place]
        if name in read:
            copy = TensorProto()
            copy.CopyFrom(stored[name])
            copy.name = f"{node.name}.weight"
            reader.input[place] = add(copy)
        read.add(name)


class Weights:
    """A file for the large constants of graphs and for constants that are used several times. Equal
    constants are stored once. The file is created when the first constant is stored."""

    def __init__(self, path: Path, large: int) -> None:
        self.path, self.large = path, large
        self.file: BinaryIO | None = None
        self.places: dict[bytes, int] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()

    def take(
        self, model: onnx.ModelProto, parts: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        """Move the large constants of a graph into the file. `parts` are Graph.parts, whose bytes
        are in the file already."""
        parts = parts or {}
        tensors = sorted(model.graph.initializer, key=lambda tensor: tensor.name in parts)
        keys = [hashlib.sha256(tensor.raw_data).digest() for tensor in tensors]
        copies, offsets = Counter(keys), dict[str, int]()
        for tensor, key in zip(tensors, keys, strict=True):
            length = len(tensor.raw_data)
            whole, start = parts.get(tensor.name, ("", 0))
            if whole in offsets:
                offset = offsets[whole] + start
            elif length >= self.large or (length >= SMALL and copies[key] > 1):
                offset = offsets[tensor.name] = self._place(key, tensor.raw_data)
            else:
                continue
            external_data_helper.set_external_data(tensor, self.path.name, offset, length)
            tensor.ClearField("raw_data")

    def _place(self, key: bytes, data: bytes) -> int:
        self.file = self.file or self.path.open("wb")
        if key not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
            self.places[key] = self.file.tell()
            self.file.write(data)
        return self.places[key]
