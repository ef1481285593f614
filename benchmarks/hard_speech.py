"""Count the word errors of an artifact, and of faster-whisper, on noisy and on very quiet clips.

    python -m benchmarks.hard_speech ARTIFACT MANIFEST
    python -m benchmarks.hard_speech ARTIFACT MANIFEST --checkpoint DIR --models FOLDER

The table has a row for each kind of sound:

- `clean`: the manifest's English clips.
- `white 10 dB`: the clips in white or pink noise, or in babble, at a signal-to-noise ratio of 20 to
  0 dB. Babble is six other clips at once.
- `peak 8`: the clips, scaled to a peak of 4 to 32 steps of 16 bits, and rounded to steps.
- `only hum`: 60 s of one of six sounds without speech. Every word is wrong there.

Faster-whisper runs as in benchmarks.long_speech; both decode without timestamps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.gate import evenly
from benchmarks.long_speech import Recording, counted, english, parser_with_engines
from benchmarks.markdown import table
from benchmarks.program import exit_code
from benchmarks.speech.clips import Clip
from benchmarks.speech.noises import NOISES, level_at, scaled
from devices.runner.audio import SAMPLING_RATE, Pcm

SNR_DB = (20, 10, 5, 0)
PEAKS = (32, 16, 8, 4)
STEPS = 32768
"""Steps of 16 bits from zero to full scale."""
VOICES = 6
EMPTY_S, EMPTY_LEVEL = 60, 0.1
MODE = "timestamps off"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 after an error."""
    parser = parser_with_engines("benchmarks.hard_speech", __doc__)
    parser.add_argument("--clips", type=int, help="number of clips; default: all")
    return exit_code(measure, parser, argv)


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    clips = english(given)
    if given.clips is not None:
        clips = evenly(clips, given.clips)
    recordings = list(make(clips, given.seed))
    print(table(summary(counted(given, recordings, [MODE]))))


def make(clips: Sequence[Clip], seed: int) -> Iterator[Recording]:
    """Yield the recordings of each kind; equal arguments give equal recordings."""
    rng = np.random.default_rng(seed)
    spoken = [clip.pcm() for clip in clips]
    noises = {name: [NOISES[name](len(pcm), rng) for pcm in spoken] for name in ("white", "pink")}
    noises["babble"] = [babble(spoken, number, rng) for number in range(len(spoken))]
    kinds = {"clean": spoken}
    for name, sounds in noises.items():
        for snr in SNR_DB:
            pairs = zip(spoken, sounds, strict=True)
            kinds[f"{name} {snr} dB"] = [pcm + level_at(snr, pcm) * noise for pcm, noise in pairs]
    for peak in PEAKS:
        kinds[f"peak {peak}"] = [quiet(pcm, peak) for pcm in spoken]
    for kind, sounds in kinds.items():
        for clip, sound in zip(clips, sounds, strict=True):
            yield Recording(kind, sound.astype(np.float32), clip.text)
    for name, noise in NOISES.items():
        sound = EMPTY_LEVEL * noise(EMPTY_S * SAMPLING_RATE, rng)
        yield Recording(f"only {name}", sound.astype(np.float32), "")


def babble(spoken: Sequence[Pcm], number: int, rng: np.random.Generator) -> np.ndarray:
    """Return clips at once, other than that of a number and as long as it is, at a level of 1."""
    others = np.delete(np.arange(len(spoken)), number)
    chosen = rng.choice(others, VOICES, replace=len(others) < VOICES)
    voices = [scaled(np.resize(spoken[i], len(spoken[number]))) for i in chosen]
    return scaled(np.sum(voices, axis=0))


def quiet(pcm: Pcm, peak: int) -> np.ndarray:
    """Return samples with a peak of some steps of 16 bits, rounded to steps."""
    return np.round(pcm * (peak / np.abs(pcm).max())) / STEPS


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each kind of sound, with the word errors of each engine."""
    engines = dict.fromkeys(row["engine"] for row in rows)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    return [
        {"sound": kind, "words": str(sum(r["words"] for r in of[kind]) // len(engines))}
        | {e: str(sum(r["wrong"] for r in of[kind] if r["engine"] == e)) for e in engines}
        for kind in kinds
    ]


if __name__ == "__main__":
    sys.exit(main())
