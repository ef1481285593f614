"""The files of onnxruntime-web that a page needs, fetched by npm once and checked at every use.

It is no package of Python's, and its 14 MB of WebAssembly have no place in a repository. npm knows
the user's mirror and proxy; what it brings counts only by the hashes below, so a folder that was
filled by hand will do as well. This is the build for the CPU alone, which needs SIMD.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import which

from devices.device import DeviceProblem, last_line

VERSION = "1.30.0"
MODULE = "ort.wasm.min.mjs"
FILES = {
    MODULE: (
        "02779f420972927b9fe109e8c8bf0715be78b3582b5b1eeae85eafd94651afb4"
        "7155bb0979777f93ab228978f59a59109a9c871270c8049cf1d41b5adc9dd90a"
    ),
    "ort-wasm-simd-threaded.mjs": (
        "21ba108743f06fed82bd495a1258e50552c95a515f1940b10aab94ea48f2c205"
        "beaa3f7e0d9b4961253da6e786638038bd3d96e6b43c66de0234d2032fc29fd6"
    ),
    "ort-wasm-simd-threaded.wasm": (
        "1adeded62203219fcf5c484cfce5657aa5875689b490423f86cf1ca1dd1cad77"
        "15f630c6337f41db71ee42794e3a00ce0b7c78939a71220b5d83368bf6ea7730"
    ),
}
"""Name in the package's dist/ -> SHA-512."""

FETCH_S = 600


def cache_folder() -> Path:
    """Return where the files are kept."""
    return Path.home() / ".cache" / "edgewhisper" / f"onnxruntime-web-{VERSION}"


def files(folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, bytes]:
    """Return name -> content, fetched into the folder where that does not hold them."""
    if not intact(found := read(folder)):
        say(f"fetching onnxruntime-web {VERSION} by npm, 33 MB, into {folder}")
        found = fetch(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in found.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise DeviceProblem(
                f"{folder} cannot be written: {error.strerror}", "make room there, 40 MB"
            ) from None
    return found


def read(folder: Path) -> dict[str, bytes]:
    """Return what is there of the files."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def intact(found: dict[str, bytes]) -> bool:
    return {name: hashlib.sha512(content).hexdigest() for name, content in found.items()} == FILES


def fetch(folder: Path) -> dict[str, bytes]:
    """Return the files out of the package as npm brings it."""
    by_hand = (
        f"install npm; or run `npm pack onnxruntime-web@{VERSION}` elsewhere, and put "
        f"{', '.join(FILES)} from its package/dist into {folder}"
    )
    npm = which("npm")
    if npm is None:
        raise DeviceProblem(
            f"onnxruntime-web {VERSION}, which runs artifacts in a browser, is not in {folder}, "
            "and there is no npm to fetch it",
            by_hand,
        )
    with tempfile.TemporaryDirectory() as work:
        pack(npm, Path(work), by_hand)
        found = unpack(Path(work))
    if not intact(found):
        raise DeviceProblem(
            f"what npm fetched is not onnxruntime-web {VERSION} as it was published: "
            f"{len(found)} of {len(FILES)} files are in it, and not all have the known SHA-512",
            f"look at the registry that `npm config get registry` names; {by_hand}",
        )
    return found


def pack(npm: str, work: Path, hint: str) -> None:
    """Let npm put the package's archive into a folder."""
    words = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(words, cwd=work, capture_output=True, text=True, timeout=FETCH_S)
        failed = f"exit code {done.returncode}: {last_line(done.stderr)}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    if failed:
        raise DeviceProblem(
            f"npm cannot fetch onnxruntime-web {VERSION} ({failed})",
            f"check the connection and npm's registry; {hint}",
        )


def unpack(work: Path) -> dict[str, bytes]:
    """Return the files of the archive in a folder; members are read, nothing is extracted."""
    found = {}
    for path in work.glob("*.tgz"):
        # one that is cut or none is like one without the files: their hashes are missed
        with suppress(tarfile.TarError, EOFError, OSError), tarfile.open(path) as archive:
            for name in FILES:
                with suppress(KeyError):
                    member = archive.extractfile(f"package/dist/{name}")
                    found[name] = member.read() if member else b""
    return found
