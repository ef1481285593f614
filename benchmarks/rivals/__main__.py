"""Measure the same checkpoint in several engines.

    python -m benchmarks.rivals --size tiny --threads 1 2 --seconds 30 --tokens 64 --out FILE
    python -m benchmarks.rivals --size tiny --threads 1 2 --seconds 5 --tokens 20
    python -m benchmarks.rivals --model DIR --speech MANIFEST
    python -m benchmarks.rivals --model DIR --speech MANIFEST --seconds 30 --tokens 64

With --size, the checkpoint has Whisper's dimensions and random weights, and the input is noise.
Every engine decodes exactly --tokens tokens: the time for that does not depend on the weights. Our
artifact has a window of --seconds in addition to the full one; the rivals pad to the full window,
as they always do. With --model and --speech, the engines decode to the end of the text, and the
table has their word error rates. With --seconds too, the clips are joined, and the recording is cut
after so many seconds.

--out stores the results as JSON lines, which `edgewhisper compare` and `edgewhisper report` read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.markdown import table
from benchmarks.normalizers import name_for
from benchmarks.program import exit_code, parser_of
from benchmarks.result import remarks, write
from benchmarks.rivals import models
from benchmarks.rivals.engines import ENGINES, interpreter
from benchmarks.rivals.race import USUAL, Task, race, ratio_rows, ratios, rows
from benchmarks.sizes import SIZES
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.wav import float_wav
from devices.runner.audio import SAMPLING_RATE
from export.problem import Problem

LOUDNESS = 0.1


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 after an error."""
    return exit_code(measure, parser(), argv)


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.rivals", __doc__)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="tiny", help="dimensions of a random model")
    add("--model", type=Path, help="a dense checkpoint, instead of a random one")
    add("--speech", type=Path, help="a manifest of clips, instead of noise")
    add("--threads", type=count, nargs="+", default=[1, 2])
    add("--seconds", type=duration, help="how long the noise is (default: 30), or the joined clips")
    add(
        "--tokens",
        type=count,
        help="tokens to decode on every clip; default: 64 on noise, unlimited on speech",
    )
    add("--engines", nargs="+", default=list(USUAL), help=f"choose from {', '.join(ENGINES)}")
    add("--rounds", type=count, default=5)
    add("--repeats", type=count, help="passes over the clips in each round")
    add("--models", type=Path, help="folder that keeps the engines' models for the next call")
    add("--python", type=Path, default=interpreter(), help="the rivals' Python interpreter")
    add("--out", type=Path, help="file for the results, as JSON lines")
    return parser


def count(text: str) -> int:
    """Parse a count of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def duration(text: str) -> float:
    """Parse a positive number of seconds."""
    if not (seconds := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return seconds


def measure(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = (given.models or Path(folder) / "models").resolve()
        place.mkdir(parents=True, exist_ok=True)
        task = task_of(given, place, Path(folder))
        results = race(
            task,
            given.engines,
            given.threads,
            given.rounds,
            place,
            given.python.absolute(),  # not resolved: an environment's interpreter is a link
            name_for(task.clips),
            lambda text: print(text, file=sys.stderr),
        )
    if given.out is not None:
        write(results, given.out)
    print(describe(task))
    print(table(rows(results)))
    if compared := ratio_rows(ratios(results)):
        print(table(compared))
    print("\n".join(remarks(results)))


def task_of(given: argparse.Namespace, place: Path, folder: Path) -> Task:
    """Return the workload, with checkpoint and clips on disk."""
    checkpoint = given.model
    if checkpoint is None:
        checkpoint = place / f"whisper-{given.size}-random"
        if not checkpoint.is_dir():
            print(f"{checkpoint.name}: creating random weights", file=sys.stderr)
            models.make(given.size, checkpoint)
    elif not checkpoint.is_dir():
        raise Problem(f"{checkpoint}: no such directory", hint="name a local checkpoint directory")
    forced = given.tokens is not None or given.speech is None
    windows_s: tuple[float, ...] = ()
    if given.speech is None:
        seconds = given.seconds or 30.0
        clips, windows_s = [noise(seconds, folder / "noise.wav")], (seconds,)
    else:
        clips = read_manifest(given.speech)
        if given.seconds is not None:
            clips = [joined(clips, given.seconds, folder / "speech.wav")]
    return Task(
        model=checkpoint.name,
        checkpoint=checkpoint.resolve(),
        clips=tuple(clips),
        tokens=(given.tokens or 64) if forced else None,
        repeats=given.repeats or (3 if len(clips) == 1 else 1),
        windows_s=windows_s,
    )


def noise(seconds: float, path: Path) -> Clip:
    """Write white noise with a fixed seed; return it as a clip."""
    samples = np.random.default_rng(0).standard_normal(round(seconds * SAMPLING_RATE))
    return written(LOUDNESS * samples, path, "noise", "en")


def joined(clips: Sequence[Clip], seconds: float, path: Path) -> Clip:
    """Join clips and cut them after so many seconds; return the recording as a clip, whose text
    also has the words that are cut. Raises Problem if the clips are too short."""
    samples, parts, texts = round(seconds * SAMPLING_RATE), [], []
    for clip in clips:
        parts.append(clip.pcm())
        texts.append(clip.text)
        if (length := sum(map(len, parts))) >= samples:
            pcm = np.concatenate(parts)[:samples]
            return written(pcm, path, " ".join(texts), clips[0].lang)
    raise Problem(
        f"--seconds {seconds:g}: the clips of --speech have {length / SAMPLING_RATE:.1f} s",
        hint="use fewer --seconds",
    )


def written(pcm: NDArray[np.floating], path: Path, text: str, lang: str) -> Clip:
    """Write samples, and return them as a clip."""
    path.write_bytes(float_wav(pcm))
    return Clip(path, text, lang, duration_s=len(pcm) / SAMPLING_RATE)


def describe(task: Task) -> str:
    """Return the line above the table."""
    sound = sum(clip.duration_s or 0 for clip in task.clips)
    clips = f"{len(task.clips)} clips"
    if len(task.clips) == 1:
        clips = f"{sound:g} s of {task.clips[0].audio.stem}"
    ended = "decoded to the end of the text"
    if task.tokens is not None:
        ended = f"exactly {task.tokens} tokens forced in every engine (end of text is suppressed)"
    return f"{task.model}: {clips}, {ended}; medians of interleaved rounds\n"


if __name__ == "__main__":
    sys.exit(main())
