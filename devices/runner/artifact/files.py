"""Files of an artifact: only regular files inside the folder are read, of bounded size."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from ..problem import RunnerProblem

AGAIN = "copy the whole artifact again, or export it again"
UNTRUSTED = "do not use this artifact: it was not written by EdgeWhisper"
MANIFEST = "manifest.json"
SNAPSHOTS, BLOBS = "snapshots", "blobs"
MOST_JSON_BYTES = 8 * 2**20


def links_outside(path: Path) -> bool:
    """Return whether a file is a link to anything but a file of its own huggingface_hub cache. In
    that cache, MODEL/snapshots/REVISION/.../NAME is a link to MODEL/blobs/HASH."""
    if not path.is_symlink():
        return False
    model = next(
        (p.parent for p in (path.parent.resolve() / path.name).parents if p.name == SNAPSHOTS), None
    )
    return model is None or path.resolve().parent != (model / BLOBS).resolve()


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Return the content of a JSON file; raise RunnerProblem for anything else."""
    plain_file(path)
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise RunnerProblem(f"{path}: {size} bytes; the limit is {most_bytes}", AGAIN)
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=no_number)
    except RunnerProblem:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise RunnerProblem(
        f"{path.parent}: {path.name} cannot be read ({reason})",
        f"{AGAIN}; an artifact is a directory written by `edgewhisper export`",
    )


def no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def plain_file(path: Path) -> None:
    """Raise RunnerProblem unless a path is a regular file of the artifact. Links out of the
    artifact are refused, and pipes and devices, which can block forever."""
    if links_outside(path):
        raise RunnerProblem(
            f"{path}: a link to {os.readlink(path)}, not a file of the artifact",
            "copy the file itself; only links of the huggingface_hub cache are followed",
        )
    try:
        mode = path.stat().st_mode
    except OSError:
        raise RunnerProblem(f"{path}: there is no such file", AGAIN) from None
    if not stat.S_ISREG(mode):
        raise RunnerProblem(f"{path}: not a regular file", AGAIN)


def stays_inside(name: str) -> bool:
    """Return whether a name is a relative path without "..", on POSIX and on Windows."""
    parts = name.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") for part in parts) and not {":", "\0"} & set(name)


def check_file(path: Path, expected: dict[str, Any], hashed: bool = True) -> None:
    """Raise RunnerProblem if a file's size, or with `hashed` its content, was changed."""
    plain_file(path)
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise RunnerProblem(f"{path}: damaged, {size} bytes instead of {expected['bytes']}", AGAIN)
    if hashed and sha256(path) != expected["sha256"]:
        raise RunnerProblem(f"{path}: damaged, its SHA-256 is not the manifest's", AGAIN)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
