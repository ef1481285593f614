"""Downloads wheels for another machine with pip: numpy and onnxruntime, coremltools for a Mac, or
the packages of another program."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import mac_platforms
from packaging.version import InvalidVersion, Version

from devices.device import DeviceProblem, last_line

NAMES = ("numpy", "onnxruntime")
OPTIONAL = ("coremltools",)
"""Packages that are installed on request only, with their dependencies."""
LEAST_PYTHON = (3, 11)
"""The oldest Python that devices/runner supports."""
OLDEST_GLIBC = 17
"""Minor version of the oldest glibc that wheels are built for."""


@dataclass(frozen=True)
class Target:
    """An interpreter that needs wheels."""

    python: tuple[int, int]
    machine: str
    """The value of platform.machine(): aarch64, x86_64 or arm64."""
    release: int
    """glibc's minor version (36 for 2.36), or macOS's major version."""
    system: str = "Linux"
    more: tuple[str, ...] = ()
    """Packages of OPTIONAL to install too."""
    only: tuple[str, ...] = ()
    """Requirements of another program, installed with their dependencies instead of NAMES."""
    oldest: str = ""
    """The oldest onnxruntime that the artifacts run in; see Device.oldest_runtime."""

    @property
    def names(self) -> list[str]:
        """The names of the packages to install."""
        return [Requirement(text).name for text in self.only] or [*NAMES, *self.more]

    @property
    def requirements(self) -> list[str]:
        """The packages to install, with the versions installed here if these are new enough."""
        if self.only:
            return list(self.only)
        return pins(self.more) if in_range(installed(), self.more, self.oldest) else self.newest

    @property
    def newest(self) -> list[str]:
        """The packages to install, in all supported versions."""
        return [range_of(name, self.oldest) for name in self.names]

    @property
    def options(self) -> list[str]:
        """pip's options for this interpreter."""
        abi = f"cp{self.python[0]}{self.python[1]}"
        return [
            *("--implementation", "cp", "--python-version", ".".join(map(str, self.python))),
            *(word for name in (abi, "abi3", "none") for word in ("--abi", name)),
            *(word for name in self.platforms() for word in ("--platform", name)),
        ]

    def platforms(self) -> list[str]:
        """Return the platform tags that it supports, newest first."""
        if self.system == "Darwin":
            return list(mac_platforms((self.release, 0), self.machine))
        tags = [f"manylinux_2_{minor}_" for minor in range(self.release, OLDEST_GLIBC - 1, -1)]
        return [f"{tag}{self.machine}" for tag in (*tags, "manylinux2014_")]

    @property
    def name(self) -> str:
        """A name for the installed packages that changes with their versions."""
        content = f"{self} {self.requirements}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        libc = "macOS " if self.system == "Darwin" else "glibc 2."
        version = ".".join(map(str, self.python))
        return f"Python {version} on {self.machine} with {libc}{self.release}"


@cache
def ranges() -> dict[str, Requirement]:
    """Return the supported versions by package name, from pyproject.toml."""
    try:
        texts = metadata.requires("edgewhisper") or []
    except metadata.PackageNotFoundError:  # run from its folder, without being installed
        texts = []
    known = {each.name: each for each in map(Requirement, texts) if "extra" not in str(each.marker)}
    return {name: known.get(name, Requirement(name)) for name in (*NAMES, *OPTIONAL)}


def pins(more: Sequence[str] = ()) -> list[str]:
    """Return requirements of the versions installed here, so that results are comparable."""
    return [pin(name) for name in (*NAMES, *more)]


def pin(name: str) -> str:
    """Return the requirement of the version installed here, or of the supported range."""
    return f"{name}=={installed()[name]}" if name in installed() else range_of(name)


def installed() -> dict[str, str]:
    """Return the versions of the packages installed here by name."""
    versions = {}
    for name in (*NAMES, *OPTIONAL):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def range_of(name: str, oldest: str = "") -> str:
    """Return the requirement of the supported range, without the marker for this machine."""
    return f"{name}{supported(name, oldest)}"


def supported(name: str, oldest: str = "") -> SpecifierSet:
    """Return the supported versions; those of onnxruntime begin with `oldest` if it is given."""
    versions = ranges()[name].specifier
    if name != "onnxruntime" or not oldest:
        return versions
    others = [str(limit) for limit in versions if limit.operator != ">="]
    return SpecifierSet(",".join([f">={oldest}", *others]))


def in_range(versions: Any, more: Sequence[str] = (), oldest: str = "") -> bool:
    """Return whether the versions installed on a device are supported."""
    try:
        known = {name: Version(versions[name]) for name in (*NAMES, *more)}
    except (KeyError, TypeError, InvalidVersion):
        return False
    return all(supported(name, oldest).contains(version) for name, version in known.items())


def download(target: Target, folder: Path) -> list[Path]:
    """Download wheels to a folder: the versions installed here, or else the newest supported."""
    choices = {"pinned": target.requirements}
    if not target.only:
        choices["newest"] = target.newest
    for name, requirements in choices.items():
        error = pip(target, folder / name, requirements)
        if not error:
            return sorted((folder / name).glob("*.whl"))
    what = listed(target.names)
    if target.oldest:
        what += f" (the artifact needs onnxruntime {target.oldest} or newer)"
    raise DeviceProblem(f"no wheels of {what} for {target}: {error}", hint(target))


def hint(target: Target) -> str:
    """Return the hint for missing wheels."""
    if target.only:
        return f"check that pip can reach its index, or leave {target.names[0]} out there"
    if target.system == "Darwin":
        return (
            "check that pip can reach its index; onnxruntime's wheels need macOS 14, coremltools' "
            "need Python 3.13 or older: `brew install python@3.13` there"
        )
    again = "; `export --runtime` makes artifacts for an older onnxruntime" if target.oldest else ""
    return f"check that pip can reach its index, or install both on the device{again}"


def listed(names: Sequence[str]) -> str:
    """Return names as "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}"


def pip(target: Target, folder: Path, requirements: Sequence[str]) -> str:
    """Download wheels; return pip's last error line, or an empty string on success."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    argv += ["--only-binary=:all:", "--dest", str(folder), *target.options]
    if not (target.more or target.only):
        argv.append("--no-deps")  # onnxruntime runs without its declared dependencies
    done = subprocess.run(
        [*argv, *requirements], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    error = last_line(done.stderr) or f"pip ended with exit code {done.returncode}"
    return error if done.returncode else ""
