"""Which language a checkpoint and its artifacts are made for.

The prompt follows from it by one rule, see export/prompt.py. Here it is named in generation_config,
where everything that reads a checkpoint finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from export.problem import Problem
from export.prompt import (
    AUTO,
    has_token,
    is_multilingual,
    known_languages,
    language_code,
    language_for,
    named_language,
    only_language,
)

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip


def set_language(
    generation: Any, train: Sequence[Clip], dev: Sequence[Clip], language: str | None
) -> None:
    """Name the language that prompts the model from here on, in the checkpoint and its artifacts
    too: `language`, or the one that all clips to train on are in. Speech of several languages
    changes nothing: each clip is prompted by its own.

    Raises Problem: speech in a language that the model has no token for, without a `language`
    to prompt it by; a `language` that it has no token for, or that nothing would be prompted by.
    """
    unknown = without_token(generation, [*train, *dev])
    if language is not None:
        refuse_language(generation, train, unknown, language)
    elif unknown and is_multilingual(generation):
        refuse_speech(generation, unknown)
    if is_multilingual(generation):
        chosen = language or only_language(generation, languages_of(train))
        if chosen is not None:
            generation.language = language_code(chosen)
        generation.task = "transcribe"


def languages_of(clips: Sequence[Clip]) -> list[str]:
    """Of every clip in which something is said."""
    return [clip.lang for clip in clips if clip.text.strip()]


def without_token(generation: Any, clips: Sequence[Clip]) -> list[str]:
    """The languages of the clips whose language the model cannot be told of."""
    return [lang for lang in languages_of(clips) if not has_token(generation, lang)]


def refuse_speech(generation: Any, unknown: Sequence[str]) -> None:
    known = known_languages(generation)
    raise Problem(
        f"the language of {len(unknown)} clips is {' and '.join(map(repr, sorted(set(unknown))))}, "
        "which the model has no token for",
        hint="correct `lang` where it is wrong; otherwise add --language CODE, the one of the "
        f"model's {len(known)} languages ({', '.join(known[:5])}, ...) whose token shall prompt it "
        "there",
    )


def refuse_language(
    generation: Any, train: Sequence[Clip], unknown: Sequence[str], language: str
) -> None:
    if not is_multilingual(generation):
        raise Problem(
            f"--language {language}: the model knows English only, and is not told any language",
            hint="leave it out, or start from a multilingual model",
        )
    known = known_languages(generation)
    if not has_token(generation, language):
        raise Problem(
            f"--language {language}: the model has no token for it",
            hint=f"name one of its {len(known)}, such as {', '.join(known[:5])}: for speech in "
            "another language, one that sounds or is written alike",
        )
    spoken = set(map(language_code, languages_of(train)))
    if not unknown and spoken != {language_code(language)}:
        raise Problem(
            f"--language {language}: the speech is in {', '.join(sorted(spoken))}, and the model "
            "has tokens for that, which prompt it",
            hint="leave it out, or correct `lang` in the manifest",
        )


def set_prompt(generation: Any, language: str | None, one_prompt: bool) -> str | None:
    """Set the language that prompts an artifact: `language`, or the one that generation_config
    names. Where it names none, the artifact detects it; a layout with `one_prompt` takes English.

    Returns a note where English was taken so. Raises Problem for a language that the model does
    not know, and for "auto" where it cannot be.
    """
    code = None if language is None else language_code(language)
    if not is_multilingual(generation):
        refuse_other_than_english(code)
        return None
    if code == AUTO and one_prompt:
        raise Problem(
            "--language auto: this layout has one fixed prompt, so its artifacts cannot detect a "
            "language",
            hint="name a code such as de, or use --layout native",
        )
    if code == AUTO:
        generation.language = generation.forced_decoder_ids = None
    elif code is not None:
        refuse_without_token(generation, code)
        generation.language = code
    elif one_prompt and named_language(generation) is None:
        generation.language = language_for(generation)
        return (
            "the checkpoint names no language and this layout has one fixed prompt: the artifact "
            "is prompted for English; choose another with --language"
        )
    return None


def refuse_other_than_english(code: str | None) -> None:
    """Raise Problem where an English-only model is asked for another language."""
    if code not in (None, "en", AUTO):
        raise Problem(
            f"--language {code}: the model knows English only",
            hint="leave it out, or start from a multilingual model",
        )


def refuse_without_token(generation: Any, code: str) -> None:
    if not has_token(generation, code):
        known = known_languages(generation)
        raise Problem(
            f"--language {code}: the model has no token for it",
            hint=f"name one of its {len(known)} languages, such as {', '.join(known[:5])}",
        )
