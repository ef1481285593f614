"""Count instructions of artifacts on emulated AArch64 cores, and hold them against those kept.

    python -m benchmarks.aarch64                                the artifacts whose counts are kept
    python -m benchmarks.aarch64 ARTIFACT... --cpu cortex-a72 --seconds 2
    python -m benchmarks.aarch64 --keep                         keep what is counted

Without ARTIFACT these are the embedded model in int8 and fp32 with a window of 2 s, and random
weights of whisper-tiny's dimensions in int8 with one of 5 s. The runner works as on a device, in
qemu-user; the same work is done on this machine, and outputs are compared: fp32 may be 1e-5 off,
and greedy tokens of the embedded model's test clips must be the same. It ends with code 1 where
they are not, and where a count is more than 1 % above the one kept. An emulated time means nothing,
so none is told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.aarch64 import counts, machine
from benchmarks.markdown import table
from benchmarks.metadata import artifact_hash
from benchmarks.program import exit_code, parser_of
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from export.artifact import verify

PLACE = machine.PROJECT / "build/aarch64"
KEPT = machine.PROJECT / "benchmarks/results/aarch64.jsonl"
ASSETS = machine.PROJECT / "edgewhisper/assets"
DIGITS, RANDOM = "whisper-digits", "whisper-tiny-random"
STANDARD = ((DIGITS, "int8", 2.0), (DIGITS, "fp32", 2.0), (RANDOM, "int8", 5.0))
"""Model, precision, seconds of the window beside the full one."""


@dataclass(frozen=True)
class Case:
    """An artifact to count, and what it hears."""

    name: str
    folder: Path
    seconds: float
    speaks: bool
    """Whether the clips' texts mean something to it: random weights go on to the last position."""


def main(argv: list[str] | None = None) -> int:
    """Count, compare, print; a letter ends with code 1."""
    return exit_code(run, parser(), argv)


def parser() -> argparse.ArgumentParser:
    found = parser_of("benchmarks.aarch64", __doc__)
    add = found.add_argument
    add("artifacts", type=Path, nargs="*", metavar="ARTIFACT")
    add("--cpu", nargs="+", default=["cortex-a72", "cortex-a76"], choices=list(machine.CPUS))
    add("--seconds", type=float, default=2.0, help="of sound for the counted window of an ARTIFACT")
    add("--tokens", type=int, default=8, help="that are forced and counted; default: 8")
    add("--clips", type=int, default=40, help="whose tokens are compared; default: all 40")
    add("--keep", action="store_true", help="store what is counted in benchmarks/results")
    return found


def run(given: argparse.Namespace) -> None:
    kept = counts.read(KEPT) if KEPT.is_file() else []
    machine.build(PLACE)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_clips(read_manifest(ASSETS / "speech/test.jsonl")[: given.clips], Path(folder))
        clips = tuple(sorted(Path(folder).glob("*.wav")))
        cases = [mine(path, given.seconds) for path in given.artifacts] or standard()
        for case in cases:
            for row in count(case, given, clips):
                rows.append(row)
                print(f"{case.name} on {row['cpu']}: counted", file=sys.stderr, flush=True)
    told = zip(counts.table_rows(rows), rows, strict=True)
    print(table([line | {"change": counts.change(row, kept)} for line, row in told]))
    counts.judge(rows, rows if given.keep else kept)
    if given.keep:
        counts.keep(rows, KEPT)


def mine(path: Path, seconds: float) -> Case:
    return Case(path.absolute().name, path, seconds, speaks=True)


def standard() -> Iterator[Case]:
    """The artifacts of STANDARD, exported as the exporter now does it."""
    from benchmarks.rivals import models, prepare

    place = PLACE / "models"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / RANDOM).is_dir():
        models.make("tiny", place / RANDOM)
    for name, precision, seconds in STANDARD:
        source = ASSETS / name if name == DIGITS else place / name
        order = prepare.Order(source, place, Path(sys.executable), (seconds,))
        folder = prepare.artifact(precision)(order)
        yield Case(f"{name}-{precision}", folder, seconds, speaks=name == DIGITS)


def count(
    case: Case, given: argparse.Namespace, clips: tuple[Path, ...]
) -> Iterator[dict[str, Any]]:
    """A row for every core."""
    manifest = verify(case.folder)
    heard = clips if case.speaks else ()
    work = machine.Work(case.folder, heard, case.seconds, given.tokens)
    here = machine.run_here(work)
    window_s = counts.window_s(manifest["audio"]["windows_samples"], case.seconds)
    for cpu in given.cpu:
        there = machine.emulate(PLACE, cpu, work)
        yield {
            "format": counts.FORMAT,
            "name": case.name,
            "precision": manifest["precision"],
            "artifact_hash": artifact_hash(manifest),
            "cpu": cpu,
            "emulated": True,
            "window_s": window_s,
            "tokens": given.tokens,
            **counts.counted(there.marks, work, window_s),
            "against_x86": counts.against(there, here),
            "versions": there.versions,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


if __name__ == "__main__":
    sys.exit(main())
