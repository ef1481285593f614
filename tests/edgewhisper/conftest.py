"""Fixtures of the tests of edgewhisper."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short_whisper(tiny_whisper):
    """A random two-layer Whisper with windows of three lengths."""
    from short_windows import with_windows

    return with_windows(tiny_whisper)
