"""Models with windows of three lengths, and clips that need all of them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import whisper

WINDOWS = [100, 200, 300]
SAMPLES = 320
"""Samples of one encoder position."""


def with_windows(model, windows=WINDOWS):
    whisper.set_windows(model.config, windows)
    return model


def clips_of_all_windows(clips: Path) -> list[Clip]:
    """Return clips of 0.9, 1.5, 3.5 and 4.1 s, which need all three windows."""
    every = read_manifest(clips)
    return [every[i] for i in (0, 2, 4, 5)]
