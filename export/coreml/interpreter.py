"""Run a saved Core ML package on any system: operation by operation, in torch.

Every result is computed in float32 and rounded to the type that the program declares, so that a
float16 package has float16 rounding. Every declared shape is compared with the actual one, already
when a package is opened, without data. This verifies the package as written. How Core ML compiles
it, on which unit it runs and how fast, only a Mac can show.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.coreml.constants import FORMS
from export.coreml.moves import Places, Unknown
from export.coreml.operations import OPERATIONS, UNROUNDED, Slot
from export.coreml.package import AGAIN, FLOATS, Array, Constant, Package, Spec, read_package
from export.problem import Problem

__all__ = ["Program", "Spec", "open_package"]

GIVEN = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
"""Types of outputs and states. Inside a program floats are float32 and integers int32."""
ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": lambda x: x.half().float(),
    "int8": lambda x: x.to(torch.int8).int(),
    "uint8": lambda x: x & 0xFF,
    "int16": lambda x: x.to(torch.int16).int(),
    "uint16": lambda x: x & 0xFFFF,
}
MAIN = {"x", "y", "a", "b", "values", "query", "key", "value", "update", "input", "data"}
"""Parameters whose float type is that of the result; weights and masks may have another one."""
WRONG = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
"""Exceptions that numpy and torch raise for values and shapes that do not match."""
BEYOND = "run the package on a Mac, or add the operation to export/coreml/operations.py"
Trace = Callable[[str, str, Tensor], None]
"""Called with the type, name and value of every result."""
Environment = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One operation, ready to run."""

    kind: str
    name: str
    run: Callable[..., Any]
    constants: dict[str, Any]
    """Parameters that are not tensors."""
    inputs: dict[str, str | list[str]]
    """Parameter -> name of its value, or names."""
    outputs: list[Spec]
    at_run: bool
    """Whether the positions it reads or writes are known only when it runs."""
    spent: list[str] = field(default_factory=list)
    """Values that no later step reads."""


