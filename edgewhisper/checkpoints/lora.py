"""LoRA adapters as PEFT saves them: merged into their base, as PEFT does it.

A folder has adapter_config.json, which names the base, and adapter_model.safetensors. Adapters that
are pickles are not read. https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from export.problem import Problem

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The checkpoint that an adapter belongs to: a path, or a hub id. Raises Problem where
    adapter_config.json names none."""
    base = _config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise Problem(
            f"{folder / CONFIG}: base_model_name_or_path is {base!r}, and the adapter is of no use "
            "without its base",
            hint="name the checkpoint there that was fine-tuned",
        )
    beside = folder / base
    return str(beside) if beside.is_dir() else base


def base_is_missing(folder: Path, base: str, error: Problem) -> Problem:
    return Problem(
        f"{folder}: a LoRA adapter of {base}, which cannot be loaded ({error})",
        hint=f"correct base_model_name_or_path in {CONFIG}, or merge the adapter where its base is "
        "(PEFT: model.merge_and_unload().save_pretrained(...)) and name the merged checkpoint",
    )


def merged(folder: Path, model: nn.Module) -> nn.Module:
    """The base with the adapter's weights in its own.

    Raises Problem: no adapter of LoRA's kind, pickled or damaged weights, weights of another
    model, no PEFT.
    """
    kind = _config(folder).get("peft_type")
    if kind != "LORA":
        raise Problem(
            f"{folder / CONFIG}: peft_type is {kind!r}; adapters of kind 'LORA' are merged",
            hint="merge it with PEFT where it was trained, and name the merged checkpoint",
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
            f"{folder}: a LoRA adapter, and PEFT is not installed, which merges it",
            hint="pip install 'edgewhisper[lora]'",
        ) from error
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
        _check_names(folder, wrapped)
        return wrapped.merge_and_unload(safe_merge=True)
    except Problem:
        raise
    except Exception as error:  # PEFT's own classes are many
        raise Problem(
            f"{folder}: the adapter does not fit its base ({str(error).strip().splitlines()[0]})",
            hint=f"check base_model_name_or_path in {CONFIG}, or merge it where it was trained",
        ) from error


def _check_names(folder: Path, wrapped: Any) -> None:
    """Every tensor of the file must have a place in the model: PEFT passes over the others."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    if lost := sorted(stored - get_peft_model_state_dict(wrapped).keys()):
        raise Problem(
            f"{folder}: {len(lost)} tensors of {WEIGHTS} have no place in the base, such as "
            f"{lost[0]}",
            hint=f"check base_model_name_or_path in {CONFIG}",
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{path} cannot be read ({error})", hint="copy the adapter again") from error
    if not isinstance(held, dict):
        raise Problem(f"{path}: a {type(held).__name__}, not an object", hint="copy it again")
    return held
