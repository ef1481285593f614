"""What `edgewhisper transcribe` prints: segments and results as they come."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import typer

from edgewhisper.cli.output import print_error, say
from export.problem import Problem

if TYPE_CHECKING:
    from devices.runner.batch import Job
    from devices.runner.interfaces import Segment
    from devices.runner.live import Result

ERASE = "\r\x1b[K"
"""Moves a terminal's cursor to the start of the line and clears the line."""


class Printer:
    """Prints segments as they come: one line each with timestamps, otherwise one line a file.

    Unless `live`, several files are transcribed at once, and each is printed when it is done.
    """

    def __init__(self, files: list[Job], timestamps: bool, quiet: bool, live: bool) -> None:
        self.several, self.timestamps = len(files) > 1, timestamps
        self.quiet, self.live = quiet, live
        self.begun = False
        """Whether a segment of the current file was printed."""

    def segment(self, job: Job, segment: Segment) -> None:
        """Print a segment of a file that is being transcribed."""
        if self.live and not self.quiet:
            self.print(str(job.path), segment.as_dict())

    def print(self, audio: str, segment: dict[str, Any]) -> None:
        """Print a segment of a file."""
        if self.timestamps:
            times = f"{segment['start_s']:.2f}\t{segment['end_s']:.2f}"
            say(f"{self.prefix(audio)}{times}\t{segment['text']}")
        else:
            typer.echo(" " if self.begun else self.prefix(audio), nl=False)
            typer.echo(segment["text"], nl=False)
        self.begun = True

    def end(self, row: dict[str, Any]) -> None:
        """End the line of a file; print what was not printed before, and the error if there is
        one."""
        if "error" in row:
            print_error(Problem(row["error"], row["hint"]))
            return
        if not self.quiet:
            self.rest(row)
        self.begun = False

    def rest(self, row: dict[str, Any]) -> None:
        """Print the segments or the text that were not printed before, and end the line."""
        audio = row["audio"]
        if not self.live:
            for segment in row["segments"]:
                self.print(audio, segment)
        if not self.timestamps:
            say("" if self.begun else self.prefix(audio) + row["text"])

    def prefix(self, audio: str) -> str:
        """Return the name of the file if there are several."""
        return f"{audio}\t" if self.several else ""


class LivePrinter:
    """Prints the final results of a recording, one line each; on a terminal also the partial ones,
    which the next result replaces."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.terminal = quiet, sys.stdout.isatty()

    def __call__(self, result: Result) -> None:
        """Print a result."""
        if self.quiet or not (self.terminal or result.final):
            return
        text = " ".join(filter(None, (result.text, result.tentative.strip())))
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            text = ERASE + (text if result.final else text[-width:])
        typer.echo(text, nl=result.final)
        sys.stdout.flush()
