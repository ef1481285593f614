"""Synthesise speech with flite's voices, which are built from recordings of people.

    python -m benchmarks.study.digits.flite --out CACHE/flite.npz

espeak-ng has many rule-based voices; flite has four voices that sound more natural. The file has
the format of synthesise.py, with these kinds of clip:

    natural   one digit                                    "seven"
    phrase    two to five digits as one phrase             "three one four"
    other     words and phrases that are not digits        ""

The dev file next to it uses festival's voice ked, which is not in the training data. flite, its
voices and ked are free for any use (Carnegie Mellon's licence).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from benchmarks.study.digits import DIGITS, SAMPLE_RATE
from benchmarks.study.digits.synthesise import (
    OTHER_PHRASES,
    OTHER_WORDS,
    Line,
    Voice,
    peak_one,
    save_cache,
    trim,
)

TRAIN_VOICES = ("kal16", "awb", "rms", "slt")
DEV_VOICES = ("ked",)
NORMAL_WPM = 170
TONES = ("{}", "{}?", "{}!", "{},")
"""Punctuation that changes the intonation of a word."""


class ProgramMissing(RuntimeError):
    """Raised when flite or festival's text2wave is not on the PATH."""


def command(text: str, voice: Voice, wav: Path, source: Path) -> list[str]:
    """Return the command that speaks `text` into `wav`; text2wave reads it from `source`."""
    stretch = NORMAL_WPM / voice.wpm
    if voice.variant in DEV_VOICES:
        source.write_text(text)
        setting = f"(Parameter.set 'Duration_Stretch {stretch:.3f})"
        settings = ["-eval", f"(voice_{voice.variant}_diphone)", "-eval", setting]
        return ["text2wave", *settings, "-o", str(wav), str(source)]
    settings = ["--setf", f"duration_stretch={stretch:.3f}"]
    settings += ["--setf", f"int_f0_target_mean={70 + 2 * voice.pitch}"]
    return ["flite", "-voice", voice.variant, *settings, "-t", text, "-o", str(wav)]


def speak(text: str, voice: Voice) -> np.ndarray:
    """Return `text` spoken by `voice`: samples (n,) float32 at 16 kHz with peak 1."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        call = command(text, voice, wav, Path(folder) / "text")
        if shutil.which(call[0]) is None:
            raise ProgramMissing(
                f"{call[0]} is not on the PATH.\ntry:   apt install flite festival festvox-kdlpc16k"
            )
        subprocess.run(call, capture_output=True, check=True)
        samples, rate = soundfile.read(wav, dtype="float32")
    return peak_one(trim(soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)))


def random_voice(rng: np.random.Generator, name: str) -> Voice:
    """Return a voice with random pitch (used by kal16 only) and pace."""
    return Voice("en-us", name, int(rng.integers(5, 50)), int(rng.integers(115, 230)))


def lines(rng: np.random.Generator, voices: tuple[str, ...], rounds: int) -> Iterator[Line]:
    """Yield `rounds` rounds per voice (ten digits and ten phrases), then the other words."""
    others = OTHER_WORDS["en-us"].split() + OTHER_PHRASES["en-us"].split("|")
    for name in voices:
        for index in range(rounds):
            for digit in DIGITS:
                tone = TONES[index % len(TONES)]
                yield Line("natural", tone.format(digit), digit, random_voice(rng, name))
            for _ in range(10):
                text = " ".join(rng.choice(DIGITS, rng.integers(2, 6)))
                spoken = text.replace(" ", str(rng.choice([" ", ", "])))
                yield Line("phrase", spoken, text, random_voice(rng, name))
        for other in others:
            yield Line("other", other, "", random_voice(rng, name))


def main() -> None:
    """Write the training file and the dev file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--rounds", type=int, default=20, help="20 give about 2000 clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dev = options.out.with_name(f"{options.out.stem}-dev{options.out.suffix}")
    rng = np.random.default_rng([options.seed, 5])
    save_cache(dev, list(lines(rng, DEV_VOICES, max(1, options.rounds // 5))), speak)
    save_cache(options.out, list(lines(rng, TRAIN_VOICES, options.rounds)), speak)


if __name__ == "__main__":
    main()
