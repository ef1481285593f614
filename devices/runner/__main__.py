"""The runner's command line; the last line on stdout is one JSON object.

A command that opens an artifact runs with a memory limit of 1 GiB plus eight times the sizes of
artifact and audio, so a malicious graph ends in an error message instead of taking all memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import android
from .machine.host import UNAVAILABLE, describe, emulated, limit_memory
from .problem import RunnerProblem

if TYPE_CHECKING:
    from .batch import Job
    from .interfaces import Segment

SPARE_BYTES = 2**30
COLD_S = 600
"""Timeout for opening an artifact from a slow disk."""


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, run one command and print its JSON; return the exit code."""
    arguments = parser().parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"note:  {message}", file=sys.stderr)
    try:
        answer = run(arguments)
    except (RunnerProblem, MemoryError) as error:
        problem = error if isinstance(error, RunnerProblem) else out_of_memory(arguments)
        print(f"error: {problem}\ntry:   {problem.hint}", file=sys.stderr)
        print(json.dumps({"error": str(problem), "hint": problem.hint}))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(answer, ensure_ascii=False))
    return int(failed(answer))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m runner", description="Run Whisper on a device.")
    commands = top.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="transcribe WAV files")
    transcribe.add_argument("artifact", type=Path, help="folder with manifest.json")
    transcribe.add_argument(
        "wav", type=Path, nargs="+", help="WAV files and folders; - reads standard input"
    )
    add_options(transcribe)
    bench = commands.add_parser("bench", help="measure the time to transcribe WAV files")
    bench.add_argument("artifact", type=Path)
    bench.add_argument("clips", type=Path, help="JSON file with a list of WAV files")
    bench.add_argument("--repeats", type=positive, default=1, help="number of rounds")
    bench.add_argument("--minutes", type=float, help="run continuously for N minutes")
    bench.add_argument("--pin", help="cores to run on: big, all, or numbers such as 0,1")
    bench.add_argument("--governor", help="CPU frequency governor during the run")
    load = commands.add_parser("compile", help="measure compiling and loading (Core ML)")
    load.add_argument("artifact", type=Path)
    check = commands.add_parser("check", help="check an artifact, then decode WAV files")
    check.add_argument("artifact", type=Path)
    check.add_argument("clips", type=Path, help="JSON file with a list of WAV files")
    profile = commands.add_parser("profile", help="measure the parts of both graphs")
    profile.add_argument("artifact", type=Path)
    profile.add_argument("--seconds", type=float, default=5.0, help="seconds of audio")
    probe = commands.add_parser("probe", help="measure small graphs (devices calibrate)")
    probe.add_argument("artifact", metavar="folder", type=Path)
    for command in (transcribe, bench, check, profile, probe):
        command.add_argument("--threads", type=positive, help="default: all available cores")
    for command in (transcribe, bench, check, load):
        command.add_argument("--compute-units", help="Core ML: all, cpu, cpu-ane or cpu-gpu")
    commands.add_parser("describe", help="describe this machine and its state")
    return top


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the fields of decode.options.Options, and the options for input and output."""
    command.add_argument("--language", help="code, or auto; default: the artifact's language")
    command.add_argument("--task", help="transcribe or translate")
    command.add_argument(
        "--timestamps", action="store_true", help="segments with times from the model"
    )
    command.add_argument("--beams", type=positive, default=1, help="beam width; default: 1, greedy")
    command.add_argument("--fallback", action="store_true", help="decode failed windows again")
    command.add_argument("--seed", type=int, default=0, help="random seed of --fallback")
    command.add_argument("--previous", action="store_true", help="prompt with the previous text")
    command.add_argument(
        "--word-timestamps", action="store_true", help="times and probabilities of words"
    )
    command.add_argument("--prompt", help="text that prompts the first window, such as names")
    command.add_argument("--hotwords", help="words that prompt every window")
    command.add_argument(
        "--output", action="append", default=[], help="also write txt, srt, vtt, json or tsv files"
    )
    command.add_argument("--output-dir", type=Path, help="default: the folder of the audio")
    command.add_argument("--overwrite", action="store_true", help="replace existing transcripts")
    command.add_argument("--jobs", type=positive, default=1, help="files to transcribe at once")
    command.add_argument(
        "--live", action="store_true", help="transcribe - or mic during the recording"
    )
    command.add_argument("--vad", action="store_true", help="skip noise; needs silero-vad")
    command.add_argument("--strict", action="store_true", help="refuse truncated files")
    command.add_argument("--stream", action="store_true", help="print each segment as JSON at once")


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a command and return its result; numpy and onnxruntime are imported where needed."""
    if android.here():
        android.take_fast_cores(getattr(arguments, "threads", None))
    if arguments.command == "describe":
        return describe()
    sound = sum(size_of(path) for path in getattr(arguments, "wav", []))
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
        return bench_with_telemetry(arguments)
    return {"transcripts": list(transcripts(arguments))}


