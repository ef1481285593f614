"""Runs a saved Core ML package on any system: op by op, in torch, as the program on disk says.

Every result is computed in float32 and rounded to the type that the program declares for it, so
that a float16 package is float16-rounded and a float32 one is not. Every declared shape is held
against what comes out, first without any numbers, when a package is opened. This proves what was
written; how Core ML compiles it, where it runs it and how fast is for a Mac to say.
"""

from __future__ import annotations

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

from export.mil_constants import FORMS
from export.mil_operations import MOVES, OPERATIONS, Places, Slot
from export.mil_package import AGAIN, FLOATS, Array, Constant, Package, Spec, read_package
from export.problem import Problem

__all__ = ["Program", "Spec", "open_package"]

NARROW = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}
HELD = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
"""Types in which states are kept and results are given."""
Trace = Callable[[str, str, Tensor], None]
"""Called with type, name and value of every result."""
Environment = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One operation, ready to run."""

    kind: str
    name: str
    run: Callable[..., Any]
    constants: dict[str, Any]
    """Parameters that are no tensors."""
    inputs: dict[str, str | list[str]]
    """Parameter -> name of its value, or names."""
    outputs: list[Spec]
    at_run: bool
    """Where it reads or writes is known only when it runs."""
    spent: list[str] = field(default_factory=list)
    """Values that nothing reads after it."""


class Program:
    """One saved package, or one function of it, ready to run."""

    def __init__(self, package: Package) -> None:
        self.path = package.path
        self.inputs = package.inputs
        self.outputs = package.outputs
        self.states = package.states
        self.spec_version = package.spec_version
        operations = [op for op in package.block.operations if op.type != "const"]
        self.operations = Counter(op.type for op in operations)
        _refuse_unknown(self.path, self.operations)
        compiler = _Compiler(package)
        self._steps = compiler.steps
        self._constants = compiler.tensors
        self._results = list(package.block.outputs)
        _free_spent(self._steps, self._results)
        self._check()

    def new_state(self) -> dict[str, Tensor]:
        """All zeros, as a program finds its states the first time."""
        return {spec.name: torch.zeros(spec.shape, dtype=HELD[spec.dtype]) for spec in self.states}

    @torch.inference_mode()
    def predict(
        self,
        feed: Mapping[str, Array],
        state: dict[str, Tensor] | None = None,
        trace: Trace | None = None,
    ) -> dict[str, Array]:
        """Outputs by name; `state` is changed, by programs that keep one.

        Numbers are converted to the declared types as Core ML does, but no fractions to integers.
        """
        values = self._constants | self._fed(feed)
        values |= {spec.name: Slot(self._kept(state), spec.name) for spec in self.states}
        self._run(values, trace)
        return {
            spec.name: values[spec.name].to(HELD[spec.dtype]).numpy().copy()
            for spec in self.outputs
        }

    def _fed(self, feed: Mapping[str, Array]) -> Environment:
        wanted = {spec.name: spec for spec in self.inputs}
        if feed.keys() != wanted.keys():
            raise Problem(
                f"{self.path}: given {', '.join(sorted(feed)) or 'nothing'}",
                hint=f"it takes {', '.join(sorted(wanted))}",
            )
        return {
            name: self._converted(spec, np.asarray(feed[name])) for name, spec in wanted.items()
        }

    def _converted(self, spec: Spec, array: Array) -> Tensor:
        if array.shape != spec.shape:
            raise Problem(
                f"{self.path}: input {spec.name} is given as {list(array.shape)}",
                hint=f"give it as {spec.dtype} {list(spec.shape)}",
            )
        if array.dtype.kind not in ("fiub" if spec.dtype in FLOATS else "iub"):
            raise Problem(
                f"{self.path}: input {spec.name} is given as {array.dtype}",
                hint=f"give it as {spec.dtype} {list(spec.shape)}",
            )
        return _widened(array.astype(spec.dtype))

    def _kept(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        wanted = {spec.name: spec.shape for spec in self.states}
        found = {name: tuple(value.shape) for name, value in (state or {}).items()}
        if state is None or wanted != found:
            raise Problem(
                f"{self.path}: keeps the states {wanted}, given {found or 'none'}",
                hint="pass what new_state() gave, in every step of one text",
            )
        return state

    def _check(self) -> None:
        """Run without numbers: all shapes and the kinds of all types are what they should be."""
        empty = {name: value.to("meta") for name, value in self._constants.items()}
        shapes = {spec.name: _blank(spec) for spec in self.inputs}
        states = {spec.name: _blank(spec) for spec in self.states}
        values = empty | shapes | {name: Slot(states, name) for name in states}
        self._run(values, None, blank=True)
        for spec in self.outputs:
            found = values.get(spec.name)
            if not isinstance(found, Tensor) or tuple(found.shape) != spec.shape:
                shape = list(found.shape) if isinstance(found, Tensor) else "nothing"
                raise Problem(f"{self.path}: output {spec} comes out as {shape}", hint=AGAIN)

    def _run(self, values: Environment, trace: Trace | None, blank: bool = False) -> None:
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
                for spec, result in zip(step.outputs, results, strict=True):
                    values[spec.name] = _declared(spec, result, step.kind in MOVES)
            except (RuntimeError, ValueError, IndexError, LookupError, TypeError) as error:
                raise _wrong(self.path, step.kind, step.name, error) from error
            if trace:
                for spec in step.outputs:
                    trace(step.kind, spec.name, values[spec.name])
            for name in step.spent:
                del values[name]


def open_package(path: Path, function: str | None = None) -> Program:
    """A package ready to run: its function of that name, or the one that it runs itself.

    Raises Problem: not a package, damaged, an operation or a mode of one that is not known here,
    shapes that disagree.
    """
    return Program(read_package(Path(path), function))


class _Compiler:
    """Turns operations into steps and constants into tensors, one operation after the other."""

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
            except (ValueError, IndexError, LookupError, TypeError) as error:
                raise _wrong(package.path, op.type, name, error) from error
            for spec in outputs:
                if spec.name in self._known:
                    raise _wrong(package.path, op.type, name, f"{spec.name} is there already")
                self._known[spec.name] = spec

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
        found = values if isinstance(values, tuple) else (values,)
        for spec, value in zip(outputs, found, strict=True):
            shape = () if isinstance(value, str) else value.shape
            if shape != spec.shape:
                raise ValueError(f"holds {list(shape)}, declared {list(spec.shape)}")
            self._constants[spec.name] = value

    def _constant(self, op: Any, name: str, key: str) -> Constant:
        """What a parameter holds that has to be known now."""
        (binding,) = op.inputs[key].arguments
        if binding.WhichOneof("binding") == "value":
            return self.package.constant(f"{name}.{key}", binding.value)
        if binding.name not in self._constants:
            raise ValueError(f"{key} is not constant")
        return self._constants[binding.name]

    def _step(self, op: Any, name: str, outputs: list[Spec]) -> Step:
        run = OPERATIONS[op.type]
        takes = typing.get_type_hints(run)
        _check_parameters(run, op.inputs)
        constants: dict[str, Any] = {}
        inputs: dict[str, str | list[str]] = {}
        at_run = False
        for key, argument in op.inputs.items():
            wanted = takes[key]
            if wanted == list[Tensor]:
                inputs[key] = [self._named(name, key, one) for one in argument.arguments]
                continue
            (binding,) = argument.arguments
            constant = binding.WhichOneof("binding") == "value" or binding.name in self._constants
            if _is_tensor(wanted) or (wanted == Places and not constant):
                inputs[key] = self._named(name, key, binding)
                at_run = at_run or wanted == Places
            else:
                constants[key] = _python(key, self._constant(op, name, key), wanted)
        return Step(op.type, name, run, constants, inputs, outputs, at_run)

    def _named(self, name: str, key: str, binding: Any) -> str:
        """The name by which a value is found when the program runs."""
        found = binding.name
        if binding.WhichOneof("binding") == "value":
            found = f"{name}.{key}"
            self._constants[found] = self.package.constant(found, binding.value)
        if found in self._constants and found not in self.tensors:
            value = self._constants[found]
            if isinstance(value, str):
                raise ValueError(f"{key} is a string")
            self.tensors[found] = _widened(value)
        elif found not in self._constants and found not in self._known:
            raise ValueError(f"{key} is {found}, which is nowhere computed before")
        return found


def _refuse_unknown(path: Path, operations: Counter[str]) -> None:
    unknown = sorted(operations.keys() - OPERATIONS.keys() - FORMS.keys())
    if unknown:
        found = ", ".join(f"{kind} ({operations[kind]} times)" for kind in unknown)
        raise Problem(
            f"{path}: operations that are not known here: {found}",
            hint="run the package on a Mac, or write them into export/mil_operations.py",
        )


def _check_parameters(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    takes = inspect.signature(function).parameters
    for name in given:
        if name not in takes:
            raise ValueError(f"parameter {name} is not known here")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(f"parameter {name} is missing")


def _is_tensor(wanted: Any) -> bool:
    return wanted in (Tensor, Slot, Tensor | None)


def _python(key: str, value: Constant, wanted: Any) -> Any:
    """A constant as an operation takes it; a mode that it does not know is refused."""
    if typing.get_origin(wanted) is typing.Literal:
        found = value if isinstance(value, str) else value.item()
        if found not in typing.get_args(wanted):
            known = ", ".join(map(str, typing.get_args(wanted)))
            raise ValueError(f"{key} is {found!r}, known are {known}")
        return found
    if isinstance(value, str):
        return value
    listed = any("list" in str(part) for part in (wanted, *typing.get_args(wanted)))
    return value.reshape(-1).tolist() if listed else value.item()


def _widened(array: Array) -> Tensor:
    """As values are kept: float32, int32 or bool."""
    kind = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int32)
    return torch.from_numpy(np.array(array, kind))


def _blank(spec: Spec) -> Tensor:
    kind = torch.float32 if spec.dtype in FLOATS else torch.int32
    kind = torch.bool if spec.dtype == "bool" else kind
    return torch.empty(spec.shape, dtype=kind, device="meta")


def _declared(spec: Spec, value: Tensor, moved: bool) -> Tensor:
    """A result, rounded to the type that is declared for it, after its shape was compared."""
    if tuple(value.shape) != spec.shape:
        raise ValueError(f"comes out as {list(value.shape)}, declared {list(spec.shape)}")
    if value.dtype != _blank(spec).dtype:
        raise ValueError(f"comes out as {value.dtype}, declared {spec.dtype}")
    if spec.dtype == "float16" and not moved:
        return value.half().float()
    if spec.dtype in NARROW:
        return value.to(NARROW[spec.dtype]).int()
    return value % 2**16 if spec.dtype == "uint16" else value


def _wrong(path: Path, kind: str, name: str, reason: Exception | str) -> Problem:
    return Problem(f"{path}: operation {name} ({kind}): {reason}", hint=AGAIN)


def _free_spent(steps: list[Step], results: list[str]) -> None:
    """Say after which step each value is needed no longer."""
    needed = set(results)
    for step in reversed(steps):
        read = [
            n
            for names in step.inputs.values()
            for n in ([names] if isinstance(names, str) else names)
        ]
        for name in {*read, *(spec.name for spec in step.outputs)} - needed:
            needed.add(name)
            step.spent.append(name)
