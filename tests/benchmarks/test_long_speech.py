"""Wrong words on long joined recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import long_speech
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.noises import NOISES


@pytest.fixture
def spoken(clips: Path, monkeypatch: pytest.MonkeyPatch) -> list[Clip]:
    """The included clips, and recordings of 10 s instead of minutes."""
    monkeypatch.setattr(long_speech, "LONG_S", 10.0)
    monkeypatch.setattr(long_speech, "NOISY_S", 10.0)
    return [clip for clip in read_manifest(clips) if clip.text]


def longest_zeros(pcm: np.ndarray) -> int:
    edges = np.flatnonzero(np.concatenate([[True], pcm != 0, [True]]))
    return int(np.diff(edges).max()) - 1


def test_recordings_of_the_same_seed_are_equal(spoken):
    first, second = (list(long_speech.make(spoken, 1, 2, seed=3)) for _ in range(2))
    assert [r.kind for r in first] == ["joined", "zeros", "noise", "noise"]
    for one, other in zip(first, second, strict=True):
        assert one.text == other.text
        assert np.array_equal(one.pcm, other.pcm)
        assert len(one.pcm) > 160_000


def test_zeros_are_the_only_difference_to_the_joined_recording(spoken):
    joined, zeros, *_ = long_speech.make(spoken, 1, 0, seed=0)
    assert joined.text == zeros.text
    assert longest_zeros(zeros.pcm) >= 1440
    different = joined.pcm != zeros.pcm
    assert not zeros.pcm[different].any()


def test_the_command_prints_the_wrong_words_of_each_mode(exported, clips, spoken, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = [str(exported), str(clips), "--long", "1", "--noisy", "1", "--out", str(out)]
    assert long_speech.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| engine | mode | joined | zeros | noise | encoder runs | seconds |"
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["timestamps off", "timestamps on"]
    assert len(out.read_text("utf-8").splitlines()) == 6


@pytest.mark.parametrize("kind", NOISES)
def test_noises_are_as_loud_and_as_long_as_they_should_be(kind, rng):
    sound = NOISES[kind](20_001, rng)
    assert sound.shape == (20_001,)
    assert np.sqrt(np.mean(np.square(sound))) == pytest.approx(1, rel=1e-3)
