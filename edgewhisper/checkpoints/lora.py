"""Merge LoRA adapters (Hu et al. 2021, arXiv:2106.09685) into their base with PEFT.

An adapter is a folder with adapter_config.json, which names the base, and
adapter_model.safetensors. Pickled adapters are not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from edgewhisper.checkpoints.huggingface import first_line
from export.problem import Problem

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_folder(folder: Path) -> bool:
    """Return whether a directory is a LoRA adapter."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """Return the path or Hub ID of an adapter's base. Raises Problem if it has none."""
    base = _config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise Problem(
            f"{folder / CONFIG}: base_model_name_or_path is {base!r}, and the adapter cannot be "
            "used without its base",
            hint="set it to the checkpoint that was fine-tuned",
        )
    inside = folder / base
    return str(inside) if inside.is_dir() else base


def base_is_missing(folder: Path, base: str, error: Problem) -> Problem:
    return Problem(
        f"{folder}: a LoRA adapter of {base}, which cannot be loaded ({error})",
        hint=f"correct base_model_name_or_path in {CONFIG}, or merge the adapter on the machine "
        "that has its base (PEFT: model.merge_and_unload().save_pretrained(...)) and use that",
    )


def merged(folder: Path, model: nn.Module) -> nn.Module:
    """Return the base with the adapter merged into its weights. Raises Problem if the adapter is
    not a LoRA, its weights are pickled, damaged or of another model, or PEFT is not installed."""
    kind = _config(folder).get("peft_type")
    if kind != "LORA":
        raise Problem(
            f"{folder / CONFIG}: peft_type is {kind!r}; only 'LORA' is supported",
            hint="merge it with PEFT where it was trained, and use the merged checkpoint",
        )
    if not (folder / WEIGHTS).is_file():
        pickled = f"; {PICKLED} is a pickle and is not read" if (folder / PICKLED).exists() else ""
        raise Problem(
            f"{folder}: there is no {WEIGHTS}{pickled}",
            hint="save the adapter again with save_pretrained(..., safe_serialization=True)",
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise Problem(
            f"{folder}: PEFT is not installed, which merging this LoRA adapter needs",
            hint="pip install 'edgewhisper[lora]'",
        ) from error
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
        _check_names(folder, wrapped)
        return wrapped.merge_and_unload(safe_merge=True)
    except Problem:
        raise
    except Exception as error:  # PEFT raises many classes
        raise Problem(
            f"{folder}: the adapter does not fit its base ({first_line(error)})",
            hint=f"check base_model_name_or_path in {CONFIG}, or merge it where it was trained",
        ) from error


def _check_names(folder: Path, wrapped: Any) -> None:
    """Raise Problem if tensors of the file do not match the model: PEFT ignores them silently."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    if unused := sorted(stored - get_peft_model_state_dict(wrapped).keys()):
        raise Problem(
            f"{folder}: {len(unused)} tensors of {WEIGHTS} have no place in the base, such as "
            f"{unused[0]}",
            hint=f"check base_model_name_or_path in {CONFIG}",
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{path} cannot be read ({error})", hint="copy the adapter again") from error
    if not isinstance(config, dict):
        raise Problem(f"{path}: a {type(config).__name__}, not an object", hint="copy it again")
    return config
