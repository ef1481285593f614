"""OpenAI's Whisper models: names, dimensions, vocabularies, special tokens, alignment heads.

Sources: Radford et al. 2022 (arXiv:2212.04356) and the package openai-whisper 20250625 (MIT):
`model.py` for the dimensions, `tokenizer.py` for the special tokens and the suppressed ones,
`__init__.py` for the alignment heads. The token lists in assets/vocabularies are that package's
`gpt2.tiktoken` and `multilingual.tiktoken` in the byte alphabet of GPT-2, one token per line.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from export import vocabulary
from export.vocabulary import PREVIOUS, START, TASKS

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperTokenizer

ENGLISH_END = 50_256
"""Id of <|endoftext|> in GPT-2's vocabulary, which the English-only models use. The id of
<|startoftranscript|> is the next one."""
CANTONESE_MELS = 128
"""Mel bins of the models that know Cantonese; all others have 80."""
VOCABULARIES = Path(__file__).resolve().parent.parent / "assets" / "vocabularies"
BYTES = 256
MAX_INITIAL_TIMESTAMP_INDEX = 50
"""The first timestamp is at most one second."""
NO_SPEECH_NAMES = (vocabulary.NO_SPEECH, "<|nocaptions|>")
"""Names of the same token in newer and older tokenizers."""


@dataclass(frozen=True)
class Size:
    """The dimensions and alignment heads of a model."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int
    alignment_heads: tuple[tuple[int, int], ...]
    num_mel_bins: int = 80
    word_delay_s: float | None = None
    """Median of the word timestamps of these heads minus those of a forced alignment, measured with
    benchmarks/word_times.py; None if it was not measured. On four sets of clips it was +0.08 to
    +0.10 (tiny.en) and -0.08 to -0.04 (base)."""


ENGLISH, MULTILINGUAL, WITH_CANTONESE = 51_864, 51_865, 51_866
"""Vocabulary sizes. English-only models (ENGLISH) have no language and task in the prompt."""

# fmt: off
SIZES = {
    "tiny.en": Size(384, 4, 4, ENGLISH, (
        (1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)), word_delay_s=0.1),
    "tiny": Size(384, 4, 4, MULTILINGUAL, ((2, 2), (3, 0), (3, 2), (3, 3), (3, 4), (3, 5))),
    "base.en": Size(512, 6, 6, ENGLISH, ((3, 3), (4, 7), (5, 1), (5, 5), (5, 7))),
    "base": Size(512, 6, 6, MULTILINGUAL, (
        (3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6)), word_delay_s=-0.05),
    "small.en": Size(768, 12, 12, ENGLISH, (
        (6, 6), (7, 0), (7, 3), (7, 8), (8, 2), (8, 5), (8, 7), (9, 0), (9, 4), (9, 8), (9, 10),
        (10, 0), (10, 1), (10, 2), (10, 3), (10, 6), (10, 11), (11, 2), (11, 4))),
    "small": Size(768, 12, 12, MULTILINGUAL, (
        (5, 3), (5, 9), (8, 0), (8, 4), (8, 7), (8, 8), (9, 0), (9, 7), (9, 9), (10, 5))),
    "medium.en": Size(1024, 24, 24, ENGLISH, (
        (11, 4), (14, 1), (14, 12), (14, 14), (15, 4), (16, 0), (16, 4), (16, 9), (17, 12),
        (17, 14), (18, 7), (18, 10), (18, 15), (20, 0), (20, 3), (20, 9), (20, 14), (21, 12))),
    "medium": Size(1024, 24, 24, MULTILINGUAL, (
        (13, 15), (15, 4), (15, 15), (16, 1), (20, 0), (23, 4))),
    # no heads: v1 and v2 have the same dimensions but other heads, so a file does not show them
    "large-v1": Size(1280, 32, 32, MULTILINGUAL, ()),
    "large-v2": Size(1280, 32, 32, MULTILINGUAL, ()),
    "large-v3": Size(1280, 32, 32, WITH_CANTONESE, (
        (7, 0), (10, 17), (12, 18), (13, 12), (16, 1), (17, 14), (19, 11), (21, 4), (24, 1),
        (25, 6)), num_mel_bins=CANTONESE_MELS),
    "large-v3-turbo": Size(1280, 32, 4, WITH_CANTONESE, (
        (2, 4), (2, 11), (3, 3), (3, 6), (3, 11), (3, 14)), num_mel_bins=CANTONESE_MELS),
}
# fmt: on
HUB_IDS = {
    **{name: f"openai/whisper-{name}" for name in SIZES},
    "large-v1": "openai/whisper-large",
    "large": "openai/whisper-large-v3",
    "turbo": "openai/whisper-large-v3-turbo",
}
"""Size name -> Hub ID. `large` and `turbo` are the same models as in openai-whisper."""


