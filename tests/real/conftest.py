"""Fixtures of the tests on OpenAI's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_models import ROOT, model


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    return model("tiny.en")


@pytest.fixture(scope="session")
def base() -> Path:
    return model("base")


@pytest.fixture(scope="session")
def common_voice() -> Path:
    """The folder of the product's Common Voice manifests."""
    return ROOT / "edgewhisper" / "assets" / "common-voice"
