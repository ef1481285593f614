"""Set the language that a checkpoint and its artifacts are prompted with.

It is stored in generation_config. See export/prompt.py for how the prompt follows from it.
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
    named_language,
    only_language,
    prompt_language,
)

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip


def set_language(
    generation: Any, train: Sequence[Clip], dev: Sequence[Clip], language: str | None
) -> None:
    """Set the language that prompts a checkpoint and its artifacts.

    It is `language`, or the language of all training clips. Training clips of several languages
    change nothing: each clip is prompted with its own language. An English-only model has no
    language to set; it accepts the `language` "en", "auto" and None.

    Raises Problem if the model has no token for the language of a clip and `language` is None, if
    it has no token for `language`, or if no clip would be prompted with `language`.
    """
    if not is_multilingual(generation):
        refuse_other_than_english(None if language is None else language_code(language))
        return
    unknown = without_token(generation, [*train, *dev])
    if language is not None:
        refuse_language(generation, train, unknown, language)
    elif unknown:
        refuse_speech(generation, unknown)
    chosen = language or only_language(generation, languages_of(train))
    if chosen is not None:
        generation.language = language_code(chosen)
    generation.task = "transcribe"


def languages_of(clips: Sequence[Clip]) -> list[str]:
    """Return the language of every clip that has a text."""
    return [clip.lang for clip in clips if clip.text.strip()]


def without_token(generation: Any, clips: Sequence[Clip]) -> list[str]:
    """Return the languages of the clips for which the model has no token."""
    return [lang for lang in languages_of(clips) if not has_token(generation, lang)]


def refuse_speech(generation: Any, unknown: Sequence[str]) -> None:
    known = known_languages(generation)
    raise Problem(
        f"the language of {len(unknown)} clips is {' and '.join(map(repr, sorted(set(unknown))))}, "
        "which the model has no token for",
        hint="correct `lang` if it is wrong; otherwise add --language CODE, to prompt the model "
        f"with one of its {len(known)} languages: {', '.join(known)}",
    )


def refuse_language(
    generation: Any, train: Sequence[Clip], unknown: Sequence[str], language: str
) -> None:
    known = known_languages(generation)
    if not has_token(generation, language):
        raise Problem(
            f"--language {language}: the model has no token for it",
            hint="for speech in a language without a token, choose a related one or one with the "
            f"same script: {', '.join(known)}",
        )
    spoken = set(map(language_code, languages_of(train)))
    if not unknown and spoken != {language_code(language)}:
        raise Problem(
            f"--language {language}: the speech is in {', '.join(sorted(spoken))}, and the model "
            "has tokens for that, which are used as prompts",
            hint="omit it, or correct `lang` in the manifest",
        )


def set_prompt(generation: Any, language: str | None, one_prompt: bool) -> str | None:
    """Set the language that prompts an artifact.

    It is `language`, or the language of generation_config. If both are missing, the artifact
    detects the language, or uses English if its layout has one fixed prompt (`one_prompt`).

    Returns a note in that last case, otherwise None. Raises Problem if the model has no token for
    the language, and for "auto" with a fixed prompt.
    """
    code = None if language is None else language_code(language)
    if not is_multilingual(generation):
        refuse_other_than_english(code)
        return None
    if code == AUTO and one_prompt:
        raise Problem(
            "--language auto: this layout has one fixed prompt, so its artifacts cannot detect a "
            "language",
            hint="choose a code such as de, or use --layout native",
        )
    if code == AUTO:
        generation.language = generation.forced_decoder_ids = None
    elif code is not None:
        refuse_without_token(generation, code)
        generation.language = code
    elif one_prompt and named_language(generation) is None:
        generation.language = prompt_language(generation)
        return (
            "the checkpoint has no language and this layout has one fixed prompt: the artifact is "
            "prompted for English; choose another with --language"
        )
    return None


def refuse_other_than_english(code: str | None) -> None:
    """Raise Problem for another language than English, which an English-only model cannot use."""
    if code not in (None, "en", AUTO):
        raise Problem(
            f"--language {code}: the model knows English only",
            hint="omit it, or start from a multilingual model",
        )


def refuse_without_token(generation: Any, code: str) -> None:
    if not has_token(generation, code):
        known = known_languages(generation)
        raise Problem(
            f"--language {code}: the model has no token for it",
            hint=f"choose one of its {len(known)} languages, such as {', '.join(known[:5])}",
        )
