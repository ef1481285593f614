"""Check an ONNX graph and save it, with its large weights in a file of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from export.manifest import Spec, describe_graph
from export.onnx.constants import LARGE, Weights, own_constants
from export.onnx.graph import Graph
from export.problem import Problem

GraphParts = tuple[Graph, list[Spec], list[Spec]]
"""A graph, its inputs and its outputs."""
PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes of weights in one graph file: protobuf allows 2 GiB, and 1 MiB is left for the nodes."""


def write_graph(
    made: GraphParts,
    folder: Path,
    name: str,
    suffix: str = "",
    edit: Callable[[onnx.ModelProto], None] = lambda model: None,
) -> dict[str, list[dict[str, Any]]]:
    """Write one graph after `edit` has changed it; return its inputs and outputs for the manifest.

    Large weights of a mapped graph are stored in a separate file NAME.weights. The runtime maps it
    into memory, while it copies weights stored in the graph. The int8 products of a mapped graph
    share no constants; see constants.py.
    """
    graph, inputs, outputs = made
    model, path = graph.model(name, inputs, outputs), folder / f"{name}{suffix}.onnx"
    _check(model, path)
    edit(model)
    if graph.mapped:
        own_constants(model)
        with Weights(path.with_suffix(".weights"), LARGE) as weights:
            weights.take(model, graph.parts)
    onnx.save(model, path)
    return describe_graph(inputs, outputs)


def _check(graph: onnx.ModelProto, path: Path) -> None:
    size = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if size > PROTOBUF_LIMIT:
        raise Problem(
            f"{path.name} would take {size / 1e9:.1f} GB; one ONNX file holds less than 2.1 GB",
            hint="export with --precision int8",
        )
    onnx.checker.check_model(graph)
