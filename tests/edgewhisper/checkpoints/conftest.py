"""Small random models with OpenAI's vocabularies, which no test changes."""

from __future__ import annotations

import pytest
from small_checkpoints import random_of

from edgewhisper.checkpoints.openai import ENGLISH, MULTILINGUAL
from edgewhisper.whisper import WhisperForConditionalGeneration


@pytest.fixture(scope="session")
def english() -> WhisperForConditionalGeneration:
    return random_of(ENGLISH)


@pytest.fixture(scope="session")
def multilingual() -> WhisperForConditionalGeneration:
    return random_of(MULTILINGUAL)
