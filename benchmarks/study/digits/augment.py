"""Compose utterances in the mel power domain: many voices, rooms and noises from few clips.

The steps of an utterance, in physical order:

    voice     resampled versions (bank), formant shift (warp of the mel axis), pace
    mouth     level of each word, pauses, tight or loose cutting
    channel   band limits, tilt, smooth random equaliser
    room      exponential decay along time
    noise     gaussian of any colour and modulation, or recorded, with its cross term
    level     loudness, then log10, clamp and scale as in Whisper's feature extractor

SpecAugment masks (Park et al. 2019) are applied to the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from scipy.signal import lfilter

from benchmarks.study.digits.spectra import FLOOR, N_MELS, Bank, extractor, to_features

FRAMES_PER_S = 100

T = TypeVar("T")


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of utterance, and strength of the augmentation (0 none, 1 full)."""

    empty: float = 0.12
    phrase: float = 0.08
    real: float = 0.50
    """Share of word sequences with recorded speakers; the others are synthetic."""
    natural: float = 0.50
    """Share of synthetic sequences with flite's voices, which are built from recordings."""
    accented: float = 0.15
    """Share of the other synthetic sequences with voices of other languages."""
    mixed: float = 0.1
    """Share of sequences in which every word has a new speaker."""
    hard: float = 1.0


@dataclass(frozen=True)
class Utterance:
    """An utterance: features (80, frames) float32 and its digits."""

    features: np.ndarray
    digits: list[int]


# ---------------------------------------------------------------- the mel axis


@cache
def mel_hz() -> np.ndarray:
    """Return the centre of each mel band in Hz, (80,)."""
    filters = extractor().mel_filters  # (201, 80)
    hertz = np.arange(filters.shape[0]) * 8000 / (filters.shape[0] - 1)
    return (filters * hertz[:, None]).sum(0) / filters.sum(0)


@cache
def band_weight() -> np.ndarray:
    """Return weights (80,) that turn mel power into total power; Slaney filters have unit area."""
    return (1 / extractor().mel_filters.sum(0)).astype(np.float32)


@cache
def bins_per_band() -> np.ndarray:
    """Return the effective number of spectrum bins per band, (80,).

    Averaging over bins reduces the cross term of noise.
    """
    filters = extractor().mel_filters
    return (filters.sum(0) ** 2 / (filters**2).sum(0)).astype(np.float32)


@cache
def normal_table() -> np.ndarray:
    """Return a million standard normal numbers; drawing new ones for every frame is too slow."""
    return np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)