# -------------------------------------------------------------------------------- vocabularies


def vocabulary_of(config: WhisperConfig, start: int | None = None) -> int | None:
    """Return the size of OpenAI's vocabulary that a model uses; None if it uses another one.

    A fine-tuned model may have additional tokens at the end, so its size may be that of another
    vocabulary. Its vocabulary is recognised by the mel bins, and by `start`, the id of
    <|startoftranscript|> (None if it is not known).
    """
    size = config.vocab_size
    if config.num_mel_bins == CANTONESE_MELS and size >= WITH_CANTONESE:
        return WITH_CANTONESE
    if start == ENGLISH_END + 1 and size >= ENGLISH:
        return ENGLISH
    if start == ENGLISH_END + 2 and size >= MULTILINGUAL:
        return MULTILINGUAL
    return size if size in (ENGLISH, MULTILINGUAL) else None


def special_ids(vocab_size: int) -> dict[str, int]:
    """Return name -> id of the special tokens."""
    first = len(ordinary_tokens(vocab_size == ENGLISH))
    return {name: first + number for number, name in enumerate(special_of(vocab_size))}


def special_of(vocab_size: int) -> list[str]:
    """Return the special tokens of one of OpenAI's vocabularies, in the order of their ids."""
    return vocabulary.special_tokens(100 if vocab_size == WITH_CANTONESE else 99)


@lru_cache(maxsize=2)
def ordinary_tokens(english: bool) -> list[str]:
    """Return the ordinary tokens in the order of their ids, in GPT-2's byte alphabet."""
    path = VOCABULARIES / f"{'english' if english else 'multilingual'}.txt.xz"
    return lzma.decompress(path.read_bytes()).decode("utf-8").split("\n")


@lru_cache(maxsize=2)
def merges_of(english: bool) -> list[tuple[str, str]]:
    """Return the merges of the byte-pair encoding in their order. The merge that makes a token
    joins the two parts into which the earlier merges split it."""
    tokens = ordinary_tokens(english)
    rank = {token: number for number, token in enumerate(tokens)}
    never = len(tokens)
    merges = []
    for token in tokens[BYTES:]:
        parts = list(token)
        while len(parts) > 2:
            ranks = [rank.get(left + right, never) for left, right in pairwise(parts)]
            first = ranks.index(min(ranks))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if parts:  # the multilingual list ends with an empty token, which has no merge
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer(vocab_size: int) -> WhisperTokenizer:
    """Return the tokenizer of one of OpenAI's vocabularies, as in its checkpoints on the hub."""
    english = vocab_size == ENGLISH
    return vocabulary.tokenizer(
        ordinary_tokens(english), merges_of(english), special_of(vocab_size)
    )


# --------------------------------------------------------------------------- suppressed tokens

SYMBOLS = (
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *("<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))"),
    *("(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"),
)
NOTES = "♩♪♫♬♭♮♯"


def suppressed_tokens(tokenizer: WhisperTokenizer, special: Mapping[str, int]) -> list[int]:
    """Return the ids that OpenAI's decoding suppresses, ascending. These are tokens that do not
    transcribe speech, such as brackets and music symbols, and the special tokens of a prompt."""

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    suppressed = {ids_of(" -")[0], ids_of(" '")[0]}
    for symbol in (*SYMBOLS, *NOTES):
        for ids in (ids_of(symbol), ids_of(f" {symbol}")):
            if len(ids) == 1 or symbol in NOTES:
                suppressed.add(ids[0])
    return sorted(suppressed | set(prompt_tokens(special)))


def prompt_tokens(special: Mapping[str, int]) -> Iterable[int]:
    """Return the ids of the special tokens of a prompt."""
    names = (START, *(f"<|{task}|>" for task in TASKS), "<|startoflm|>", PREVIOUS, *NO_SPEECH_NAMES)
    return (special[name] for name in names if name in special)


def first_suppressed(tokenizer: WhisperTokenizer, end: int) -> list[int]:
    """Return the ids that must not begin a text: a single space, and the end token."""
    return [*tokenizer.encode(" ", add_special_tokens=False), end]


# -------------------------------------------------------------------------------------- models


def size_of(config: WhisperConfig, english: bool) -> Size | None:
    """Return the size with the dimensions of a model, among the English-only models or the others.
    Returns None if there is none."""
    for size in SIZES.values():
        dimensions = (size.d_model, size.encoder_layers, size.decoder_layers, size.num_mel_bins)
        actual = (config.d_model, config.encoder_layers, config.decoder_layers, config.num_mel_bins)
        if dimensions == actual and english == (size.vocab_size == ENGLISH):
            return size
    return None


def hub_id(name: str) -> str:
    """Return the Hub ID of a size name, or the unchanged name."""
    return HUB_IDS.get(name, name)
