"""Read the .pt files of openai-whisper, which hold `dims` and `model_state_dict`.

The file is a pickle and is not trusted: it is read with `weights_only=True`, which builds tensors
and plain containers and runs no code.

    openai-whisper                      Hugging Face
    encoder.blocks.N.attn.query         model.encoder.layers.N.self_attn.q_proj
    decoder.blocks.N.cross_attn.key     model.decoder.layers.N.encoder_attn.k_proj
    decoder.blocks.N.mlp.0              model.decoder.layers.N.fc1
    encoder.ln_post, decoder.ln         model.encoder.layer_norm, model.decoder.layer_norm
    decoder.token_embedding.weight      model.decoder.embed_tokens.weight
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperConfig

from edgewhisper.checkpoints.huggingface import first_line
from export.problem import Problem

SUFFIXES = (".pt", ".pth")
RENAMED = (
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.attn\.", ".self_attn."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"\.out\.", ".out_proj."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.ln_post\.", ".layer_norm."),
    (r"decoder\.ln\.", "decoder.layer_norm."),
    (r"\.token_embedding\.", ".embed_tokens."),
    (r"\.positional_embedding$", ".embed_positions.weight"),
)
DIMENSIONS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
MOST = 1_000_000
"""Largest accepted dimension."""


def is_file(path: Path) -> bool:
    """Return whether the path is a .pt or .pth file."""
    return path.suffix in SUFFIXES and path.is_file()


def read(path: Path) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """Return the config, and the float32 tensors under Hugging Face's names. Raises Problem if the
    file is not openai-whisper's, is damaged, or needs code to be run."""
    content = load(path)
    dims = content.get("dims") if isinstance(content, dict) else None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(dims, dict) or not isinstance(state, dict):
        raise Problem(
            f"{path}: not a file of openai-whisper, it has no `dims` and `model_state_dict`",
            hint="use a .pt file of openai-whisper, or a Hugging Face directory",
        )
    tensors = {renamed(name): tensor.float() for name, tensor in tensors_of(path, state).items()}
    return config_of(path, dims, tensors), tensors


def load(path: Path) -> Any:
    """Return the content of the file. Its tensors are memory-mapped if the format allows it."""
    for mapped in (True, False):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            reason = first_line(error)
    shown = "" if reason.startswith("Weights only") else f" ({reason})"  # names torch's options
    raise Problem(
        f"{path}: the file cannot be read as plain tensors{shown}",
        hint="it is not a .pt file, is truncated, or contains code, which is not run: copy it "
        "again, or use a Hugging Face directory",
    )


def tensors_of(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Problem(f"{path}: {name!r} in model_state_dict is not a tensor", hint=AGAIN)
    return dict(state)


def renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return f"model.{name}"


def config_of(path: Path, dims: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WhisperConfig:
    for name in DIMENSIONS:
        if type(dims.get(name)) is not int or not 1 <= dims[name] <= MOST:
            raise Problem(
                f"{path}: dims[{name!r}] is {dims.get(name)!r}, not a number from 1 to {MOST}",
                hint=AGAIN,
            )
    values = {ours: dims[theirs] for theirs, ours in DIMENSIONS.items()}
    table = tensors.get("model.decoder.embed_tokens.weight")
    expected = (values["vocab_size"], values["d_model"])
    if table is None or tuple(table.shape) != expected:
        shape = None if table is None else tuple(table.shape)
        raise Problem(
            f"{path}: dims have a token table of {expected}, the file has {shape}", hint=AGAIN
        )
    ffn = {
        f"{side}_ffn_dim": len(tensors.get(f"model.{side}.layers.0.fc1.bias", ())) or 1
        for side in ("encoder", "decoder")
    }
    return WhisperConfig(**values, **ffn)


AGAIN = "the file is damaged: copy it again"
