"""A made-up latency table for tests of what is done with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.latency import STAGES, Cost, Table
from export.onnx.operators import KINDS


def make_table(costs: Mapping[str, Cost] | None = None, **changes: Any) -> Table:
    """Every operator costs nothing but those that are named."""
    free = dict.fromkeys([*STAGES, *KINDS], Cost(0.0))
    told = {
        "device": "rpi5",
        "precision": "int8",
        "threads": 4,
        "machine": {"cpu": "a CPU", "emulated": False},
        "versions": {"onnxruntime": "1.31.1"},
        "measured_at": "2026-01-02T03:04:05+00:00",
    }
    return Table(operators=free | dict(costs or {}), **(told | changes))
