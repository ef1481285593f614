"""Load and save checkpoints.

`load` reads every form in which Whisper models are distributed. `save` writes one form: a Hugging
Face directory with config.json, model.safetensors, the tokenizer and, for compressed models,
compression.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, WhisperConfig, WhisperProcessor, WhisperTokenizer

from devices.runner.machine.host import usable_cores
from edgewhisper.checkpoints import ctranslate2, generation, generation_file, huggingface, lora, pt
from edgewhisper.checkpoints import mapped as mapped_file
from edgewhisper.checkpoints.huggingface import resolved
from edgewhisper.checkpoints.processors import load_tokenizer, processor_of
from edgewhisper.model import WhisperForConditionalGeneration
from edgewhisper.quiet import quiet
from export.files import new_directory
from export.problem import Problem

COMPLETE = (
    *("config.json", "model.safetensors", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
)
"""The files that transformers and other engines need in a Hugging Face directory."""


def load(
    source: str | Path, revision: str | None = None, mapped: bool = False
) -> WhisperForConditionalGeneration:
    """Load a checkpoint as a model in float32 and evaluation mode.

    With `mapped`, `source` is a Hugging Face directory with one file of a dense model's weights.
    They stay in the file and keep their type, see edgewhisper/checkpoints/mapped.py.

    `source` is one of:

    - a size name of OpenAI's, such as "tiny.en"
    - a Hub ID
    - a Hugging Face directory, dense or compressed
    - a directory with a LoRA adapter of PEFT's, which is merged into its base
    - a CTranslate2 directory, as faster-whisper uses it
    - a .pt file of openai-whisper

    No code that comes with a checkpoint is run: weights are read from safetensors, CTranslate2's
    format, or a pickle that holds tensors only. The generation config is completed from the
    tokenizer and the vocabulary (see edgewhisper/checkpoints/generation.py).

    Raises Problem if the source does not exist, is not a Whisper checkpoint, is damaged, or has
    files that contradict each other.
    """
    return _load(source, revision, mapped)[0]


def load_with_processor(
    source: str | Path,
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load a checkpoint with its processor. It reads the tokenizer once. Raises as `load`."""
    model, tokenizer = _load(source, None)
    source = resolved(source)
    while lora.is_folder(Path(source)):
        source = resolved(lora.base_of(Path(source)))
    return model, processor_of(source, model.config, tokenizer)


def _load(
    source: str | Path, revision: str | None, mapped: bool = False
) -> tuple[WhisperForConditionalGeneration, WhisperTokenizer | None]:
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    source = resolved(source)
    stored: dict[str, Any] = {}
    if mapped:
        model, stored = _in_file(Path(source))
    elif lora.is_folder(Path(source)):
        return _from_adapter(Path(source))
    elif ctranslate2.is_folder(Path(source)):
        model, stored = _from_ctranslate2(Path(source))
    elif pt.is_file(Path(source)):
        model = _from_tensors(source, *pt.read(Path(source)))
    else:
        model, stored = huggingface.read(source, revision)
    tokenizer = load_tokenizer(
        source, model.config, stored.get(generation_file.START_KEY), revision
    )
    model.generation_config = generation.complete(
        source, model.generation_config, model.config, stored, tokenizer
    )
    for name in generation.IN_CONFIG:  # config.json repeats them, and training reads them there
        setattr(model.config, name, getattr(model.generation_config, name, None))
    return model.eval(), tokenizer


def _from_adapter(
    folder: Path,
) -> tuple[WhisperForConditionalGeneration, WhisperTokenizer | None]:
    """Load a LoRA adapter's base and merge the adapter into it."""
    base = lora.base_of(folder)
    try:
        model, tokenizer = _load(base, None)
    except Problem as error:
        raise lora.base_is_missing(folder, base, error) from error
    generation_config = model.generation_config
    model = cast(WhisperForConditionalGeneration, lora.merged(folder, model))
    model.generation_config = generation_config
    return model.eval(), tokenizer


def _in_file(folder: Path) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """Return a dense model whose weights are in its file, and the content of config.json."""
    config, stored = huggingface.read_config(folder)
    if getattr(config, "edgewhisper", None) is not None:
        raise Problem(
            f"{folder}: only uncompressed models can stay in their file; this one is compressed",
            hint="load it without mapped=True",
        )
    model = _from_tensors(folder, config, mapped_file.read(folder))
    mapped_file.compute_in_float32(model)
    if (folder / generation.FILE).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise huggingface.unreadable(folder, error) from error
    return model, stored


def _from_ctranslate2(folder: Path) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """Return the model, and the values of its config.json under Hugging Face's names."""
    variables, config = ctranslate2.read(folder), ctranslate2.read_config(folder)
    model = _from_tensors(folder, variables.config(), variables.tensors())
    names = {
        "suppress_tokens": "suppress_ids",
        "begin_suppress_tokens": "suppress_ids_begin",
        "alignment_heads": "alignment_heads",
    }
    return model, {name: config[other] for name, other in names.items() if other in config}


def _from_tensors(
    source: str | Path, config: WhisperConfig, tensors: Mapping[str, Tensor]
) -> WhisperForConditionalGeneration:
    """Return a dense model of exactly these tensors. Raises Problem if names or shapes differ."""
    try:
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
    except Exception as error:  # invalid dimensions
        raise huggingface.unreadable(source, error) from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected.pop("proj_out.weight")  # tied to the token table
    report = {
        "missing_keys": expected.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - expected.keys(),
        "mismatched_keys": [
            (name,)
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    huggingface.refuse_partial(source, report)
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    return model


# ---------------------------------------------------------------------------------------- save


def save(
    model: nn.Module,
    processor: WhisperProcessor,
    out: Path,
    compression: dict[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a checkpoint directory. `out` must not exist; after an error it does not exist either.

    `compression` is the content of compression.json (None for a model that was not compressed),
    and `card` the text of README.md. Raises Problem if the directory cannot be written.
    """
    with new_directory(out) as directory:
        with quiet():
            try:
                model.save_pretrained(directory, safe_serialization=True)
            except SafetensorError as error:  # raised when the disk is full
                raise OSError(str(error)) from error
            processor.save_pretrained(directory)
            processor.feature_extractor.save_pretrained(directory)
        if compression is not None:
            text = json.dumps(compression, indent=2, ensure_ascii=False) + "\n"
            (directory / "compression.json").write_text(text, encoding="utf-8")
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")


def as_directory(source: str | Path, folder: Path) -> Path:
    """Return the checkpoint as a complete Hugging Face directory in float32. This is `source` if it
    is one already, otherwise a copy inside `folder`. Raises as `load`."""
    path = Path(source)
    has_files = all((path / name).is_file() for name in COMPLETE)
    if has_files and generation_file.is_complete(generation_file.read(path)):
        return path
    out = folder / (path.stem if pt.is_file(path) else path.name)
    save(*load_with_processor(source), out)
    return out


def compression_record(source: str | Path) -> dict[str, Any]:
    """Return the compression.json of a local checkpoint; empty if it has none."""
    path = Path(source) / "compression.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
