"""Downloads Debian packages for any CPU with this machine's apt, without root or installing them.

apt runs with its own state in a folder, and with this machine's sources of one release.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from devices.device import DeviceProblem, last_line

NETWORK = (
    "check the network, and that the apt sources have packages for the phone's CPU; Ubuntu has "
    "those for ARM on another mirror, which must be added to the sources"
)


def release() -> str:
    """Return the code name of this machine's Debian or Ubuntu; raise DeviceProblem elsewhere."""
    path = Path("/etc/os-release")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    codename = re.search(r'^(?:UBUNTU|VERSION)_CODENAME="?([\w-]+)', text, re.MULTILINE)
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if codename is None or missing:
        raise DeviceProblem(
            "Python for a phone is built from Debian's packages, and this machine has no "
            f"{missing[0] if missing else 'release code name'}",
            "bench from Debian or Ubuntu, for example in a container",
        )
    return codename[1]


def fetch(names: Sequence[str], config: Path) -> list[Path]:
    """Download packages and their dependencies, with a configuration of lay_out_apt."""
    words = ["install", "-y", "-qq", "--no-install-recommends", "--download-only"]
    apt(["apt-get", *words, *names], config)
    return sorted((config.parent / "archives").glob("*.deb"))


def update(config: Path) -> None:
    """Download the package lists."""
    apt(["apt-get", "update", "-qq"], config)


def apt(argv: Sequence[str], config: Path | None = None) -> str:
    """Return the output of a program of apt or dpkg; raise DeviceProblem if it fails."""
    own = {} if config is None else {"APT_CONFIG": str(config)}
    env = {**os.environ, **own, "LC_ALL": "C"}
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        output = last_line(done.stderr) or "no output"
        raise DeviceProblem(f"{argv[0]} ended with exit code {done.returncode} ({output})", NETWORK)
    return done.stdout


def unpack(packages: Sequence[Path], root: Path) -> None:
    """Unpack packages to a folder without running their scripts."""
    for package in packages:
        apt(["dpkg-deb", "-x", str(package), str(root)])


def lay_out_apt(folder: Path, architecture: str, entries: Sequence[str]) -> Path:
    """Write an apt configuration with its own state and the given sources; return its path."""
    for name in ("lists/partial", "archives/partial", "sources"):
        (folder / "apt" / name).mkdir(parents=True)
    for number, entry in enumerate(entries):
        kind = "sources" if "Suites:" in entry else "list"
        (folder / f"apt/sources/{number}.{kind}").write_text(entry + "\n", encoding="utf-8")
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "1",
        "Dir::State": folder / "apt",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "apt",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": folder / "apt/sources",
    }
    config = folder / "apt/apt.conf"
    lines = [f'{name} "{value}";\n' for name, value in settings.items()]
    config.write_text("".join(lines), encoding="utf-8")
    return config


def source_files() -> Iterator[str]:
    """Yield the texts of this machine's apt source files."""
    base = Path("/etc/apt")
    for path in [base / "sources.list", *sorted((base / "sources.list.d").glob("*"))]:
        if path.is_file():
            yield path.read_text(encoding="utf-8") + "\n\n"


def entries_of(suite: str, text: str) -> list[str]:
    """Return the source entries of a release, in either of apt's two formats."""
    entries = []
    for stanza in re.split(r"\n\s*\n", text):
        if re.search(rf"^Suites:.*\b(?<!-){suite}\b", stanza, flags=re.M):
            entries.append(stanza.strip())
    return entries + re.findall(rf"^(deb .*\s{suite}(?:\s|-).*)$", text, flags=re.M)
