"""Text normalizers by name. Results of different normalizers are never compared.

The rules behind a name never change. A changed normalizer gets a new name (such as hindi-wer-2), so
that new results are not compared with old ones by mistake. For clips of several languages, the name
lists the normalizer of each, such as by-language:en=whisper-english,*=whisper-basic; * stands for
all other languages.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from benchmarks.normalizers.bambara import bambara
from benchmarks.normalizers.hindi import hindi_strict, hindi_wer
from benchmarks.normalizers.vistaar import vistaar
from benchmarks.normalizers.whisper import whisper_basic, whisper_english
from export.problem import Problem


class Spoken(Protocol):
    """A text and its language, as a Clip has them."""

    @property
    def text(self) -> str: ...
    @property
    def lang(self) -> str: ...


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
"""The default normalizers; other languages use whisper-basic if it is harmless."""

HARMLESS = 0.01
"""whisper-basic turns combining marks into spaces; up to this share of them it is harmless."""

MERGED = 0.1
"""whisper-english merges number words: "three one four" becomes 314. English texts in which it
merges more than this share of the words are scored by whisper-basic."""

MIXED = "by-language:"
OTHERS = "*"


def normalizer(name: str, language: str | None = None) -> Callable[[str], str]:
    """Return the normalizer of a name; a by-language name needs the text's language.

    Raises Problem for an unknown name and for a by-language name without an entry for `language`.
    """
    if name.startswith(MIXED):
        return _by_language(name, language)
    if name not in NORMALIZERS:
        raise Problem(
            f"unknown normalizer {name!r}", hint=f"choose one of {', '.join(NORMALIZERS)}"
        )
    return NORMALIZERS[name]


def _by_language(name: str, language: str | None) -> Callable[[str], str]:
    pairs = [pair.partition("=") for pair in name.removeprefix(MIXED).split(",")]
    names = {code: normalizer(plain) for code, _, plain in pairs}
    if language is None:
        return next(iter(names.values()))
    entry = names.get(base_code(language), names.get(OTHERS))
    if entry is None:
        raise Problem(
            f"the normalizer {name!r} has no entry for the language {language!r}",
            hint=f"add {base_code(language)}=NAME or {OTHERS}=NAME to it",
        )
    return entry


def base_code(language: str) -> str:
    """Return a language code without its region: en for en-US and EN_us."""
    return language.lower().replace("_", "-").split("-")[0]


def name_for(clips: Sequence[Spoken], otherwise: str | None = None) -> str:
    """Return the name of the normalizer for the clips' language, or a by-language name.

    If a language has no normalizer, returns `otherwise`; raises Problem if that is None.
    """
    texts: dict[str, list[str]] = {}
    for clip in clips:
        texts.setdefault(base_code(clip.lang), []).append(clip.text)
    try:
        return _joined({language: _for_texts(language, group) for language, group in texts.items()})
    except Problem:
        if otherwise is None:
            raise
        return otherwise


def _for_texts(language: str, texts: Sequence[str]) -> str:
    text = unicodedata.normalize("NFKC", "".join("".join(texts).split()))
    marks = sum(unicodedata.category(char)[0] == "M" for char in text)
    usual = BY_LANGUAGE.get(language, "whisper-basic")
    if usual.startswith("whisper-") and marks > HARMLESS * len(text):
        raise Problem(
            f"no normalizer suits these texts, whose language is given as {language!r}: "
            f"whisper-basic would turn {marks} of {len(text)} characters into spaces, because it "
            "removes vowel signs",
            hint=f"correct `lang` if it is wrong ({_languages()}), or choose a --normalizer: "
            f"{', '.join(NORMALIZERS)}; `none` changes spaces only",
        )
    merges = usual == "whisper-english" and merged_share(texts) > MERGED
    return "whisper-basic" if merges else usual


def merged_share(texts: Iterable[str]) -> float:
    """Return the share of words that whisper-english merges with others."""
    before = after = 0
    for text in texts:
        words = len(whisper_basic(text).split())
        before += words
        after += min(words, len(whisper_english(text).split()))
    return 1 - after / before if before else 0.0


def _joined(names: dict[str, str]) -> str:
    """Return the common normalizer, or a by-language name in which * is whisper-basic."""
    if len(set(names.values())) <= 1:
        return next(iter(names.values()), "whisper-basic")
    special = [f"{code}={name}" for code, name in sorted(names.items()) if name != "whisper-basic"]
    others = [f"{OTHERS}=whisper-basic"] if len(special) < len(names) else []
    return MIXED + ",".join([*special, *others])


def _languages() -> str:
    return ", ".join(f"{language} has {name}" for language, name in BY_LANGUAGE.items())
