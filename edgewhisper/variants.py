"""Variants of clips: more speech for distillation, made from a few hundred clips.

A variant is one clip, or two clips in sequence, at another speed and level, and in half of the
cases with noise. It has no text: the dense model transcribes it, and its states are the targets.

Speed perturbation is that of Ko et al. 2015 (Audio augmentation for speech recognition).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.speech.clips import Clip
from benchmarks.speech.noises import level_at, pink, room, white
from devices.runner.audio import SAMPLING_RATE
from export.files import new_file

SPEEDS = 0.87, 1.14
LEVELS_DB = -12.0, 6.0
SNRS_DB = 8.0, 35.0
PAUSES_S = 0.05, 0.4
JOINED = 0.4
"""Share of the variants that have a second clip, if there is room for it."""
PIECES = 0.15
"""Share of the parts that are a piece of a clip, from 40 % of the longest length on."""
NOISY = 0.5
"""Share of the variants with noise."""
PEAK = 0.99


def variants(
    clips: Sequence[Clip],
    per_clip: int,
    longest_s: float,
    seed: int,
    folder: Path,
    done: Callable[[], None] = lambda: None,
) -> list[Clip]:
    """Write variants of clips to a folder, as 16 kHz FLAC files, and return them without texts.

    There are `per_clip` variants for each clip, of at most `longest_s` seconds. Joined clips
    have one language. Variants depend only on the seed; files that exist are not written again.
    """
    by_language: dict[str, list[Clip]] = {}
    for clip in clips:
        by_language.setdefault(clip.lang, []).append(clip)
    made = []
    for number in range(per_clip * len(clips)):
        clip, rng = clips[number % len(clips)], np.random.default_rng([seed, 5, number])
        others, file = by_language[clip.lang], folder / f"{number:06}.flac"
        made.append(written(file, clip, others, longest_s, rng))
        done()
    return made


def written(
    file: Path, clip: Clip, others: Sequence[Clip], longest_s: float, rng: np.random.Generator
) -> Clip:
    """Write one variant, if its file does not exist, and return it."""
    import soundfile

    if not file.is_file():
        pcm = variant(clip, others, round(longest_s * SAMPLING_RATE), rng)
        with new_file(file) as partial:
            soundfile.write(partial, pcm, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    duration_s = soundfile.info(file).duration
    return replace(clip, audio=file, text="", duration_s=duration_s, line=None)


def variant(
    clip: Clip, others: Sequence[Clip], longest: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a variant of a clip: at most `longest` samples (n,) float32 at 16 kHz."""
    import soxr

    pcm = piece(clip.pcm(), longest, rng)
    pause = np.zeros(round(rng.uniform(*PAUSES_S) * SAMPLING_RATE), np.float32)
    room_left = longest - len(pcm) - len(pause)
    if rng.random() < JOINED and room_left > longest / 4:
        second = others[int(rng.integers(len(others)))].pcm()
        pcm = np.concatenate([pcm, pause, piece(second, room_left, rng)])
    speed = rng.uniform(*SPEEDS)
    pcm = soxr.resample(pcm, SAMPLING_RATE * speed, SAMPLING_RATE)[:longest]
    if rng.random() < NOISY:
        pcm = pcm + noise(pcm, rng)
    pcm = pcm * 10 ** (rng.uniform(*LEVELS_DB) / 20)
    return (pcm * min(1.0, PEAK / max(np.abs(pcm).max(), 1e-9))).astype(np.float32)


def piece(pcm: np.ndarray, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Return the samples, or a random piece: always if they are too long, at times otherwise."""
    if len(pcm) <= longest and rng.random() >= PIECES:
        return pcm
    length = min(len(pcm), round(longest * rng.uniform(0.4, 1.0)))
    start = int(rng.integers(len(pcm) - length + 1))
    return pcm[start : start + length]


def noise(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return white, pink or room noise (n,) at a random signal-to-noise ratio."""
    kind = (white, pink, room)[rng.integers(3)]
    return level_at(rng.uniform(*SNRS_DB), pcm) * kind(len(pcm), rng)
