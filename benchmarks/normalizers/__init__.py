"""Text normalizers by name. Results of different normalizers are never compared.

A name stands for fixed rules: whoever changes what a normalizer does gives it a new name (such as
hindi-wer-2), so that old results are not compared with new ones by mistake. Clips of several
languages have a name that lists the normalizer of each, such as
by-language:en=whisper-english,*=whisper-basic, where * stands for the languages not listed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.normalizers.bambara import bambara
from benchmarks.normalizers.hindi import hindi_strict, hindi_wer
from benchmarks.normalizers.vistaar import vistaar
from benchmarks.normalizers.whisper import whisper_basic, whisper_english
from export.problem import Problem

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip

NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: " ".join(text.split()),
    "whisper-basic": whisper_basic,
    "whisper-english": whisper_english,
    "vistaar": vistaar,
    "hindi-strict": hindi_strict,
    "hindi-wer": hindi_wer,
    "bambara": bambara,
}

BY_LANGUAGE = {"hi": "hindi-wer", "bm": "bambara", "en": "whisper-english"}
"""What is used where none is named; for other languages whisper-basic where it does no harm."""

HARMLESS = 0.01
"""The largest share of marks, which whisper-basic turns into spaces, among a text's characters."""

MERGED = 0.1
"""The largest share of words that whisper-english may merge into numbers: it makes one word of
"three one four", 314. English texts with more number words are scored by whisper-basic."""

MIXED = "by-language:"
OTHERS = "*"


def normalizer(name: str, language: str | None = None) -> Callable[[str], str]:
    """The normalizer of that name, for a text in `language` where the name lists several.

    Raises Problem for an unknown name, which lists the known ones, and for a by-language name
    without a normalizer for `language`.
    """
    if name.startswith(MIXED):
        return _of_mixed(name, language)
    if name not in NORMALIZERS:
        raise Problem(
            f"there is no normalizer {name!r}", hint=f"choose one of {', '.join(NORMALIZERS)}"
        )
    return NORMALIZERS[name]


def _of_mixed(name: str, language: str | None) -> Callable[[str], str]:
    pairs = [pair.partition("=") for pair in name.removeprefix(MIXED).split(",")]
    names = {code: normalizer(plain) for code, _, plain in pairs}
    if language is None:
        return next(iter(names.values()))
    found = names.get(base_code(language), names.get(OTHERS))
    if found is None:
        raise Problem(
            f"the normalizer {name!r} says nothing about the language {language!r}",
            hint=f"add {base_code(language)}=NAME or {OTHERS}=NAME to it",
        )
    return found


def base_code(language: str) -> str:
    """The language of a code without its region: en for en-US and EN_us."""
    return language.lower().replace("_", "-").split("-")[0]


def name_for(clips: Sequence[Clip], otherwise: str | None = None) -> str:
    """The normalizer for the clips' language, or a by-language name where they need several.

    Where a language has none: `otherwise`, or where that is None a Problem which lists those there
    are.
    """
    texts: dict[str, list[str]] = {}
    for clip in clips:
        texts.setdefault(base_code(clip.lang), []).append(clip.text)
    try:
        return _joined({language: _of_language(language, said) for language, said in texts.items()})
    except Problem:
        if otherwise is None:
            raise
        return otherwise


def _of_language(language: str, texts: Sequence[str]) -> str:
    text = unicodedata.normalize("NFKC", "".join("".join(texts).split()))
    marks = sum(unicodedata.category(char)[0] == "M" for char in text)
    usual = BY_LANGUAGE.get(language, "whisper-basic")
    if usual.startswith("whisper-") and marks > HARMLESS * len(text):
        raise Problem(
            f"there is no normalizer for texts such as these, whose language is given as "
            f"{language!r}: whisper-basic would turn {marks} of {len(text)} characters into "
            "spaces, because it takes vowel signs for decoration",
            hint=f"correct `lang` if it is wrong ({_languages()}), or name one with --normalizer: "
            f"{', '.join(NORMALIZERS)}; none leaves texts as they are",
        )
    merges = usual == "whisper-english" and merged_share(texts) > MERGED
    return "whisper-basic" if merges else usual


def merged_share(texts: Iterable[str]) -> float:
    """The share of words that whisper-english merges with others."""
    before = after = 0
    for text in texts:
        words = len(whisper_basic(text).split())
        before += words
        after += min(words, len(whisper_english(text).split()))
    return 1 - after / before if before else 0.0


def _joined(names: dict[str, str]) -> str:
    """The one normalizer of all languages, or the by-language name; whisper-basic is its *."""
    if len(set(names.values())) <= 1:
        return next(iter(names.values()), "whisper-basic")
    special = [f"{code}={name}" for code, name in sorted(names.items()) if name != "whisper-basic"]
    others = [f"{OTHERS}=whisper-basic"] if len(special) < len(names) else []
    return MIXED + ",".join([*special, *others])


def _languages() -> str:
    return ", ".join(f"{language} has {name}" for language, name in BY_LANGUAGE.items())
