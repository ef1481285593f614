"""Create the clips shipped in edgewhisper/assets/speech for the demo and the tests.

    python -m benchmarks.study.digits.clips [--out DIR]

    train   240 sequences of one to six digits, for fine-tuning and calibration
    dev      60 sequences by other voices
    test     40 sequences by yet other voices
    other    silence, noises and foreign words (text ""), and one clip of about 20 s

All clips have espeak-ng voices with varied level, pauses and noise. Most are limited to the 4 kHz
telephone band of the recordings that the checkpoint was trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.study.digits import DIGITS, SAMPLE_RATE, SPEECH, WINDOW_S
from benchmarks.study.digits.synthesise import (
    DEV_VARIANTS,
    HELD_OUT_WORDS,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    Voice,
    random_voice,
    speak,
)

LONGEST_S = WINDOW_S - 0.2
SPLITS = {"train": (240, TRAIN_VARIANTS), "dev": (60, DEV_VARIANTS), "test": (40, TEST_VARIANTS)}


def low_pass(samples: np.ndarray, cutoff_hz: float) -> np.ndarray:
    """Remove frequencies above `cutoff_hz`, with a soft edge."""
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum / (1 + (hertz / cutoff_hz) ** 24), len(samples))


def coloured_noise(rng: np.random.Generator, length: int, tilt: float = 0.0) -> np.ndarray:
    """Return Gaussian noise (length,) of unit power with a spectrum of frequency**-tilt."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hertz = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 40.0)
    noise = np.fft.irfft(spectrum * hertz**-tilt, length)
    return noise / noise.std()


def silence(seconds: float) -> np.ndarray:
    """Return digital silence."""
    return np.zeros(round(seconds * SAMPLE_RATE))


def say_sequence(
    rng: np.random.Generator, voice: Voice, digits: list[str], breath: float
) -> np.ndarray:
    """Return digits spoken by one voice, as a phrase with probability `breath`, else word by
    word."""
    if rng.random() < breath:
        spoken = [speak(" ".join(digits), voice)]
    else:
        spoken = [speak(digit, voice) for digit in digits]
    parts = [silence(rng.uniform(0.1, 0.4))]
    for clip in spoken:
        parts += [clip * 0.5, silence(rng.uniform(0.06, 0.3))]
    return np.concatenate(parts)


def vary(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Vary band, noise and level; return samples (n,) float64 with a peak below 1."""
    if rng.random() < 0.8:
        samples = low_pass(samples, 3800)
    rms = np.sqrt((samples**2).mean())
    snr_db = rng.uniform(15, 45)
    noise = coloured_noise(rng, len(samples), rng.uniform(0, 0.8))
    samples = samples + noise * rms * 10 ** (-snr_db / 20)
    return samples / np.abs(samples).max() * 10 ** (rng.uniform(-18, -1) / 20)


def sequence(
    rng: np.random.Generator, variants: list[str], count: int
) -> tuple[np.ndarray, str, str]:
    """Return (samples, text, voice name) of up to `count` digits that fit the window."""
    voice = random_voice(rng, variants)
    digits = [str(digit) for digit in rng.choice(DIGITS, count)]
    samples = say_sequence(rng, voice, digits, breath=0.4)
    while len(samples) > LONGEST_S * SAMPLE_RATE:
        digits = digits[:-1]
        samples = say_sequence(rng, voice, digits, breath=0.4)
    return vary(rng, samples), " ".join(digits), voice.name


def write_clip(folder: Path, name: str, samples: np.ndarray, text: str, speaker: str) -> dict:
    """Encode a clip as Ogg Opus; return its line of the manifest."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(
        path, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.85
    )
    seconds = round(soundfile.info(path).duration, 3)
    return {"audio": name, "text": text, "lang": "en", "speaker": speaker, "duration": seconds}


def write_manifest(path: Path, rows: list[dict]) -> None:
    """Write a manifest, one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_split(out: Path, split: str, seed: int) -> None:
    """Write the clips and manifest of a split, with one to six digits in turn."""
    count, variants = SPLITS[split]
    rng = np.random.default_rng([seed, *split.encode()])
    rows = []
    for index in range(count):
        samples, text, voice = sequence(rng, variants, 1 + index % 6)
        name = f"{split}/{index:03d}.ogg"
        rows.append(write_clip(out, name, samples, text, f"espeak:{voice}"))
    write_manifest(out / f"{split}.jsonl", rows)


def long_clip(rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """Return (samples, text, voice name) of about 20 s of digits by one voice."""
    voice, digits, parts, length = Voice("en-us", "m3", 50, 160), [], [], 0
    while length < 19.2 * SAMPLE_RATE:
        digits.append(str(rng.choice(DIGITS)))
        parts.append(say_sequence(rng, voice, digits[-1:], breath=0.0))
        length += len(parts[-1])
    return vary(rng, np.concatenate(parts)), " ".join(digits), voice.name


def other_clips(rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray, str, str]]:
    """Yield (name, samples, text, speaker) of the clips that are not short digit sequences."""
    length = 4 * SAMPLE_RATE
    yield "silence", silence(4), "", ""
    yield "noise-faint", coloured_noise(rng, length) * 0.001, "", ""
    yield "noise-white", coloured_noise(rng, length) * 0.05, "", ""
    yield "noise-pink", coloured_noise(rng, length, 0.5) * 0.05, "", ""
    yield "noise-brown", coloured_noise(rng, length, 1.0) * 0.1, "", ""
    for language, words in HELD_OUT_WORDS.items():
        voice = Voice(language, "m3" if language in ("fi", "cs") else "f2", 50, 160)
        spoken = speak(", ".join(words.split()[:3]), voice)[: round(LONGEST_S * SAMPLE_RATE)]
        yield f"words-{language}", vary(rng, spoken), "", f"espeak:{voice.name}"
    samples, text, name = long_clip(rng)
    yield "long", samples, text, f"espeak:{name}"


def write_other(out: Path, seed: int) -> None:
    """Write the clips that are not short digit sequences."""
    rng = np.random.default_rng([seed, 99])
    rows = [
        write_clip(out, f"other/{name}.ogg", samples, text, speaker)
        for name, samples, text, speaker in other_clips(rng)
    ]
    for row in rows:
        language = Path(row["audio"]).stem.removeprefix("words-")
        row["lang"] = language if language in HELD_OUT_WORDS else "en" if row["text"] else "zxx"
    write_manifest(out / "other.jsonl", rows)


def main() -> None:
    """Write all shipped clips."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SPEECH)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for split in SPLITS:
        write_split(options.out, split, options.seed)
    write_other(options.out, options.seed)


if __name__ == "__main__":
    main()
