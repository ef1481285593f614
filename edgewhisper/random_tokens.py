"""Random tokens before a text, so that a decoder reads more of its vocabulary.

A hundred clips contain a few hundred of Whisper's 51,865 tokens. A decoder that is fitted or
distilled on their texts only is wrong at other tokens. A dense model's states are defined for any
tokens, so random ones before the text of a clip are input that costs no speech.
"""

from functools import cache
from typing import Any

import torch

COMMON = 1000
"""The text token number i is drawn with a probability proportional to 1 / (i + COMMON): byte pair
encodings number frequent tokens first."""


def drawn(tokenizer: Any, texts: int, length: int, seed: int) -> list[list[int]]:
    """Return the ids of `length` random text tokens for each of so many texts."""
    ids = text_tokens(tokenizer)
    weights = 1 / (torch.arange(len(ids)) + COMMON)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(weights, texts * length, True, generator=generator)
    return [[ids[i] for i in row] for row in rows.view(texts, length).tolist()]


@cache
def text_tokens(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that are part of a text, ascending."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
