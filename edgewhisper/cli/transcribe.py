"""`edgewhisper transcribe`: the text of audio files."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from edgewhisper.cli import transcribe_options as given
from edgewhisper.cli.options import Json, Source, Threads, Units
from edgewhisper.cli.output import emit, print_error, say
from export.problem import Problem

if TYPE_CHECKING:
    from devices.runner.batch import Job
    from devices.runner.interfaces import Segment


def transcribe_cli(
    source: Source,
    audio: given.Audio,
    language: given.Language = None,
    task: given.Task = None,
    timestamps: given.Timestamps = False,
    beams: given.Beams = 1,
    fallback: given.Fallback = False,
    seed: given.Seed = 0,
    previous: given.Previous = False,
    word_timestamps: given.WordTimestamps = False,
    prompt: given.Prompt = None,
    hotwords: given.Hotwords = None,
    output: given.Output = None,
    output_dir: given.OutputDir = None,
    overwrite: given.Overwrite = False,
    jobs: given.Jobs = 1,
    strict: given.Strict = False,
    threads: Threads = None,
    compute_units: Units = None,
    json_file: Json = None,
) -> None:
    """Transcribe audio files with a checkpoint or an artifact.

    With an artifact, each segment is printed as soon as it is decoded.
    """
    from benchmarks.speech.sound import SUFFIXES, read_audio
    from devices.runner import batch, writers
    from edgewhisper import transcription

    formats = writers.formats_of(output or [])
    files = batch.plan(audio, SUFFIXES, formats, output_dir, overwrite)
    artifact = transcription.is_artifact(source)
    if not artifact:
        transcription.refuse_files_and_jobs(source, formats, jobs)
    recognise = transcription.recogniser(
        source,
        threads or batch.threads_for(jobs),
        compute_units,
        language=language,
        task=task,
        timestamps=timestamps or not writers.TIMED.isdisjoint(formats),
        beams=beams,
        fallback=fallback,
        seed=seed,
        previous=previous,
        word_timestamps=word_timestamps,
        prompt=prompt,
        hotwords=hotwords,
        confidence=artifact and (json_file is not None or "json" in formats),
    )
    printer = Printer(files, timestamps, quiet=json_file == "-", live=jobs == 1)
    read = partial(read_audio, strict=strict)
    progress = printer.quiet or not sys.stdout.isatty()
    rows = []
    for row in batch.run(files, read, recognise, jobs, printer.segment, progress):
        rows.append(row)
        printer.end(row)
    emit(rows, json_file)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


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
