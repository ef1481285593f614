"""The structure of Whisper's vocabulary: ordinary tokens, special tokens, timestamps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

END = "<|endoftext|>"
START = "<|startoftranscript|>"
TASKS = ("translate", "transcribe")
PREVIOUS = "<|startofprev|>"
NO_SPEECH = "<|nospeech|>"
NO_TIMESTAMPS = "<|notimestamps|>"
TIMESTAMPS = 1501
"""Number of timestamp tokens: 0.00 to 30.00 s in steps of 0.02 s."""


def special_tokens(languages: int | None = None) -> list[str]:
    """Return the special tokens in the order of their ids, with the first `languages` languages or
    all."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    codes = (f"<|{code}|>" for code in islice(LANGUAGES, languages))
    tasks = (f"<|{task}|>" for task in TASKS)
    return [END, START, *codes, *tasks, "<|startoflm|>", PREVIOUS, NO_SPEECH, NO_TIMESTAMPS]


def timestamps() -> list[str]:
    """Return the timestamp tokens, which follow the special ones."""
    return [f"<|{number * 0.02:.2f}|>" for number in range(TIMESTAMPS)]


def tokenizer(
    ordinary: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str]
) -> WhisperTokenizer:
    """Return a byte-level BPE tokenizer of these tokens in this order, followed by the
    timestamps."""
    from tokenizers import AddedToken
    from transformers import WhisperTokenizer

    ids = {token: number for number, token in enumerate([*ordinary, *special])}
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    made = WhisperTokenizer(vocab=ids, merges=list(merges), model_max_length=448, **ends)
    added = [AddedToken(text, normalized=False, special=True) for text in special]
    made.add_special_tokens({"extra_special_tokens": added})
    made.add_tokens([AddedToken(text, normalized=False, special=False) for text in timestamps()])
    return made
