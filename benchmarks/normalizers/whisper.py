"""Whisper's own normalizers (Radford et al. 2022, arXiv:2212.04356, appendix C), by transformers.

whisper-basic: lowercase; drop what stands in brackets; every mark, symbol and punctuation character
becomes a space. It destroys scripts whose vowels are combining marks (Devanagari, Thai and others):
words fall apart into consonants and wrong vowels go unseen (Manohar et al. 2024, arXiv:2409.02449).

whisper-english: besides, spells numbers as digits, contractions in full and British words the
American way. The list of spellings is whisper_english.json beside this file: english.json of the
package openai-whisper 20250625 (MIT, whisper_english.LICENSE).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

SPELLINGS = Path(__file__).with_name("whisper_english.json")


def whisper_basic(text: str) -> str:
    """Normalise a sentence; the result has single spaces and none at its ends."""
    return " ".join(_basic()(text).split())


def whisper_english(text: str) -> str:
    """Normalise an English sentence; the result has single spaces and none at its ends.

    Unlike the others it is not idempotent: "it's" becomes "it is", "is" may meet a number next.
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
    """British -> American."""
    found: dict[str, str] = json.loads(SPELLINGS.read_text(encoding="utf-8"))
    return found
