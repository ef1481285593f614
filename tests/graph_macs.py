"""Multiply-accumulates of an ONNX graph, counted from the shapes of what flows through it."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from export.shrink import layer_shapes
from export.to_onnx import export_onnx

FRONT_END = "log_mel/"


def of_exported(model, processor, folder: Path, context: int) -> tuple[int, int]:
    """Of the encoder's graph, and of the decoder's for one token that sees `context` in all."""
    manifest = export_onnx(model, processor, folder / "artifact", "fp32")
    samples = manifest["audio"]["window_samples"]
    shapes = layer_shapes(model)["decoder"]
    feeds = {"input_ids": np.zeros((1, 1), np.int64)}
    for spec in manifest["contract"]["decoder"]["inputs"][1:]:
        layer, kind = spec["name"].split(".")[1:]
        attention = {"past": "self_attn", "cross": "encoder_attn"}[spec["name"].split(".")[0]]
        shape = shapes[int(layer)][attention]
        length = context - 1 if attention == "self_attn" else model.config.max_source_positions
        dim = shape["qk_dim" if kind == "key" else "v_dim"]
        feeds[spec["name"]] = np.zeros((1, shape["heads"], length, dim), np.float32)
    pcm = {"pcm": np.zeros((1, samples), np.float32)}
    return (
        count(folder / "artifact" / "encoder.onnx", pcm),
        count(folder / "artifact" / "decoder.onnx", feeds),
    )


def count(path: Path, feeds: dict[str, np.ndarray]) -> int:
    """All MatMul, Conv and MultiHeadAttention nodes of one run, without the log-mel front end."""
    model = onnx.load(str(path))
    shapes = run(model, feeds)
    nodes = [node for node in model.graph.node if not node.name.startswith(FRONT_END)]
    return sum(COUNTERS[node.op_type](node, shapes) for node in nodes if node.op_type in COUNTERS)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor: all are made outputs, and nothing is optimised away."""
    named = {output.name for output in model.graph.output}
    every = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in every if n not in named)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    shapes = {n: a.shape for n, a in zip(names, session.run(None, feeds), strict=True)}
    shapes |= {name: array.shape for name, array in feeds.items()}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def matmul(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    return prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def convolution(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    return prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])


def attention(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Scores and mix of every query with every key: (1, s, width) and (1, heads, past, dim)."""
    query, value = shapes[node.input[0]], shapes[node.output[0]]
    keys = shapes[node.input[1]][-2]
    if len(node.input) > 6:
        keys += shapes[node.input[6]][-2]
    return query[1] * keys * (query[2] + value[2])


COUNTERS = {"MatMul": matmul, "Conv": convolution, "MultiHeadAttention": attention}
