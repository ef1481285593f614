"""The models and the clips that ship with EdgeWhisper, and which clips fit which model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgewhisper.runs import newest
from export.problem import Problem

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = ASSETS / "whisper-digits"
"""The embedded model: a small Whisper that knows spoken digits and needs no download."""
ENGLISH = ASSETS / "whisper-tiny-en"
"""The embedded artifact: OpenAI's tiny.en, compressed. Recognises English without a download."""
SPEECH = ASSETS / "speech"
"""Folder of spoken digits: train.jsonl, dev.jsonl, test.jsonl."""
COMMON_VOICE = ASSETS / "common-voice"
"""Folder of English sentences: calibration.jsonl, dev.jsonl, test.jsonl."""


def default_speech(vocabulary: int | None) -> Path:
    """Return the manifest of shipped test clips for a model with `vocabulary` tokens.

    Models with the vocabulary of the embedded model get spoken digits, all others English
    sentences.
    """
    digits = vocabulary == vocabulary_of(DEFAULT_MODEL)
    return (SPEECH if digits else COMMON_VOICE) / "test.jsonl"


def default_artifact(core_ml: bool = False) -> Path:
    """Return the newest artifact in ./edgewhisper-runs, or else the embedded one. Core ML artifacts
    are included with `core_ml`."""
    return newest("artifact", without="" if core_ml else "-coreml-") or ENGLISH


def vocabulary_of(folder: Path) -> int | None:
    """Return the number of tokens in the config.json of a checkpoint or an artifact, or None."""
    return (read_config(folder) or {}).get("vocab_size")


def speech_for(folders: Iterable[Path]) -> Path:
    """Return the manifest of shipped test clips that fits all models.

    Raises Problem if the models need different clips.
    """
    sizes = {folder: vocabulary_of(folder) for folder in folders}
    manifests = {folder: default_speech(size) for folder, size in sizes.items() if size is not None}
    if len(set(manifests.values())) > 1:
        listed = ", ".join(f"{folder}: {path.parent.name}" for folder, path in manifests.items())
        raise Problem(
            f"no clips were given, and the models need different default clips ({listed})",
            hint="choose clips for all models with --speech",
        )
    return next(iter(manifests.values()), SPEECH / "test.jsonl")


def read_config(folder: Path) -> Any:
    """Return config.json without its transformers_version, or None if it cannot be read."""
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {key: config[key] for key in config.keys() - {"transformers_version"}}
    return None
