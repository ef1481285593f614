"""Builds a self-contained folder with Python, numpy and onnxruntime for a phone's CPU.

    python              the start script, for the phone's shell
    bin/python3         the interpreter
    lib/                the C library's loader, and the libraries
    lib/python3.N/      the standard library
    lib/python3/dist-packages/   numpy and onnxruntime

Android has another C library and no Python, so the script starts the loader explicitly. The parts
come from packages of this machine's Debian or Ubuntu, and from wheels. A bundle is built once per
CPU and takes about 150 MB.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from devices import debian
from devices.device import DeviceProblem
from devices.wheels import LEAST_PYTHON, Target, download, pins


@dataclass(frozen=True)
class Cpu:
    """A CPU architecture, with its names in Debian and Linux and its loader."""

    debian: str
    machine: str
    loader: str


CPUS = {
    "arm64-v8a": Cpu("arm64", "aarch64", "ld-linux-aarch64.so.1"),
    "x86_64": Cpu("amd64", "x86_64", "ld-linux-x86-64.so.2"),
}
"""Android's name of an architecture -> the others."""

START = """#!/system/bin/sh
here=${{0%/*}}
unset LD_PRELOAD LD_LIBRARY_PATH
export PYTHONHOME="$here" PYTHONUTF8=1 ORT_DISABLE_TELEMETRY=1 TMPDIR="${{TMPDIR:-/data/local/tmp}}"
exec "$here/lib/{loader}" --argv0 "$here/python" --library-path "$here/lib" "$here/bin/python3" \\
  -s "$@"
"""

NOT_RUN = (
    *("test", "idlelib", "lib2to3", "ensurepip", "distutils", "tkinter", "turtledemo"),
    *("pydoc_data", "tests", "__pycache__", "include"),
    *("transformers", "quantization", "tools", "backend", "datasets"),  # of onnxruntime
)
"""Folders that are not needed at run time."""


def bundle(cpu: Cpu, say: Callable[[str], None]) -> Path:
    """Return the bundle for a CPU, named by a hash of its content; build it if it is missing."""
    release = debian.release()
    inputs = f"{cpu} {release} {pins()}".encode() + Path(__file__).read_bytes()
    place = cache("bundles") / hashlib.sha256(inputs).hexdigest()[:16]
    with suppress(OSError):
        return next(entry for entry in place.iterdir() if not entry.name.startswith("."))
    say(f"building an interpreter for {cpu.machine} from this machine's packages (only once)")
    try:
        place.mkdir(parents=True, exist_ok=True)
        return build(cpu, release, place)
    except OSError as error:
        raise DeviceProblem(
            f"{error.filename or place} cannot be written: {error.strerror}", "free 500 MB"
        ) from None


def cache(name: str) -> Path:
    """Return the folder `name` of EdgeWhisper's cache on this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgewhisper" / name


def build(cpu: Cpu, release: str, place: Path) -> Path:
    """Build a bundle in a folder; return its path."""
    with tempfile.TemporaryDirectory(prefix=".", dir=place) as temporary:
        work = Path(temporary)
        packages, python = parts(cpu, release, work)
        root, out = work / "root", work / "bundle"
        debian.unpack(packages, root)
        gather(cpu, root, out)
        wheels = download(Target((3, python), cpu.machine, libc_of(packages)), work / "wheels")
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(root / "packages")
        copy(root / f"usr/bin/python3.{python}", out / "bin/python3", root)
        copy_tree(root / f"usr/lib/python3.{python}", out / f"lib/python3.{python}", root)
        copy_tree(root / "packages", out / "lib/python3/dist-packages", root)
        (out / "python").write_text(START.format(loader=cpu.loader), encoding="ascii")
        (out / "python").chmod(0o755)
        target = place / hash_of(out)
        with suppress(OSError):  # another process may have built it meanwhile
            os.replace(out, target)
        return target


def parts(cpu: Cpu, release: str, work: Path) -> tuple[list[Path], int]:
    """Download the Debian packages; return them and the minor version of their Python."""
    entries = debian.entries_of(release, "".join(debian.source_files()))
    config = debian.lay_out_apt(work, cpu.debian, entries)
    debian.update(config)
    depends = debian.apt(["apt-cache", "depends", "python3-minimal"], config)
    version = re.search(r"python3\.(\d+)-minimal", depends)
    if version is None:
        raise DeviceProblem(
            f"this machine's apt sources have no python3 for {cpu.debian}", debian.NETWORK
        )
    python = int(version[1])
    if (3, python) < LEAST_PYTHON:
        raise DeviceProblem(
            f"{release} has Python 3.{python}, and the runner needs "
            f"{LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or newer",
            "bench from Debian 12, Ubuntu 24.04 or newer",
        )
    names = [f"python3.{python}-minimal", f"libpython3.{python}-stdlib", "libstdc++6"]
    return debian.fetch(names, config), python


def libc_of(packages: Sequence[Path]) -> int:
    """Return glibc's minor version from the names of the packages."""
    names = " ".join(package.name for package in packages)
    version = re.search(r"\blibc6_2\.(\d+)", names)
    assert version is not None  # all other packages depend on it
    return int(version[1])


def gather(cpu: Cpu, root: Path, out: Path) -> None:
    """Copy loader and libraries, each under the names by which programs load it."""
    folders = [root / part / f"{cpu.machine}-linux-gnu" for part in ("lib", "usr/lib")]
    by_file: dict[Path, list[Path]] = {}
    for path in [path for folder in folders for path in folder.glob("lib*.so*")]:
        by_file.setdefault(path.resolve(), []).append(path)
    # libraries are loaded by the names of their links, or by their own name if they have none
    chosen = [
        path
        for file, names in by_file.items()
        for path in ([name for name in names if name.is_symlink()] or names)
        if file.is_file()
    ]
    loaders = [folder / cpu.loader for folder in folders if (folder / cpu.loader).is_file()]
    for path in [*chosen, *loaders]:
        copy(path, out / "lib" / path.name, root)


def copy_tree(source: Path, target: Path, root: Path) -> None:
    """Copy the files of a folder that are needed at run time."""
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if name not in NOT_RUN]
        for name in names:
            if not name.endswith((".a", ".pyi", ".pyc", ".whl", ".h")):
                path = Path(folder) / name
                copy(path, target / path.relative_to(source), root)


def copy(source: Path, target: Path, root: Path) -> None:
    """Copy a file, following links; links that lead out of `root` are skipped."""
    real = source.resolve()
    if real.is_file() and real.is_relative_to(root.resolve()):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, target)
        target.chmod(0o755 if os.access(real, os.X_OK) else 0o644)


def hash_of(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder)} {digest}\n".encode())
    return total.hexdigest()[:16]
