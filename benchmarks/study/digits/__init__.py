"""Training of the embedded default checkpoint, a small Whisper that transcribes English digits.

synthesise.py   word and phrase clips from espeak-ng voices (stored outside the repository)
flite.py        the same from flite voices
spectra.py      clips as mel power spectra
banks.py        the training and dev banks of spectra
augment.py      composes utterances from the spectra of a bank
batches.py      the schedule and composition of batches
model.py        tokenizer, model and initial weights
trainer.py      training state, one step, helper processes
train.py        trains from scratch for a wall time, and resumes
evaluate.py     the fixed evaluation, as JSON
manifests.py    recordings as speech manifests
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
