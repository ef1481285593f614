"""An AArch64 machine in an emulator, built once into a folder; nothing is installed.

    root/            Debian's arm64 packages of Python and its libraries, unpacked
    root/site/       AArch64 wheels of numpy and onnxruntime, in the versions of constraints.txt
    count.so         count.c, built with qemu-plugin.h of Debian's qemu sources
    bytecode/        bytecode of the Python programs

Every run gets a CPU description as Linux on that core has it, because onnxruntime crashes on the
x86 caches in the host's /sys.

It needs Debian 12, whose qemu-user supports plugins. The folder takes about 300 MB, of which 70 MB
are downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.program import PROJECT
from devices import debian
from export.files import new_directory
from export.problem import Problem

VERSIONS = PROJECT / "constraints.txt"
SOURCE = Path(__file__).with_name("count.c")
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libssl3", "libuuid1", f"python{PYTHON}-minimal"),
    *(f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib"),
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
CPUS = {
    "cortex-a53": ("0xd03", "fp asimd crc32 cpuid"),
    "cortex-a72": ("0xd08", "fp asimd crc32 cpuid"),
    "cortex-a76": ("0xd0b", "fp asimd crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"),
}
"""Name of a core -> its part number and features in /proc/cpuinfo."""
CORES = 4


@dataclass(frozen=True)
class Task:
    """The arguments of guest.py."""

    artifact: Path
    clips: tuple[Path, ...]
    seconds: float
    tokens: int
    rounds: int = 2
    """The first round warms up; the last one is counted."""

    def argv(self, out: Path) -> list[str]:
        paths = [str(path.resolve()) for path in (self.artifact, out, *self.clips)]
        options = [f"--{name}={getattr(self, name)}" for name in ("seconds", "tokens", "rounds")]
        return ["-s", "-m", "benchmarks.aarch64.guest", *paths, *options]


@dataclass(frozen=True)
class Answer:
    """The output of guest.py and the plugin's marks."""

    arrays: dict[str, np.ndarray]
    tokens: list[list[int]]
    versions: dict[str, str]
    marks: str = ""


def emulate(place: Path, cpu: str, task: Task) -> Answer:
    """Run the guest on an emulated core; return its answer with the marks."""
    root = place / "root"
    env = {
        "PYTHONPATH": f"{PROJECT}:{root / 'site'}",
        "PYTHONPYCACHEPREFIX": str(place / "bytecode"),
        "PYTHONHASHSEED": "0",  # otherwise the order of sets changes the counts
    }
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks"
        result = answer(python(place, cpu, Path(folder), marks), env, task, Path(folder))
        return replace(result, marks=marks.read_text(encoding="ascii"))


def python(place: Path, cpu: str, folder: Path, marks: Path) -> list[str]:
    """Return the command of the emulated interpreter, which writes marks to a file."""
    root, plugin = place / "root", f"{place / 'count.so'},out={marks}"
    described = describe(root, cpu, folder / "root")
    emulator = ["qemu-aarch64", "-cpu", cpu, "-L", str(described), "-plugin", plugin]
    return [*emulator, str(root / f"usr/bin/python{PYTHON}")]


def run_here(task: Task) -> Answer:
    """Run the guest on this machine's CPU."""
    with tempfile.TemporaryDirectory() as folder:
        return answer([sys.executable], {"PYTHONPATH": str(PROJECT)}, task, Path(folder))


def answer(interpreter: Sequence[str], env: Mapping[str, str], task: Task, folder: Path) -> Answer:
    hint = "read its output; delete build/aarch64 to rebuild the emulated machine"
    checked([*interpreter, *task.argv(folder / "guest")], hint, env)
    output = json.loads((folder / "guest.json").read_text(encoding="utf-8"))
    with np.load(folder / "guest.npz") as stored:
        return Answer(dict(stored), **output)


