"""The embedded default checkpoint: a small Whisper that writes down spoken English digits.

synthesise.py   espeak-ng voices -> word and phrase clips (cached outside the repository)
augment.py      composes utterances from mel power spectra, without touching waveforms
train.py        trains from zero, by wall time, and resumes
evaluate.py     the fixed evaluation, as JSON
clips.py        the clips shipped in edgewhisper/assets/speech
"""

from pathlib import Path

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SAMPLE_RATE = 16_000
WINDOW_S = 6
"""The checkpoint's window in seconds (Whisper's own is 30)."""

ASSETS = Path(__file__).resolve().parents[3] / "edgewhisper" / "assets"
CHECKPOINT = ASSETS / "whisper-digits"
SPEECH = ASSETS / "speech"
