"""Count the word errors of an artifact, and of faster-whisper, on long joined recordings.

    python -m benchmarks.long_speech ARTIFACT MANIFEST
    python -m benchmarks.long_speech ARTIFACT MANIFEST --checkpoint DIR --models FOLDER

The recordings are made from the manifest's English clips, in an order drawn with --seed:

- `joined`: 11 minutes, with pauses of 0.3 to 1 s.
- `zeros`: the same, with 90 ms of digital silence in the middle of every fifth clip.
- `noise`: sentences with 2 to 8 s of noise, hum, tones or music between them, about 90 s.

Faster-whisper runs with --checkpoint, in the environment of `make rivals-env`, on the same weights
in int8. Both decode greedily, without fallback, with and without timestamps. faster-whisper starts
every window without the previous text, as ours does by default.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.markdown import table
from benchmarks.program import OURS, PROJECT, exit_code, parser_of
from benchmarks.rivals.engines import interpreter, refuse_missing
from benchmarks.rivals.prepare import Conversion, ctranslate2
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.noises import NOISES
from benchmarks.speech.wav import float_wav
from benchmarks.wer import word_errors
from devices.runner.audio import SAMPLING_RATE, Pcm
from devices.runner.recognizer import Recognizer
from export.problem import Problem

LONG_S, NOISY_S = 660.0, 90.0
ZEROS_S = 0.09
EVERY = 5
"""One in this many clips of the `zeros` recordings has digital silence in it."""
NORMALIZER = "whisper-english"
MODES = {"timestamps off": False, "timestamps on": True}


@dataclass(frozen=True)
class Recording:
    """A joined recording and its text."""

    kind: str
    pcm: Pcm
    text: str


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 after an error."""
    parser = parser_with_engines("benchmarks.long_speech", __doc__)
    add = parser.add_argument
    add("--long", type=int, default=2, help="number of long recordings of each kind")
    add("--noisy", type=int, default=10, help="number of recordings with noise")
    return exit_code(measure, parser, argv)


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    recordings = list(make(english(given), given.long, given.noisy, given.seed))
    print(table(summary(counted(given, recordings))))


