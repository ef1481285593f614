"""Versions of the libraries that made a checkpoint, an artifact or a result."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

PACKAGES = ("edgewhisper", "torch", "transformers", "accelerate", "onnx", "onnxruntime", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES without importing them."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@cache
def version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
