"""The weights that a saved ONNX graph multiplies with, taken apart without our own unpacking."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

INT8 = {"DynamicQuantizeMatMul": (1, 2), "MatMulIntegerToFloat": (1, 3), "QGemm": (3, 4)}
"""Operators of int8 products -> their inputs that are the weight and its scale."""
ROWS = ("QGemm", "Gemm")
"""Operators whose weight lies as (out, in)."""
CASTS = {onnx.TensorProto.FLOAT: np.float32}


def stored_rows(*paths: Path) -> dict[bytes, set[str]]:
    """Every row of every stored weight, as the bytes of its floats -> the operators that read it,
    those of int8 products under one name.

    A row holds the weights of one output: bitwise equal rows are found, and nothing else.
    """
    found: dict[bytes, set[str]] = defaultdict(set)
    for path in paths:
        graph = onnx.load(path).graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        makers = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            weight = _weight(node, constants, makers)
            for row in [] if weight is None else weight:
                kind = "int8" if node.op_type in INT8 else node.op_type
                found[(row + np.float32(0)).tobytes()].add(kind)
    return found


def _weight(node, constants, makers) -> np.ndarray | None:
    """(out, in) float32; None where the operator has no stored weight."""
    if node.op_type == "MatMulNBits":
        return _blocks(node, constants, makers)
    if node.op_type not in ("MatMul", "Conv", "Gemm", *INT8):
        return None
    place, scale = INT8.get(node.op_type, (1, None))
    weight = _value(node.input[place], constants, makers)
    if weight is None:
        return None
    if node.op_type == "Conv":
        return weight.reshape(len(weight), -1).astype(np.float32)
    rows = np.ascontiguousarray(weight if node.op_type in ROWS else weight.T)
    return rows if scale is None else rows * constants[node.input[scale]].reshape(-1, 1)


def _blocks(node, constants, makers) -> np.ndarray:
    """MatMulNBits' documentation: two codes a byte, the first one low, zero point 8."""
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    packed, scale = (_value(name, constants, makers) for name in node.input[1:3])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.float32) - 8
    wide = codes.reshape(*packed.shape[:2], -1) * scale[:, :, None]
    return np.ascontiguousarray(wide.reshape(len(packed), -1)[:, : settings["K"]])


def _value(name, constants, makers) -> np.ndarray | None:
    """A constant, or what the runtime makes of constants as it loads the graph."""
    if name in constants:
        return constants[name]
    node = makers.get(name)
    if node is None:
        return None
    inputs = [_value(other, constants, makers) for other in node.input]
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if any(value is None for value in inputs):
        return None
    if node.op_type == "Gather":
        return np.take(inputs[0], inputs[1], axis=settings["axis"])
    if node.op_type == "Concat":
        return np.concatenate(inputs, axis=settings["axis"])
    if node.op_type == "Cast":
        return inputs[0].astype(CASTS[settings["to"]])
    if node.op_type == "Mul":
        return inputs[0] * inputs[1]
    return None


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Zeros of different sign differ."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