class Program:
    """One function of a saved package, ready to run."""

    def __init__(self, package: Package) -> None:
        self.path = package.path
        self.spec_version = package.spec_version
        self.inputs, self.outputs = package.inputs, package.outputs
        self.states = package.states
        kinds = (op.type for op in package.block.operations)
        self.operations = Counter(kind for kind in kinds if kind != "const")
        _refuse_unknown(self.path, self.operations)
        compiler = _Compiler(package)
        self._steps, self._constants = compiler.steps, compiler.tensors
        _free_spent(self._steps, set(package.block.outputs))
        self._check()

    def new_state(self) -> dict[str, Tensor]:
        """Return states of zeros, as a program has them at the start."""
        return {spec.name: torch.zeros(spec.shape, dtype=GIVEN[spec.dtype]) for spec in self.states}

    @torch.inference_mode()
    def predict(
        self,
        feed: Mapping[str, Array],
        state: dict[str, Tensor] | None = None,
        trace: Trace | None = None,
    ) -> dict[str, Array]:
        """Return outputs by name; `state` is changed by programs with states. Inputs are converted
        to the declared types as Core ML does, but fractions are not converted to integers."""
        values = self._constants | self._fed(feed)
        if self.states:
            kept = self._kept(state)
            values |= {name: Slot(kept, name) for name in kept}
        self._run(values, trace)
        return {
            spec.name: values[spec.name].to(GIVEN[spec.dtype]).numpy().copy()
            for spec in self.outputs
        }

    def _fed(self, feed: Mapping[str, Array]) -> Environment:
        expected = {spec.name: spec for spec in self.inputs}
        if feed.keys() != expected.keys():
            raise Problem(
                f"{self.path}: got the inputs {', '.join(sorted(feed)) or 'none'}",
                hint=f"pass {', '.join(sorted(expected))}",
            )
        return {
            name: self._converted(spec, np.asarray(feed[name])) for name, spec in expected.items()
        }

    def _converted(self, spec: Spec, array: Array) -> Tensor:
        if array.shape != spec.shape:
            raise Problem(
                f"{self.path}: input {spec.name} has shape {list(array.shape)}",
                hint=f"pass {spec.dtype} {list(spec.shape)}",
            )
        if array.dtype.kind not in ("fiub" if spec.dtype in FLOATS else "iub"):
            raise Problem(
                f"{self.path}: input {spec.name} has dtype {array.dtype}",
                hint=f"pass {spec.dtype} {list(spec.shape)}",
            )
        return _widened(array.astype(spec.dtype))

    def _kept(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        expected = {spec.name: spec.shape for spec in self.states}
        actual = {name: tuple(value.shape) for name, value in (state or {}).items()}
        if state is None or expected != actual:
            raise Problem(
                f"{self.path}: has the states {expected}, got {actual or 'none'}",
                hint="pass the result of new_state() to every step of one text",
            )
        return state

    def _check(self) -> None:
        """Run without data and check all shapes and kinds of types."""
        empty = {name: value.to("meta") for name, value in self._constants.items()}
        shapes = {spec.name: _blank(spec) for spec in self.inputs}
        states = {spec.name: _blank(spec) for spec in self.states}
        values = empty | shapes | {name: Slot(states, name) for name in states}
        self._run(values, blank=True)

    def _run(self, values: Environment, trace: Trace | None = None, blank: bool = False) -> None:
        for step in self._steps:
            given = {
                key: values[name] if isinstance(name, str) else [values[one] for one in name]
                for key, name in step.inputs.items()
            }
            try:
                if blank and step.at_run:
                    results = [_blank(spec) for spec in step.outputs]
                else:
                    results = step.run(**given, **step.constants)
                results = [results] if isinstance(results, Tensor) else results
                if len(results) != len(step.outputs):
                    raise ValueError(f"{len(results)} results, declared {len(step.outputs)}")
                for spec, result in zip(step.outputs, results, strict=True):
                    values[spec.name] = _declared(spec, result, step.kind in UNROUNDED)
            except WRONG as error:
                raise _wrong(self.path, step.kind, step.name, error) from error
            if trace:
                for spec in step.outputs:
                    trace(step.kind, spec.name, values[spec.name])
            for name in step.spent:
                del values[name]
            del given, results  # otherwise they would live until the next step


def open_package(path: Path, function: str | None = None) -> Program:
    """Return a package ready to run: the function of that name, or the default one. Raises Problem
    if it is not a package, is damaged, or has unknown operations, unknown modes or shapes that
    disagree."""
    return Program(read_package(Path(path), function))


class _Compiler:
    """Turn operations into steps and constants into tensors, one operation after the other."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.steps: list[Step] = []
        self.tensors: dict[str, Tensor] = {}
        self._constants: dict[str, Constant] = {}
        self._known = {spec.name: spec for spec in (*package.inputs, *package.states)}
        for op in package.block.operations:
            outputs = [package.spec(output) for output in op.outputs]
            name = outputs[0].name if outputs else op.type
            try:
                self._add(op, name, outputs)
            except Problem:
                raise
            except WRONG as error:
                raise _wrong(package.path, op.type, name, error) from error
            for spec in outputs:
                if spec.name in self._known:
                    raise _wrong(package.path, op.type, name, f"{spec.name} is defined twice")
                self._known[spec.name] = spec
        states = {spec.name for spec in package.states}
        for name in package.block.outputs:
            if name not in self._known or name in states:
                raise _wrong(package.path, "output", name, "no operation computes it")
            self._widen(name)
        package.require_match(
            "outputs", [self._known[name] for name in package.block.outputs], package.outputs
        )

    def _add(self, op: Any, name: str, outputs: list[Spec]) -> None:
        if op.type == "const":
            self._keep(outputs, self.package.constant(name, op.attributes["val"]))
        elif op.type in FORMS:
            form = FORMS[op.type]
            values = {key: self.package.constant(name, v) for key, v in op.attributes.items()}
            values |= {key: self._constant(op, name, key) for key in op.inputs}
            values.pop("name", None)
            _check_parameters(form, values)
            self._keep(outputs, form(**values))
        else:
            self.steps.append(self._step(op, name, outputs))

    def _keep(self, outputs: list[Spec], values: Constant | tuple[Array, ...]) -> None:
        parts = values if isinstance(values, tuple) else (values,)
        for spec, value in zip(outputs, parts, strict=True):
            if not isinstance(value, str) and (value.shape, value.dtype) != spec.held:
                actual = f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"holds {actual}, declared {spec.dtype} {list(spec.shape)}")
            self._constants[spec.name] = value

    def _constant(self, op: Any, name: str, key: str) -> Constant:
        """Return the value of a parameter that must be constant."""
        binding = _only(key, op.inputs[key])
        if binding.WhichOneof("binding") == "value":
            return self.package.constant(f"{name}.{key}", binding.value)
        if binding.name not in self._constants:
            raise ValueError(f"{key} is not constant")
        return self._constants[binding.name]

    def _step(self, op: Any, name: str, outputs: list[Spec]) -> Step:
        run = OPERATIONS[op.type]
        takes = _hints(run)
        _check_parameters(run, op.inputs)
        constants: dict[str, Any] = {}
        inputs: dict[str, str | list[str]] = {}
        at_run = False
        for key, argument in op.inputs.items():
            hint = takes[key]
            if hint == list[Tensor]:
                inputs[key] = [self._named(name, key, one) for one in argument.arguments]
                continue
            binding = _only(key, argument)
            constant = binding.WhichOneof("binding") == "value" or binding.name in self._constants
            if _is_tensor(hint) or (hint == Places and not constant):
                inputs[key] = self._named(name, key, binding)
                at_run = at_run or hint == Places
            else:
                constants[key] = _python(key, self._constant(op, name, key), hint)
        self._check_floats(op.type, inputs, outputs)
        if op.type == "cast" and constants["dtype"].replace("fp", "float") != outputs[0].dtype:
            raise ValueError(f"casts to {constants['dtype']}, declared {outputs[0].dtype}")
        return Step(op.type, name, run, constants, inputs, outputs, at_run)

    def _check_floats(
        self, kind: str, inputs: dict[str, str | list[str]], outputs: list[Spec]
    ) -> None:
        """Raise ValueError unless only `cast` converts one float type to another."""
        names = [n for key in inputs.keys() & MAIN for n in _names(inputs[key])]
        dtypes = {self._known[n].dtype for n in names if n in self._known}
        dtypes |= {spec.dtype for spec in outputs}
        if kind != "cast" and dtypes >= set(FLOATS):
            raise ValueError(f"mixes {' and '.join(FLOATS)}")

    def _named(self, name: str, key: str, binding: Any) -> str:
        """Return the name under which a value is stored when the program runs."""
        source = binding.name
        if binding.WhichOneof("binding") == "value":
            source = f"{name}.{key}"
            self._constants[source] = self.package.constant(source, binding.value)
        elif source not in self._known:
            raise ValueError(f"{key} is {source}, which no earlier operation computes")
        self._widen(source)
        return source

    def _widen(self, name: str) -> None:
        """Convert a constant to a tensor on first use."""
        if name in self._constants and name not in self.tensors:
            value = self._constants[name]
            if isinstance(value, str):
                raise ValueError(f"{name} is a string")
            self.tensors[name] = _widened(value)


def _refuse_unknown(path: Path, operations: Counter[str]) -> None:
    unknown = sorted(operations.keys() - OPERATIONS.keys() - FORMS.keys())
    if unknown:
        listed = ", ".join(f"{kind} ({operations[kind]} times)" for kind in unknown)
        raise Problem(
            f"{path}: unsupported operations: {listed}",
            hint=BEYOND,
        )


def _only(key: str, argument: Any) -> Any:
    """Return the source of a parameter's only value."""
    if len(argument.arguments) != 1:
        raise ValueError(f"{key} has {len(argument.arguments)} values instead of one")
    return argument.arguments[0]


def _check_parameters(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    takes = inspect.signature(function).parameters
    for name in given:
        if name not in takes:
            raise Unknown(f"unsupported parameter {name}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(f"parameter {name} is missing")


_hints = functools.cache(typing.get_type_hints)


def _is_tensor(hint: Any) -> bool:
    return hint in (Tensor, Slot, Tensor | None)


def _python(key: str, value: Constant, hint: Any) -> Any:
    """Convert a constant to the type of a parameter; raise Unknown for a mode it does not
    support."""
    if typing.get_origin(hint) is typing.Literal:
        mode = value if isinstance(value, str) else value.item()
        if mode not in typing.get_args(hint):
            known = ", ".join(map(str, typing.get_args(hint)))
            raise Unknown(f"{key} is {mode!r}, supported: {known}")
        return mode
    if isinstance(value, str):
        return value
    listed = any("list" in str(part) for part in (hint, *typing.get_args(hint)))
    return value.reshape(-1).tolist() if listed else value.item()


def _widened(array: Array) -> Tensor:
    """Copy an array into a tensor of the kinds used inside a program: float32, int32 or bool."""
    kind = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int32)
    return torch.from_numpy(np.array(array, kind))


def _kept_as(dtype: str) -> torch.dtype:
    if dtype == "bool":
        return torch.bool
    return torch.float32 if dtype in FLOATS else torch.int32


def _blank(spec: Spec) -> Tensor:
    """Return a tensor with a shape but no data."""
    return torch.empty(spec.shape, dtype=_kept_as(spec.dtype), device="meta")


def _declared(spec: Spec, value: Tensor, moved: bool) -> Tensor:
    """Return a result, rounded to its declared type after its shape and kind were checked."""
    if value.shape != spec.shape:
        raise ValueError(f"returns {list(value.shape)}, declared {list(spec.shape)}")
    if value.dtype != _kept_as(spec.dtype):
        raise ValueError(f"returns {value.dtype}, declared {spec.dtype}")
    return value if moved or spec.dtype not in ROUNDED else ROUNDED[spec.dtype](value)


def _wrong(path: Path, kind: str, name: str, reason: Exception | str) -> Problem:
    hint = BEYOND if isinstance(reason, Unknown) else AGAIN
    first = (str(reason).splitlines() or [type(reason).__name__])[0].rstrip(".")
    return Problem(f"{path}: operation {name} ({kind}): {first}", hint=hint)


def _names(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _free_spent(steps: list[Step], needed: set[str]) -> None:
    """Record for each step which values no later step reads."""
    for step in reversed(steps):
        names = {name for given in step.inputs.values() for name in _names(given)}
        step.spent.extend((names | {spec.name for spec in step.outputs}) - needed)
        needed |= names
