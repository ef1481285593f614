"""Core ML packages of programs as they are built. Modules that import this are skipped without
coremltools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

with contextlib.redirect_stderr(io.StringIO()):  # it tells what it lacks outside macOS
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types


def write(path: Path, inputs: list, build: Callable, target: str = "iOS17") -> Path:
    """A package of a program as it is built: without coremltools' passes, which improve it."""
    opset = getattr(ct.target, target)
    with contextlib.redirect_stderr(io.StringIO()):
        model = ct.convert(
            Builder.program(input_specs=inputs, opset_version=opset)(build),
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    model.save(str(path))
    return path


def tensor(shape, dtype=types.fp16):
    return Builder.TensorSpec(shape, dtype=dtype)
