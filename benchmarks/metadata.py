"""Hashes and sizes that identify artifacts, checkpoints and clips by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speech.clips import Clip


def artifact_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of the names and hashes of an artifact's files."""
    return digest(f"{name} {entry['sha256']}" for name, entry in sorted(manifest["files"].items()))


def folder_hash(folder: Path) -> str:
    """Return the same hash for a folder without a manifest, such as a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(f"{path.relative_to(folder).as_posix()} {file_hash(path)}" for path in files)


def clips_hash(clips: Sequence[Clip]) -> str:
    """Return the SHA-256 of the sound, text and language of all clips, in order."""
    return digest(f"{file_hash(clip.audio)} {clip.lang} {clip.text}" for clip in clips)


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines of text, in hex."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the total size in bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
