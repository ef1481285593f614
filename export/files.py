"""Files that appear whole or not at all: written to a temporary sibling, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.problem import Problem


def cached(name: str) -> Path:
    """The folder for what is fetched or measured once, such as ~/.cache/edgewhisper/speech."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "edgewhisper" / name


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends without an error.

    Raises Problem when `out` exists or cannot be written; whatever happens, no half remains.
    """
    out = Path(out)
    if out.exists():
        raise Problem(f"{out} exists already", hint="name another --out, or remove it first")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with writing(out):
            yield temporary
            temporary.chmod(0o755)  # mkdtemp gives 0o700; a result is no secret
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As new_directory, for one file, which may replace an older one."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
    try:
        with writing(path):
            yield Path(name)
            os.chmod(name, 0o644)
            os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what stops a write (no space, no permission) into a letter about `path`."""
    try:
        yield
    except OSError as error:
        raise Problem(
            f"{path} cannot be written: {error.strerror or error}",
            hint="check the free space and the permissions there, or name another place",
        ) from error


def leads_out(path: Path) -> bool:
    """Whether a file is a link to anything but a file of its own hub cache, where
    MODEL/snapshots/REVISION/.../NAME is a link to MODEL/blobs/HASH.

    As devices/runner/artifact/files.py, which has no more than the standard library there.
    """
    if not path.is_symlink():
        return False
    model = next(
        (p.parent for p in (path.parent.resolve() / path.name).parents if p.name == "snapshots"),
        None,
    )
    return model is None or path.resolve().parent != (model / "blobs").resolve()
