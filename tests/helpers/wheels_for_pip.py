"""Minimal wheels for pip, and the error that a device raises."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.device import DeviceProblem


def raised(of: Callable[[], object]) -> DeviceProblem:
    with pytest.raises(DeviceProblem) as found:
        of()
    return found.value


PLATFORM = f"manylinux_2_17_{os.uname().machine}"


def make_wheel(folder: Path, name: str, version: str, code: str = "", tags: str = "") -> None:
    """Write a wheel for the interpreter of these tests."""
    abi = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tags = tags or f"{abi}-{abi}-{PLATFORM}"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tags}.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", code or f"said = 'pushed {version}'\n")
        about = f"{name}-{version}.dist-info"
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nTag: {tags}\n")
        wheel.writestr(f"{about}/RECORD", "")
