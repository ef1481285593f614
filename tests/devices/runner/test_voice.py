"""The voice activity detector, an optional package."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.speech.clips import read_manifest
from benchmarks.speech.noises import NOISES
from devices.runner.engines import voice
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer

installed = pytest.mark.skipif(find_spec("silero_vad") is None, reason="needs silero-vad")


@pytest.fixture(scope="module")
def detector() -> voice.Voice:
    return voice.Voice()


@installed
@pytest.mark.parametrize("kind", NOISES)
def test_noise_and_music_have_no_speech(kind, detector, rng):
    sound = 0.1 * NOISES[kind](480_000, rng)
    assert detector.probabilities(sound).shape == (938,)
    assert not detector.only_speech(sound).any()


@installed
def test_sentences_are_kept_and_the_noise_between_them_is_not(detector, common_voice, rng):
    first, second = (clip.pcm() for clip in read_manifest(common_voice / "test.jsonl")[:2])
    noise = 0.01 * NOISES["pink"](80_000, rng)
    kept = detector.only_speech(np.concatenate([first, noise, second]))
    assert len(kept) == len(first) + len(noise) + len(second)
    silent = kept[len(first) :][:80_000] == 0
    assert silent.mean() > 0.6
    for clip, part in ((first, kept[: len(first)]), (second, kept[-len(second) :])):
        assert np.square(part).sum() > 0.99 * np.square(clip).sum()


@installed
def test_noise_is_not_decoded_with_the_detector(exported, rng):
    recognizer = Recognizer(exported, threads=1)
    transcript = recognizer.transcribe(0.1 * NOISES["music"](160_000, rng), vad=True)
    assert (transcript.text, transcript.graph_s) == ("", [])


def test_without_the_package_the_error_message_says_how_to_install_it(exported, monkeypatch):
    monkeypatch.setattr(voice, "PACKAGE", "no_such_package")
    with pytest.raises(RunnerProblem, match="vad: the package silero-vad") as caught:
        Recognizer(exported, threads=1).transcribe(np.ones(16_000, np.float32), vad=True)
    assert "pip install --no-deps silero-vad" in caught.value.hint
