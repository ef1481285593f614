"""Where outputs go when the user names no place: ./edgewhisper-runs, newest last.

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
    """A path that is not taken, for a `noun` (checkpoint, artifact, result) made now."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (RUNS / f"{noun}-{stamp}{again}{suffix}" for again in ["", *_again()])
    return next(path for path in candidates if not path.exists())


def newest(noun: str, without: str = "") -> Path | None:
    """The latest output of that noun, whose name does not have this in it, or None. Checkpoints
    that `compress` refused ("-failed") do not count."""
    paths = [
        path
        for path in RUNS.glob(f"{noun}-*")
        if "-failed" not in path.name and (not without or without not in path.name)
    ]
    return max(paths, key=lambda path: path.name, default=None)


def main_process() -> bool:
    """Under torchrun only the first process speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def _again() -> list[str]:
    """Tells apart outputs of one second; sorts behind the bare stamp."""
    return [f".{number:02d}" for number in range(1, 100)]
