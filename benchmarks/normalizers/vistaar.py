"""Hindi as the Vistaar benchmark scores it, to compare with IndicWhisper and its successors.

Source: Bhogale et al. 2023 (arXiv:2305.15386) and its evaluation script, reimplemented here from
their description:

1. Delete ASCII punctuation, danda, double danda, Urdu full stop and apostrophe, without a space.
2. Apply the Indic NLP library's normalizer for the language with its defaults. For Devanagari it
   removes joiners, byte order mark and soft hyphen, turns unusual spaces into spaces and curly
   quotes and dashes into ASCII, writes nukta letters as two code points, and ॲ as ए. Case, digits,
   nasals and nuktas do not change.

We differ in one point: quotes and dashes become ASCII before punctuation is deleted. In the
original order, curly quotes survive as straight ones, and normalising twice changes the text.
"""

from __future__ import annotations

import string

PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "।॥۔"))
TO_ASCII = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015", "-")
)
SPACES = str.maketrans(dict.fromkeys("\u200b\u00a0", " "))
INVISIBLE = str.maketrans(dict.fromkeys("\u200c\u200d\ufeff\ufffe\u2060\u00ad"))
COMPOSED = "\u0929\u0931\u0934\u0958\u0959\u095a\u095b\u095c\u095d\u095e\u095f"
NUKTA_LETTERS = str.maketrans(
    {char: base + "\u093c" for char, base in zip(COMPOSED, "नरळकखगजडढफय", strict=True)}
)


def vistaar(text: str) -> str:
    """Normalise a sentence; the result has single spaces and no surrounding spaces."""
    for table in (TO_ASCII, PUNCTUATION, SPACES, INVISIBLE, NUKTA_LETTERS):
        text = text.translate(table)
    return " ".join(text.replace("\u0972", "ए").split())
