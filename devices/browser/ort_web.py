"""The files of onnxruntime-web that the page needs, downloaded once with npm and always verified.

It is not a Python package, and 14 MB of WebAssembly do not belong into a repository. npm knows the
user's mirror and proxy. The files are verified with the hashes below, so they may also be copied
into the folder by hand. This build runs on the CPU only and needs SIMD.
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

from devices.bundle import cache
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
"""File in the package's dist/ -> SHA-512."""

FETCH_S = 600


def cache_folder() -> Path:
    """Return the folder of the files."""
    return cache(f"onnxruntime-web-{VERSION}")


def files(folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, bytes]:
    """Return file name -> content, downloaded into the folder if any file is missing or changed."""
    if not intact(contents := read(folder)):
        say(f"downloading onnxruntime-web {VERSION} with npm, 33 MB, into {folder}")
        contents = fetch(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise DeviceProblem(
                f"{folder} cannot be written: {error.strerror}", "free 40 MB there"
            ) from None
    return contents


def read(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files that exist."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def intact(contents: dict[str, bytes]) -> bool:
    """Return whether all files are there with the right hashes."""
    return {name: hashlib.sha512(data).hexdigest() for name, data in contents.items()} == FILES


def fetch(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files, from the package that npm downloads."""
    by_hand = (
        f"install npm; or run `npm pack onnxruntime-web@{VERSION}` elsewhere, and copy "
        f"{', '.join(FILES)} from its package/dist to {folder}"
    )
    npm = which("npm")
    if npm is None:
        raise DeviceProblem(
            f"onnxruntime-web {VERSION}, which runs artifacts in a browser, is not in {folder}, "
            "and npm is not installed to download it",
            by_hand,
        )
    with tempfile.TemporaryDirectory() as work:
        pack(npm, Path(work), by_hand)
        contents = unpack(Path(work))
    if not intact(contents):
        raise DeviceProblem(
            f"npm downloaded something else than the published onnxruntime-web {VERSION}: "
            f"{len(contents)} of {len(FILES)} files are in it, and not all have the known SHA-512",
            f"check the registry that `npm config get registry` prints; {by_hand}",
        )
    return contents


def pack(npm: str, work: Path, hint: str) -> None:
    """Have npm write the package's archive to a folder."""
    words = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(words, cwd=work, capture_output=True, text=True, timeout=FETCH_S)
        failed = f"exit code {done.returncode}: {last_line(done.stderr)}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    if failed:
        raise DeviceProblem(
            f"npm cannot download onnxruntime-web {VERSION} ({failed})",
            f"check the network and npm's registry; {hint}",
        )


def unpack(work: Path) -> dict[str, bytes]:
    """Return the contents of the files in the archive; nothing is extracted to disk."""
    contents = {}
    for path in work.glob("*.tgz"):
        # a damaged archive lacks files, which the hashes then detect
        with suppress(tarfile.TarError, EOFError, OSError), tarfile.open(path) as archive:
            for name in FILES:
                with suppress(KeyError):
                    member = archive.extractfile(f"package/dist/{name}")
                    contents[name] = member.read() if member else b""
    return contents
