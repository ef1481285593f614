"""`edgewhisper transcribe`: the text of audio files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from edgewhisper.cli.options import Json, Source, Threads, Units
from edgewhisper.cli.output import emit, say

Audio = Annotated[list[Path], Argument(help="audio files of any length; - reads from stdin")]
Language = Annotated[
    str | None,
    Option(
        help="language code such as hi, or auto to detect it; default: the language that the "
        "model records, otherwise auto"
    ),
]
Task = Annotated[
    str | None,
    Option(help="transcribe, or translate to translate into English; default: transcribe"),
]
Timestamps = Annotated[
    bool,
    Option(
        "--timestamps",
        help="print segments with start and end time; long audio is split at segment ends",
    ),
]
Beams = Annotated[int, Option(min=1, help="number of beams in beam search; 1: greedy decoding")]
Fallback = Annotated[
    bool,
    Option(
        "--fallback",
        help="if a window's text repeats itself or has a low probability, decode the window again "
        "by random sampling",
    ),
]
Seed = Annotated[int, Option(help="random seed of --fallback")]
Previous = Annotated[
    bool, Option("--previous", help="prompt each window with the text of the previous one")
]
Strict = Annotated[
    bool, Option("--strict", help="fail on truncated audio files instead of warning")
]


def transcribe_cli(
    source: Source,
    audio: Audio,
    language: Language = None,
    task: Task = None,
    timestamps: Timestamps = False,
    beams: Beams = 1,
    fallback: Fallback = False,
    seed: Seed = 0,
    previous: Previous = False,
    strict: Strict = False,
    threads: Threads = None,
    compute_units: Units = None,
    json_file: Json = None,
) -> None:
    """Transcribe audio files with a checkpoint or an artifact.

    With an artifact, each segment is printed as soon as it is decoded.
    """
    from benchmarks.speech.sound import read_audio
    from edgewhisper import transcription

    options: dict[str, Any] = dict(
        language=language,
        task=task,
        timestamps=timestamps,
        beams=beams,
        fallback=fallback,
        seed=seed,
        previous=previous,
        compute_units=compute_units,
    )
    printer = Printer(audio, timestamps, quiet=json_file == "-")
    pcms = (read_audio(path, strict) for path in audio)  # one at a time: they may be hours long
    rows = []
    transcripts = transcription.transcribe(source, pcms, threads, printer.segment, **options)
    for number, transcript in enumerate(transcripts):
        rows.append({"audio": str(audio[number]), **transcript})
        printer.end(number, transcript["text"])
    emit(rows, json_file)


class Printer:
    """Prints segments as they come: one line each with timestamps, otherwise one line a file."""

    def __init__(self, audio: list[Path], timestamps: bool, quiet: bool) -> None:
        self.audio, self.timestamps, self.quiet = audio, timestamps, quiet
        self.begun = -1
        """Index of the last file with a printed segment."""

    def segment(self, number: int, segment: Any) -> None:
        """Print a segment of the file with index `number`."""
        if self.quiet:
            return
        if self.timestamps:
            times = f"{segment.start_s:.2f}\t{segment.end_s:.2f}"
            say(f"{self.prefix(number)}{times}\t{segment.text}")
        else:
            typer.echo(" " if self.begun == number else self.prefix(number), nl=False)
            typer.echo(segment.text, nl=False)
        self.begun = number

    def end(self, number: int, text: str) -> None:
        """End the line of a file, or print its text if it had no segments."""
        if not self.timestamps and not self.quiet:
            say("" if self.begun == number else self.prefix(number) + text)

    def prefix(self, number: int) -> str:
        """Return the name of the file if there are several."""
        return "" if len(self.audio) == 1 else f"{self.audio[number]}\t"
