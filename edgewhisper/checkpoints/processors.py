"""Load the tokenizer and the feature extractor of a checkpoint, or OpenAI's if it has none."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

from edgewhisper.checkpoints import ctranslate2, huggingface, lora, openai, pt
from edgewhisper.checkpoints.generation_file import START_KEY
from edgewhisper.checkpoints.huggingface import first_line, looks_local, resolved
from edgewhisper.quiet import quiet
from edgewhisper.shapes import POSITION_S
from export.problem import Problem
from export.vocabulary import START

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warn after a fork


def load_processor(source: str | Path, revision: str | None = None) -> WhisperProcessor:
    """Load tokenizer and feature extractor of a checkpoint, or OpenAI's if it has none. Raises
    Problem if they cannot be read, or if there is no tokenizer for the vocabulary."""
    source = resolved(source)
    if lora.is_folder(Path(source)):
        return load_processor(lora.base_of(Path(source)))
    config, start = _config_and_start(source, revision)
    tokenizer = load_tokenizer(source, config, start, revision)
    return processor_of(source, config, tokenizer, revision)


def processor_of(
    source: str | Path,
    config: WhisperConfig,
    tokenizer: WhisperTokenizer | None,
    revision: str | None = None,
) -> WhisperProcessor:
    """Return the processor of a checkpoint whose tokenizer is loaded already."""
    if tokenizer is None:
        raise _no_tokenizer(
            source,
            f"it has no tokenizer files, and {config.vocab_size} tokens match no vocabulary of "
            "OpenAI's",
        )
    extractor = _feature_extractor(source, config, revision)
    _check_window(source, config, extractor)
    return WhisperProcessor(extractor, tokenizer)


def load_tokenizer(
    source: str | Path,
    config: WhisperConfig,
    start: int | None = None,
    revision: str | None = None,
) -> WhisperTokenizer | None:
    """Load a checkpoint's tokenizer, or OpenAI's for its vocabulary if it has none.

    `start` is the id of <|startoftranscript|> that the checkpoint stores, None if it stores none.
    Returns None if the vocabulary is not OpenAI's either. Raises Problem for tokenizer files that
    cannot be read.
    """
    source = resolved(source)
    vocabulary = openai.vocabulary_of(config, start)
    if _has_tokenizer(Path(source)) or not looks_local(source):
        try:
            with quiet():
                tokenizer = WhisperTokenizer.from_pretrained(str(source), revision=revision)
        except Exception as error:
            raise _no_tokenizer(source, first_line(error)) from error
        # transformers silently makes an empty tokenizer if the files are missing
        if START in tokenizer.get_vocab():
            return tokenizer
        if _has_tokenizer(Path(source)):
            raise _no_tokenizer(source, f"the vocabulary lacks {START}")
    return None if vocabulary is None else openai.tokenizer(vocabulary)


def _has_tokenizer(folder: Path) -> bool:
    """Return whether a directory has usable tokenizer files of Hugging Face's.

    The files in CTranslate2 folders are not used: some lack merges, so text would be split into
    other tokens than the model was trained on.
    """
    if ctranslate2.is_folder(folder):
        return False
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _no_tokenizer(source: str | Path, reason: str) -> Problem:
    return Problem(
        f"{source}: no usable tokenizer ({reason})",
        hint="copy tokenizer.json and tokenizer_config.json from the model that was fine-tuned; or "
        "remove them, then OpenAI's tokenizer is used if the vocabulary is OpenAI's",
    )


def _config_and_start(source: str | Path, revision: str | None) -> tuple[WhisperConfig, int | None]:
    """Return the config, and the start token, which only Hugging Face's forms store."""
    if ctranslate2.is_folder(Path(source)):
        return ctranslate2.read(Path(source)).config(), None
    if pt.is_file(Path(source)):
        return pt.read(Path(source))[0], None
    config, stored = huggingface.read_config(source, revision)
    return config, stored.get(START_KEY)


def _feature_extractor(
    source: str | Path, config: WhisperConfig, revision: str | None
) -> WhisperFeatureExtractor:
    """Return the checkpoint's feature extractor, or Whisper's for its mel bands and window."""
    names = ("preprocessor_config.json", "processor_config.json")
    if looks_local(source) and not any((Path(source) / name).is_file() for name in names):
        window_s = round(config.max_source_positions * POSITION_S)
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=window_s)
    try:
        with quiet():
            return WhisperFeatureExtractor.from_pretrained(str(source), revision=revision)
    except Exception as error:
        raise Problem(
            f"{source}: no usable feature extractor ({first_line(error)})",
            hint="copy preprocessor_config.json from the base model; or remove it, then Whisper's "
            "own feature extractor is used",
        ) from error


def _check_window(
    source: str | Path, config: WhisperConfig, extractor: WhisperFeatureExtractor
) -> None:
    """Raise Problem if the encoder cannot read the features. Two mel frames make one position."""
    pairs = {
        "feature_size": (extractor.feature_size, "num_mel_bins", config.num_mel_bins),
        "nb_max_frames": (
            extractor.n_samples // extractor.hop_length,
            "2 * max_source_positions",
            2 * config.max_source_positions,
        ),
    }
    for key, (actual, config_key, expected) in pairs.items():
        if actual != expected:
            raise Problem(
                f"{source}: preprocessor_config.json has {key} = {actual}, and config.json has "
                f"{config_key} = {expected}",
                hint="copy preprocessor_config.json from the model that was fine-tuned; or remove "
                "it, then Whisper's own feature extractor is used",
            )
