"""The known engines: their programs, models and packages."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from benchmarks.program import PROJECT
from benchmarks.rivals import prepare
from benchmarks.rivals.prepare import Prepare
from devices.device import RUNNER, Device, Packages
from export.problem import Problem

PYTHON = "EDGEWHISPER_RIVALS_PYTHON"
"""Environment variable with a Python interpreter to use instead of that of `make rivals-env`."""
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


@dataclass(frozen=True)
class Kind:
    """An engine: its program, how its model is made, and the packages it needs."""

    module: str
    """The module of this package that runs it."""
    precision: str
    prepare: Prepare
    needs: tuple[str, ...] = ()
    """Packages of requirements.txt; if empty, it runs in the toolchain's environment."""
    imports: tuple[str, ...] = ()
    """Modules that show whether the packages work."""
    rival: bool = True
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of its program."""

    @property
    def foreign(self) -> bool:
        """Whether it runs in the rivals' environment."""
        return bool(self.needs)

    @property
    def program(self) -> str:
        return f"benchmarks.rivals.{self.module}"

    @property
    def packages(self) -> Packages:
        """The packages it needs, in the versions of requirements.txt."""
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
        pins = {line.partition("==")[0]: line for line in lines if line[:1] != "#"}
        return Packages(tuple(pins[name] for name in (*self.needs, "numpy")), self.imports)


FASTER = ("faster-whisper", "ctranslate2", "tokenizers", "onnxruntime"), ("faster_whisper",)
CPP = ("pywhispercpp",), ("_pywhispercpp",)
WHEEL = {"EDGEWHISPER_WHISPER_CPP": "wheel"}
"""Uses the published wheel instead of the library that `make rivals-env` built from source."""
SHERPA = ("sherpa-onnx",), ("sherpa_onnx",)

ENGINES = {
    "ours": Kind("ours", "int8", prepare.artifact("int8"), rival=False),
    "ours-fp32": Kind("ours", "fp32", prepare.artifact("fp32"), rival=False),
    "faster-whisper": Kind("faster_whisper", "int8", prepare.ctranslate2, *FASTER),
    "whisper.cpp": Kind("whisper_cpp", "q8_0", prepare.ggml("q8_0"), *CPP),
    "whisper.cpp-wheel": Kind("whisper_cpp", "q8_0", prepare.ggml("q8_0"), *CPP, env=WHEEL),
    "whisper.cpp-f16": Kind("whisper_cpp", "f16", prepare.ggml("f16"), *CPP),
    "sherpa-onnx": Kind("sherpa_onnx", "int8", prepare.sherpa("int8"), *SHERPA),
    "transformers": Kind("transformers", "fp32", prepare.as_it_is),
}
"""Engines by name."""

RIVALS = {name: kind for name, kind in ENGINES.items() if kind.rival}

CODE = "engines"
"""The folder on a device for the programs of the rivals' own environment."""


def send_program(kind: Kind, device: Device) -> None:
    """Copy an engine's program and the files that it imports into CODE, under the same names."""
    rivals = Path(__file__).resolve().parent
    places = [rivals / "protocol.py", rivals / f"{kind.module}.py", RUNNER.resolve()]
    packages = {parent for place in places for parent in place.parents if PROJECT in parent.parents}
    for place in (*(package / "__init__.py" for package in sorted(packages)), *places):
        device.push(place, f"{CODE}/{place.relative_to(PROJECT).as_posix()}")


def interpreter() -> Path:
    """Return the path of the rivals' Python on this machine, which may not exist."""
    place = Path(os.environ.get(PYTHON) or PROJECT / "build/rivals/bin/python")
    return place.absolute()  # not resolved: an environment's interpreter is a link


def refuse_unknown(engines: Sequence[str]) -> None:
    """Raise Problem for unknown engines."""
    for engine in engines:
        if engine not in ENGINES:
            raise Problem(f"unknown engine {engine!r}", hint=f"choose from {', '.join(ENGINES)}")


def refuse_missing(engines: Sequence[str], python: Path, instead: str) -> None:
    """Raise Problem for engines whose environment is missing."""
    foreign = [engine for engine in engines if ENGINES[engine].foreign]
    if foreign and not python.is_file():
        raise Problem(
            f"{', '.join(foreign)}: the rivals' environment is missing, there is no {python}",
            hint=f"make it with `make rivals-env`, or {instead}",
        )


def count_parameters(checkpoint: Path) -> int | None:
    """Return the number of weights in a checkpoint's safetensors file; None if it has several
    files."""
    place = checkpoint / "model.safetensors"
    if not place.is_file():
        return None
    with place.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
    return sum(prod(tensor["shape"]) for name, tensor in tensors.items() if name[:2] != "__")
