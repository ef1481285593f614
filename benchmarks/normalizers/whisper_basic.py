"""Whisper's language-neutral normalizer (Radford et al. 2022, arXiv:2212.04356, appendix C).

Lowercase; drop what stands in brackets; every mark, symbol and punctuation character becomes a
space. It destroys scripts whose vowels are combining marks (Devanagari, Thai and others): figures
for such languages need a normalizer of their own.
"""

from __future__ import annotations

import re
import unicodedata

BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]")
PARENTHESES = re.compile(r"\([^)]+?\)")


def whisper_basic(text: str) -> str:
    """Normalise a sentence; the result has single spaces and none at its ends."""
    text = PARENTHESES.sub("", BRACKETS.sub("", text.lower()))
    text = unicodedata.normalize("NFKC", text)
    kept = (" " if unicodedata.category(char)[0] in "MSP" else char for char in text)
    return " ".join("".join(kept).lower().split())
