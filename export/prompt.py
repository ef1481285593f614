"""The prompt: the tokens that tell Whisper the language and the task.

Training, decoding, export and the other engines follow one rule, so that a model is evaluated with
the prompt it was trained with. The language is the clip's own if the model has a token for it,
otherwise the one that generation_config names. If that names none, decoding detects the language,
while training and layouts with a fixed prompt use English. The prompt of an English-only model has
no language.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from export.problem import Problem

AUTO = "auto"
"""Stands for a language that the model detects."""


def language_code(given: str) -> str:
    """Return Whisper's code for hi, hi_in, hi-IN, Hindi or <|hi|>; unknown input in lower case."""
    word = given.strip().lower().removeprefix("<|").removesuffix("|>")
    if len(word) == 2:  # no name is that short, and importing the names takes a second
        return word
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return TO_LANGUAGE_CODE.get(word, word.replace("_", "-").split("-")[0])


def is_multilingual(generation: Any) -> bool:
    """Return whether the model knows other languages than English."""
    return bool(getattr(generation, "is_multilingual", False))


def has_token(generation: Any, language: str) -> bool:
    """Return whether the model has a token for the language."""
    return f"<|{language_code(language)}|>" in (getattr(generation, "lang_to_id", None) or {})


def language_ids(generation: Any) -> dict[str, int]:
    """Return code -> token id for every language the model knows."""
    ids = getattr(generation, "lang_to_id", None) or {}
    return {token.strip("<|>"): number for token, number in ids.items()}


def known_languages(generation: Any) -> list[str]:
    """Return the codes of the languages the model knows."""
    return list(language_ids(generation))


def named_language(generation: Any) -> str | None:
    """Return the code of the language that generation_config names, None if it names none. The
    config names it by `language` or, in older versions, by `forced_decoder_ids`. Raises Problem if
    the model has no token for it."""
    if not is_multilingual(generation):
        return None
    named = getattr(generation, "language", None)
    if named:
        code = language_code(named)
        _look_up(generation, "lang_to_id", f"<|{code}|>")
        return code
    forced = forced_ids(getattr(generation, "forced_decoder_ids", None)).get(LANGUAGE_POSITION)
    return next((code for code, i in language_ids(generation).items() if i == forced), None)


LANGUAGE_POSITION, TASK_POSITION = 1, 2
"""Positions of language and task in a prompt."""


def forced_ids(forced: Any) -> dict[int, int]:
    """Return position -> id of `forced_decoder_ids`, by which older configs name language and task.
    Entries that are not pairs of integers are skipped; among them are null ids, which force
    nothing."""
    pairs = forced if isinstance(forced, list | tuple) else ()
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, list | tuple) and [*map(type, pair)] == [int, int]
    }


def language_or_auto(generation: Any, spoken: str | None = None) -> str | None:
    """Return the code of the language that prompts the model for speech in `spoken`. Returns AUTO
    if the language has to be detected, and None if the model knows English only. Raises Problem as
    `named_language` does."""
    if not is_multilingual(generation):
        return None
    if spoken is not None and has_token(generation, spoken):
        return language_code(spoken)
    return named_language(generation) or AUTO


def prompt_language(generation: Any, spoken: str | None = None) -> str | None:
    """Return the same as `language_or_auto`, but English instead of AUTO."""
    code = language_or_auto(generation, spoken)
    if code != AUTO:
        return code
    _look_up(generation, "lang_to_id", "<|en|>")
    return "en"


def task_of(generation: Any) -> str:
    """Return the task in generation_config, by default "transcribe"."""
    return getattr(generation, "task", None) or "transcribe"


def prompt_ids(generation: Any, spoken: str | None = None) -> list[int]:
    """Return the prompt: start, language and task if the model is multilingual, and no
    timestamps."""
    prompt = [generation.decoder_start_token_id]
    code = prompt_language(generation, spoken)
    if code is not None:
        prompt.append(_look_up(generation, "lang_to_id", f"<|{code}|>"))
        prompt.append(_look_up(generation, "task_to_id", task_of(generation)))
    no_timestamps = getattr(generation, "no_timestamps_token_id", None)
    return prompt if no_timestamps is None else [*prompt, no_timestamps]


def no_speech_id(generation: Any) -> int | None:
    """Return the token whose probability after the start token is that of no speech. It is the
    token before no_timestamps_token_id."""
    no_timestamps = getattr(generation, "no_timestamps_token_id", None)
    return None if no_timestamps is None else no_timestamps - 1


def timestamp_ids(generation: Any, vocab_size: int) -> range:
    """Return the ids of the timestamps. Fine-tuning may have added words after them."""
    no_timestamps = getattr(generation, "no_timestamps_token_id", None)
    end = getattr(generation, "timestamp_end", None) or vocab_size
    return range(0) if no_timestamps is None else range(no_timestamps + 1, end)


def only_language(generation: Any, spoken: Iterable[str]) -> str | None:
    """Return the code of the one language of all this speech, None if the model has no token for it
    or there are several."""
    codes = {language_code(language) for language in spoken}
    code = codes.pop() if len(codes) == 1 else None
    return code if code is not None and has_token(generation, code) else None


def _look_up(generation: Any, table: str, key: str) -> int:
    ids = getattr(generation, table, None) or {}
    if key not in ids:
        known = ", ".join(sorted(ids)[:5]) or "none"
        raise Problem(
            f"generation_config.json: {table} has no entry {key!r} "
            f"(its {len(ids)} entries: {known} ...)",
            hint="take generation_config.json from the model that was compressed",
        )
    return ids[key]
