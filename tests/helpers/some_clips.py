"""A manifest of a few of another manifest's clips, for tests that would take too long with all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def manifest_of_some(clips: Path, chosen: slice, folder: Path) -> Path:
    rows = [json.loads(line) for line in clips.read_text().splitlines()[chosen]]
    lines = [json.dumps(row | {"audio": str(clips.parent / row["audio"])}) for row in rows]
    path = folder / "few.jsonl"
    path.write_text("\n".join(lines))
    return path


def copy_of_some(clips: Path, count: int, folder: Path) -> Path:
    """Copy the sound files next to a manifest of its first clips, folder/few.jsonl."""
    shutil.copytree(clips.parent / "test", folder / "test")
    path = folder / "few.jsonl"
    path.write_text("\n".join(clips.read_text().splitlines()[:count]) + "\n")
    return path
