"""Sounds without speech, for measuring what a recogniser invents.

Every function returns `samples` samples at 16 kHz with a root mean square of 1.
"""

from __future__ import annotations

import math

import numpy as np

from devices.runner.audio import SAMPLING_RATE

CHORDS = ((220, 277.2, 329.6), (246.9, 293.7, 370), (196, 246.9, 293.7), (164.8, 207.7, 246.9))
"""Frequencies in Hz: A major, B minor, G major, E major."""
MELODY = (440, 493.9, 554.4, 659.3, 587.3, 440, 392, 329.6)
NOTE_S, CHORD_S = 0.25, 1.0
HARMONICS = 8


def white(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise with the same power at all frequencies."""
    return scaled(rng.standard_normal(samples))


def pink(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise whose power falls by 3 dB per octave above 20 Hz."""
    return coloured(samples, rng, 0.5)


def room(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the noise of a quiet room: its power falls by 6 dB per octave, its level varies by
    2 dB over seconds, and a fan adds 100 Hz."""
    seconds = np.arange(samples) / SAMPLING_RATE
    level = 1 + 0.25 * np.sin(2 * np.pi * 0.13 * seconds + rng.uniform(0, 6))
    fan = 0.3 * np.sin(2 * np.pi * 100 * seconds)
    return scaled(level * coloured(samples, rng, 1.0) + fan + 0.05 * white(samples, rng))


def hum(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return mains hum: 50 Hz and its odd harmonics up to 550 Hz."""
    seconds, phase = np.arange(samples) / SAMPLING_RATE, rng.uniform(0, 6)
    tones = [np.sin(2 * np.pi * 50 * k * seconds + phase) / k**2 for k in range(1, 12, 2)]
    return scaled(np.sum(tones, axis=0))


def tones(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return sine tones of 0.2 to 1.5 s with pauses between them, like signal tones."""
    sound, place = np.zeros(samples), 0
    while place < samples:
        length = int(rng.uniform(0.2, 1.5) * SAMPLING_RATE)
        seconds = np.arange(min(length, samples - place)) / SAMPLING_RATE
        sound[place : place + length] = np.sin(2 * np.pi * rng.uniform(300, 3000) * seconds)
        place += length + int(rng.uniform(0.1, 1.0) * SAMPLING_RATE)
    return scaled(sound)


def music(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return chords, a melody of plucked notes and a drum on every beat."""
    sound = np.zeros(samples)
    for start in range(0, samples, int(CHORD_S * SAMPLING_RATE)):
        for frequency in CHORDS[rng.integers(len(CHORDS))]:
            add(sound, start, 0.3 * note(frequency, CHORD_S, 1.0))
    for start in range(0, samples, int(NOTE_S * SAMPLING_RATE)):
        add(sound, start, note(MELODY[rng.integers(len(MELODY))], NOTE_S, 8.0))
    for start in range(0, samples, int(2 * NOTE_S * SAMPLING_RATE)):
        add(sound, start, drum(rng))
    return scaled(sound)


NOISES = {
    "white": white,
    "pink": pink,
    "room": room,
    "hum": hum,
    "tones": tones,
    "music": music,
}


def level_at(snr_db: float, pcm: np.ndarray) -> float:
    """Return the root mean square of noise at a signal-to-noise ratio, for a signal (n,)."""
    return math.sqrt(float(np.mean(pcm**2))) * 10 ** (-snr_db / 20)


# ------------------------------------------------------------------------------------------ parts


def scaled(sound: np.ndarray) -> np.ndarray:
    """Return the sound with a root mean square of 1, as float32."""
    return (sound / np.sqrt(np.mean(np.square(sound)))).astype(np.float32)


def coloured(samples: int, rng: np.random.Generator, exponent: float) -> np.ndarray:
    """Return noise whose amplitude falls with the frequency to the power of `exponent`."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hz = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    return scaled(np.fft.irfft(spectrum / np.maximum(hz, 20) ** exponent, samples))


def note(hz: float, length_s: float, decay: float) -> np.ndarray:
    """Return a note with harmonics that decays by `decay` nepers per second."""
    seconds = np.arange(int(length_s * SAMPLING_RATE)) / SAMPLING_RATE
    waves = [np.sin(2 * np.pi * hz * k * seconds) / k**1.5 for k in range(1, HARMONICS + 1)]
    return np.sum(waves, axis=0) * np.exp(-decay * seconds) * np.minimum(1, seconds / 0.005)


def drum(rng: np.random.Generator) -> np.ndarray:
    """Return a burst of noise of 0.1 s."""
    seconds = np.arange(SAMPLING_RATE // 10) / SAMPLING_RATE
    return 0.3 * rng.standard_normal(len(seconds)) * np.exp(-40 * seconds)


def add(sound: np.ndarray, start: int, part: np.ndarray) -> None:
    """Add a part to the sound in place, up to the sound's end."""
    sound[start : start + len(part)] += part[: len(sound) - start]