def checked(argv: Sequence[str], hint: str, env: Mapping[str, str] | None = None) -> str:
    """Run a program and return its stdout. Raises Problem with the last line of its stderr."""
    own = None if env is None else {"ORT_DISABLE_TELEMETRY": "1", "PATH": "/usr/bin:/bin", **env}
    try:
        done = subprocess.run(argv, env=own, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Problem(f"{argv[0]} cannot be started: {error.strerror}", hint) from None
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Problem(f"{argv[0]} ended with exit code {done.returncode} ({message})", hint)
    return done.stdout


# --------------------------------------------------------------------------------- building it


def build(place: Path) -> None:
    """Build what is missing. Raises Problem for a missing tool or package."""
    for tool, package in (("qemu-aarch64", "qemu-user"), ("gcc", "gcc")):
        if shutil.which(tool) is None:
            raise Problem(f"{tool} is not installed", f"install it: sudo apt-get install {package}")
    stamp = place / "root" / VERSIONS.name
    if not stamp.is_file() or stamp.read_bytes() != VERSIONS.read_bytes():
        fetch(place)
    plugin = place / "count.so"
    if not plugin.is_file() or plugin.stat().st_mtime < SOURCE.stat().st_mtime:
        compile_plugin(place, plugin)


def fetch(place: Path) -> None:
    """Download and unpack packages, wheels and the plugin header."""
    place.mkdir(parents=True, exist_ok=True)
    fetched = place / "fetched"
    shutil.rmtree(fetched, ignore_errors=True)
    config = lay_out_apt(fetched, "".join(debian.source_files()))
    hint = "Debian's packages and the Python package index are needed; check the network"
    env = {"APT_CONFIG": str(config)}
    in_fetched = ["sh", "-c", 'cd "$0" && exec "$@"', str(fetched)]
    checked(["apt-get", "update", "-qq"], hint, env)
    checked([*in_fetched, "apt-get", "download", "-qq", *PACKAGES], hint, env)
    source = ["apt-get", "source", "-qq", "--download-only", "qemu"]
    checked([*in_fetched, *source], hint, env)
    checked(pip(fetched), hint)
    unpack_header(fetched, place / "qemu-plugin.h")
    shutil.rmtree(place / "root", ignore_errors=True)
    with new_directory(place / "root") as root:
        for package in sorted(fetched.glob("*.deb")):
            checked(["dpkg-deb", "-x", str(package), str(root)], hint)
        for wheel in fetched.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(root / "site")
        shutil.copy(VERSIONS, root)
    shutil.rmtree(fetched)


def pip(folder: Path) -> list[str]:
    """Return the command that downloads the wheels; their dependencies are not needed."""
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_aarch64")]
    where = ["--no-deps", "-d", str(folder), "-c", str(VERSIONS)]
    kind = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", "-q"]
    return [*command, *where, *kind, *platforms, "numpy", "onnxruntime"]


def lay_out_apt(folder: Path, sources: str) -> Path:
    """Write apt's configuration for arm64 and return its path. Raises Problem on other systems."""
    entries = debian_sources(sources)
    if not entries:
        raise Problem(
            "the emulated machine needs Debian 12's packages (bookworm), which this machine's apt "
            "does not have",
            "run it on Debian 12, in a container for instance",
        )
    return debian.lay_out_apt(folder, "arm64", entries)


def debian_sources(text: str) -> list[str]:
    """Return the entries for Debian 12, in either of apt's formats, with binaries and sources."""
    entries = []
    for entry in debian.entries_of(SUITE, text):
        both = re.sub(r"^Types:.*$", "Types: deb deb-src", entry, flags=re.M)
        entries.append(both if "Suites:" in entry else f"{entry}\ndeb-src{entry[len('deb') :]}")
    return entries


def unpack_header(folder: Path, out: Path) -> None:
    (archive,) = folder.glob("qemu_*.orig.tar.*")
    with tarfile.open(archive) as tar:
        header = next(m for m in tar if m.name.endswith("include/qemu/qemu-plugin.h"))
        content = tar.extractfile(header)
        assert content is not None  # a file, by its name
        out.write_bytes(content.read())


def compile_plugin(header: Path, out: Path) -> None:
    """Compile count.c into a library, with qemu-plugin.h from a folder."""
    argv = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", f"-I{header}", "-o", str(out), str(SOURCE)]
    checked(argv, "install gcc and libc6-dev")


def describe(root: Path, cpu: str, out: Path) -> Path:
    """Create and return a folder with links into the root and Linux's description of a CPU."""
    if cpu not in CPUS:
        raise Problem(f"unknown core {cpu!r}", f"choose one of {', '.join(CPUS)}")
    part, features = CPUS[cpu]
    text = f"Features\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    text += f"CPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 3\n\n"
    cores = "".join(f"processor\t: {number}\n{text}" for number in range(CORES))
    files = {"proc/cpuinfo": cores}
    for name in ("possible", "present"):
        files[f"sys/devices/system/cpu/{name}"] = f"0-{CORES - 1}\n"
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    for name in ("lib", "usr"):
        (out / name).symlink_to(root / name)
    return out
