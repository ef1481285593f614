"""Where OpenAI's weights are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def model(name: str) -> Path:
    """The checkpoint of a size, such as tiny.en; skips the test where it is not there."""
    place = Path(os.environ.get("EDGEWHISPER_MODELS", ROOT / "build/models")) / name
    if not (place / "config.json").is_file():
        pytest.skip(f"{place} is not there; make models fetches it")
    return place
