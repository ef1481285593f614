"""Candidates of a bench: an artifact, or a checkpoint run by a rival engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.version import Version

from benchmarks.metadata import artifact_hash, folder_bytes, folder_hash
from benchmarks.rivals.engines import RIVALS, count_parameters, interpreter, refuse_missing
from benchmarks.rivals.prepare import Conversion
from benchmarks.rivals.transformers import refuse_slim
from devices.device import Device
from devices.runner.engines.coreml import UNITS
from export.artifact import read_manifest, verify
from export.problem import Problem

EACH = ("each",)
"""The value of `compute_units` that means all of them."""


@dataclass(frozen=True)
class Candidate:
    """One program and model to bench: an artifact directory, or a checkpoint by one of RIVALS."""

    source: Path
    rival: str | None = None
    form: Path | None = None
    """The model converted for the rival, if that is another folder; see in_own_form."""
    name: str = ""
    """Name in tables; the folder's name if it is empty."""
    compute_units: str | None = None
    """Core ML compute units, if they are chosen."""

    @property
    def label(self) -> str:
        """The name in tables, with the compute units or the rival in parentheses."""
        name = self.name or Path(self.source).resolve().name
        suffix = self.compute_units or (None if self.name else self.rival)
        return name if suffix is None else f"{name} ({suffix})"

    @property
    def is_coreml(self) -> bool:
        return self.rival is None and read_manifest(Path(self.source)).get("target") == "coreml"

    @property
    def oldest_runtime(self) -> str | None:
        """The oldest onnxruntime that runs the artifact, by its manifest; None if it has none."""
        if self.rival is not None:
            return None
        runtime = read_manifest(Path(self.source)).get("runtime")
        version = runtime.get("onnxruntime") if isinstance(runtime, dict) else runtime
        if version is None:
            return None
        if not isinstance(version, str) or not re.fullmatch(r"\d+\.\d+(\.\d+)?", version):
            raise Problem(
                f"{self.source}: its manifest needs onnxruntime {str(version)[:60]!r}, which is no "
                "version",
                hint="export it again",
            )
        return version


def oldest_runtime(candidates: Sequence[Candidate]) -> str:
    """Return the oldest onnxruntime that runs all artifacts, or "" if none of them names one."""
    versions = filter(None, (candidate.oldest_runtime for candidate in candidates))
    return max(versions, key=Version, default="")


def by_units(candidates: Sequence[Candidate], units: tuple[str, ...]) -> list[Candidate]:
    """Return the candidates with each Core ML artifact repeated for every named compute unit."""
    units = tuple(UNITS) if units == EACH else tuple(dict.fromkeys(units))
    if unknown := next((name for name in units if name not in UNITS), None):
        raise Problem(
            f"unknown compute units {unknown!r}",
            hint=f"choose one or more of {', '.join(UNITS)}, or each",
        )
    if units and not any(candidate.is_coreml for candidate in candidates):
        raise Problem(
            f"compute units {units[0]!r} are given, but none of the artifacts is for Core ML",
            hint="leave them out, or name an artifact that was exported with `--target coreml`",
        )
    expanded: list[Candidate] = []
    for candidate in candidates:
        names = units if candidate.is_coreml else ()
        expanded += [replace(candidate, compute_units=name) for name in names] or [candidate]
    return expanded


def identify(candidate: Candidate) -> dict[str, Any]:
    """Return the fields of a result that are known before anything runs."""
    source = Path(candidate.source)
    common = {"name": candidate.label, "rival": candidate.rival}
    if candidate.rival is None:
        manifest = verify(source)
        return common | {
            "artifact_hash": artifact_hash(manifest),
            "artifact_bytes": folder_bytes(source),
            "precision": manifest["precision"],
            "parameters": manifest["parameters"],
            "macs": manifest["macs"],
            **({"compute_units": candidate.compute_units} if candidate.compute_units else {}),
        }
    check_rival(candidate)
    form = candidate.form or source
    return common | {
        "artifact_hash": folder_hash(form),
        "artifact_bytes": folder_bytes(form),
        "precision": RIVALS[candidate.rival].precision,
        "parameters": count_parameters(source),
        "macs": None,
    }


def check_rival_name(name: str | None) -> None:
    """Raise Problem for an unknown rival."""
    if name not in RIVALS:
        raise Problem(f"unknown rival {name!r}", hint=f"choose one of {', '.join(RIVALS)}")


def check_rival(candidate: Candidate) -> None:
    """Raise Problem for an unknown rival or a missing checkpoint."""
    check_rival_name(candidate.rival)
    if not Path(candidate.source).is_dir():
        raise Problem(
            f"{candidate.source}: no such directory", hint="name a local checkpoint directory"
        )


def in_own_form(candidate: Candidate, folder: Path, say: Callable[[str], None]) -> Candidate:
    """Convert a rival's checkpoint into a folder and return the candidate with its `form` set."""
    check_rival(candidate)
    refuse_slim(candidate.source)
    kind = RIVALS[str(candidate.rival)]
    if kind.foreign:
        say(f"{candidate.label}: converting the model")
    conversion = Conversion(Path(candidate.source).resolve(), folder, interpreter())
    return replace(candidate, form=kind.prepare(conversion))


def place_for(candidate: Candidate, device: Device) -> Device:
    """Return the device with the packages of the candidate's program. Raises Problem if the
    program cannot run there."""
    if candidate.rival is None:
        return device
    kind, local = RIVALS[candidate.rival], device.name == "local"
    if kind.foreign:
        if local:
            refuse_missing([candidate.rival], interpreter(), "leave it out")
        return device.having(kind.packages, interpreter())
    if not local:
        raise Problem(
            f"the rival {candidate.rival} runs on this machine only, not on {device.name}",
            hint="bench the rival with `--device local`",
        )
    return device


def check_target(candidate: Candidate, machine: dict[str, Any], name: str) -> None:
    """Raise Problem for a Core ML artifact on a system without Core ML."""
    kernel = str(machine.get("kernel"))
    if candidate.is_coreml and not kernel.startswith("Darwin"):
        raise Problem(
            f"{candidate.source} is a Core ML artifact, which can be timed on Apple systems only; "
            f"{name} runs {kernel}",
            hint="add --device m1 and --host with a Mac, or export with `--target onnx` for "
            f"{name}",
        )
