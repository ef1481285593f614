"""Opens an artifact and runs the gate on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gate import Bounds, Languages, Parts, Windows, judge
from benchmarks.reference_runtimes import open_artifact
from benchmarks.speech.clips import Clip


def run_gate(
    artifact: Path,
    reference: Sequence[Windows],
    clips: Sequence[Clip],
    bounds: Bounds,
    parts: Parts | None = None,
    threads: int | None = None,
    languages: Languages | None = None,
) -> dict[str, Any]:
    """Return the gate's figures of an artifact; see benchmarks.gate.judge."""
    return judge(open_artifact(artifact, threads), reference, clips, bounds, parts, languages)
