"""Hugging Face's configuration and tokenizer files, saved alongside the graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn


def save_hub_files(model: nn.Module, processor: Any, out: Path) -> None:
    """Save the configuration, tokenizer and feature extractor, for tools that read them."""
    save_configuration(model, processor, out)
    processor.tokenizer.save_pretrained(out)
    write_compactly(out / "tokenizer.json")


def save_configuration(model: nn.Module, processor: Any, out: Path) -> None:
    """Save the files of `save_hub_files` without the tokenizer, which tokens.json replaces."""
    for part in (model.config, model.generation_config, processor.feature_extractor):
        part.save_pretrained(out)


def write_compactly(path: Path) -> None:
    """Rewrite a JSON file without indentation, which is much of the size of a small artifact."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
