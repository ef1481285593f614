"""The embedded digits model as an artifact, clips of one window, and a simulated machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simulated_machine import PI, make

from benchmarks.speech.clips import read_manifest
from devices.runner.recognizer import Recognizer
from edgewhisper import whisper

WINDOW = 96_000


@pytest.fixture(scope="module")
def pcms(clips) -> list[np.ndarray]:
    """Eight shipped clips, within one window."""
    return [clip.pcm()[:WINDOW] for clip in read_manifest(clips)[1::5]]


@pytest.fixture(scope="module")
def recognizer(exported) -> Recognizer:
    """The embedded default in fp32."""
    return Recognizer(exported, threads=1)


@pytest.fixture(scope="module")
def plain(exported) -> Recognizer:
    """The same artifact without the guards, which transformers does not have."""
    return Recognizer(exported, threads=1, guards=False)


@pytest.fixture(scope="module")
def torch_model(digits):
    return whisper.load(digits)


@pytest.fixture
def pi(tmp_path) -> Path:
    return make(tmp_path / "pi", PI)