def failed(answer: dict[str, Any]) -> bool:
    """Print the errors of files that could not be read, and return whether there are any."""
    rows = [row for row in answer.get("transcripts", []) if "error" in row]
    for row in rows:
        print(f"error: {row['error']}\ntry:   {row['hint']}", file=sys.stderr)
    return bool(rows)


def bench_with_telemetry(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark while a helper process samples telemetry. Helper processes are forked
    before large modules are imported, so they stay small."""
    from .machine.tuning import governed, pin
    from .measure.telemetry import Sampler

    with governed(arguments.governor) as governor:
        settings: dict[str, Any] = {"governor": governor}
        if arguments.pin is not None:
            settings["pinned"] = pin(arguments.pin)
        if arguments.minutes is None:
            settings["cold_load_s"] = cold_load_s(arguments)
        sampler = Sampler()
        from .measure.bench import bench

        result = bench(
            arguments.artifact,
            arguments.clips,
            arguments.repeats,
            arguments.threads,
            arguments.compute_units,
            arguments.minutes,
        )
        return {**result, **settings, "telemetry": sampler.finish()}


def cold_load_s(arguments: argparse.Namespace) -> float | str:
    """Return the seconds to open the artifact from disk, measured in a helper process.

    Returns "unavailable" on emulators and where the helper fails; the benchmark itself then reports
    the error.
    """
    from .machine.helper_process import HelperProcess, can_fork

    def task(stop: int) -> bytes:
        from .measure.bench import cold_load_s

        return json.dumps(cold_load_s(arguments.artifact, arguments.threads)).encode()

    real = can_fork() and not emulated(Path("/"), platform.machine())
    output = HelperProcess(task).finish(COLD_S) if real else b""
    return json.loads(output) if output else UNAVAILABLE


def transcripts(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the transcript of each file; `--stream` prints every segment once it is decoded, and
    `--live` every result."""
    from . import batch, live, writers
    from .audio import read_wav
    from .recognizer import Recognizer

    formats = writers.formats_of(arguments.output)
    jobs = batch.plan(arguments.wav, (".wav",), formats, arguments.output_dir, arguments.overwrite)
    recognizer = Recognizer(
        arguments.artifact,
        arguments.threads or batch.threads_for(arguments.jobs),
        compute_units=arguments.compute_units,
    )
    names = ["language", "task", "beams", "fallback", "seed", "previous", "vad"]
    names += ["prompt", "hotwords"]
    options = {name: getattr(arguments, name) for name in names}
    if arguments.live:
        row = live.transcript(recognizer, jobs, lambda result: say(result.as_dict()), **options)
        return iter([row])
    options["word_timestamps"] = arguments.word_timestamps
    options["timestamps"] = arguments.timestamps or not writers.TIMED.isdisjoint(formats)

    def show(job: Job, segment: Segment) -> None:
        if arguments.stream:
            say({"audio": str(job.path), **segment.as_dict()})

    return batch.run(
        jobs,
        partial(read_wav, strict=arguments.strict),
        partial(recognizer.row, confidence=True, **options),
        arguments.jobs,
        show,
    )


def say(row: dict[str, Any]) -> None:
    """Print one line of JSON at once."""
    print(json.dumps(row, ensure_ascii=False), flush=True)


def size_of(path: Path) -> int:
    """Return the size of a file, or the total size of the files in a folder, in bytes."""
    entries = [path, *path.rglob("*")]
    return sum(entry.stat().st_size for entry in entries if entry.is_file())


def out_of_memory(arguments: argparse.Namespace) -> RunnerProblem:
    return RunnerProblem(
        f"{getattr(arguments, 'artifact', 'the runner')}: out of memory, or above the limit for an "
        "artifact of this size",
        "close other programs; if that does not help, copy the artifact again",
    )


if __name__ == "__main__":
    sys.exit(main())
