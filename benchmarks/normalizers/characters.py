"""What the normalizers share: brackets, signs that cannot be seen, grouped digits, kinds."""

from __future__ import annotations

import re
import unicodedata

BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]*\)")
"""Notes on noises and the like, as Whisper's normalizers find them."""

SPACES = str.maketrans(dict.fromkeys("\u00a0\u200b\u202f", " "))
SELECTORS = "\ufe0e\ufe0f"
"""They choose between the text and the picture form of a character."""

GROUPED = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9]|,[0-9])")
"""1,250,000 and, as in India, 12,50,000; not the list 1,2,3."""


def without_invisible(text: str) -> str:
    """Joiners, byte order marks, soft hyphens and the like go; unusual spaces become spaces."""
    text = text.translate(SPACES)
    return "".join(
        char for char in text if unicodedata.category(char) != "Cf" and char not in SELECTORS
    )


def ungrouped(text: str) -> str:
    """Numbers without the commas between their groups of digits."""
    return GROUPED.sub(lambda found: found[0].replace(",", ""), text)


def readable(text: str) -> str:
    """Letters, marks and numbers, single spaces for the rest: vowel signs are marks and stay."""
    kept = (char if unicodedata.category(char)[0] in "LMN" else " " for char in text)
    return " ".join("".join(kept).split())
