"""An artifact on disk: write, read and verify the folder that `export` produces.

An artifact is a folder. Its manifest.json describes the model (see manifest.py) and lists every
other file with its size and SHA-256 hash.

This module needs the standard library only, so that a device can check what it received.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.files import links_outside, new_file, stays_inside
from export.layouts import LAYOUTS, NATIVE, needed_files
from export.problem import Problem

FORMAT = 2
AUTO_FORMAT = 3
"""The format of artifacts that detect the language. A reader that knows only format 2 would prompt
them for English."""
MANIFEST = "manifest.json"
WRITTEN_BY_EXPORT = "name a directory that `edgewhisper export` wrote"
AGAIN = "export it again, or copy the whole folder again"
Gate = Callable[[dict[str, Any]], dict[str, Any]]
"""Function from a manifest to its value of the key `gate`."""


def write_manifest(directory: Path, manifest: dict[str, Any], gate: Gate | None = None) -> None:
    """Write manifest.json with the hash and size of every other file in the folder. Adds the keys
    `format` and `files` to `manifest`, so that it equals what `read_manifest` returns. Then runs
    `gate` and stores its record; if it raises, no manifest is written."""
    detects = (manifest.get("decoding") or {}).get("language") == "auto"
    manifest["format"] = AUTO_FORMAT if detects else FORMAT
    manifest["files"] = {
        path.relative_to(directory).as_posix(): describe(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    if gate is not None:
        manifest["gate"] = gate(manifest)
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with new_file(directory / MANIFEST) as partial:
        partial.write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the content of manifest.json. The listed files are not checked; see `verify`. Raises
    Problem if the folder holds no artifact, the manifest is not JSON or has an unknown format, a
    field is missing, or a file name points outside the folder."""
    path = Path(directory) / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "not a file")  # reading a pipe would block
        if links_outside(path):
            raise OSError(0, "a link that leads out of the artifact")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason, hint = f"{MANIFEST} cannot be read ({error.strerror})", WRITTEN_BY_EXPORT
        if not path.parent.exists():
            reason = "there is no such directory"
        elif isinstance(error, FileNotFoundError) and any(path.parent.glob("*.safetensors")):
            reason = "it is a checkpoint"
            hint = f"run `edgewhisper export {directory}`, and name the directory that it writes"
        raise Problem(f"{directory}: no artifact here ({reason})", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: damaged, not JSON ({error})", hint=AGAIN) from error
    return checked_manifest(directory, manifest)


def checked_manifest(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a folder. Raises Problem as `read_manifest` does."""
    path = Path(directory) / MANIFEST
    actual = manifest.get("format") if isinstance(manifest, dict) else None
    if type(actual) is not int or actual not in (FORMAT, AUTO_FORMAT):
        raise Problem(
            f"{path}: format {actual!r}; this version reads formats {FORMAT} and {AUTO_FORMAT}",
            hint="use the EdgeWhisper version that wrote it, or export the checkpoint again",
        )
    _check_files(path, manifest)
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """Check the size and hash of every file and return the manifest. Raises Problem as
    `read_manifest` does, and for the first file that is missing or has changed."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, expected in manifest["files"].items():
        path = directory / name
        if links_outside(path):
            raise Problem(f"{path}: a link, not a file of the artifact", hint=AGAIN)
        if not path.is_file():
            raise Problem(f"{path}: missing from the artifact", hint=AGAIN)
        actual = describe(path)
        if actual["bytes"] != expected["bytes"]:
            raise Problem(
                f"{path}: damaged, {actual['bytes']} bytes instead of {expected['bytes']}",
                hint=AGAIN,
            )
        if actual["sha256"] != expected["sha256"]:
            raise Problem(f"{path}: damaged, its SHA-256 is not the manifest's", hint=AGAIN)
    for path in directory.glob("*.mlpackage/**/*"):  # Core ML may read any file of a package
        if path.relative_to(directory).as_posix() not in manifest["files"] and not path.is_dir():
            raise Problem(f"{path}: {MANIFEST} does not list it", hint=AGAIN)
    return manifest


def describe(path: Path) -> dict[str, Any]:
    """Return the SHA-256 hash and the size in bytes of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    layout, files = manifest.get("layout", NATIVE), manifest.get("files")
    if layout not in tuple(LAYOUTS):
        raise Problem(
            f"{path}: layout {layout!r}; this version knows {', '.join(LAYOUTS)}",
            hint="use the EdgeWhisper version that wrote it, or export the checkpoint again",
        )
    if not isinstance(files, dict):
        raise Problem(f"{path}: damaged, it lists no files", hint=AGAIN)
    for name, entry in files.items():
        if not stays_inside(name):
            raise Problem(
                f"{path}: names the file {name!r}, which is outside the artifact",
                hint="do not use this artifact: it was not written by EdgeWhisper",
            )
        if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
            raise Problem(f"{path}: damaged, no hash and size for {name}", hint=AGAIN)
    for name in needed_files(layout, str(manifest.get("precision"))):
        if name not in files:
            raise Problem(f"{path}: damaged, it does not list {name}", hint=AGAIN)
