"""Compute the training and dev banks of spectra from recordings and synthetic speech.

Held out from the Free Spoken Digit Dataset are recordings 0 to 4 of each digit, and all recordings
of the speakers lucas and theo.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.study.digits import DIGITS, SAMPLE_RATE
from benchmarks.study.digits.spectra import (
    WARPS,
    Clip,
    make_bank,
    pieces,
    read_clip,
    read_rows,
    resample,
    says_digits,
)

HELD_OUT_SPEAKERS = ("fsdd_lucas", "fsdd_theo")
# Recordings reserved for the evaluation: one wake word, two languages, one noise.
HELD_OUT_OTHER = ("alexa", "test_fr", "test_pt", "noise2")


def recorded_clips(source: Path, dev: bool) -> list[Clip]:
    """Return digits of the training speakers: recordings 5..49, or the held-out 0..4 for `dev`."""
    clips = []
    for row in read_rows(source):
        if row.kind != "digit" or row.speaker in HELD_OUT_SPEAKERS:
            continue
        if (int(row.path.stem.rsplit("_", 1)[1]) < 5) != dev:
            continue
        samples, digit = read_clip(row.path), DIGITS.index(row.text)
        for ratio in WARPS[::3] if dev else WARPS:
            name = f"{row.speaker}@{ratio}"
            clips.append(Clip(resample(samples, ratio), (digit,), name, "real"))
    return clips


def other_recorded_clips(source: Path) -> list[Clip]:
    """Return noises, words and sentences without digits of a manifest; FSDD has none."""
    clips = []
    for row in read_rows(source):
        held_out = any(name in row.path.stem or name == row.text for name in HELD_OUT_OTHER)
        if row.kind in ("digit", "rir") or held_out or says_digits(row.text):
            continue
        pool = "noise" if row.kind == "noise" else "real-other"
        for piece in pieces(read_clip(row.path), 10.0 if pool == "noise" else 4.0):
            clips.append(Clip(piece, (), row.speaker, pool))
    return clips


def synthetic_clips(cache: Path) -> list[Clip]:
    """Return the clips of a file from synthesise.py or flite.py, with their kinds as pools."""
    rng = np.random.default_rng(4)
    arrays = np.load(cache)
    ends = np.cumsum(arrays["length"])
    audio = arrays["audio"]
    clips = []
    for end, length, text, kind, voice in zip(
        ends, arrays["length"], arrays["text"], arrays["kind"], arrays["voice"], strict=True
    ):
        samples = audio[end - length : end].astype(np.float32) / 20_000
        digits = tuple(DIGITS.index(word) for word in str(text).split())
        # flite has few voices, so each of its words gets four lengths of the vocal tract
        for ratio in rng.choice(WARPS, 4, replace=False) if kind == "natural" else (1.0,):
            resampled = resample(samples, ratio)[: 6 * SAMPLE_RATE]
            clips.append(Clip(resampled, digits, f"{voice}@{ratio}", str(kind)))
    return clips


def white_clips(seed: int) -> list[Clip]:
    """Return six clips of ten seconds of Gaussian noise."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((6, 10 * SAMPLE_RATE)).astype(np.float32) * 0.1
    return [Clip(row, (), "", "white") for row in samples]


def prepare_banks(source: Path, synthetic: list[Path], out: Path) -> tuple[Path, Path]:
    """Compute the training and dev banks if they do not exist; return their paths."""
    train, dev = out / "bank-train", out / "bank-dev"
    if not train.with_suffix(".json").exists():
        others = other_recorded_clips(source)
        clips = recorded_clips(source, dev=False) + others + white_clips(1)
        clips += [clip for cache in synthetic for clip in synthetic_clips(cache)]
        held = recorded_clips(source, dev=True) + others + white_clips(2)
        for cache in synthetic:
            held += synthetic_clips(cache.with_name(f"{cache.stem}-dev{cache.suffix}"))
        make_bank(held).save(dev)
        make_bank(clips).save(train)
    return train, dev
