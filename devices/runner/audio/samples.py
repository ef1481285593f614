"""Checks of samples: the models take 16 kHz mono float32, full scale 1.0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..interfaces import Pcm
from ..problem import RunnerProblem

SAMPLING_RATE = 16_000
SILENT_PEAK = 1e-4
"""-80 dBFS, three steps of a 16-bit converter: a quieter recording holds dither, not speech."""
UNSCALED = ("int64", "uint16", "uint32", "uint64")
"""Integer types that audio hardware and files do not use, so their full scale is unknown."""
LOUDEST = 16.0
"""Floats may exceed full scale, as after mixing or resampling, but not by 24 dB."""


def checked_samples(given: Any, name: str = "the samples") -> Pcm:
    """Return samples as the models need them: float32 (samples,), full scale 1.0, 16 kHz mono.

    `given` is an array (samples,), (samples, 1) or (1, samples) of floats, or of int16, int32, int8
    or uint8, which are divided by their full scale. All audio for transcription, evaluation and
    training passes this check. Raises RunnerProblem for other types, several channels, no samples,
    NaN or infinite samples, and floats that are not scaled to [-1, 1].
    """
    if not isinstance(given, np.ndarray):
        raise RunnerProblem(
            f"{name}: a {type(given).__name__} is not a NumPy array",
            "give a NumPy array of 16 kHz samples (float32 in [-1, 1], or int16), or a path",
        )
    if given.dtype.kind not in "fiu" or given.dtype.name in UNSCALED:
        raise RunnerProblem(
            f"{name}: samples of dtype {given.dtype} have no known scale",
            "give float32 in [-1, 1], or int16",
        )
    if given.ndim == 0 or given.size != max(given.shape):
        raise RunnerProblem(
            f"{name}: an array of shape {given.shape} is not one channel",
            "give one channel, such as `samples.mean(axis=1)` of (samples, channels)",
        )
    if not given.size:
        raise RunnerProblem(f"{name}: there are no samples", "record or copy it again")
    samples = np.asarray(given.reshape(-1), np.float32)
    if given.dtype.kind == "f":
        return check_floats(samples, name)
    if given.dtype.kind == "u":
        samples = samples - np.float32(128)
    return samples * np.float32(2.0 ** (1 - 8 * given.dtype.itemsize))


def check_floats(samples: Pcm, name: str) -> Pcm:
    """Raise RunnerProblem for floats that are not finite or not scaled to [-1, 1]."""
    bad = int(np.count_nonzero(~np.isfinite(samples)))
    if bad:
        raise RunnerProblem(
            f"{name}: {bad} of {samples.size} samples are NaN or infinite",
            "the recording is damaged: write it again with finite samples",
        )
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise RunnerProblem(
            f"{name}: floats of up to {peak:.6g}, where full scale is 1.0",
            "divide them by their full scale, such as 32768 for 16-bit samples",
        )
    return samples


def is_silent(pcm: Pcm) -> bool:
    """Return whether all samples are below SILENT_PEAK."""
    return not pcm.size or float(np.abs(pcm).max()) < SILENT_PEAK


def is_hum(pcm: Pcm) -> bool:
    """Return whether a window holds only silence, an offset or mains hum. These change by less than
    SILENT_PEAK from sample to sample."""
    return len(pcm) < 2 or is_silent(np.diff(pcm))


def shortest(windows: Sequence[int], samples: int) -> int:
    """Return the shortest of the ascending window lengths that holds `samples`, or the longest."""
    return next((window for window in windows if window >= samples), windows[-1])
