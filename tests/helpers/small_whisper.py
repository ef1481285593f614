"""Random small Whispers, and Whispers without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, WhisperConfig

from edgewhisper.whisper import WhisperForConditionalGeneration


def random_whisper(
    digits: Path,
    d_model: int = 32,
    heads: int = 2,
    ffn: int = 48,
    encoder_layers: int = 2,
    decoder_layers: int = 2,
):
    """Drawn with torch's random numbers. It goes with the tokenizer of the embedded default, whose
    directory `digits` is, and has its window (300 positions), so that its feature extractor fits.
    """
    config = WhisperConfig.from_pretrained(digits)
    config.update(
        dict(
            d_model=d_model,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=ffn,
            decoder_ffn_dim=ffn,
            dropout=0.0,
        )
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # far from zero, so that a wrong fold or scale shows
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config = GenerationConfig.from_pretrained(digits)
    return model


def whisper_without_weights(d_model: int, layers: int, heads: int):
    """A Whisper of a published size on the meta device: shapes only."""
    config = WhisperConfig(
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
    )
    with torch.device("meta"):
        return WhisperForConditionalGeneration(config)
