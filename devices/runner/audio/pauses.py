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
PAUSE_RISE = 4.0
"""Frames within 6 dB of the quietest one count as pause; white noise varies by 1 dB."""


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

    It is the middle of the longest pause of at least 0.2 s in the second half, or else of the
    longest pause after the first eighth, or else the quietest frame of the second half.
    """
    count = len(window) // FRAME
    if count < 8:
        return len(window)
    audible = without_hum(window[: count * FRAME])
    power = np.square(audible).reshape(count, FRAME).mean(axis=1)  # (frames,)
    quiet = power <= max(PAUSE_RISE * float(power.min()), SILENT_PEAK**2)
    for begin, shortest in ((count // 2, PAUSE_FRAMES), (count // 8, 2)):
        length, middle = longest_run(quiet[begin:])
        if length >= shortest:
            return round((begin + middle) * FRAME)
    return (count // 2 + int(power[count // 2 :].argmin())) * FRAME + FRAME // 2


def without_hum(pcm: Pcm) -> Pcm:
    """Return the samples without frequencies below LOWEST_HZ, such as an offset or mains hum."""
    spectrum = np.fft.rfft(pcm)
    spectrum[: math.ceil(LOWEST_HZ * len(pcm) / SAMPLING_RATE)] = 0
    return np.fft.irfft(spectrum, len(pcm)).astype(np.float32)


def longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """Return length and middle of the longest run of true flags, the last one if equal."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    best, middle = 0, 0.0
    for begin, end in edges.reshape(-1, 2):
        if end - begin >= best:
            best, middle = int(end - begin), (begin + end) / 2
    return best, middle
