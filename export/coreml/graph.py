"""A small builder of MIL programs (Core ML's operator format), and saving them as packages.

A value is a variable of coremltools' MIL builder. All programs have batch 1 and fixed shapes. Every
dtype is chosen here, and every weight's storage in weights.py; coremltools' passes, which would
change them, are disabled.

Values have one of two arrangements, for n positions of d features each:

    plain            (1, n, d)      `linear`, and one product for all heads of an attention
    channels first   (1, d, 1, n)   1x1 convolutions, and one product per head

The second is the one that Apple's notes on transformers and WhisperKit use for the Neural Engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.coreml import weights as forms
from export.manifest import Dim, Spec
from export.problem import Problem
from export.quantise import Scheme
from export.weights import Floats

TARGETS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
"""Deployment target -> version of the Core ML specification it introduced. macOS 13, 14 and 15
correspond to iOS 16, 17 and 18."""

Var = Any
"""A value of the program under construction."""
Build = Callable[[dict[str, Var]], Sequence[Var]]
"""Builds the outputs, in order, from the inputs and states by name."""


@cache
def toolbox() -> Any:
    """Import coremltools on first use, silently; that takes seconds. Raises Problem if it is not
    installed."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import coremltools
    except ImportError as error:
        raise Problem(
            f"Core ML packages are written with coremltools, which cannot be imported ({error})",
            hint="pip install 'coremltools>=9,<10' on macOS or x86-64, or export --target onnx",
        ) from error
    return coremltools


class Graph:
    """The operators of one program under construction. `schemes` names how single weights are
    stored in the precisions that compress them."""

    def __init__(
        self,
        precision: str,
        target: str,
        schemes: Mapping[Any, Scheme] | None = None,
        channels_first: bool = False,
    ) -> None:
        self.dtype: Any = np.float32 if precision == "fp32" else np.float16
        self.precision, self.target, self.schemes = precision, target, schemes or {}
        self.channels_first = channels_first
        self.features = 1 if channels_first else -1
        """The axis of the features."""
        self.stored: Counter[str] = Counter()
        """Form of storage -> number of weights stored in it."""
        self.notes: list[str] = []
        """What was requested and could not be done, and why."""
        self._constants: dict[tuple[Any, ...], Var] = {}
        self._count = 0
        self._prefix = ""

    def op(self, kind: str, **inputs: Any) -> Any:
        """Add an operator and return its output, or a list of outputs."""
        from coremltools.converters.mil import Builder

        self._count += 1
        return getattr(Builder, kind)(name=f"{self._prefix}{kind}_{self._count}", **inputs)

    def constant(self, value: NDArray | float) -> Var:
        """Store floats in the program's dtype; equal ones are stored once."""
        wide = np.asarray(value, np.float32)
        array: NDArray = forms.halved(wide, self.place) if self.dtype == np.float16 else wide
        key = (array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self.op("const", val=array)
        return self._constants[key]

    @property
    def place(self) -> str:
        """The part of the model to which new operators belong."""
        return self._prefix.rstrip("_")

    def add(self, x: Var, y: Floats | float | Var) -> Var:
        return self._elementwise("add", x, y)

    def mul(self, x: Var, y: Floats | float | Var) -> Var:
        return self._elementwise("mul", x, y)

    def _elementwise(self, kind: str, x: Var, y: Floats | float | Var) -> Var:
        """Apply an operator whose second operand may be an array or a number."""
        numbers = isinstance(y, float | np.ndarray)
        return self.op(kind, x=x, y=self.constant(y) if numbers else y)

    def cast(self, x: Var, dtype: str) -> Var:
        """Cast to float16 or float32, if the value has the other type."""
        kind = {"float16": "fp16", "float32": "fp32"}[dtype]
        known = x.dtype.__name__ == kind
        return x if known else self.op("cast", x=x, dtype=kind)

    def reshape(self, x: Var, *shape: Dim) -> Var:
        return x if tuple(x.shape) == shape else self.op("reshape", x=x, shape=list(shape))

    def transpose(self, x: Var, *perm: int) -> Var:
        return self.op("transpose", x=x, perm=list(perm))

    def matmul(self, x: Var, y: Var, transpose_y: bool = False) -> Var:
        return self.op("matmul", x=x, y=y, transpose_y=transpose_y)

    def einsum(self, x: Var, y: Var) -> Var:
        """Multiply channels-first values: x (1, c, 1, k), y (1, k, 1, n) -> (1, c, 1, n)."""
        return self.op("einsum", values=(x, y), equation="nchw,nwhu->nchu")

    def softmax(self, x: Var, axis: int) -> Var:
        return self.op("softmax", x=x, axis=axis)

    def sum(self, x: Var, axis: int) -> Var:
        return self.op("reduce_sum", x=x, axes=[axis], keep_dims=True)

    def gather(self, x: Var, places: NDArray[np.integer] | Var, axis: int) -> Var:
        if isinstance(places, np.ndarray):
            places = places.astype(np.int32)
        return self.op("gather", x=x, indices=places, axis=axis)

    def split(self, x: Var, sizes: Sequence[int], axis: int) -> list[Var]:
        if len(sizes) == 1:
            return [x]
        return self.op("split", x=x, split_sizes=list(sizes), axis=axis)

    def concat(self, parts: Sequence[Var], axis: int) -> Var:
        return parts[0] if len(parts) == 1 else self.op("concat", values=list(parts), axis=axis)

    @contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Prefix the names of operators made inside with `prefix_`, so that readers can group
        them."""
        before, self._prefix = self._prefix, f"{self._prefix}{prefix}_"
        yield
        self._prefix = before


def program(
    g: Graph,
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    build: Build,
    states: Sequence[Spec] = (),
) -> Any:
    """Build a MIL program and check its outputs against their specs."""
    ct = toolbox()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}
    places = {s.name: Builder.placeholder(s.shape, kinds[s.dtype]) for s in inputs}
    places |= {s.name: Builder.state_tensor_placeholder(s.shape, kinds[s.dtype]) for s in states}
    function = Function(places, opset_version=ct.target[g.target])
    with function:
        made = list(build(function.inputs))
        for value, spec in zip(made, outputs, strict=True):
            actual = (tuple(value.shape), value.dtype)
            assert actual == (spec.shape, kinds[spec.dtype]), (spec, actual)
            value.name = spec.name
        function.set_outputs(made)
    whole = Program()
    whole.add_function("main", function)
    return whole


def save(made: Any, target: str, path: Path, description: str) -> None:
    """Write a program as the package `path`. The same program gives the same bytes."""
    ct = toolbox()
    with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars
        model = ct.convert(
            made,
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,  # adds no casts, so float16 stays float16
            minimum_deployment_target=ct.target[target],
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))
    spec = model.get_spec()
    metadata = spec.description.metadata
    metadata.shortDescription = description
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    bare = spec.SerializeToString(deterministic=True)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(bare)
    _name_by_path(path / "Manifest.json")


def _name_by_path(manifest: Path) -> None:
    """Replace the random identifiers of a package's items by ones derived from their paths. Keys
    are sorted as coremltools sorts them, because it rewrites the file whenever it opens a
    package."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    items = content["itemInfoEntries"]
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, items[old]["path"])).upper() for old in items}
    content["itemInfoEntries"] = {names[old]: item for old, item in items.items()}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")
