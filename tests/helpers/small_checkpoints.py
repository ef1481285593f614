"""Small random models with OpenAI's vocabularies, and the folders that they are saved in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import WhisperConfig

from edgewhisper.checkpoints.openai import ENGLISH
from edgewhisper.whisper import WhisperForConditionalGeneration

SMALL = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_source_positions=1500,
)


def random_of(vocab_size: int, **more: int) -> WhisperForConditionalGeneration:
    """Return a small random model with one of OpenAI's vocabularies."""
    torch.manual_seed(vocab_size)
    start = 50257 if vocab_size == ENGLISH else 50258
    values = SMALL | {"vocab_size": vocab_size, "decoder_start_token_id": start} | more
    return WhisperForConditionalGeneration(WhisperConfig(**values))


def bare(model: WhisperForConditionalGeneration, out: Path) -> Path:
    """Save weights and config.json only."""
    model.save_pretrained(out)
    (out / "generation_config.json").unlink()
    config = json.loads((out / "config.json").read_text())
    for key in ("suppress_tokens", "begin_suppress_tokens", "eos_token_id", "bos_token_id"):
        config.pop(key, None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def edit(path: Path, **values: object) -> None:
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(stored | values))


def folder_of(out: Path, content: bytes, **config: object) -> Path:
    """Write a CTranslate2 folder."""
    out.mkdir()
    (out / "model.bin").write_bytes(content)
    (out / "config.json").write_text(json.dumps(config))
    return out


def same_weights(actual, expected, tolerance: float = 0.0) -> bool:
    left, right = actual.state_dict(), expected.state_dict()
    return left.keys() == right.keys() and all(
        (left[name] - right[name]).abs().max() <= tolerance * right[name].abs().max()
        for name in left
    )
