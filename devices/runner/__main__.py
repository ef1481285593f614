"""The runner's commands; the last line on stdout is one JSON object."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from .machine import describe
from .problem import RunnerProblem


def main(argv: list[str] | None = None) -> int:
    """Parse, run one command, print its JSON; a letter becomes JSON too, with exit code 1."""
    arguments = parser().parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"note:  {message}", file=sys.stderr)
    try:
        answer = run(arguments)
    except RunnerProblem as letter:
        print(f"error: {letter}\ntry:   {letter.hint}", file=sys.stderr)
        print(json.dumps({"error": str(letter), "hint": letter.hint}))
        return 1
    print(json.dumps(answer, ensure_ascii=False))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(prog="runner", description="Whisper on a device.")
    commands = top.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="text of WAV files")
    transcribe.add_argument("artifact", type=Path)
    transcribe.add_argument("wav", type=Path, nargs="+")
    bench = commands.add_parser("bench", help="texts and times of a JSON list of WAV files")
    bench.add_argument("artifact", type=Path)
    bench.add_argument("clips", type=Path)
    bench.add_argument("--repeats", type=positive, default=1)
    for command in (transcribe, bench):
        command.add_argument("--threads", type=positive, help="default: all usable cores")
    commands.add_parser("describe", help="this machine and its state")
    return top


def positive(text: str) -> int:
    """Read a count of at least 1."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a command's answer; numpy and onnxruntime are imported where they are used."""
    if arguments.command == "describe":
        return describe()
    if arguments.command == "bench":
        from .measure import bench

        return bench(arguments.artifact, arguments.clips, arguments.repeats, arguments.threads)
    from .recognizer import Recognizer

    recognizer = Recognizer(arguments.artifact, arguments.threads)
    found = [(path, recognizer.transcribe(path)) for path in arguments.wav]
    return {"transcripts": [{"audio": str(path), "text": t.text} for path, t in found]}


if __name__ == "__main__":
    sys.exit(main())
