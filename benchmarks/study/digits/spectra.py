"""Banks of clips as mel power spectra, from which training composes utterances.

A Whisper feature is log10 of mel power, clamped and scaled. Before the logarithm everything is
additive in power: words follow each other, noise is added, a channel multiplies. Composing there is
about a hundred times cheaper than on samples.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from benchmarks.study.digits import DIGITS, SAMPLE_RATE

N_MELS = 80
HOP = 160  # samples per frame: 10 ms
FLOOR = 1e-10  # mel power, as in Whisper's feature extractor
WARPS = (0.826, 0.874, 0.925, 0.979, 1.0, 1.036, 1.096, 1.16, 1.228)
"""Resampling ratios of recorded clips; they change pitch, formants and pace together."""


@cache
def extractor() -> Any:
    """Return the checkpoint's feature extractor, for its mel filters and for comparison."""
    from transformers import WhisperFeatureExtractor

    from benchmarks.study.digits import WINDOW_S

    return WhisperFeatureExtractor(feature_size=N_MELS, chunk_length=WINDOW_S)


def mel_power(samples: np.ndarray) -> np.ndarray:
    """Return a clip's mel power (frames, 80) float32 before the logarithm, padded with silence."""
    import torch

    length = -(-len(samples) // HOP) * HOP + HOP
    padded = np.zeros(length + 400, np.float32)
    padded[200 : 200 + len(samples)] = samples
    spectrum = torch.stft(
        torch.from_numpy(padded), 400, HOP, window=torch.hann_window(400),
        center=False, return_complex=True,
    )  # fmt: skip
    filters = torch.from_numpy(extractor().mel_filters).float()
    return (filters.T @ spectrum.abs() ** 2).T.contiguous().numpy()


def to_features(power: np.ndarray) -> np.ndarray:
    """Return Whisper's features (80, frames) float32 for mel power (frames, 80)."""
    log = np.log10(np.maximum(power, FLOOR))
    return ((np.maximum(log, log.max() - 8.0) + 4.0) / 4.0).astype(np.float32).T


@dataclass(frozen=True)
class Clip:
    """Samples at 16 kHz with their digits, speaker and pool."""

    samples: np.ndarray
    digits: tuple[int, ...]
    speaker: str
    pool: str


@dataclass(frozen=True)
class Bank:
    """Concatenated log10 mel power of many clips: `log_mel` (frames, 80) float16."""

    log_mel: np.ndarray
    start: np.ndarray
    frames: np.ndarray
    digits: list[tuple[int, ...]]
    speaker: list[str]
    pool: list[str]

    def save(self, path: Path) -> None:
        """Write PATH.npy, which is memory-mapped later, and PATH.json."""
        np.save(path.with_suffix(".npy"), self.log_mel)
        lists = {"start": self.start.tolist(), "frames": self.frames.tolist()}
        lists |= {"digits": self.digits, "speaker": self.speaker, "pool": self.pool}
        path.with_suffix(".json").write_text(json.dumps(lists))

    @classmethod
    def load(cls, path: Path) -> Bank:
        """Read what `save` wrote."""
        lists = json.loads(path.with_suffix(".json").read_text())
        return cls(
            np.load(path.with_suffix(".npy"), mmap_mode="r"),
            np.array(lists["start"]),
            np.array(lists["frames"]),
            [tuple(digits) for digits in lists["digits"]],
            lists["speaker"],
            lists["pool"],
        )


def make_bank(clips: list[Clip]) -> Bank:
    """Return a bank of clips, with one more frame at the end for interpolation."""
    spectra = [np.log10(np.maximum(mel_power(c.samples), FLOOR)).astype(np.float16) for c in clips]
    frames = np.array([len(s) for s in spectra])
    start = np.concatenate([[0], np.cumsum(frames)[:-1]])
    log_mel = np.concatenate([*spectra, np.full((1, N_MELS), -10, np.float16)])
    return Bank(
        log_mel, start, frames,
        [c.digits for c in clips], [c.speaker for c in clips], [c.pool for c in clips],
    )  # fmt: skip


# ---------------------------------------------------------------- recordings


@dataclass(frozen=True)
class Row:
    """One recording of a manifest or of the FSDD folder."""

    path: Path
    text: str
    speaker: str
    kind: str


def read_rows(source: Path) -> list[Row]:
    """Return the rows of a JSONL manifest, or of a folder of D_SPEAKER_N.wav files by name."""
    if source.is_file():
        lines = map(json.loads, source.read_text().splitlines())
        return [
            Row(source.parent / r["audio"], r["text"], r["speaker"], r.get("kind", "digit"))
            for r in lines
        ]
    rows = []
    for path in sorted(source.glob("*.wav")):
        match = re.fullmatch(r"(\d)_([a-z]+)_(\d+)", path.stem)
        if match:
            rows.append(Row(path, DIGITS[int(match[1])], f"fsdd_{match[2]}", "digit"))
    if not rows:
        raise FileNotFoundError(
            f"no D_SPEAKER_N.wav recordings in {source}.\n"
            "try:   git clone https://github.com/Jakobovski/free-spoken-digit-dataset, "
            "and give its recordings folder"
        )
    return rows


def read_clip(path: Path) -> np.ndarray:
    """Return samples (n,) float32 at 16 kHz, mono, with peak 1."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    return (mono / max(1e-4, float(np.abs(mono).max()))).astype(np.float32)


def resample(samples: np.ndarray, ratio: float) -> np.ndarray:
    """Speed up by `ratio`, which raises pitch and formants."""
    if ratio == 1.0:
        return samples
    return soxr.resample(samples, SAMPLE_RATE * ratio, SAMPLE_RATE).astype(np.float32)


def says_digits(text: str) -> bool:
    """Return whether a text has a digit or numeral that a digit transcriber would output."""
    return bool(re.search(r"\d|" + "|".join(rf"\b{d}" for d in DIGITS), text.lower()))


def pieces(samples: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Cut into pieces of at most `seconds`; a last piece below 0.3 s is dropped."""
    size = round(seconds * SAMPLE_RATE)
    cut = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [piece for piece in cut if len(piece) > 0.3 * SAMPLE_RATE]
