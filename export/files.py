"""Files and folders that are written completely or not at all, and checks of their paths."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.problem import Problem


def cached(name: str) -> Path:
    """Return the cache folder for downloads and measurements, e.g. ~/.cache/edgewhisper/speech."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "edgewhisper" / name


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `out`, which becomes `out` if the block raises no error.
    Raises Problem if `out` exists or cannot be written. The temporary folder is always removed."""
    out = Path(out)
    if out.exists():
        raise Problem(f"{out} exists already", hint="name another --out, or remove it first")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with writing(out):
            yield temporary
            temporary.chmod(0o755)  # mkdtemp sets 0o700
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes `path`, like `new_directory`; it may replace an older
    file."""
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
    """Turn an OSError (no space, no permission) into a Problem that names `path`."""
    try:
        yield
    except OSError as error:
        raise Problem(
            f"{path} cannot be written: {error.strerror or error}",
            hint="check the free space and the permissions there, or name another place",
        ) from error


def links_outside(path: Path) -> bool:
    """Return whether a file is a link to anything but a blob of its own Hugging Face hub cache. In
    that cache, MODEL/snapshots/REVISION/.../NAME is a link to MODEL/blobs/HASH. The runner has a
    copy in devices/runner/artifact/files.py, because it must not import this package."""
    if not path.is_symlink():
        return False
    model = next(
        (p.parent for p in (path.parent.resolve() / path.name).parents if p.name == "snapshots"),
        None,
    )
    return model is None or path.resolve().parent != (model / "blobs").resolve()


def stays_inside(name: str) -> bool:
    """Return whether a relative file name stays inside its folder, on POSIX and on Windows. The
    runner has a copy in devices/runner/artifact/files.py, like that of `links_outside`."""
    parts = name.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") for part in parts) and not {":", "\0"} & set(name)
