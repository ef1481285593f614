"""Which libraries made something: the same answer in checkpoints, artifacts and results."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("edgewhisper", "torch", "transformers", "accelerate", "onnx", "onnxruntime", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES, none of which is imported for it."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
