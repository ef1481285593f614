"""The prompt: what Whisper is told before it writes, and for which language.

One rule, for training, decoding, export and the rivals, so that a model is judged under the prompt
that it was trained under: a clip's own language where the model has a token for it, otherwise the
one that generation_config names. Where that names none, decoding detects the language; training
and layouts that have one fixed prompt take English. The prompt of an English-only model has no
language.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from export.problem import Problem

AUTO = "auto"
"""Stands for the language that the model detects."""


def language_code(given: str) -> str:
    """Whisper's code for hi, hi_in, hi-IN, Hindi or <|hi|>; what it does not know stays, in lower
    case."""
    word = given.strip().lower().removeprefix("<|").removesuffix("|>")
    if len(word) == 2:  # no name is so short, and to import the names takes a second
        return word
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return TO_LANGUAGE_CODE.get(word, word.replace("_", "-").split("-")[0])


def is_multilingual(generation: Any) -> bool:
    return bool(getattr(generation, "is_multilingual", False))


def has_token(generation: Any, language: str) -> bool:
    """Whether a multilingual model can be told of the language."""
    return f"<|{language_code(language)}|>" in (getattr(generation, "lang_to_id", None) or {})


def language_ids(generation: Any) -> dict[str, int]:
    """Code -> id of every language that the model can be told of."""
    ids = getattr(generation, "lang_to_id", None) or {}
    return {token.strip("<|>"): number for token, number in ids.items()}


def known_languages(generation: Any) -> list[str]:
    return list(language_ids(generation))


def named_language(generation: Any) -> str | None:
    """The code of the language that generation_config names, by `language` or by the older
    `forced_decoder_ids`; None where it names none.

    Raises Problem where the model has no token for it.
    """
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
"""Where language and task stand in a prompt."""


def forced_ids(forced: Any) -> dict[int, int]:
    """Position -> id of `forced_decoder_ids`, by which older configs name language and task.

    An id may be null, which leaves it open; what is not a pair of numbers is left out.
    """
    pairs = forced if isinstance(forced, list | tuple) else ()
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, list | tuple) and [*map(type, pair)] == [int, int]
    }


def language_or_auto(generation: Any, spoken: str | None = None) -> str | None:
    """The code of the language that prompts the model for speech in `spoken`; AUTO where it is to
    be detected, None where the model knows English only. Raises Problem as named_language does."""
    if not is_multilingual(generation):
        return None
    if spoken is not None and has_token(generation, spoken):
        return language_code(spoken)
    return named_language(generation) or AUTO


def language_for(generation: Any, spoken: str | None = None) -> str | None:
    """The same with English in place of AUTO."""
    code = language_or_auto(generation, spoken)
    if code != AUTO:
        return code
    _look_up(generation, "lang_to_id", "<|en|>")
    return "en"


def task_of(generation: Any) -> str:
    return getattr(generation, "task", None) or "transcribe"


def prompt_ids(generation: Any, spoken: str | None = None) -> list[int]:
    """Start, language and task where the model is multilingual, no timestamps."""
    prompt = [generation.decoder_start_token_id]
    code = language_for(generation, spoken)
    if code is not None:
        prompt.append(_look_up(generation, "lang_to_id", f"<|{code}|>"))
        prompt.append(_look_up(generation, "task_to_id", task_of(generation)))
    silent = getattr(generation, "no_timestamps_token_id", None)
    return prompt if silent is None else [*prompt, silent]


def no_speech_id(generation: Any) -> int | None:
    """The token whose probability behind the start is that of no speech: it comes before
    no_timestamps_token_id."""
    silent = getattr(generation, "no_timestamps_token_id", None)
    return None if silent is None else silent - 1


def timestamp_ids(generation: Any, vocab_size: int) -> range:
    """The ids of timestamps. Fine-tuning may have added words behind them."""
    silent = getattr(generation, "no_timestamps_token_id", None)
    end = getattr(generation, "timestamp_end", None) or vocab_size
    return range(0) if silent is None else range(silent + 1, end)


def only_language(generation: Any, spoken: Iterable[str]) -> str | None:
    """The code of the language that all this speech is in, where the model has a token for it."""
    codes = {language_code(language) for language in spoken}
    code = codes.pop() if len(codes) == 1 else None
    return code if code is not None and has_token(generation, code) else None


def _look_up(generation: Any, table: str, key: str) -> int:
    ids = getattr(generation, table, None) or {}
    if key not in ids:
        known = ", ".join(sorted(ids)[:5]) or "none"
        raise Problem(
            f"generation_config.json: {key!r} is asked for, but {table} has no such entry "
            f"({len(ids)} there: {known} ...)",
            hint="take generation_config.json from the model that was compressed",
        )
    return ids[key]
