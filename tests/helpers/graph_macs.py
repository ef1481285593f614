"""Multiply-accumulates of an ONNX graph, counted from the shapes of what flows through it."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from export.onnx.attention import SPARE
from export.onnx.to_onnx import export_onnx

FRONT_END = "log_mel/"


def of_exported(model, processor, folder: Path, context: int) -> tuple[int, int]:
    """Of the encoder's graph, and of the decoder's for one token that sees `context` in all."""
    manifest = export_onnx(model, processor, folder / "artifact", "fp32")
    samples = manifest["audio"]["window_samples"]
    past = {"past_length": np.array([context - 1], np.int32)}
    feeds = {"input_ids": np.zeros((1, 1), np.int64)} | past
    heads = {spec["name"]: spec["shape"][1] for spec in manifest["contract"]["decoder"]["outputs"]}
    for spec in manifest["contract"]["decoder"]["inputs"][2:]:
        made = spec["name"].replace("past.", "present.").replace("cross.", "heard.")
        shape = (1, heads[made], *spec["shape"][2:])
        feeds[spec["name"]] = np.zeros(shape, np.float32)
    pcm = {"pcm": np.zeros((1, samples), np.float32)}
    return (
        count(folder / "artifact" / "encoder.onnx", pcm),
        count(folder / "artifact" / "decoder.onnx", feeds),
    )


def count(path: Path, feeds: dict[str, np.ndarray]) -> int:
    """All MatMul, Conv and attention nodes of one run, without the log-mel front end."""
    model = onnx.load(str(path))
    shapes = run(model, feeds)
    nodes = [node for node in model.graph.node if not node.name.startswith(FRONT_END)]
    plain = (COUNTERS[node.op_type](node, shapes) for node in nodes if node.op_type in COUNTERS)
    return sum(plain) + cached(model, feeds, shapes)


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
    """Scores and mix of every query with every key, (1, s, width) each."""
    query, value = shapes[node.input[0]], shapes[node.output[0]]
    return query[1] * shapes[node.input[1]][1] * (query[2] + value[2])


def cached(model: onnx.ModelProto, feeds: dict, shapes: dict[str, tuple[int, ...]]) -> int:
    """Scores and mix over the filled part of the caches, in the widths that heads have outside
    them. (Inside, widths are multiples of 8, and one position more is multiplied and hidden.)"""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    total = 0
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            query, value = node.input[0], node.output[0]
            if makers[makers[query].input[0]].op_type == "Pad":
                query = makers[makers[makers[query].input[0]].input[0]].input[0]
            if readers[readers[value].output[0]].op_type == "Slice":
                value = readers[readers[readers[value].output[0]].output[0]].output[0]
            own = node.input[3].startswith("past.")
            room = feeds[node.input[3]].shape[2]
            keys = int(feeds["past_length"][0]) + 1 if own else room - SPARE
            total += keys * (shapes[query][2] + shapes[value][2])
    return total


COUNTERS = {
    "MatMul": matmul,
    "Gemm": matmul,
    "Conv": convolution,
    "MultiHeadAttention": attention,
}
