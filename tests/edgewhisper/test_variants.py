"""Variants of clips: their length, what they contain, and that they depend on the seed only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import variants as module
from edgewhisper.variants import variants


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    """Clips of 0.9, 1.5, 3.5 and 4.1 s."""
    every = read_manifest(clips)
    return [every[i] for i in (0, 2, 4, 5)]


def test_variants_are_readable_clips_of_at_most_the_longest_length(few, tmp_path, seed):
    made = variants(few, 5, 3.0, seed, tmp_path)
    assert len(made) == 20
    for clip in made:
        pcm = clip.pcm()
        assert 0 < len(pcm) <= 48000
        assert clip.duration_s == len(pcm) / 16000
        assert clip.text == ""
        assert 0.001 < np.abs(pcm).max() < 1
    assert len({clip.audio for clip in made}) == 20


def test_variants_depend_on_the_seed_only_and_are_written_once(few, tmp_path, seed):
    first = variants(few, 2, 3.0, seed, tmp_path / "one")
    again = variants(few, 2, 3.0, seed, tmp_path / "two")
    other = variants(few, 2, 3.0, seed + 1, tmp_path / "three")
    assert [c.audio.read_bytes() for c in first] == [c.audio.read_bytes() for c in again]
    assert all(
        a.audio.read_bytes() != b.audio.read_bytes() for a, b in zip(first, other, strict=True)
    )
    first[0].audio.write_bytes(again[1].audio.read_bytes())
    assert variants(few, 2, 3.0, seed, tmp_path / "one")[0].duration_s == again[1].duration_s


def test_a_variant_without_noise_and_second_clip_is_the_clip_at_another_speed_and_level(
    few, tmp_path, seed, monkeypatch
):
    for share in ("JOINED", "PIECES", "NOISY"):
        monkeypatch.setattr(module, share, 0.0)
    for clip, made in zip(few, variants(few, 1, 30.0, seed, tmp_path), strict=True):
        pcm, result = clip.pcm(), made.pcm()
        speed = len(pcm) / len(result)
        assert 0.87 - 1e-3 <= speed <= 1.14 + 1e-3
        assert np.corrcoef(envelope(pcm), envelope(result))[0, 1] > 0.98


def test_a_clip_is_joined_only_with_clips_of_its_language(few, tmp_path, seed, monkeypatch):
    others = []
    monkeypatch.setattr(module, "variant", lambda clip, of, *rest: others.append(of) or clip.pcm())
    variants([few[0], few[2], few[3], replace(few[1], lang="de")], 1, 30.0, seed, tmp_path)
    assert [[clip.lang for clip in of] for of in others] == [["en"] * 3] * 3 + [["de"]]


def envelope(pcm: np.ndarray) -> np.ndarray:
    """Return the level of 20 equal parts of a clip (20,)."""
    return np.array([np.square(part).mean() ** 0.5 for part in np.array_split(pcm, 20)])
