"""Read generation_config.json as it is, and the start token that a checkpoint stores.

transformers ignores a file that it cannot parse. It then prompts the model with default values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgewhisper.quiet import quiet
from export.problem import Problem

FILE = "generation_config.json"
START_KEY = "decoder_start_token_id"
DEFAULT_START = 50_257
"""The start token of WhisperConfig if nothing is stored, and of OpenAI's English-only models."""


def read(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Return the content of the file; empty if there is no file.

    `source` is a directory or a Hub ID. Raises Problem if the file is not a JSON object.
    """
    path = _path_of(source, revision)
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(source, f"is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise _unreadable(source, f"holds a {type(values).__name__}, not a JSON object")
    return values


def stored_start(values: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """Return the id of <|startoftranscript|> that a checkpoint stores; None if it stores none.

    `values` is the content of generation_config.json, `config` that of config.json. WhisperConfig
    writes its default to config.json, so another value in either file takes precedence.
    """
    starts = [places.get(START_KEY) for places in (config, values)]
    known = [start for start in starts if type(start) is int]
    return next((start for start in known if start != DEFAULT_START), next(iter(known), None))


def is_complete(values: Mapping[str, Any]) -> bool:
    """Return whether other engines find the prompt in the file. They do not derive the values that
    are missing, nor those of a file that transformers generated from config.json."""
    needed = ["is_multilingual", START_KEY]
    if values.get("is_multilingual"):
        needed += ["lang_to_id", "task_to_id"]
    missing = [key for key in needed if values.get(key) in (None, {})]
    return not missing and not values.get("_from_model_config")


def _path_of(source: str | Path, revision: str | None) -> Path | None:
    """Return the path of the file, in the hub's cache for a Hub ID; None if there is none."""
    local = Path(source) / FILE
    if isinstance(source, Path) or Path(source).exists():
        return local if local.is_file() else None
    from transformers.utils import cached_file

    try:
        with quiet():
            found = cached_file(str(source), FILE, revision=revision)
    except Exception:  # the model has no such file, or reading the model raises the same error
        return None
    return None if found is None else Path(found)


def _unreadable(source: str | Path, what: str) -> Problem:
    return Problem(
        f"{source}: {FILE} {what}",
        hint=f"correct {FILE}, copy it from the model that was fine-tuned, or remove it, then its "
        "values are derived from the tokenizer",
    )
