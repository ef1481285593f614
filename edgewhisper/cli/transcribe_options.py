"""The options of `edgewhisper transcribe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.options import DEFAULT, MODEL
from export.problem import Problem

Inputs = Annotated[
    list[str],
    Argument(
        metavar="[MODEL] AUDIO...",
        help=f"MODEL: artifact, or checkpoint: {MODEL}; default: {DEFAULT}. AUDIO: audio files of "
        "any length, and folders of them; - reads from stdin",
    ),
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
    Option(help="text that prompts the first window, such as the spelling of names"),
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
        help="transcribe the microphone (mic) or stdin (-: WAV, or raw 16-bit samples at 16 kHz) "
        "during the recording; a terminal shows partial results",
    ),
]
Strict = Annotated[
    bool, Option("--strict", help="fail on truncated audio files instead of warning")
]


def model_and_audio(inputs: list[str]) -> tuple[str, list[Path]]:
    """Split the arguments into the model and the audio files.

    The first argument is the model, unless it is a file that is not a .pt file, or "-", or the only
    argument and a directory without config.json. Raises Problem if no audio is given.
    """
    from benchmarks.speech.sound import SUFFIXES
    from edgewhisper.shipped import default_artifact

    first = Path(inputs[0])
    is_file = first.is_file() and first.suffix != ".pt"
    is_folder = len(inputs) == 1 and first.is_dir() and not (first / "config.json").exists()
    if is_file or is_folder or inputs[0] == "-":
        return str(default_artifact()), [Path(name) for name in inputs]
    if len(inputs) == 1:
        if first.suffix.lower() in SUFFIXES and not first.exists():
            raise Problem(f"there is no audio file {first}", hint="check the path")
        raise Problem(
            f"{first} is not an audio file, and no audio file follows it",
            hint="name a model and audio files, or only audio files: edgewhisper transcribe a.wav",
        )
    return inputs[0], [Path(name) for name in inputs[1:]]
