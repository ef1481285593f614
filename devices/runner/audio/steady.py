"""Detects noise that stays the same, such as that of a fan, of mains or of a microphone."""

import numpy as np

from ..interfaces import Pcm
from .samples import SAMPLING_RATE

FRAME = 320
"""20 ms."""
BANDS_HZ = (80, 300, 600, 1200, 2400, 4800, 8000)
SMOOTH_FRAMES = 5
"""0.1 s: shorter than a syllable."""
STEADY_RISE = 3.0
"""4.8 dB. In white and pink noise, the loudest 0.1 s of a band is 2 to 4 dB above the median; in
152 sentences with 5 dB more power than the noise, at least 7.5 dB in the loudest band."""
LEAST_S = 1.0


def is_steady(pcm: Pcm) -> bool:
    """Return whether no 0.1 s is 4.8 dB louder than the median in any of six bands of frequencies.

    Such a window has no words: the syllables of speech change the level of a band by 20 dB, and
    rise above noise in the band where the noise is weakest. Windows below 1 s are not judged.
    """
    count = len(pcm) // FRAME
    if count * FRAME < LEAST_S * SAMPLING_RATE:
        return False
    spectra = np.fft.rfft(pcm[: count * FRAME].reshape(count, FRAME) * np.hanning(FRAME))
    edges = [round(hz * FRAME / SAMPLING_RATE) for hz in BANDS_HZ]
    power = np.add.reduceat(np.square(np.abs(spectra)), edges[:-1], axis=1)  # (frames, bands)
    sums = np.cumsum(power, axis=0)
    smooth = sums[SMOOTH_FRAMES:] - sums[:-SMOOTH_FRAMES]
    return bool(np.all(smooth.max(axis=0) <= STEADY_RISE * np.median(smooth, axis=0)))
