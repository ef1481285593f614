"""Whisper's own normalizers (Radford et al. 2022, arXiv:2212.04356, appendix C), by transformers.

whisper-basic makes text lowercase, removes bracketed text, and turns every mark, symbol and
punctuation character into a space. It does not work for scripts whose vowels are combining marks
(Devanagari, Thai and others): words fall apart into consonants and wrong vowels are not counted
(Manohar et al. 2024, arXiv:2409.02449).

whisper-english also writes numbers as digits, contractions in full, and British words in American
spelling. The spellings in whisper_english.json are english.json of the package openai-whisper
20250625 (MIT, whisper_english.LICENSE).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

SPELLINGS = Path(__file__).with_name("whisper_english.json")


def whisper_basic(text: str) -> str:
    """Normalise a sentence; the result has single spaces and no surrounding spaces."""
    return " ".join(_basic()(text).split())


def whisper_english(text: str) -> str:
    """Normalise an English sentence; the result has single spaces and no surrounding spaces.

    Unlike the other normalizers it is not idempotent.
    """
    return " ".join(_english()(text).split())


@lru_cache(maxsize=1)
def _basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


@lru_cache(maxsize=1)
def _english() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(spellings())


def spellings() -> dict[str, str]:
    """Return the map of British to American spellings."""
    table: dict[str, str] = json.loads(SPELLINGS.read_text(encoding="utf-8"))
    return table
