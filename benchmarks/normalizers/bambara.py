"""Bambara: one spelling for the old and the new orthography, tones and contractions.

The rules follow the bambara-text-normalization project (MIT), reimplemented here. For a
contraction, only the next two words are considered.

    numbers        in words: 25 -> mugan ni duuru
    letters        è ò of the old spelling -> ɛ ɔ; ny, ñ -> ɲ; ng -> ŋ
    tones          other accents are removed; ɛ ɔ ɲ ŋ are letters and kept
    contractions   b'a -> bɛ a, t'a -> tɛ a, y'a -> ye a; see ELIDED for k' and n'
    other          lowercase; no brackets and punctuation; an apostrophe ends a word

è and ò are the old letters here, not e and o with a low tone, so they are replaced before tones are
removed.
"""

from __future__ import annotations

import re
import unicodedata

from benchmarks.normalizers.characters import BRACKETED, readable, ungrouped, without_invisible

APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u02b9\u2032`\u00b4", "'"))
TONES = re.compile("[\u0300\u0301\u0302\u030c]")
"""Combining accents for low, high, falling and rising tones; the last two are our addition."""

LEGACY = {"e\u0300": "ɛ", "o\u0300": "ɔ"}
LETTERS = (("n\u0303", "ɲ"), ("ny", "ɲ"), ("ng", "ŋ"))

CONTRACTION = re.compile(r"(?<!\w)([btykn]) ?'(?=(\w+)(?: (\w+))?)")
ELIDED = {"b": "bɛ", "t": "tɛ", "y": "ye", "k": "ka", "n": "ni"}
CLAUSE = ("ka", "ye", "bɛ", "tɛ", "ma")
"""Words that follow a subject. After `k'` and a subject they begin quoted speech: k' is ko."""


def bambara(text: str) -> str:
    """Normalise a sentence; the result has single spaces and no surrounding spaces."""
    text = without_invisible(text).lower()
    text = one_orthography(BRACKETED.sub(" ", text)).translate(APOSTROPHES)
    text = CONTRACTION.sub(in_full, ungrouped(text))
    return readable(NUMBER.sub(in_words, readable(text)))


def one_orthography(text: str) -> str:
    """Return the text in the new orthography, without tones."""
    text = unicodedata.normalize("NFD", text)
    for old, new in LEGACY.items():
        text = text.replace(old, new)
    text = TONES.sub("", text)
    for old, new in LETTERS:
        text = text.replace(old, new)
    return unicodedata.normalize("NFC", text)


def in_full(match: re.Match[str]) -> str:
    """Return the full form of a contracted word.

    The second word after the apostrophe decides between k'a la (kɛ), k'an ka (ko) and k'a ta (ka),
    and between n'a ma (na) and n'a ta (ni).
    """
    letter, following = match[1], match[3]
    if letter == "k" and following == "la":
        return "kɛ "
    if letter == "k" and following in CLAUSE:
        return "ko "
    if letter == "n" and following == "ma":
        return "na "
    return ELIDED[letter] + " "


# --------------------------------------------------------------------------------------- numbers

NUMBER = re.compile("[0-9]+")
ONES = "fu kelen fila saba naani duuru wɔɔrɔ wolonwula segin kɔnɔntɔn".split()  # noqa: SIM905 (a list of words)
SCALES = ((1_000_000, "miliyɔn"), (1000, "waa"), (100, "kɛmɛ"))
LONGEST = 9
"""Numbers with more digits are read digit by digit."""


def in_words(match: re.Match[str]) -> str:
    digits = match[0]
    if len(digits) > LONGEST or (len(digits) > 1 and digits[0] == "0"):
        return f" {' '.join(ONES[int(digit)] for digit in digits)} "
    return f" {cardinal(int(digits))} "


def cardinal(number: int) -> str:
    """Return a number in words, its parts joined by ni: 123 is kɛmɛ ni mugan ni saba."""
    if number < 10:
        return ONES[number]
    parts = []
    for size, name in SCALES:
        count, number = divmod(number, size)
        if count:
            parts.append(name if (size, count) == (100, 1) else f"{name} {cardinal(count)}")
    tens, ones = divmod(number, 10)
    if tens:
        parts.append({1: "tan", 2: "mugan"}.get(tens) or f"bi {ONES[tens]}")
    if ones:
        parts.append(ONES[ones])
    return " ni ".join(parts)
