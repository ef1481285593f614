"""Splits long audio into windows, in pauses where there are any."""

import math

import numpy as np
import numpy.typing as npt

from ..interfaces import Pcm
from .samples import SAMPLING_RATE, SILENT_PEAK

LOWEST_HZ = 80
"""Voices are above this frequency."""
FRAME = 160
"""Samples per frame in the search for pauses: 10 ms."""
PAUSE_FRAMES = 20
"""0.2 s: longer than the closure of a stop consonant, which is also quiet."""
SMOOTH_FRAMES = 5
FLOOR_PERCENT = 3
"""This share of the frames is below the noise floor. In a window of 30 s it is 0.9 s, so that short
stretches of digital silence do not count."""
PAUSE_RISE = 4.0
"""0.2 s whose mean level is within 6 dB of the noise floor are a pause."""
SOUND_RISE = 10.0
SAME_RISE = 1.5
"""Places whose levels differ by less than 1.8 dB are equally quiet."""
QUIET = 0.01
"""Quiet sound has less than this share of the power of the loud frames: -20 dB."""


def split(pcm: Pcm, window_samples: int) -> list[slice]:
    """Split audio into pieces of at most `window_samples`, in pauses if there are any. The pieces
    are contiguous and cover every sample once, so no word is lost or doubled."""
    pieces, start = [], 0
    while len(pcm) - start > window_samples:
        stop = start + find_cut(pcm[start : start + window_samples])
        pieces.append(slice(start, stop))
        start = stop
    return [*pieces, slice(start, len(pcm))]


def find_cut(window: Pcm) -> int:
    """Return the sample of a full window at which to end the piece.

    It is the middle of the longest of the quietest pauses in the last third, or if that has no
    pause of 0.2 s, in the second half, or after the first eighth. If there is none at all, it is
    the quietest 0.2 s of the last third.
    """
    count = len(window) // FRAME
    if count < 8:
        return len(window)
    levels = frame_levels(window[: count * FRAME])
    late = 2 * count // 3
    for begin in (late, count // 2, count // 8, late):
        width = min(PAUSE_FRAMES, count - begin)
        means = moving_average(levels[begin:], width)
        if means.min() <= math.log(PAUSE_RISE):
            break
    _, middle = longest_run(means <= means.min() + math.log(SAME_RISE))
    return round((begin + middle + (width - 1) / 2) * FRAME)


def frame_levels(pcm: Pcm) -> npt.NDArray[np.float64]:
    """Return the logarithm of each frame's power over the noise floor, (frames,). Frames below the
    floor, and silent ones, have 0. The filter spreads loud sound into silent frames."""
    power = np.square(without_hum(pcm)).reshape(-1, FRAME).mean(axis=1, dtype=np.float64)
    smooth = moving_average(power, SMOOTH_FRAMES)
    floor = max(float(np.percentile(smooth, FLOOR_PERCENT)), SILENT_PEAK**2)
    silent = np.abs(pcm).reshape(-1, FRAME).max(axis=1) < SILENT_PEAK
    return np.where(silent, 0.0, np.log(np.maximum(power, floor) / floor))


def sound_seconds(pcm: Pcm) -> float:
    """Return how long the sound is at least 10 dB above the noise floor, in seconds."""
    count = len(pcm) // FRAME
    if count < SMOOTH_FRAMES:
        return 0.0
    loud = frame_levels(pcm[: count * FRAME]) > math.log(SOUND_RISE)
    return int(loud.sum()) * FRAME / SAMPLING_RATE


def moving_average(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the mean of every `width` neighbours, (len(values) - width + 1,)."""
    return np.convolve(values, np.full(width, 1 / width), "valid")


def without_hum(pcm: Pcm) -> Pcm:
    """Return the samples without frequencies below LOWEST_HZ, such as an offset or mains hum."""
    spectrum = np.fft.rfft(pcm)
    spectrum[: math.ceil(LOWEST_HZ * len(pcm) / SAMPLING_RATE)] = 0
    return np.fft.irfft(spectrum, len(pcm)).astype(np.float32)


def longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """Return length and middle of the longest run of true flags, the last one if equal."""
    best, middle = 0, 0.0
    for begin, end in runs(flags):
        if end - begin >= best:
            best, middle = int(end - begin), (begin + end) / 2
    return best, middle


def runs(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Return begin and end of every run of true flags, (runs, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2)


def quiet_power(power: npt.NDArray[np.floating]) -> float:
    """Return the power below which sound is quiet, compared with the loud ones of some frames."""
    return QUIET * float(np.quantile(power, 0.95))
