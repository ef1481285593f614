"""Write recordings as speech manifests, to compress and evaluate the embedded model.

git clone https://github.com/Jakobovski/free-spoken-digit-dataset
python -m benchmarks.study.digits.manifests --fsdd free-spoken-digit-dataset/recordings --out speech
edgewhisper compress --speech speech/train.jsonl --dev speech/dev.jsonl
edgewhisper eval CHECKPOINT --speech speech/fsdd_lucas-clean.jsonl

train              sequences of the training speakers' recordings 5..49 with random levels, channels
                   and noise; every eighth clip is noise without words
dev                the same with recordings 0..4
SPEAKER-clean,     the 120 sequences of each held-out speaker that evaluate.py scores,
SPEAKER-10dB       without and with white noise
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.study.digits import SAMPLE_RATE
from benchmarks.study.digits.banks import HELD_OUT_SPEAKERS
from benchmarks.study.digits.clips import (
    LONGEST_S,
    coloured_noise,
    vary,
    write_clip,
    write_manifest,
)
from benchmarks.study.digits.evaluate import (
    Spoken,
    add_white_noise,
    lay_out,
    sequence_plan,
    speaker_sequences,
)
from benchmarks.study.digits.spectra import WARPS, Row, read_clip, read_rows, resample

EMPTY = 8
"""Every eighth clip is noise only, so that fine-tuned models keep outputting nothing for it."""


def by_speaker(rows: list[Row], dev: bool) -> list[list[Row]]:
    """Return the digit recordings of each training speaker: 0..4 for `dev`, 5..49 otherwise."""
    speakers: dict[str, list[Row]] = {}
    for row in rows:
        held_out = int(row.path.stem.rsplit("_", 1)[1]) < 5 if row.kind == "digit" else not dev
        if row.kind == "digit" and row.speaker not in HELD_OUT_SPEAKERS and held_out == dev:
            speakers.setdefault(row.speaker, []).append(row)
    return list(speakers.values())


def varied_sequences(speakers: list[list[Row]], count: int, seed: int) -> list[Spoken]:
    """Return `count` sequences with resampled voices, and noise-only clips among them."""
    rng = np.random.default_rng(seed)
    sequences = []
    for index, step in enumerate(sequence_plan(1, count, seed)):
        if index % EMPTY == 0:
            sequences.append(Spoken(noise(rng), ""))
            continue
        rows = speakers[index % len(speakers)]
        chosen = [rows[int(i)] for i in rng.integers(len(rows), size=len(step["clips"]))]
        ratio = float(rng.choice(WARPS))
        clips = [resample(read_clip(row.path), ratio) for row in chosen]
        own = {**step, "clips": list(range(len(clips)))}
        spoken = lay_out(own, clips, [row.text for row in chosen])
        sequences.append(Spoken(vary(rng, spoken.samples).astype(np.float32), spoken.text))
    return sequences


def noise(rng: np.random.Generator) -> np.ndarray:
    """Return silence or noise (samples,) float32 of random colour, length and level."""
    length = round(rng.uniform(1, LONGEST_S) * SAMPLE_RATE)
    level_db = rng.uniform(-90, -15)
    return (coloured_noise(rng, length, rng.uniform(0, 1)) * 10 ** (level_db / 20)).astype(
        np.float32
    )


def write(out: Path, name: str, spoken: list[Spoken], speaker: str = "") -> None:
    """Write a manifest and its clips."""
    rows = [
        write_clip(out, f"{name}/{index:04d}.ogg", item.samples.clip(-1, 1), item.text, speaker)
        for index, item in enumerate(spoken)
    ]
    write_manifest(out / f"{name}.jsonl", rows)


def main() -> None:
    """Write the manifests of all splits and held-out speakers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdd", type=Path, required=True, help="recordings, or a JSONL manifest")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1600, help="clips to train on")
    parser.add_argument("--dev", type=int, default=160, help="clips to choose thresholds on")
    options = parser.parse_args()
    rows = read_rows(options.fsdd)
    train, dev = by_speaker(rows, dev=False), by_speaker(rows, dev=True)
    write(options.out, "train", varied_sequences(train, options.train, seed=1))
    write(options.out, "dev", varied_sequences(dev, options.dev, seed=2))
    for speaker in HELD_OUT_SPEAKERS:
        own = [row for row in rows if row.speaker == speaker and row.kind == "digit"]
        if own:
            clean = speaker_sequences(own)
            write(options.out, f"{speaker}-clean", clean, speaker)
            write(options.out, f"{speaker}-10dB", add_white_noise(clean, 10), speaker)


if __name__ == "__main__":
    main()
