"""Serves the page of `edgewhisper serve`: it transcribes in the browser with an artifact.

The page gets the graphs, the decoding rules and the token table, and no message from a page is
accepted. Windows, language, decoding and texts are computed in the browser by listen.js, with the
rules of the runner.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from devices.runner.artifact.manifest import check_files, read_manifest
from devices.runner.decode.rules import Rules

from . import job, ort_web
from .site import Site

PAGE = (
    "transcribe.js",
    "audio.js",
    "listen.js",
    "recognizer.js",
    "pauses.js",
    "steady.js",
    "timestamps.js",
)
PLACE = "artifact/"


def open_site(
    artifact: Path,
    listen: str | None = None,
    certificate: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Site:
    """Return a site that serves the page for an artifact, until it is closed.

    Raises RunnerProblem for an artifact that the runner does not accept, and DeviceProblem for a
    Core ML artifact, an address that cannot be used, or a certificate that cannot be loaded.
    """
    work, files = described(artifact)
    here = Path(__file__).parent
    files |= {name: (here / name).read_bytes() for name in PAGE}
    files["page.html"] = (here / "transcribe.html").read_bytes()
    files["job.json"] = json.dumps(work).encode()
    files |= ort_web.files(ort_web.cache_folder(), say)
    return Site(listen, files, messages=(), certificate=certificate)


def described(folder: Path) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
    """Return what the page has to know about an artifact, and the files that it requests."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    files: dict[str, bytes | Path] = {}
    graphs = job.graphs(folder, manifest, PLACE, files)
    size = sum(path.stat().st_size for path in files.values() if isinstance(path, Path))
    files[f"{PLACE}tokens.json"] = folder / "tokens.json"
    return {
        **graphs,
        "bytes": size,
        "tokens": f"{PLACE}tokens.json",
        "rules": asdict(Rules.from_manifest(manifest["decoding"])),
        "window_samples": manifest["audio"]["window_samples"],
        "windows": job.windows(manifest),
        "most_ids": job.MOST_IDS,
    }, files
