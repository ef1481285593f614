"""Debian's packages for any CPU, by this machine's apt: nothing is installed and no root is needed.

apt gets a state of its own in a folder, and of this machine's sources those of one release.
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
    "it needs a network and packages of this machine's release for the phone's CPU; Ubuntu has "
    "ARM's on another mirror, which has to stand in the sources"
)


def release() -> str:
    """The code name of this machine's Debian or Ubuntu. Raises DeviceProblem on other systems."""
    path = Path("/etc/os-release")
    told = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r'^(?:UBUNTU|VERSION)_CODENAME="?([\w-]+)', told, re.MULTILINE)
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if found is None or missing:
        raise DeviceProblem(
            "a phone gets Python, numpy and onnxruntime from here, out of Debian's packages, and "
            f"there is {'no ' + missing[0] if missing else 'no release'} on this machine",
            "bench from Debian or Ubuntu, in a container for instance",
        )
    return found[1]


def fetch(names: Sequence[str], config: Path) -> list[Path]:
    """Fetch packages and all that they depend on, by a configuration of lay_out_apt."""
    words = ["install", "-y", "-qq", "--no-install-recommends", "--download-only"]
    apt(["apt-get", *words, *names], config)
    return sorted((config.parent / "archives").glob("*.deb"))


def update(config: Path) -> None:
    """Fetch the lists of packages."""
    apt(["apt-get", "update", "-qq"], config)


def apt(argv: Sequence[str], config: Path | None = None) -> str:
    """What a program of apt's or dpkg's prints; its letter where it fails."""
    own = {} if config is None else {"APT_CONFIG": str(config)}
    env = {**os.environ, **own, "LC_ALL": "C"}
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = last_line(done.stderr) or "it said nothing"
        raise DeviceProblem(f"{argv[0]} ended with exit code {done.returncode} ({said})", NETWORK)
    return done.stdout


def unpack(packages: Sequence[Path], root: Path) -> None:
    """Lay packages out under a folder; none of their scripts is run."""
    for package in packages:
        apt(["dpkg-deb", "-x", str(package), str(root)])


def lay_out_apt(folder: Path, architecture: str, entries: Sequence[str]) -> Path:
    """apt's configuration with a state of its own in a new folder, and with some sources."""
    for name in ("lists/partial", "archives/partial", "sources"):
        (folder / "apt" / name).mkdir(parents=True)
    for number, entry in enumerate(entries):
        kind = "sources" if "Suites:" in entry else "list"
        (folder / f"apt/sources/{number}.{kind}").write_text(entry + "\n", encoding="utf-8")
    told = {
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
    lines = [f'{name} "{value}";\n' for name, value in told.items()]
    config.write_text("".join(lines), encoding="utf-8")
    return config


def source_files() -> Iterator[str]:
    """Where this machine's apt fetches from."""
    base = Path("/etc/apt")
    for path in [base / "sources.list", *sorted((base / "sources.list.d").glob("*"))]:
        if path.is_file():
            yield path.read_text(encoding="utf-8") + "\n\n"


def entries_of(suite: str, text: str) -> list[str]:
    """The entries for a release, in either of apt's forms."""
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        if re.search(rf"^Suites:.*\b(?<!-){suite}\b", stanza, flags=re.M):
            found.append(stanza.strip())
    return found + re.findall(rf"^(deb .*\s{suite}(?:\s|-).*)$", text, flags=re.M)
