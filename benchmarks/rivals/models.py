"""Create a checkpoint with Whisper's dimensions and random weights, without a download.

Engines need as much time for it as for a trained one, and read it like one of OpenAI's. The
vocabulary has 51 865 entries, with end of text, languages, tasks and timestamps at Whisper's ids,
and a matching tokenizer. The 50 257 ordinary tokens are all bytes and pairs of bytes, which can
spell every byte string.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.sizes import HEAD, SIZES, Size
from export import vocabulary

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig, WhisperTokenizer

ORDINARY = 50_257
LANGUAGES = 99
END, START = 50_257, 50_258
TASKS = {"translate": 50_358, "transcribe": 50_359}
SILENT = 50_363
"""The id of <|notimestamps|>."""


def make(size: str, out: Path, seed: int = 0) -> None:
    """Write a checkpoint of a named size into the directory `out`."""
    write(SIZES[size], out, seed)


def write(size: Size, out: Path, seed: int = 0) -> None:
    """Write a checkpoint with these dimensions into the directory `out`."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers import WhisperProcessor as Processor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(model_config(size)).eval()
    model.generation_config = generation_config()
    model.save_pretrained(out)
    extractor = WhisperFeatureExtractor(feature_size=size.mels)
    Processor(extractor, make_tokenizer()).save_pretrained(out)
    extractor.save_pretrained(out)  # preprocessor_config.json, which faster-whisper reads


def model_config(size: Size) -> WhisperConfig:
    from transformers import WhisperConfig

    heads, ffn = size.width // HEAD, 4 * size.width
    return WhisperConfig(
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        num_mel_bins=size.mels,
        vocab_size=size.vocabulary,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def generation_config() -> GenerationConfig:
    """Return a generation config with Whisper's ids that suppresses only timestamps."""
    from transformers import GenerationConfig

    codes = list(languages())
    return GenerationConfig(
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        max_length=448,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": START + 1 + i for i, code in enumerate(codes)},
        task_to_id=TASKS,
        no_timestamps_token_id=SILENT,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        max_initial_timestamp_index=50,
    )


def make_tokenizer() -> WhisperTokenizer:
    """Return a byte-level BPE tokenizer with the ids of OpenAI's multilingual vocabulary."""
    return vocabulary.tokenizer(*ordinary(), vocabulary.special_tokens(LANGUAGES))


def ordinary() -> tuple[list[str], list[tuple[str, str]]]:
    """Return the 50 257 ordinary tokens, all bytes first, and the merges of the pairs."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    pairs = list(islice(product(symbols, symbols), ORDINARY - len(symbols)))
    return symbols + [first + second for first, second in pairs], pairs


def languages() -> Iterator[str]:
    """Yield the language codes in Whisper's order."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as known

    return islice(known, LANGUAGES)
