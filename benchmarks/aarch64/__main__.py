"""Count instructions of artifacts on emulated AArch64 cores, and compare with stored counts.

    python -m benchmarks.aarch64                                the artifacts with stored counts
    python -m benchmarks.aarch64 ARTIFACT... --cpu cortex-a72 --seconds 2
    python -m benchmarks.aarch64 --keep                         store the new counts

Without ARTIFACT, these are the embedded model in int8 and fp32 with a window of 2 s, and random
weights with whisper-tiny's dimensions in int8 with a window of 5 s.

The runner runs in qemu-user as on a device. The same work is done on this machine, and the outputs
are compared: fp32 may differ by 1e-5, and the greedy tokens of the embedded model's test clips must
be equal. The exit code is 1 if they are not, or if a count is more than 1 % above the stored one.
Times from emulators are never reported.
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
"""Model, precision, and seconds of the window in addition to the full one."""


@dataclass(frozen=True)
class Case:
    """An artifact to count, and its input."""

    name: str
    folder: Path
    seconds: float
    """Length of the counted window."""
    is_trained: bool
    """Whether it can transcribe clips; random weights decode up to the last position."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 after an error."""
    return exit_code(run, parser(), argv)


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.aarch64", __doc__)
    add = parser.add_argument
    add("artifacts", type=Path, nargs="*", metavar="ARTIFACT")
    add("--cpu", nargs="+", default=["cortex-a72", "cortex-a76"], choices=list(machine.CPUS))
    add("--seconds", type=float, default=2.0, help="length of the counted window of an ARTIFACT")
    add("--tokens", type=int, default=8, help="number of forced and counted tokens; default: 8")
    add(
        "--clips",
        type=int,
        default=40,
        help="number of clips whose tokens are compared; default: all 40",
    )
    add("--keep", action="store_true", help="store the counts in benchmarks/results")
    return parser


def run(given: argparse.Namespace) -> None:
    kept = counts.read(KEPT) if KEPT.is_file() else []
    machine.build(PLACE)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_clips(read_manifest(ASSETS / "speech/test.jsonl")[: given.clips], Path(folder))
        clips = tuple(sorted(Path(folder).glob("*.wav")))
        cases = [given_case(path, given.seconds) for path in given.artifacts] or standard()
        for case in cases:
            for row in count(case, given, clips):
                rows.append(row)
                print(f"{case.name} on {row['cpu']}: counted", file=sys.stderr, flush=True)
    lines = zip(counts.table_rows(rows), rows, strict=True)
    print(table([line | {"change": counts.change(row, kept)} for line, row in lines]))
    counts.judge(rows, rows if given.keep else kept)
    if given.keep:
        counts.store(rows, KEPT)


def given_case(path: Path, seconds: float) -> Case:
    """Return the case of an artifact on the command line."""
    return Case(path.absolute().name, path, seconds, is_trained=True)


def standard() -> Iterator[Case]:
    """Yield the artifacts of STANDARD, exported with the current exporter."""
    from benchmarks.rivals import models, prepare

    place = PLACE / "models"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / RANDOM).is_dir():
        models.make("tiny", place / RANDOM)
    for name, precision, seconds in STANDARD:
        source = ASSETS / name if name == DIGITS else place / name
        conversion = prepare.Conversion(source, place, Path(sys.executable), (seconds,))
        folder = prepare.artifact(precision)(conversion)
        yield Case(f"{name}-{precision}", folder, seconds, is_trained=name == DIGITS)


def count(
    case: Case, given: argparse.Namespace, clips: tuple[Path, ...]
) -> Iterator[dict[str, Any]]:
    """Yield a row of counts for every core."""
    manifest = verify(case.folder)
    inputs = clips if case.is_trained else ()
    task = machine.Task(case.folder, inputs, case.seconds, given.tokens)
    here = machine.run_here(task)
    window_s = counts.window_s(manifest["audio"]["windows_samples"], case.seconds)
    for cpu in given.cpu:
        there = machine.emulate(PLACE, cpu, task)
        yield {
            "format": counts.FORMAT,
            "name": case.name,
            "precision": manifest["precision"],
            "artifact_hash": artifact_hash(manifest),
            "cpu": cpu,
            "emulated": True,
            "window_s": window_s,
            "tokens": given.tokens,
            **counts.counted(there.marks, task, window_s),
            "against_x86": counts.against(there, here),
            "versions": there.versions,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


if __name__ == "__main__":
    sys.exit(main())
