"""The wheels of numpy and onnxruntime for another machine, by pip and its own configuration."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from devices.device import DeviceProblem, last_line

NAMES = ("numpy", "onnxruntime")
LEAST_PYTHON = (3, 11)
"""What devices/runner is written for."""
OLDEST_GLIBC = 17
"""Minor version of the oldest one that wheels are built for."""


@dataclass(frozen=True)
class Target:
    """An interpreter that needs wheels."""

    python: tuple[int, int]
    machine: str
    """As platform.machine() spells it: aarch64, x86_64."""
    glibc: int
    """Minor version: 36 for 2.36."""

    @property
    def options(self) -> list[str]:
        """What tells pip about it."""
        abi = f"cp{self.python[0]}{self.python[1]}"
        tags = [f"manylinux_2_{minor}_" for minor in range(self.glibc, OLDEST_GLIBC - 1, -1)]
        platforms = [f"{tag}{self.machine}" for tag in (*tags, "manylinux2014_")]
        return [
            *("--implementation", "cp", "--python-version", ".".join(map(str, self.python))),
            *(word for name in (abi, "abi3", "none") for word in ("--abi", name)),
            *(word for name in platforms for word in ("--platform", name)),
        ]

    @property
    def name(self) -> str:
        """A name for what is installed there: other pins make another one."""
        asked = f"{self} {pins()}"
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


@cache
def ranges() -> dict[str, Requirement]:
    """The versions that this release takes, by name: those in pyproject.toml."""
    try:
        asked = [Requirement(text) for text in metadata.requires("edgewhisper") or []]
    except metadata.PackageNotFoundError:  # run from its folder, without being installed
        asked = []
    found = {requirement.name: requirement for requirement in asked if not requirement.marker}
    return {name: found.get(name, Requirement(name)) for name in NAMES}


def pins() -> list[str]:
    """The versions that run here: with them, texts and times can be compared."""
    return [f"{name}=={metadata.version(name)}" for name in NAMES]


def in_range(versions: dict[str, Any]) -> bool:
    """Whether what a device says is installed there is what this release takes."""
    try:
        found = {name: Version(versions[name]) for name in NAMES}
    except (KeyError, TypeError, InvalidVersion):
        return False
    return all(ranges()[name].specifier.contains(found[name]) for name in NAMES)


def download(target: Target, folder: Path) -> list[Path]:
    """Fetch the wheels into a folder: of the versions that run here, else the newest in range."""
    asked = {"pinned": pins(), "newest": [str(one) for one in ranges().values()]}
    for name, requirements in asked.items():
        said = pip(target, folder / name, requirements)
        if not said:
            return sorted((folder / name).glob("*.whl"))
    raise DeviceProblem(
        f"no wheels of {' and '.join(NAMES)} for Python {target.python[0]}.{target.python[1]} "
        f"on {target.machine} with glibc 2.{target.glibc}: {said}",
        "check that pip can reach its index, or install both on the device",
    )


def pip(target: Target, folder: Path, requirements: Sequence[str]) -> str:
    """Download wheels; return its last words where that failed, nothing otherwise."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    argv += ["--only-binary=:all:", "--no-deps", "--dest", str(folder), *target.options]
    done = subprocess.run(
        [*argv, *requirements], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    said = last_line(done.stderr) or f"pip ended with exit code {done.returncode}"
    return said if done.returncode else ""
