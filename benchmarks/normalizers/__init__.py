"""Text normalizers by name. Results of different normalizers are never compared.

A name stands for fixed rules: whoever changes what a normalizer does gives it a new name (such as
hindi-wer-2), so that old results are not compared with new ones by mistake.
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
    from benchmarks.speech import Clip

NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: " ".join(text.split()),
    "whisper-basic": whisper_basic,
    "whisper-english": whisper_english,
    "vistaar": vistaar,
    "hindi-strict": hindi_strict,
    "hindi-wer": hindi_wer,
    "bambara": bambara,
}

BY_LANGUAGE = {"hi": "hindi-wer", "bm": "bambara"}
"""What is used where none is named; for other languages whisper-basic where it does no harm."""

HARMLESS = 0.01
"""The largest share of marks, which whisper-basic turns into spaces, among a text's characters."""


def normalizer(name: str) -> Callable[[str], str]:
    """The normalizer of that name. Raises Problem for an unknown one, naming those there are."""
    if name not in NORMALIZERS:
        raise Problem(
            f"there is no normalizer {name!r}", hint=f"choose one of {', '.join(NORMALIZERS)}"
        )
    return NORMALIZERS[name]


def name_for(clips: Sequence[Clip], otherwise: str | None = None) -> str:
    """The normalizer for the clips' language.

    Where there is none for it, or languages are mixed that need different ones: `otherwise`, or
    where that is None a Problem which lists those there are.
    """
    texts: dict[str, list[str]] = {}
    for clip in clips:
        texts.setdefault(clip.lang.lower().replace("_", "-").split("-")[0], []).append(clip.text)
    try:
        names = {language: _of_language(language, said) for language, said in texts.items()}
        return _the_only(names)
    except Problem:
        if otherwise is None:
            raise
        return otherwise


def _of_language(language: str, texts: Iterable[str]) -> str:
    if language in BY_LANGUAGE:
        return BY_LANGUAGE[language]
    text = unicodedata.normalize("NFKC", "".join("".join(texts).split()))
    marks = sum(unicodedata.category(char)[0] == "M" for char in text)
    if marks > HARMLESS * len(text):
        raise Problem(
            f"there is no normalizer for texts such as these, whose language is given as "
            f"{language!r}: whisper-basic would turn {marks} of {len(text)} characters into "
            "spaces, because it takes vowel signs for decoration",
            hint=f"correct `lang` if it is wrong ({_languages()}), or name one with --normalizer: "
            f"{', '.join(NORMALIZERS)}; none leaves texts as they are",
        )
    return "whisper-basic"


def _the_only(names: dict[str, str]) -> str:
    found = sorted(set(names.values()))
    if len(found) > 1:
        pairs = ", ".join(f"{language}: {name}" for language, name in sorted(names.items()))
        raise Problem(
            f"the clips' languages have different normalizers ({pairs})",
            hint="score each language on its own, or name one normalizer for all with --normalizer",
        )
    return found[0] if found else "whisper-basic"


def _languages() -> str:
    return ", ".join(f"{language} has {name}" for language, name in BY_LANGUAGE.items())
