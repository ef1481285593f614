"""Real models lose no speech in long recordings, and invent no words for noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.speech.clips import read_manifest
from benchmarks.speech.noises import NOISES
from benchmarks.wer import word_errors
from devices.runner.recognizer import Recognizer

pytestmark = pytest.mark.real

WINDOW_S = 30


@pytest.fixture(scope="module", params=["tiny.en", "base"])
def recognizer(request: pytest.FixtureRequest, artifact: Callable) -> Recognizer:
    return Recognizer(artifact(request.param, "int8"))


@pytest.mark.parametrize("loudness", [0.1, 0.01])
@pytest.mark.parametrize("kind", NOISES)
def test_sounds_without_speech_have_no_words(kind, loudness, recognizer, rng):
    sound = loudness * NOISES[kind](60 * 16_000, rng)
    text = recognizer.transcribe(sound.astype(np.float32)).text
    assert not any(character.isalnum() for character in text), text


def test_tones_have_no_segments(recognizer):
    """With a fixed language, base invents sentences for these tones, and they are removed."""
    sound = 0.05 * NOISES["tones"](60 * 16_000, np.random.default_rng(0))
    transcript = recognizer.transcribe(sound.astype(np.float32), timestamps=True, language="en")
    assert not transcript.segments, transcript.text


@pytest.mark.parametrize("timestamps", [False, True])
def test_joined_sentences_lose_no_words_at_seams(timestamps, recognizer, common_voice, rng):
    """Sentences with pauses of 0.5 s, and 90 ms of digital silence in every fifth one."""
    clips = read_manifest(common_voice / "test.jsonl")
    parts = []
    for number, clip in enumerate(clips):
        pcm = clip.pcm().copy()
        if number % 5 == 0:
            pcm[len(pcm) // 2 :][:1440] = 0
        parts += [pcm, (1e-3 * rng.standard_normal(8000)).astype(np.float32)]
    recording = np.concatenate(parts)
    transcript = recognizer.transcribe(recording, timestamps=timestamps, language="en")
    reference = " ".join(clip.text for clip in clips)
    ((wrong, words),) = word_errors([reference], [transcript.text], "whisper-english")
    assert wrong < 0.16 * words
    assert len(transcript.graph_s) < len(recording) / 16_000 / WINDOW_S / 0.7 + 2
