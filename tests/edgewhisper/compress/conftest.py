"""Fixtures of the tests of compression methods."""

from __future__ import annotations

from pathlib import Path

import pytest
from low_rank_layers import narrowed
from torch import nn

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper.compress.context import Context


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    """Three clips."""
    return read_manifest(clips)[:3]


@pytest.fixture
def context(few, processor, tmp_path: Path) -> Context:
    """A context that trains and evaluates on the three clips."""
    return Context(processor=processor, train=few, dev=few, run_dir=tmp_path / "run")


@pytest.fixture
def narrow_whisper(make_whisper) -> nn.Module:
    """A random Whisper whose weights have falling singular values."""
    return narrowed(make_whisper())


@pytest.fixture
def deep(make_whisper, rng):
    """A random Whisper with two or three pairs of decoder layers."""
    return make_whisper(decoder_layers=2 * int(rng.integers(2, 4)), encoder_layers=1)
