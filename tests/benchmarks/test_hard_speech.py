"""Wrong words on noisy and on very quiet clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import hard_speech
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.noises import NOISES


@pytest.fixture
def spoken(clips: Path) -> list[Clip]:
    return [clip for clip in read_manifest(clips) if clip.text][:3]


def of_kind(clips: list[Clip], kind: str) -> list[np.ndarray]:
    return [r.pcm for r in hard_speech.make(clips, seed=1) if r.kind == kind]


def test_recordings_of_the_same_seed_are_equal(spoken):
    first, second = (list(hard_speech.make(spoken, seed=3)) for _ in range(2))
    assert all(np.array_equal(one.pcm, two.pcm) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("noise", ["white", "pink", "babble"])
@pytest.mark.parametrize("snr", hard_speech.SNR_DB)
def test_noise_has_the_level_of_the_ratio(noise, snr, spoken):
    clean, noisy = of_kind(spoken, "clean"), of_kind(spoken, f"{noise} {snr} dB")
    for one, other in zip(clean, noisy, strict=True):
        ratio = np.mean(one**2) / np.mean((other - one) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(snr, abs=0.01)


def test_quiet_clips_are_whole_steps_up_to_the_peak(spoken):
    for pcm in of_kind(spoken, "peak 4"):
        steps = pcm * hard_speech.STEPS
        assert np.array_equal(steps, np.round(steps))
        assert np.abs(steps).max() == 4


def test_the_command_prints_the_wrong_words_of_each_sound(exported, clips, monkeypatch, capsys):
    monkeypatch.setattr(hard_speech, "EMPTY_S", 1)
    assert hard_speech.main([str(exported), str(clips), "--clips", "2"]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header == "| sound | words | ours |"
    assert rows[0].startswith("| clean | ")
    assert [row.split(" | ")[:2] for row in rows[-6:]] == [[f"| only {n}", "0"] for n in NOISES]
