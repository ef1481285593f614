"""`edgewhisper transcribe`: the text of audio files."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from edgewhisper.cli import transcribe_options as given
from edgewhisper.cli.options import Json, Threads, Units
from edgewhisper.cli.output import emit
from edgewhisper.cli.transcripts import LivePrinter, Printer

if TYPE_CHECKING:
    from devices.runner.batch import Job, Transcribe
    from devices.runner.recognizer import Recognizer


def transcribe_cli(
    inputs: given.Inputs,
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
    live: given.Live = False,
    vad: given.Vad = False,
    strict: given.Strict = False,
    threads: Threads = None,
    compute_units: Units = None,
    json_file: Json = None,
) -> None:
    """Transcribe audio files with a checkpoint or an artifact.

    With an artifact, each segment is printed as soon as it is decoded. A checkpoint supports only
    --language, the output formats txt and json, and --json.
    """
    from benchmarks.speech.sound import SUFFIXES
    from devices.runner import batch, writers
    from edgewhisper import transcription

    source, audio = given.model_and_audio(inputs)
    formats = writers.formats_of(output or [])
    files = batch.plan(audio, SUFFIXES, formats, output_dir, overwrite)
    artifact = transcription.is_artifact(source)
    if not artifact:
        transcription.refuse_files_and_jobs(source, formats, jobs, live)
    threads = threads or batch.threads_for(jobs)
    options: dict[str, Any] = dict(
        language=language,
        task=task,
        beams=beams,
        fallback=fallback,
        seed=seed,
        previous=previous,
        prompt=prompt,
        hotwords=hotwords,
        vad=vad,
    )
    if live:
        recognizer = transcription.open_artifact(source, threads, compute_units)
        transcribe_live(recognizer, files, options, json_file)
        return
    options["timestamps"] = timestamps or not writers.TIMED.isdisjoint(formats)
    options["word_timestamps"] = word_timestamps
    options["confidence"] = artifact and (json_file is not None or "json" in formats)
    recognise = transcription.recogniser(source, threads, compute_units, **options)
    transcribe_files(recognise, files, jobs, strict, timestamps, json_file)


def transcribe_live(
    recognizer: Recognizer, files: list[Job], options: dict[str, Any], json_file: str | None
) -> None:
    """Transcribe a recording in progress, and print its results."""
    from devices.runner.live import transcript

    emit([transcript(recognizer, files, LivePrinter(json_file == "-"), **options)], json_file)


def transcribe_files(
    recognise: Transcribe,
    files: list[Job],
    jobs: int,
    strict: bool,
    timestamps: bool,
    json_file: str | None,
) -> None:
    """Transcribe files, `jobs` at once, and print their texts. Exits with 1 if one fails."""
    from benchmarks.speech.sound import read_audio
    from devices.runner import batch

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
