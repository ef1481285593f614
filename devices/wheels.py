"""The wheels of numpy and onnxruntime for another machine, by pip and its own configuration; for a
Mac those of coremltools too, where they are asked for; and those of another program."""

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
from packaging.tags import mac_platforms
from packaging.version import InvalidVersion, Version

from devices.device import DeviceProblem, last_line

NAMES = ("numpy", "onnxruntime")
MAY = ("coremltools",)
"""What is sent on request only, with all that it needs."""
LEAST_PYTHON = (3, 11)
"""What devices/runner is written for."""
OLDEST_GLIBC = 17
"""Minor version of the oldest one that wheels are built for."""


@dataclass(frozen=True)
class Target:
    """An interpreter that needs wheels."""

    python: tuple[int, int]
    machine: str
    """As platform.machine() spells it: aarch64, x86_64, arm64."""
    release: int
    """Of glibc the minor version, 36 for 2.36; of macOS the major one."""
    system: str = "Linux"
    more: tuple[str, ...] = ()
    """Of MAY."""
    only: tuple[str, ...] = ()
    """Requirements in the place of NAMES, with all that they need: of another program."""

    @property
    def names(self) -> list[str]:
        """What it is to have."""
        return [Requirement(text).name for text in self.only] or [*NAMES, *self.more]

    @property
    def requirements(self) -> list[str]:
        """In which versions."""
        return list(self.only) or pins(self.more)

    @property
    def options(self) -> list[str]:
        """What tells pip about it."""
        abi = f"cp{self.python[0]}{self.python[1]}"
        return [
            *("--implementation", "cp", "--python-version", ".".join(map(str, self.python))),
            *(word for name in (abi, "abi3", "none") for word in ("--abi", name)),
            *(word for name in self.platforms() for word in ("--platform", name)),
        ]

    def platforms(self) -> list[str]:
        """Return the platforms whose wheels it takes, the newest first."""
        if self.system == "Darwin":
            return list(mac_platforms((self.release, 0), self.machine))
        tags = [f"manylinux_2_{minor}_" for minor in range(self.release, OLDEST_GLIBC - 1, -1)]
        return [f"{tag}{self.machine}" for tag in (*tags, "manylinux2014_")]

    @property
    def name(self) -> str:
        """A name for what is installed there: other pins make another one."""
        asked = f"{self} {self.requirements}"
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        libc = "macOS " if self.system == "Darwin" else "glibc 2."
        version = ".".join(map(str, self.python))
        return f"Python {version} on {self.machine} with {libc}{self.release}"


@cache
def ranges() -> dict[str, Requirement]:
    """The versions that this release takes, by name: those in pyproject.toml."""
    try:
        asked = [Requirement(text) for text in metadata.requires("edgewhisper") or []]
    except metadata.PackageNotFoundError:  # run from its folder, without being installed
        asked = []
    found = {each.name: each for each in asked if "extra" not in str(each.marker)}
    return {name: found.get(name, Requirement(name)) for name in (*NAMES, *MAY)}


def pins(more: Sequence[str] = ()) -> list[str]:
    """The versions that run here: with them, texts and times can be compared."""
    return [pin(name) for name in (*NAMES, *more)]


def pin(name: str) -> str:
    """The version that runs here; coremltools may not be here, and then any in range."""
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return in_words(name)


def in_words(name: str) -> str:
    """A range, for pip, without the marker, which asks what this machine is and not the device."""
    return f"{name}{ranges()[name].specifier}"


def in_range(versions: dict[str, Any], more: Sequence[str] = ()) -> bool:
    """Whether what a device says is installed there is what this release takes."""
    try:
        found = {name: Version(versions[name]) for name in (*NAMES, *more)}
    except (KeyError, TypeError, InvalidVersion):
        return False
    return all(ranges()[name].specifier.contains(found[name]) for name in found)


def download(target: Target, folder: Path) -> list[Path]:
    """Fetch the wheels into a folder: of the versions that run here, else the newest in range."""
    asked = {"pinned": target.requirements}
    if not target.only:
        asked["newest"] = [in_words(name) for name in target.names]
    for name, requirements in asked.items():
        said = pip(target, folder / name, requirements)
        if not said:
            return sorted((folder / name).glob("*.whl"))
    raise DeviceProblem(f"no wheels of {listed(target.names)} for {target}: {said}", hint(target))


def hint(target: Target) -> str:
    """What helps where there are no wheels."""
    if target.only:
        return f"check that pip can reach its index, or do without {target.names[0]} there"
    if target.system == "Darwin":
        return (
            "check that pip can reach its index; onnxruntime's wheels need macOS 14, coremltools' "
            "Python 3.13 or older: `brew install python@3.13` there"
        )
    return "check that pip can reach its index, or install both on the device"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}"


def pip(target: Target, folder: Path, requirements: Sequence[str]) -> str:
    """Download wheels; return its last words where that failed, nothing otherwise."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    argv += ["--only-binary=:all:", "--dest", str(folder), *target.options]
    if not (target.more or target.only):
        argv.append("--no-deps")  # onnxruntime runs without what it names
    done = subprocess.run(
        [*argv, *requirements], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    said = last_line(done.stderr) or f"pip ended with exit code {done.returncode}"
    return said if done.returncode else ""
