"""Graphs of the tests in onnxruntime, as the runner opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from devices.runner.engines.sessions import session_options
from export.onnx.constants import own_constants


def open_model(model: onnx.ModelProto | Path) -> Any:
    """A session on one thread whose int8 products do not saturate on any processor."""
    given = onnx.load(model) if isinstance(model, Path) else model
    own_constants(given)
    return onnxruntime.InferenceSession(
        given.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
