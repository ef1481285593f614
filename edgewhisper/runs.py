"""Default paths of outputs, in ./edgewhisper-runs.

edgewhisper-runs/checkpoint-20261120-174502-tspar/      compress
edgewhisper-runs/artifact-20261120-174950-int8/         export
edgewhisper-runs/result-20261120-175101.jsonl           bench
"""

from __future__ import annotations

import os
import time
from pathlib import Path

RUNS = Path("edgewhisper-runs")


def new_path(noun: str, suffix: str) -> Path:
    """Return an unused path for a new output. `noun` is checkpoint, artifact or result."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (RUNS / f"{noun}-{stamp}{again}{suffix}" for again in ["", *_again()])
    return next(path for path in candidates if not path.exists())


def newest(noun: str, without: str = "") -> Path | None:
    """Return the newest output of this noun whose name does not contain `without`, or None.
    Checkpoints that `compress` refused ("-failed") are skipped."""
    paths = [
        path
        for path in RUNS.glob(f"{noun}-*")
        if "-failed" not in path.name and (not without or without not in path.name)
    ]
    return max(paths, key=lambda path: path.name, default=None)


def main_process() -> bool:
    """Return whether this is torchrun's first process, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def _again() -> list[str]:
    """Return suffixes that distinguish outputs of the same second and sort after none."""
    return [f".{number:02d}" for number in range(1, 100)]
