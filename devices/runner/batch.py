"""Transcribes many files: finds them in folders, plans their outputs, runs several at once, and
reports the progress. `python -m runner transcribe` and `edgewhisper transcribe` share this module.
"""

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .audio import SAMPLING_RATE, STDIN
from .interfaces import Pcm, Segment
from .machine.host import usable_cores
from .problem import RunnerProblem
from .writers import Row, write

LINE_S = 10.0
"""Seconds between two lines of progress."""

Transcribe = Callable[[Pcm, Callable[[Segment], None]], Row]
"""Samples and a function that is called with each segment -> the transcript."""


@dataclass(frozen=True)
class Job:
    """An audio file, and the path of its transcript in each format."""

    path: Path
    outputs: dict[str, Path] = field(default_factory=dict)


# ------------------------------------------------------------------------- files and their outputs


def plan(
    inputs: Sequence[Path],
    suffixes: Collection[str],
    formats: Sequence[str],
    folder: Path | None = None,
    overwrite: bool = False,
) -> list[Job]:
    """Return a job for each file, and for each file with one of the suffixes in each folder.

    Transcripts are written to the folder of their audio. With `folder` they are written there; the
    files of an input folder are in the same subfolders as the audio. Raises RunnerProblem if an
    input folder has no audio, if two transcripts have one path, and if a transcript exists already,
    unless `overwrite`.
    """
    jobs = []
    for given in inputs:
        paths = files_in(given, suffixes) if given.is_dir() else [given]
        root = given if given.is_dir() else given.parent
        jobs += [Job(path, outputs_of(path, root, formats, folder)) for path in paths]
    check_outputs(jobs, overwrite)
    return jobs


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with one of the suffixes in a folder and its subfolders."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if not paths:
        raise RunnerProblem(
            f"{folder}: no audio files there, of {' '.join(sorted(suffixes))}",
            "give another folder, or the files themselves",
        )
    return paths


def outputs_of(
    path: Path, root: Path, formats: Sequence[str], folder: Path | None
) -> dict[str, Path]:
    """Return the path of a file's transcript in each format; that of standard input is stdin."""
    place = path.parent if folder is None else folder / path.parent.relative_to(root)
    name = "stdin" if str(path) == STDIN else path.stem
    return {form: place / f"{name}.{form}" for form in formats}


def check_outputs(jobs: Sequence[Job], overwrite: bool) -> None:
    """Raise RunnerProblem if two transcripts have one path, or if one exists already."""
    sources: dict[Path, Path] = {}
    for job in jobs:
        for output in job.outputs.values():
            other = sources.setdefault(output, job.path)
            if other != job.path:
                raise RunnerProblem(
                    f"the transcripts of {other} and {job.path} would both be {output}",
                    "rename one of them, or transcribe them one after the other with different "
                    "--output-dir",
                )
    existing = [output for output in sources if output.exists()]
    if existing and not overwrite:
        raise RunnerProblem(
            f"{existing[0]} exists already"
            + (f", and {len(existing) - 1} more transcripts" if len(existing) > 1 else ""),
            "add --overwrite to replace them, or name another --output-dir",
        )


# -------------------------------------------------------------------------------------- running


def threads_for(workers: int) -> int:
    """Return the number of threads for each of several files that are transcribed at once."""
    return max(1, usable_cores() // workers)


def run(
    jobs: Sequence[Job],
    read: Callable[[Path], Pcm],
    transcribe: Transcribe,
    workers: int = 1,
    on_segment: Callable[[Job, Segment], None] = lambda job, segment: None,
    show: bool = True,
) -> Iterator[Row]:
    """Yield the transcript of each file in order, with the path of its audio, after writing it.

    `workers` files are transcribed at once. If there are several files and one cannot be read, its
    row has the keys "error" and "hint" instead, and the others are transcribed. With `show`, the
    progress is printed to stderr.
    """
    progress, stopped = Progress(len(jobs), show), threading.Event()

    def task(item: tuple[int, Job]) -> Row:
        number, job = item
        try:
            pcm = read(job.path)
        except ValueError as error:
            if len(jobs) == 1 or not hasattr(error, "hint"):
                raise
            return {"audio": str(job.path), "error": str(error), "hint": error.hint}
        advance = progress.begin(number, job.path, len(pcm) / SAMPLING_RATE)

        def heard(segment: Segment) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            on_segment(job, segment)
            advance(segment.end_s)

        row = {"audio": str(job.path), **transcribe(pcm, heard)}
        write(row, job.outputs)
        return row

    numbered = list(enumerate(jobs, start=1))
    if min(workers, len(jobs)) == 1:
        yield from map(task, numbered)
    else:
        pool = ThreadPoolExecutor(workers)
        try:
            yield from pool.map(task, numbered)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    progress.end()


class Progress:
    """Prints the progress of long recordings to stderr, a line every LINE_S seconds."""

    def __init__(self, count: int, show: bool) -> None:
        self.count, self.show, self.total_s = count, show, 0.0
        self.started = self.last = time.monotonic()
        self.lock = threading.Lock()

    def begin(self, number: int, path: Path, duration_s: float) -> Callable[[float], None]:
        """Return a function that is called with the position reached in a file, in seconds."""
        started, name = time.monotonic(), path.name
        if self.count > 1:
            name += f" ({number} of {self.count})"
        self.total_s += duration_s

        def advance(position_s: float) -> None:
            with self.lock:
                now = time.monotonic()
                if not self.show or now - self.last < LINE_S or not position_s:
                    return
                self.last, factor = now, (now - started) / position_s
            self.print(
                f"{name}: {minutes(position_s)} of {minutes(duration_s)}, {rate(factor)}, about "
                f"{factor * (duration_s - position_s):.0f} s left"
            )

        return advance

    def end(self) -> None:
        """Print a summary if it took longer than LINE_S."""
        took_s = time.monotonic() - self.started
        if self.show and took_s >= LINE_S and self.total_s:
            self.print(
                f"{self.count} file{'s' if self.count > 1 else ''}, {minutes(self.total_s)} in "
                f"{took_s:.0f} s, {rate(took_s / self.total_s)}"
            )

    def print(self, text: str) -> None:
        """Print one line to stderr."""
        print(text, file=sys.stderr, flush=True)


def rate(factor: float) -> str:
    """Return the real-time factor, seconds of work per second of audio."""
    return f"real-time factor {factor:.3f}"


def minutes(seconds: float) -> str:
    """Return a duration as minutes and seconds, or with hours: 1:02:03."""
    whole = round(seconds)
    text = f"{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{whole // 3600}:{text}" if whole >= 3600 else text
