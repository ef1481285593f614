"""Fixtures of the tests on OpenAI's weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent.parent
MODELS = Path(os.environ.get("EDGEWHISPER_MODELS") or PROJECT / "build" / "models")
SPEECH = PROJECT / "edgewhisper" / "assets" / "common-voice"


def model(name: str) -> Path:
    place = MODELS / name
    if not place.is_dir():
        pytest.skip(f"there is no {place}; make it with `make models`")
    return place


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    return model("tiny.en")


@pytest.fixture(scope="session")
def base() -> Path:
    return model("base")


@pytest.fixture(scope="session")
def common_voice() -> Path:
    """The folder of the product's Common Voice manifests."""
    return SPEECH
