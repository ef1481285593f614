"""The bytes of every token, for programs without a tokenizer library."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.problem import Problem


def token_bytes(tokenizer: Any, vocab_size: int) -> list[str | None]:
    """Return the bytes of each token in base64; None for special tokens, timestamps and unused ids.

    Byte-level BPE writes bytes as printable characters, which this function reverses. Words that
    were added to the vocabulary are stored as plain text. Raises Problem if a token holds a
    character that represents no byte.
    """
    unicode_to_byte = {char: byte for byte, char in _byte_alphabet()}
    added = tokenizer.added_tokens_decoder
    words = {
        i: base64.b64encode(token.content.encode()).decode()
        for i, token in added.items()
        if not token.special and not re.fullmatch(r"<\|.*\|>", token.content)
    }
    ordinary = {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
    return [
        _encoded(ordinary[i], i, unicode_to_byte) if i in ordinary else words.get(i)
        for i in range(vocab_size)
    ]


def write_tokens(tokenizer: Any, vocab_size: int, out: Path) -> None:
    """Write tokens.json with the bytes of every token."""
    tokens = {"bytes": token_bytes(tokenizer, vocab_size)}
    (out / "tokens.json").write_text(json.dumps(tokens) + "\n", encoding="utf-8")


def _encoded(token: str, number: int, unicode_to_byte: dict[str, int]) -> str:
    try:
        return base64.b64encode(bytes(unicode_to_byte[char] for char in token)).decode()
    except KeyError as error:
        raise Problem(
            f"token {number} ({token!r}): {error.args[0]!r} represents no byte",
            hint="the tokenizer must be Whisper's byte-level BPE",
        ) from error


def _byte_alphabet() -> Iterator[tuple[int, str]]:
    """Yield the pairs (byte, character) of GPT-2: printable Latin-1 bytes represent themselves, the
    others take the characters from U+0100 on."""
    unprintable = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield byte, chr(byte)
        else:
            yield byte, chr(0x100 + unprintable)
            unprintable += 1