def parser_with_engines(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser for an artifact, its speech and faster-whisper."""
    parser = parser_of(program, doc)
    add = parser.add_argument
    add("artifact", type=Path)
    add("speech", help="a manifest of clips")
    add("--checkpoint", type=Path, help="the artifact's checkpoint, for faster-whisper")
    add("--models", type=Path, help="folder that keeps faster-whisper's model for the next call")
    add("--python", type=Path, default=interpreter(), help="the rivals' Python interpreter")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="file for texts and counts, as JSON lines")
    return parser


# ----------------------------------------------------------------------------------- recordings


def english(given: argparse.Namespace) -> list[Clip]:
    """Return the manifest's clips with an English text; fail early if the rival is missing."""
    clips = [clip for clip in read_manifest(given.speech) if clip.lang == "en" and clip.text]
    if not clips:
        raise Problem(
            f"{given.speech}: no clip has an English text", hint="give a manifest of English speech"
        )
    if given.checkpoint is not None:
        refuse_missing(["faster-whisper"], given.python, "leave --checkpoint out")
    return clips


def make(clips: list[Clip], long: int, noisy: int, seed: int) -> Iterator[Recording]:
    """Yield the recordings; equal arguments give equal recordings."""
    for number in range(long):
        yield joined(clips, "joined", np.random.default_rng([seed, number]))
        yield joined(clips, "zeros", np.random.default_rng([seed, number]))
    for number in range(noisy):
        yield with_noise(clips, list(NOISES)[number % len(NOISES)], np.random.default_rng(number))


def joined(clips: list[Clip], kind: str, rng: np.random.Generator) -> Recording:
    """Return clips joined with pauses of faint noise."""
    parts, texts, samples = [], [], 0
    for number, clip in enumerate(drawn(clips, rng)):
        pcm, middle = clip.pcm().copy(), rng.uniform(0.3, 0.7)
        if kind == "zeros" and number % EVERY == 0:
            start = int(middle * len(pcm))
            pcm[start : start + int(ZEROS_S * SAMPLING_RATE)] = 0
        pause = 1e-3 * rng.standard_normal(int(rng.uniform(0.3, 1.0) * SAMPLING_RATE))
        parts += [pcm, pause.astype(np.float32)]
        texts.append(clip.text)
        samples += len(pcm) + len(pause)
        if samples > LONG_S * SAMPLING_RATE:
            break
    return Recording(kind, np.concatenate(parts), " ".join(texts))


def with_noise(clips: list[Clip], noise: str, rng: np.random.Generator) -> Recording:
    """Return sentences with noise between them, and 20 dB less of it below them."""
    parts, texts, samples = [], [], 0
    for clip in drawn(clips, rng):
        pcm = clip.pcm()
        gap = int(rng.uniform(2, 8) * SAMPLING_RATE)
        between = 0.05 * NOISES[noise](gap, rng)
        parts += [between, pcm + 0.005 * NOISES[noise](len(pcm), rng)]
        texts.append(clip.text)
        samples += len(pcm) + gap
        if samples > NOISY_S * SAMPLING_RATE:
            break
    return Recording("noise", np.concatenate(parts).astype(np.float32), " ".join(texts))


def drawn(clips: list[Clip], rng: np.random.Generator) -> list[Clip]:
    """Return the clips in a drawn order."""
    return [clips[i] for i in rng.permutation(len(clips))]


# ---------------------------------------------------------------------------------- transcription


def counted(
    given: argparse.Namespace, recordings: list[Recording], modes: Sequence[str] = tuple(MODES)
) -> list[dict[str, Any]]:
    """Return the texts and word errors of all engines, and write them to --out."""
    answers = ours(given.artifact, recordings, given.threads, modes)
    if given.checkpoint is not None:
        answers += rival(given, recordings, modes)
    rows = [row | {"reference": r.text} for row, r in paired(answers, recordings)]
    if given.out is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        given.out.write_text("".join(lines), encoding="utf-8")
    return rows


def ours(
    artifact: Path, recordings: list[Recording], threads: int, modes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the answers of the runner, in each mode."""
    recognizer = Recognizer(artifact, threads)
    answers = []
    for mode in modes:
        timestamps = MODES[mode]
        for recording in recordings:
            started = time.perf_counter()
            transcript = recognizer.transcribe(recording.pcm, timestamps=timestamps)
            answers.append(
                {
                    "engine": "ours",
                    "mode": mode,
                    "text": transcript.text,
                    "seconds": time.perf_counter() - started,
                    "encoder_runs": len(transcript.graph_s),
                }
            )
    return answers


def rival(
    given: argparse.Namespace, recordings: list[Recording], modes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the answers of faster-whisper, which runs in the rivals' environment."""
    with tempfile.TemporaryDirectory() as folder:
        models = (given.models or Path(folder) / "models").resolve()
        models.mkdir(parents=True, exist_ok=True)
        model = ctranslate2(Conversion(given.checkpoint, models, given.python.absolute()))
        paths = [Path(folder) / f"{number:05}.wav" for number in range(len(recordings))]
        for path, recording in zip(paths, recordings, strict=True):
            path.write_bytes(float_wav(recording.pcm))
        words = [str(given.python.absolute()), "-m", "benchmarks.rivals.long_faster_whisper"]
        words += [str(model), str(given.threads), ",".join(modes), *map(str, paths)]
        done = subprocess.run(words, cwd=PROJECT, env=OURS, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise Problem(
            f"faster-whisper failed: {''.join(reason)}",
            hint="rebuild its environment with `make rivals-env`, or leave --checkpoint out",
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


# ----------------------------------------------------------------------------------------- counts


def paired(answers: list[dict[str, Any]], recordings: list[Recording]) -> Iterator[Any]:
    """Yield each answer, with its kind and word errors, and its recording."""
    for number, answer in enumerate(answers):
        recording = recordings[number % len(recordings)]
        ((wrong, words),) = word_errors([recording.text], [answer["text"]], NORMALIZER)
        yield {"kind": recording.kind, "wrong": wrong, "words": words} | answer, recording


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each engine and mode, with the word errors of each kind of recording."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["engine"], row["mode"]), []).append(row)
    return [
        {
            "engine": engine,
            "mode": mode,
            **{kind: wrong_words(group, kind) for kind in dict.fromkeys(r["kind"] for r in rows)},
            "encoder runs": str(sum(row["encoder_runs"] or 0 for row in group) or "-"),
            "seconds": f"{sum(row['seconds'] for row in group):.0f}",
        }
        for (engine, mode), group in groups.items()
    ]


def wrong_words(group: list[dict[str, Any]], kind: str) -> str:
    """Return the word errors of each recording of a kind, and their sum out of all words."""
    counts = [row["wrong"] for row in group if row["kind"] == kind]
    words = sum(row["words"] for row in group if row["kind"] == kind)
    return f"{' + '.join(map(str, counts))} = {sum(counts)} of {words}"


if __name__ == "__main__":
    sys.exit(main())
