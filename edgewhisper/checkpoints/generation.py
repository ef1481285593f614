"""Complete and check the generation config of a checkpoint.

generation_config.json stores whether a model is multilingual, and the ids of its language, task and
timestamp tokens. Fine-tuned checkpoints often have no such file, or one that transformers generated
from config.json (`_from_model_config`). transformers then prompts a multilingual model without
language and task. Missing values are therefore derived from the names of the tokenizer's special
tokens and from the vocabulary. Existing values must agree with the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from devices.runner.artifact.manifest import MOST_DELAY_S
from edgewhisper.checkpoints import openai
from edgewhisper.checkpoints.generation_file import FILE, START_KEY
from export.problem import Problem
from export.prompt import LANGUAGE_POSITION, TASK_POSITION, forced_ids, language_code
from export.vocabulary import END, NO_TIMESTAMPS, PREVIOUS, START, TASKS

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig, WhisperTokenizer

IN_CONFIG = (
    *("decoder_start_token_id", "eos_token_id", "bos_token_id", "pad_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""Keys that config.json repeats."""
KEPT = (
    *IN_CONFIG,
    *("max_length", "is_multilingual", "lang_to_id", "task_to_id", "language", "task"),
    *("no_timestamps_token_id", "prev_sot_token_id", "max_initial_timestamp_index"),
    *("alignment_heads", "word_delay_s"),
    "timestamp_end",
)
"""Keys that decoding uses. Others, such as beams, penalties and `return_timestamps`, are ignored in
checkpoints and artifacts."""
TYPES = {
    **dict.fromkeys(("language", "task"), str),
    **dict.fromkeys(("lang_to_id", "task_to_id"), dict),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "alignment_heads"), list),
    "is_multilingual": bool,
    "word_delay_s": float,
    "forced_decoder_ids": list,
}
"""Key -> type of its value. All other keys have integers."""
ADDED = (
    "config.json must have the decoder_start_token_id of the model that was fine-tuned: "
    f"{openai.ENGLISH_END + 1} if it is English-only, {openai.ENGLISH_END + 2} if multilingual"
)
"""The end of a hint: how the vocabulary of a model with added tokens is recognised."""
MULTILINGUAL_ONLY = ("lang_to_id", "task_to_id", "language", "task")


def complete(
    source: object,
    generation: GenerationConfig,
    config: WhisperConfig,
    stored: Mapping[str, Any],
    tokenizer: WhisperTokenizer | None,
) -> GenerationConfig:
    """Return the generation config with all values that decoding needs.

    `stored` is the content of config.json with the stored start token (see huggingface.py), and
    `source` the checkpoint's name in errors. Without a tokenizer nothing can be derived, so the
    config must be complete. Raises Problem if values contradict the tokenizer or the vocabulary, or
    are missing and cannot be derived.
    """
    special = special_ids(tokenizer)
    generated = bool(generation._from_model_config)
    values = {} if generated else values_of(generation)
    refuse_types(source, values)
    refuse_delay(source, values.get("word_delay_s", 0.0))
    if tokenizer is None or not special:
        refuse_underivable(source, values, config)
        refuse_unknown(source, values)
        return build(values)
    refuse_other_tokenizer(source, special, config, stored.get(START_KEY))
    derived = derive(special, config)
    english = is_english(special)
    derived["alignment_heads"] = stored.get("alignment_heads") or alignment_heads(config, english)
    if generated:
        derived |= suppressed(special, stored, tokenizer, config)
    values = derived | values
    end = timestamp_end(tokenizer, values["no_timestamps_token_id"], config.vocab_size)
    values["timestamp_end"] = None if end == config.vocab_size else end
    refuse_contradictions(source, values, derived, config)
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        refuse_beyond(source, key, values.get(key) or [], config.vocab_size)
    refuse_heads(source, values["alignment_heads"] or [])
    values.setdefault("word_delay_s", word_delay_s(config, english, values["alignment_heads"]))
    add_prompt(values, stored)
    refuse_unknown(source, values)
    return build(values)


def values_of(generation: GenerationConfig) -> dict[str, Any]:
    """Return the values of the file that decoding uses."""
    stored = generation.to_dict()
    keys = (*KEPT, "forced_decoder_ids")
    return {key: stored[key] for key in keys if stored.get(key) is not None}


