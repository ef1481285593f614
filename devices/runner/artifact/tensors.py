"""Inputs and outputs of the graphs: checks the manifest's entries and the graphs against them."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..problem import RunnerProblem
from .fields import Field
from .files import AGAIN, MANIFEST

MOST_TENSOR_BYTES = 2**28
DTYPES = {
    "float32": 4,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Data type -> bytes per element."""
ONE_EXPORT = "its files are not of one export: copy the whole artifact again, or export it again"


def check_graph(graph: Field) -> dict[str, list[Field]]:
    """Return the checked inputs and outputs of a graph in the manifest, and its states if any."""
    sides = ("inputs", "outputs", *(["states"] if graph.get("states") else []))
    specs_by_side = {side: graph.at(side).each() for side in sides}
    for specs in specs_by_side.values():
        names = [check_spec(spec) for spec in specs]
        if len(set(names)) < len(names):
            raise RunnerProblem(f"{graph.path}: {graph.where} names a tensor twice", AGAIN)
    return specs_by_side


def check_spec(spec: Field) -> str:
    """Return the name of a tensor; raise RunnerProblem for a bad type or too large a shape."""
    dtype = spec.at("dtype")
    if dtype.value not in tuple(DTYPES):
        raise dtype.wrong(f"one of {', '.join(DTYPES)}")
    shape = spec.at("shape")
    axes = [a.text() if isinstance(a.value, str) else a.count(1, 2**31) for a in shape.each(8)]
    size = DTYPES[dtype.value] * math.prod(a for a in axes if isinstance(a, int))
    if size > MOST_TENSOR_BYTES:
        raise RunnerProblem(
            f"{spec.path}: {shape.where} {axes} takes {size} bytes; the limit is "
            f"{MOST_TENSOR_BYTES}",
            AGAIN,
        )
    return spec.at("name").text()


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two tensors have the same type, rank and sizes of fixed axes."""
    pairs = list(zip(one["shape"], other["shape"], strict=False))
    same = all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs)
    return same and len(one["shape"]) == len(other["shape"]) and one["dtype"] == other["dtype"]


def described(spec: dict[str, Any]) -> str:
    """Return type and shape of a tensor, for an error message."""
    return f"{spec['dtype']} {spec['shape']}"


class Tensor(NamedTuple):
    """An input or output as declared by a graph."""

    name: str
    shape: list[Any]
    dtype: str


def check_session(path: Path, session: Any, contract: dict[str, Any]) -> None:
    """Raise RunnerProblem if a session's inputs and outputs differ from the manifest's."""
    for side, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        tensors = [Tensor(node.name, node.shape, dtype_of(node.type)) for node in nodes]
        check_tensors(path, side, tensors, contract[side])


def dtype_of(onnx_type: str) -> str:
    """Return float16 for onnxruntime's "tensor(float16)", and so on."""
    bare = onnx_type.removeprefix("tensor(").removesuffix(")")
    return "float32" if bare == "float" else bare


def check_tensors(
    path: Path, side: str, tensors: list[Tensor], specs: list[dict[str, Any]]
) -> None:
    """Raise RunnerProblem if a graph's tensors differ from the manifest's in name or shape."""
    expected = {spec["name"]: spec for spec in specs}
    names = [tensor.name for tensor in tensors]
    if names != list(expected):
        odd = sorted(set(names) ^ set(expected))[:4] or "the order"
        raise RunnerProblem(
            f"{path}: its {len(names)} {side} are not the {len(expected)} of {MANIFEST}; they "
            f"differ in {odd}",
            ONE_EXPORT,
        )
    for tensor in tensors:
        check_tensor(path, side, tensor, expected[tensor.name])


def check_tensor(path: Path, side: str, tensor: Tensor, spec: dict[str, Any]) -> None:
    """Raise RunnerProblem if a tensor's type or shape differs from the manifest's."""
    axes = list(zip(spec["shape"], tensor.shape, strict=False))
    sizes = all(a == b for a, b in axes if isinstance(a, int))
    rank = len(spec["shape"]) == len(tensor.shape)
    bytes_each, known = DTYPES[spec["dtype"]], [a for a in tensor.shape if isinstance(a, int)]
    fits = bytes_each * math.prod(known) <= MOST_TENSOR_BYTES
    if not (sizes and rank and fits and tensor.dtype == spec["dtype"]):
        raise RunnerProblem(
            f"{path}: {tensor.name!r} of its {side} is {tensor.dtype} {tensor.shape}; {MANIFEST} "
            f"has {described(spec)}",
            ONE_EXPORT,
        )
