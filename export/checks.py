"""Checks of a model and its processor before an artifact is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from export.manifest import decoding_rules
from export.problem import Problem
from export.tokens import token_bytes


def check(model: nn.Module, processor: Any) -> None:
    """Raise Problem if the exported graphs could not represent the model exactly. Checks the
    activation, the tied token table, the window of the feature extractor, the prompt in the
    generation config, and that every token represents bytes."""
    check_model(model)
    check_window(model, processor.feature_extractor)
    decoding_rules(model)
    token_bytes(processor.tokenizer, model.config.vocab_size)


def check_model(model: nn.Module) -> None:
    """Raise Problem unless the model has the exact GELU and one table for input and output
    tokens."""
    if model.config.activation_function != "gelu":
        raise Problem(
            f"the model's activation is {model.config.activation_function!r}; "
            "the exported graphs compute Whisper's 'gelu'",
            hint="start from a Whisper checkpoint with activation_function gelu",
        )
    if not _tied(model.proj_out, model.model.decoder.embed_tokens):
        raise Problem(
            "the model's output table (proj_out) differs from its token table; "
            "the exported graphs share one",
            hint="train with tie_word_embeddings = true, as Whisper was",
        )


def check_window(model: nn.Module, extractor: Any) -> None:
    """Raise Problem unless the feature extractor has the model's window: two mel frames per encoder
    position."""
    expected = 2 * model.config.max_source_positions * extractor.hop_length
    if extractor.n_samples != expected:
        raise Problem(
            f"the feature extractor's window has {extractor.n_samples} samples, "
            f"the model's {expected}",
            hint="set chunk_length in preprocessor_config.json to the model's window in seconds",
        )
    if extractor.feature_size != model.config.num_mel_bins:
        raise Problem(
            f"the feature extractor makes {extractor.feature_size} mel bins, "
            f"the model reads {model.config.num_mel_bins}",
            hint="take preprocessor_config.json from the model that was compressed",
        )


def _tied(output: nn.Module, table: nn.Module) -> bool:
    if hasattr(table, "rows"):
        return getattr(output, "table", None) is table
    return output.weight is table.weight or output.weight.equal(table.weight)


def check_choice(kind: str, given: str, known: Sequence[str], target: str) -> None:
    """Raise Problem if `given` is not one of the known layouts or precisions of a target."""
    if given not in known:
        raise Problem(
            f"unknown {kind} {given!r} for {target}", hint=f"choose one of: {', '.join(known)}"
        )
