"""The options of `edgewhisper transcribe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Audio = Annotated[
    list[Path], Argument(help="audio files of any length, and folders of them; - reads from stdin")
]
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
Vad = Annotated[
    bool,
    Option("--vad", help="skip noise and music with a voice activity detector; needs silero-vad"),
]
WordTimestamps = Annotated[
    bool,
    Option("--word-timestamps", help="add the times and probabilities of words to JSON"),
]
Prompt = Annotated[
    str | None,
    Option(help="text that prompts the first window, such as names in their spelling"),
]
Hotwords = Annotated[str | None, Option(help="words that prompt every window")]
Output = Annotated[
    list[str] | None,
    Option(
        metavar="FORMAT",
        help="write a file for each audio file: txt, srt, vtt, json or tsv, or several as in "
        "txt,srt; may be repeated; srt, vtt and tsv turn on --timestamps",
    ),
]
OutputDir = Annotated[
    Path | None, Option(help="directory of these files; default: that of the audio file")
]
Overwrite = Annotated[bool, Option("--overwrite", help="replace existing files")]
Jobs = Annotated[
    int, Option(min=1, help="number of files to transcribe at once; they share the cores")
]
Live = Annotated[
    bool,
    Option(
        "--live",
        help="transcribe - (WAV, or raw 16-bit samples at 16 kHz) or mic while it is recorded; "
        "partial results are shown on a terminal",
    ),
]
Strict = Annotated[
    bool, Option("--strict", help="fail on truncated audio files instead of warning")
]
