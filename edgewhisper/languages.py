"""Which language a checkpoint and its artifacts are made for.

The prompt follows from it by one rule, see export/prompt.py. Here it is named in generation_config,
where everything that reads a checkpoint finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from export.problem import Problem
from export.prompt import (
    has_token,
    is_multilingual,
    known_languages,
    language_code,
    language_for,
    only_language,
)

if TYPE_CHECKING:
    from benchmarks.speech import Clip


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


def fix_language(generation: Any, clips: Sequence[Clip]) -> None:
    """An artifact has one prompt, and the checkpoint is compared with it under the same: for the
    language that generation_config names, or else that of all the clips, or else English."""
    if is_multilingual(generation) and not getattr(generation, "language", None):
        only = only_language(generation, languages_of(clips))
        generation.language = only or language_for(generation)
