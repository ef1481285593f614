"""The runner's commands; the last line on stdout is one JSON object.

A command that opens an artifact runs under a limit of memory, a gigabyte and eight times the
sizes of artifact and sound: a graph that asks for more gets a letter, not the machine.
"""

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .machine import android
from .machine.host import UNAVAILABLE, describe, emulated, limit_memory
from .problem import RunnerProblem

SPARE_BYTES = 2**30
COLD_S = 600
"""For opening an artifact from a slow disk."""


def main(argv: list[str] | None = None) -> int:
    """Parse, run one command, print its JSON; a letter becomes JSON too, with exit code 1."""
    arguments = parser().parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"note:  {message}", file=sys.stderr)
    try:
        answer = run(arguments)
    except (RunnerProblem, MemoryError) as error:
        letter = error if isinstance(error, RunnerProblem) else out_of_memory(arguments)
        print(f"error: {letter}\ntry:   {letter.hint}", file=sys.stderr)
        print(json.dumps({"error": str(letter), "hint": letter.hint}))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(answer, ensure_ascii=False))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(prog="runner", description="Whisper on a device.")
    commands = top.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="text of WAV files")
    transcribe.add_argument("artifact", type=Path)
    transcribe.add_argument("wav", type=Path, nargs="+", help="files; - is standard input")
    add_options(transcribe)
    bench = commands.add_parser("bench", help="texts and times of a JSON list of WAV files")
    bench.add_argument("artifact", type=Path)
    bench.add_argument("clips", type=Path)
    bench.add_argument("--repeats", type=positive, default=1)
    bench.add_argument("--minutes", type=float, help="transcribe clips on and on for so long")
    bench.add_argument("--pin", help="cores to run on: big, all, or numbers such as 0,1")
    bench.add_argument("--governor", help="of the clock, meanwhile, such as performance")
    load = commands.add_parser("compile", help="a Core ML artifact, and load it; seconds of both")
    load.add_argument("artifact", type=Path)
    check = commands.add_parser("check", help="tokens of WAV files, after all that can be checked")
    check.add_argument("artifact", type=Path)
    check.add_argument("clips", type=Path)
    profile = commands.add_parser("profile", help="where the time of both graphs goes")
    profile.add_argument("artifact", type=Path)
    profile.add_argument("--seconds", type=float, default=5.0, help="of sound in the window")
    probe = commands.add_parser("probe", help="times of graphs of fixed shapes")
    probe.add_argument("artifact", metavar="folder", type=Path)
    for command in (transcribe, bench, check, profile, probe):
        command.add_argument("--threads", type=positive, help="default: all usable cores")
    for command in (transcribe, bench, check, load):
        command.add_argument("--compute-units", help="of Core ML: all, cpu, cpu-ane or cpu-gpu")
    commands.add_parser("describe", help="this machine and its state")
    return top


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the fields of listen.Options, and how they are printed."""
    command.add_argument("--language", help="code, or auto; default: the artifact's own")
    command.add_argument("--task", help="transcribe or translate")
    command.add_argument("--timestamps", action="store_true", help="cut and timed by the model")
    command.add_argument("--beams", type=positive, default=1, help="default: 1, greedy")
    command.add_argument("--fallback", action="store_true", help="try again what reads badly")
    command.add_argument("--seed", type=int, default=0, help="of --fallback's random numbers")
    command.add_argument("--previous", action="store_true", help="prompt with the text before")
    command.add_argument("--strict", action="store_true", help="refuse files that are cut short")
    command.add_argument("--stream", action="store_true", help="a line of JSON a segment, at once")


def positive(text: str) -> int:
    """Read a count of at least 1."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a command's answer; numpy and onnxruntime are imported where they are used."""
    if android.here():
        android.take_fast_cores(getattr(arguments, "threads", None))
    if arguments.command == "describe":
        return describe()
    sound = sum(path.stat().st_size for path in getattr(arguments, "wav", []) if path.is_file())
    limit_memory(SPARE_BYTES + 8 * (size_of(arguments.artifact) + sound))
    if arguments.command == "check":
        from .measure.check import check

        return check(
            arguments.artifact, arguments.clips, arguments.threads, arguments.compute_units
        )
    if arguments.command == "compile":
        from .measure.bench import compile_first

        return compile_first(arguments.artifact, arguments.compute_units)
    if arguments.command == "profile":
        from .measure.profile import profile

        return profile(arguments.artifact, arguments.seconds, arguments.threads)
    if arguments.command == "probe":
        from .measure.probe import probe_all

        return probe_all(arguments.artifact, arguments.threads)
    if arguments.command == "bench":
        return watched_bench(arguments)
    return {"transcripts": list(transcripts(arguments))}


def watched_bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, with a sampler beside; the processes beside this one are forked before it imports
    what is large."""
    from .machine.tuning import governed, pin
    from .measure.telemetry import Sampler

    with governed(arguments.governor) as governor:
        around: dict[str, Any] = {"governor": governor}
        if arguments.pin is not None:
            around["pinned"] = pin(arguments.pin)
        if arguments.minutes is None:
            around["cold_load_s"] = cold_load_s(arguments)
        sampler = Sampler()
        from .measure.bench import bench

        answer = bench(
            arguments.artifact,
            arguments.clips,
            arguments.repeats,
            arguments.threads,
            arguments.compute_units,
            arguments.minutes,
        )
        return {**answer, **around, "telemetry": sampler.finish()}


def cold_load_s(arguments: argparse.Namespace) -> float | str:
    """Open the artifact in a process of its own, from the disk; a letter is for the one after. An
    emulator's time is none."""
    from .measure.helper_process import Beside, possible

    def work(asked: int) -> bytes:
        from .measure.bench import cold_load_s

        return json.dumps(cold_load_s(arguments.artifact, arguments.threads)).encode()

    real = possible() and not emulated(Path("/"), platform.machine())
    said = Beside(work).finish(COLD_S) if real else b""
    return json.loads(said) if said else UNAVAILABLE


def transcripts(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is said in each file; `--stream` prints every segment as soon as it is decoded."""
    from .audio import read_wav
    from .recognizer import Recognizer, Transcript

    recognizer = Recognizer(
        arguments.artifact, arguments.threads, compute_units=arguments.compute_units
    )
    names = ("language", "task", "timestamps", "beams", "fallback", "seed", "previous")
    options = {name: getattr(arguments, name) for name in names}
    for path in arguments.wav:
        transcript = Transcript()
        pcm = read_wav(path, arguments.strict)
        for segment in recognizer.stream(pcm, transcript, **options):
            if arguments.stream:
                row = {"audio": str(path), **segment.as_dict()}
                print(json.dumps(row, ensure_ascii=False), flush=True)
        yield {"audio": str(path), **transcript.as_dict()}


def size_of(artifact: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in artifact.rglob("*") if entry.is_file())


def out_of_memory(arguments: argparse.Namespace) -> RunnerProblem:
    return RunnerProblem(
        f"{getattr(arguments, 'artifact', 'the runner')}: more memory is needed than the machine "
        "has, or than such an artifact can need",
        "close other programs; copy the artifact again if that does not help",
    )


if __name__ == "__main__":
    sys.exit(main())