def normals(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return standard normal numbers from a random place in the table."""
    count = shape[0] * shape[1]
    first = int(rng.integers(len(normal_table()) - count))
    return normal_table()[first : first + count].reshape(shape)


def axis_warp(factors: np.ndarray) -> np.ndarray:
    """Return a matrix (80, 80) that shifts formants; `factors` scale 0.5, 1.5, 2.5 and 4 kHz."""
    hertz = mel_hz()
    factor = np.interp(hertz, [500, 1500, 2500, 4000, 8000], [*factors, 1.0])
    source = np.interp(hertz / factor, hertz, np.arange(N_MELS))
    low = np.minimum(source.astype(int), N_MELS - 2)
    matrix = np.zeros((N_MELS, N_MELS), np.float32)
    band = np.arange(N_MELS)
    matrix[low, band] = 1 - (source - low)
    matrix[low + 1, band] = source - low
    return matrix


def channel_db(rng: np.random.Generator, hard: float, narrow: float) -> np.ndarray:
    """Return the gain (80,) in dB of a random microphone and line.

    `narrow` is the probability of a 4 kHz telephone band.
    """
    hertz = mel_hz()
    octave = np.log2(np.maximum(hertz, 80) / 1000)
    gain = octave * rng.uniform(-4, 4) * hard
    position = np.arange(N_MELS) / N_MELS
    for ripple in range(1, 5):
        gain += rng.normal(0, 2.5 * hard / ripple) * np.cos(
            np.pi * ripple * position + rng.uniform(0, 2 * np.pi)
        )
    if rng.random() < 0.3 * hard:
        gain -= 10 * np.log10(1 + (rng.uniform(80, 350) / np.maximum(hertz, 20)) ** 4)
    if rng.random() < narrow:
        gain -= np.minimum(70, 10 * np.log10(1 + (hertz / rng.uniform(3300, 4100)) ** 40))
    elif rng.random() < 0.3:
        gain -= 10 * np.log10(1 + (hertz / rng.uniform(2500, 7000)) ** 10)
    return gain.astype(np.float32)


# ---------------------------------------------------------------- which clips


class Pools:
    """The clips of a bank by voice: `voices[pool]` lists {digit: clip indices}, one per voice."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.voices: dict[str, list[dict[int, list[int]]]] = {}
        self.clips: dict[str, list[int]] = {}
        voices: dict[tuple[str, str], dict[int, list[int]]] = {}
        for index, (digits, speaker, pool) in enumerate(
            zip(bank.digits, bank.speaker, bank.pool, strict=True)
        ):
            self.clips.setdefault(pool, []).append(index)
            if len(digits) == 1:
                voices.setdefault((pool, speaker), {}).setdefault(digits[0], []).append(index)
        for (pool, _), by_digit in sorted(voices.items()):
            self.voices.setdefault(pool, []).append(by_digit)

    def has(self, pool: str) -> bool:
        """Return whether a pool has clips."""
        return bool(self.clips.get(pool))


def draw(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Return a random item."""
    return items[int(rng.integers(len(items)))]


def word_pool(rng: np.random.Generator, pools: Pools, mix: Mix) -> str:
    """Draw the pool of a voice: recorded, flite, espeak-ng, or with a foreign accent."""
    if pools.has("real") and rng.random() < mix.real:
        return "real"
    if pools.has("natural") and rng.random() < mix.natural:
        return "natural"
    if pools.has("accented") and rng.random() < mix.accented:
        return "accented"
    return "word" if pools.has("word") else "real"


def draw_voice(rng: np.random.Generator, pools: Pools, pool: str) -> dict[int, list[int]]:
    """Draw a voice. espeak-ng's voices have few clips, so three of them are merged into one."""
    count = 1 if pool in ("real", "natural") else 3
    merged: dict[int, list[int]] = {}
    for _ in range(count):
        for digit, clips in draw(rng, pools.voices[pool]).items():
            merged.setdefault(digit, []).extend(clips)
    return merged


def draw_words(rng: np.random.Generator, pools: Pools, mix: Mix, count: int) -> tuple[list, str]:
    """Draw `count` random digits; return their clip indices and the pool of the last one."""
    pool = word_pool(rng, pools, mix)
    mixed = rng.random() < mix.mixed
    voice = draw_voice(rng, pools, pool)
    clips = []
    for _ in range(count):
        if mixed:
            pool = word_pool(rng, pools, mix)
            voice = draw_voice(rng, pools, pool)
        clips.append(draw(rng, voice[draw(rng, sorted(voice))]))
    return clips, pool


def choose_clips(rng: np.random.Generator, pools: Pools, mix: Mix, most: int) -> tuple[list, str]:
    """Draw the words of an utterance: clip indices and their pool; none for noise and silence."""
    kind = rng.random()
    if kind < mix.empty:
        if pools.has("other") and rng.random() < 0.65:
            pool = "real-other" if pools.has("real-other") and rng.random() < 0.4 else "other"
            return [draw(rng, pools.clips[pool]) for _ in range(rng.integers(1, 4))], pool
        return [], "noise"
    if kind < mix.empty + mix.phrase and most >= 2 and pools.has("phrase"):
        return [draw(rng, pools.clips["phrase"]) for _ in range(rng.integers(1, 3))], "phrase"
    counts = rng.integers(1, most + 1, 2)
    return draw_words(rng, pools, mix, int(counts.max() if rng.random() < 0.5 else counts[0]))


# ---------------------------------------------------------------- composition


@dataclass(frozen=True)
class Placement:
    """Source and target of the speech frames, arrays (speech frames,), and the placed clips."""

    source: np.ndarray
    """Fractional frame numbers in the bank."""
    target: np.ndarray
    """Frame numbers in the window."""
    gain_db: np.ndarray
    clips: list[int]
    end: int
    """First frame after the last word and its trailing pause."""


def draw_gap(rng: np.random.Generator) -> int:
    """Draw the number of frames between two words."""
    seconds = rng.normal(0.12, 0.12) if rng.random() < 0.85 else rng.uniform(0.3, 0.9)
    return int(max(0.0, seconds) * FRAMES_PER_S)


def place(
    rng: np.random.Generator, bank: Bank, clips: list[int], window: int, hard: float
) -> Placement:
    """Place clips one after the other into a window of `window` frames; drop those that do not
    fit."""
    pace = np.exp(rng.uniform(-0.25, 0.25) * hard)
    plan: list[tuple[int, np.ndarray, int]] = []
    total = 0
    for clip in clips:
        frames = int(bank.frames[clip])
        cut = rng.integers(0, 4, 2) if rng.random() < 0.3 * hard and frames > 20 else (0, 0)
        kept = frames - int(cut[0]) - int(cut[1])
        length = max(8, round(kept / (pace * np.exp(rng.normal(0, 0.06 * hard)))))
        gap = draw_gap(rng) if plan else 0
        if bank.pool[clip] in ("other", "real-other", "phrase"):
            length = min(length, window - 4) if not plan and not bank.digits[clip] else length
        if total + gap + length > window - 4:
            break
        first = bank.start[clip] + cut[0]
        plan.append((clip, np.linspace(first, first + kept - 1, length), total + gap))
        total += gap + length
    room = window - total
    lead = int(rng.integers(0, (room if rng.random() < 0.2 else min(room, 120)) + 1))
    tail = int(rng.integers(0, min(room - lead, 100) + 1))
    if not plan:
        empty = np.zeros(0)
        return Placement(empty, empty.astype(int), empty, [], lead + tail)
    gains = [np.full(len(s), rng.uniform(-5, 5) * hard) for _, s, _ in plan]
    targets = [np.arange(at, at + len(s)) + lead for _, s, at in plan]
    return Placement(
        np.concatenate([s for _, s, _ in plan]), np.concatenate(targets), np.concatenate(gains),
        [clip for clip, _, _ in plan], total + lead + tail,
    )  # fmt: skip


def gather(bank: Bank, source: np.ndarray) -> np.ndarray:
    """Return log mel power (frames, 80) float32 at fractional frame numbers."""
    low = source.astype(int)
    part = (source - low)[:, None].astype(np.float32)
    return bank.log_mel[low] * (1 - part) + bank.log_mel[low + 1] * part


def speech_power(
    rng: np.random.Generator, bank: Bank, where: Placement, pool: str, window: int, hard: float
) -> np.ndarray:
    """Return mel power (window, 80) of the placed words with a random voice, channel and room."""
    power = np.zeros((window, N_MELS), np.float32)
    if len(where.source) == 0:
        return power
    log = gather(bank, where.source) + (where.gain_db / 10)[:, None].astype(np.float32)
    if hard and rng.random() < 0.85:
        overall = np.exp(rng.uniform(-0.16, 0.16) * hard)
        log = log @ axis_warp(overall * np.exp(rng.normal(0, 0.04 * hard, 4)))
    narrow = 0.2 if pool in ("real", "real-other") else 0.75
    log += channel_db(rng, hard, narrow)[None] / 10
    power[where.target] = 10**log
    if rng.random() < 0.35 * hard:
        power = reverberate(power, rng.uniform(0.1, 0.5), rng.uniform(-22, -6))
    return power


def reverberate(power: np.ndarray, rt60_s: float, level_db: float) -> np.ndarray:
    """Add an exponential tail that falls 60 dB in `rt60_s` and begins at `level_db`."""
    decay = 10 ** (-6 / (rt60_s * FRAMES_PER_S))
    return power + lfilter([0, 10 ** (level_db / 10)], [1, -decay], power, axis=0).astype(
        np.float32
    )


def noise_power(rng: np.random.Generator, pools: Pools, window: int) -> np.ndarray:
    """Return mel power (window, 80) of mostly Gaussian noise of any colour, total power about 1."""
    kind = rng.random()
    name = "noise" if kind > 0.75 and pools.has("noise") else "white"
    clip = draw(rng, pools.clips[name])
    start = pools.bank.start[clip]
    shift = rng.integers(0, max(1, pools.bank.frames[clip] - window))
    frames = min(window, int(pools.bank.frames[clip]))
    recorded = pools.bank.log_mel[start + shift : start + shift + frames].astype(np.float32)
    log: np.ndarray = np.resize(recorded, (window, N_MELS))
    if kind > 0.35 if name == "white" else rng.random() < 0.5:
        log = log + channel_db(rng, 1.5, 0.25)[None] / 10
    if kind > 0.55:
        log = log + modulation_db(rng, window)[:, None] / 10
    power = 10**log
    return power / ((power @ band_weight()).mean() + 1e-12)


def modulation_db(rng: np.random.Generator, window: int) -> np.ndarray:
    """Return a slow modulation (window,) in dB: swell, hum or bursts."""
    time = np.arange(window) / FRAMES_PER_S
    if rng.random() < 0.5:
        rate = np.exp(rng.uniform(np.log(0.3), np.log(8)))
        return rng.uniform(2, 10) * np.sin(2 * np.pi * (rate * time + rng.random()))
    knots = rng.normal(0, 8, rng.integers(3, 30))
    return np.interp(time, np.linspace(0, time[-1], len(knots)), knots)


def add_noise(rng: np.random.Generator, power: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the power of speech plus noise.

    |S + N|**2 = |S|**2 + |N|**2 + 2 |S||N| cos(phase); the cross term averages over bins.
    """
    cross = normals(rng, power.shape) * np.sqrt(2 * power * noise / bins_per_band())
    return np.maximum(power + noise + cross, 0.1 * (power + noise))


def mask_features(rng: np.random.Generator, features: np.ndarray) -> None:
    """Apply SpecAugment in place: two frequency masks and one or two time masks with the mean."""
    fill = features.mean()
    for _ in range(2):
        first = rng.integers(0, N_MELS - 4)
        features[first : first + rng.integers(0, 10)] = fill
    for _ in range(rng.integers(1, 3)):
        first = rng.integers(0, features.shape[1] - 12)
        features[:, first : first + rng.integers(0, 10)] = fill


def set_level(rng: np.random.Generator, power: np.ndarray, speech: bool) -> np.ndarray:
    """Scale to a random loudness; windows without speech may be almost silent."""
    loudness_db = rng.uniform(-45, -12) if speech else rng.uniform(-100, -8)
    active = power @ band_weight()
    reference = active[active > 1e-6 * active.max()].mean() if active.max() > 0 else 1.0
    # The total mel power of a sine of RMS 1 is about (sum of the window)**2 / 2 = 2e4.
    return power * np.float32(2e4 * 10 ** (loudness_db / 10) / reference)


def compose(
    rng: np.random.Generator, pools: Pools, mix: Mix, window_s: float, most: int, mask: bool = True
) -> Utterance:
    """Compose a training utterance of at most `most` digits in a window of `window_s` seconds."""
    window = round(window_s * FRAMES_PER_S)
    clips, pool = choose_clips(rng, pools, mix, most)
    where = place(rng, pools.bank, clips, window, mix.hard)
    power = speech_power(rng, pools.bank, where, pool, window, mix.hard)
    speech = bool(where.clips)
    if rng.random() < (0.75 if speech else 0.9):
        noise = noise_power(rng, pools, window).astype(np.float32)
        if rng.random() < 0.5:
            noise[where.end :] = 0
        total = float((power @ band_weight()).sum() / max(1, len(where.source))) or 1.0
        snr_db = rng.uniform(max(2, 25 - 36 * mix.hard), 42)
        power = add_noise(rng, power, noise * np.float32(total * 10 ** (-snr_db / 10)))
    features = to_features(np.maximum(set_level(rng, power, speech), FLOOR))
    if mask:
        mask_features(rng, features)
    digits = [digit for clip in where.clips for digit in pools.bank.digits[clip]]
    return Utterance(features, digits)
