"""The models and the clips that ship with EdgeWhisper, and which clips fit which model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgewhisper.runs import newest
from export.artifact import MANIFEST
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
    """Return the number of tokens of a directory's model; None if it cannot be read.

    This is `vocab_size` in the config.json of a checkpoint or an artifact. A LoRA adapter has that
    of its base, and an artifact without config.json that of its tokens or logits.
    """
    from edgewhisper.checkpoints import lora

    if lora.is_folder(folder):
        return vocabulary_of(Path(lora.base_of(folder)))
    size = (read_config(folder) or {}).get("vocab_size")
    return _tokens_of_artifact(folder) if size is None else size


def _tokens_of_artifact(folder: Path) -> int | None:
    with suppress(OSError, ValueError, LookupError, TypeError):
        return len(json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["bytes"])
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        outputs = [spec for graph in manifest["contract"].values() for spec in graph["outputs"]]
        return next((spec["shape"][-1] for spec in outputs if spec["name"] == "logits"), None)
    return None


def speech_for(folders: Iterable[Path]) -> Path:
    """Return the manifest of shipped test clips that fits all models.

    Models in forms without a number of tokens have OpenAI's vocabulary: .pt files, CTranslate2
    directories, size names and Hub IDs. Raises Problem if the models need different clips.
    """
    sizes = {folder: vocabulary_of(folder) for folder in folders}
    manifests = {folder: default_speech(size) for folder, size in sizes.items() if size is not None}
    if len(set(manifests.values())) > 1:
        listed = ", ".join(f"{folder}: {path.parent.name}" for folder, path in manifests.items())
        raise Problem(
            f"no clips were given, and the models need different default clips ({listed})",
            hint="choose clips for all models with --speech",
        )
    return next(iter(manifests.values()), default_speech(None))


def read_config(folder: Path) -> Any:
    """Return config.json without its transformers_version, or None if it cannot be read."""
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {key: config[key] for key in config.keys() - {"transformers_version"}}
    return None
