"""Shared steps of the normalizers: brackets, invisible characters, grouped digits, punctuation."""

from __future__ import annotations

import re
import unicodedata

BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]*\)")
"""Bracketed remarks, such as noises, by the same rule as Whisper's normalizers."""

SPACES = str.maketrans(dict.fromkeys("\u00a0\u200b\u202f", " "))
SELECTORS = "\ufe0e\ufe0f"
"""Variation selectors, which choose the text or emoji form of a character."""

GROUPED = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9]|,[0-9])")
"""Digits grouped by commas: 1,250,000 and the Indian 12,50,000, but not the list 1,2,3."""


def without_invisible(text: str) -> str:
    """Remove joiners, byte order marks and soft hyphens; turn unusual spaces into spaces."""
    text = text.translate(SPACES)
    return "".join(
        char for char in text if unicodedata.category(char) != "Cf" and char not in SELECTORS
    )


def ungrouped(text: str) -> str:
    """Remove the commas between groups of digits."""
    return GROUPED.sub(lambda match: match[0].replace(",", ""), text)


def readable(text: str) -> str:
    """Keep letters, marks (such as vowel signs) and numbers; replace the rest by single spaces."""
    kept = (char if unicodedata.category(char)[0] in "LMN" else " " for char in text)
    return " ".join("".join(kept).split())