def build(values: dict[str, Any]) -> GenerationConfig:
    """Return a generation config of these values, without languages and tasks if English-only."""
    from transformers import GenerationConfig

    multilingual = values.get("is_multilingual", True)
    dropped = () if multilingual else MULTILINGUAL_ONLY
    keys = [key for key in KEPT if values.get(key) is not None and key not in dropped]
    return GenerationConfig(**{key: values[key] for key in keys})


# ------------------------------------------------------------------------ derived from the tokens


def special_ids(tokenizer: WhisperTokenizer | None) -> dict[str, int]:
    """Return name -> id of all tokens like <|this|>, except timestamps. It is empty if the
    tokenizer has no <|startoftranscript|>."""
    if tokenizer is None:
        return {}
    special = {
        name: number
        for name, number in tokenizer.get_vocab().items()
        if name.startswith("<|") and name.endswith("|>") and not name[2:3].isdigit()
    }
    return special if START in special and END in special else {}


def derive(special: Mapping[str, int], config: WhisperConfig) -> dict[str, Any]:
    """Return the values that follow from the names of the special tokens."""
    languages = {name: special[name] for name in languages_among(special)}
    tasks = {task: special[f"<|{task}|>"] for task in TASKS if f"<|{task}|>" in special}
    multilingual = bool(languages) and bool(tasks) and not is_english(special)
    return {
        "is_multilingual": multilingual,
        "decoder_start_token_id": special[START],
        "eos_token_id": special[END],
        "bos_token_id": special[END],
        "pad_token_id": special[END],
        "no_timestamps_token_id": special.get(NO_TIMESTAMPS),
        "prev_sot_token_id": special.get(PREVIOUS),
        "max_initial_timestamp_index": openai.MAX_INITIAL_TIMESTAMP_INDEX,
        "max_length": config.max_target_positions,
        **({"lang_to_id": languages, "task_to_id": tasks} if multilingual else {}),
    }


def is_english(special: Mapping[str, int]) -> bool:
    """Return whether the tokenizer is of an English-only model. It also has languages and tasks,
    but it uses GPT-2's vocabulary."""
    return special[END] == openai.ENGLISH_END


def languages_among(special: Mapping[str, int]) -> list[str]:
    """Return the language tokens in the order of their ids.

    These are the tokens between <|startoftranscript|> and the first task, and known languages that
    a fine-tuned model has elsewhere.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    known = {f"<|{code}|>" for code in LANGUAGES}
    first = special[START] + 1
    last = min(
        (special[f"<|{task}|>"] for task in TASKS if f"<|{task}|>" in special), default=first
    )
    inside = {name for name, number in special.items() if first <= number < last}
    return sorted((inside | known) & special.keys(), key=special.__getitem__)


def timestamp_end(tokenizer: WhisperTokenizer, silent: int | None, vocab_size: int) -> int:
    """Return the id after the last timestamp, where fine-tuning may have added words. If the
    tokenizer does not name its timestamps, as early ones, this is the vocabulary's end."""
    if silent is None:
        return vocab_size
    names = tokenizer.convert_ids_to_tokens(
        list(range(silent + 1, min(vocab_size, len(tokenizer))))
    )
    stamps = [bool(re.fullmatch(r"<\|\d+\.\d\d\|>", name or "")) for name in names]
    count = stamps.index(False) if False in stamps else len(stamps)
    return silent + 1 + count if count else vocab_size


def suppressed(
    special: Mapping[str, int],
    stored: Mapping[str, Any],
    tokenizer: WhisperTokenizer,
    config: WhisperConfig,
) -> dict[str, Any]:
    """Return the suppressed tokens of config.json, or OpenAI's for its vocabularies."""
    tokens: dict[str, Any] = {}
    if openai.vocabulary_of(config, special[START]) is not None:
        tokens["suppress_tokens"] = openai.suppressed_tokens(tokenizer, special)
        tokens["begin_suppress_tokens"] = openai.first_suppressed(tokenizer, special[END])
    keys = ("suppress_tokens", "begin_suppress_tokens")
    return tokens | {key: stored[key] for key in keys if key in stored}


