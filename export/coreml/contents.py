"""The contents of a saved Core ML package: its operations, and how its weights are stored."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from export.coreml.constants import FORMS
from export.coreml.package import FLOATS, Package, Spec, read_package


def contents(path: Path) -> dict[str, Any]:
    """Return the specification version, the number of operations by kind, and of weights by form.
    Forms are float16, int8, int4, palette4 and so on. Nothing is executed. Raises Problem if `path`
    is not a package or is damaged."""
    package = read_package(Path(path))
    operations = package.block.operations
    specs = {spec.name: spec for op in operations for spec in map(package.spec, op.outputs)}
    parts = {
        argument.name
        for op in operations
        if op.type in FORMS
        for binding in op.inputs.values()
        for argument in binding.arguments
    }
    weights: Counter[str] = Counter()
    for op in operations:
        made = [specs[output.name] for output in op.outputs]
        if op.type in FORMS:
            weights[_form(package, op, specs)] += math.prod(made[0].shape)
        elif op.type == "const" and made[0].name not in parts and made[0].dtype in FLOATS:
            weights[made[0].dtype] += math.prod(made[0].shape)
    kinds = Counter(op.type for op in operations if op.type != "const")
    return {
        "specification_version": package.spec_version,
        "operations": dict(kinds.most_common()),
        "weights": dict(weights.most_common()),
    }


def _form(package: Package, op: Any, specs: dict[str, Spec]) -> str:
    """Return the name of a compressed constant's form, with its bits."""
    values = dict(op.attributes)
    given = {}
    for name, binding in op.inputs.items():
        (argument,) = binding.arguments
        if argument.WhichOneof("binding") == "name":
            given[name] = specs[argument.name]
        else:
            values[name] = argument.value
    for name, value in values.items():
        given[name] = package.spec(SimpleNamespace(name=name, type=value.type))
    if "lut" in given:
        shape = given["lut"].shape  # (..., entries, width) from iOS18 on
        return f"palette{(shape[-2] if len(shape) > 1 else shape[0]).bit_length() - 1}"
    codes = given.keys() & {"quantized_data", "data", "nonzero_data"}
    return given[codes.pop()].dtype if codes else op.type.removeprefix("constexpr_")