def add_prompt(values: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Add language and task, which older checkpoints store as `forced_decoder_ids` in either file.

    transformers reads these ids if neither language nor task is set. If the id of the language is
    null, the language is detected.
    """
    if not values["is_multilingual"]:
        return
    if values.get("language") is None and values.get("task") is None:
        key = "forced_decoder_ids"
        forced = forced_ids(values.get(key) or stored.get(key))
        names = {number: token.strip("<|>") for token, number in values["lang_to_id"].items()}
        tasks = {number: task for task, number in values["task_to_id"].items()}
        values["language"] = names.get(forced.get(LANGUAGE_POSITION))
        values["task"] = tasks.get(forced.get(TASK_POSITION))
    values["task"] = values.get("task") or "transcribe"


def alignment_heads(config: WhisperConfig, english: bool) -> list[list[int]] | None:
    """Return the heads of OpenAI's model with these dimensions; None for a compressed model."""
    size = None if getattr(config, "edgewhisper", None) else openai.size_of(config, english)
    return None if size is None else [list(head) for head in size.alignment_heads] or None


def word_delay_s(
    config: WhisperConfig, english: bool, heads: Sequence[Sequence[int]] | None
) -> float | None:
    """Return how late the word timestamps are, if the model has the dimensions and the heads of one
    of OpenAI's models for which this was measured."""
    size = openai.size_of(config, english)
    if size is None or heads != alignment_heads(config, english):
        return None
    return size.word_delay_s


# ------------------------------------------------------------------------------- contradictions


def refuse_underivable(source: object, values: Mapping[str, Any], config: WhisperConfig) -> None:
    needed = ("is_multilingual", "decoder_start_token_id", "eos_token_id")
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise Problem(
            f"{source}: {FILE} lacks {' and '.join(missing)}, there is no tokenizer to derive them "
            f"from, and a vocabulary of {config.vocab_size} tokens is not one of OpenAI's (the "
            f"model has {config.num_mel_bins} mel bins)",
            hint=f"copy the tokenizer files and {FILE} from the model that was fine-tuned; if "
            f"tokens were added to OpenAI's vocabulary, {ADDED}",
        )


def refuse_contradictions(
    source: object, values: Mapping[str, Any], derived: Mapping[str, Any], config: WhisperConfig
) -> None:
    """Raise Problem if an id in the file differs from the tokenizer's id of that name."""
    for key in ("decoder_start_token_id", "no_timestamps_token_id", "prev_sot_token_id"):
        if derived[key] is not None and values[key] != derived[key]:
            raise contradiction(source, key, values[key], derived[key])
    ends = values["eos_token_id"]
    if derived["eos_token_id"] not in (ends if isinstance(ends, list) else [ends]):
        raise contradiction(source, "eos_token_id", ends, derived["eos_token_id"])
    refuse_other_kind(source, values["is_multilingual"], derived, config)
    for table in ("lang_to_id", "task_to_id"):
        for name, number in (values.get(table) or {}).items():
            expected = (derived.get(table) or {}).get(name, number)
            if number != expected:
                raise contradiction(source, f"{table}[{name!r}]", number, expected)
            refuse_beyond(source, f"{table}[{name!r}]", [number], config.vocab_size)


def refuse_other_kind(
    source: object, actual: bool, derived: Mapping[str, Any], config: WhisperConfig
) -> None:
    """Raise Problem if the file has another value of `is_multilingual` than the tokenizer.

    A model with a vocabulary of its own may be trained without language and task in the prompt.
    """
    expected, start = derived["is_multilingual"], derived[START_KEY]
    if actual == expected or (expected and openai.vocabulary_of(config, start) is None):
        return
    raise Problem(
        f"{source}: {FILE} has is_multilingual = {actual}, but according to the tokenizer it is "
        f"{expected}: the id of {START} is {start}, with vocab_size {config.vocab_size} in "
        "config.json",
        hint=f"correct is_multilingual in {FILE}, or remove it; if the tokenizer or config.json is "
        "of another model, copy them from the model that was fine-tuned",
    )


def refuse_other_tokenizer(
    source: object, special: Mapping[str, int], config: WhisperConfig, start: int | None
) -> None:
    """Raise Problem if the tokenizer exceeds the vocabulary, or has other ids than OpenAI's.

    `start` is the stored id of <|startoftranscript|>. The vocabulary is the one with this id, or
    the one with this number of tokens: WhisperConfig's default is the start of another one.
    """
    sizes = (openai.vocabulary_of(config, start), openai.vocabulary_of(config))
    known = [openai.special_ids(size) for size in dict.fromkeys(sizes) if size is not None]
    wrong = [differing(special, ids, config) for ids in known or [{}]]
    if not all(wrong):
        return
    name, limit = wrong[0][0]
    with_start = "" if start is None else f", {START_KEY} {start}"
    raise Problem(
        f"{source}: the tokenizer's id of {name} is {special[name]}; with vocab_size "
        f"{config.vocab_size}{with_start} and num_mel_bins {config.num_mel_bins} in config.json it "
        f"must be {limit}",
        hint="the tokenizer is of another model: copy the one that belongs to these weights, "
        f"or remove its files, then OpenAI's own is used; if tokens were added to it, {ADDED}",
    )


def differing(
    special: Mapping[str, int], known: Mapping[str, int], config: WhisperConfig
) -> list[tuple[str, str]]:
    """Return name and allowed id of each token whose id is not the known one, or is too high."""
    names = [name for name in (END, START, "<|transcribe|>", NO_TIMESTAMPS) if name in special]
    allowed = {name: known.get(name) for name in names}
    return [
        (name, "less than vocab_size" if expected is None else str(expected))
        for name, expected in allowed.items()
        if special[name] >= config.vocab_size or expected not in (None, special[name])
    ]


def contradiction(source: object, key: str, actual: Any, expected: Any) -> Problem:
    return Problem(
        f"{source}: {FILE} has {key} = {actual}, but according to the tokenizer it is {expected}",
        hint=f"one of the two files is of another model: copy {FILE} from the model that was "
        "fine-tuned, or remove it, then its values are derived from the tokenizer",
    )


def refuse_unknown(source: object, values: Mapping[str, Any]) -> None:
    """Raise Problem if a multilingual model has no token for the language or task of the file."""
    if not values["is_multilingual"]:
        return
    language, task = values.get("language"), values.get("task")
    languages, tasks = values.get("lang_to_id") or {}, values.get("task_to_id") or {}
    if language and f"<|{language_code(language)}|>" not in languages:
        raise unknown(source, "language", language, [name.strip("<|>") for name in languages])
    if task and task not in tasks:
        raise unknown(source, "task", task, list(tasks))


def unknown(source: object, key: str, value: str, known: Sequence[str]) -> Problem:
    shown = ", ".join(known[:5]) + (f" and {len(known) - 5} others" if len(known) > 5 else "")
    return Problem(
        f"{source}: {FILE} has {key} = {value!r}, for which the model has no token; it has tokens "
        f"for {shown or 'none'}",
        hint=f"set {key} in {FILE} to one of these, or remove it"
        + (", then the language is detected" if key == "language" else ", then it is transcribe"),
    )


def refuse_types(source: object, values: Mapping[str, Any]) -> None:
    """Raise Problem if a value is not of its type."""
    for key, value in values.items():
        kind = TYPES.get(key, int)
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if key == "eos_token_id" and isinstance(value, list) and value:
            right = all(type(number) is int for number in value)
        if kind is dict and right:
            right = all(type(number) is int for number in value.values())
        if not right:
            raise Problem(
                f"{source}: {FILE} has {key} = {value!r}, which is not of type {kind.__name__}",
                hint=f"copy {FILE} from the model that was fine-tuned, or remove {key}",
            )


def refuse_heads(source: object, heads: Any) -> None:
    """Raise Problem if alignment heads are not pairs of a decoder layer and a head."""
    for head in heads if isinstance(heads, list) else [heads]:
        pair = isinstance(head, list) and len(head) == 2
        if not pair or not all(type(number) is int and number >= 0 for number in head):
            raise Problem(
                f"{source}: {head!r} in alignment_heads of {FILE} is not [decoder layer, head]",
                hint=f"copy {FILE} from the model that was fine-tuned, or remove alignment_heads",
            )


def refuse_delay(source: object, delay_s: float) -> None:
    """Raise Problem for a delay of word timestamps that the runner would refuse."""
    if not abs(delay_s) <= MOST_DELAY_S:
        raise Problem(
            f"{source}: {FILE} has word_delay_s = {delay_s!r}; it must be from -{MOST_DELAY_S} to "
            f"{MOST_DELAY_S} seconds",
            hint=f"correct {FILE}, or remove word_delay_s",
        )


def refuse_beyond(source: object, key: str, ids: Any, vocab_size: int) -> None:
    wrong = (
        [ids]
        if not isinstance(ids, list | tuple)
        else [number for number in ids if type(number) is not int or not 0 <= number < vocab_size]
    )
    if wrong:
        raise Problem(
            f"{source}: {FILE} (or config.json) has {wrong[0]!r} in {key}; the ids of the model "
            f"are 0 to {vocab_size - 1}",
            hint="correct the file, or copy it from the model that was fine-tuned",
        )
