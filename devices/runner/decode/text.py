"""Converts tokens to text with a table, so that a device needs no tokenizer library."""

from array import array
from binascii import a2b_base64
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.files import read_json
from ..problem import RunnerProblem

MOST_BYTES = 2**24


class Tokens:
    """The bytes of every token, in one array; separate objects would take 7 MB more."""

    def __init__(self, rows: Iterable[bytes]) -> None:
        joined, ends = bytearray(), array("q", [0])
        for row in rows:
            joined += row
            ends.append(len(joined))
        self.joined, self.ends = bytes(joined), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, token: int) -> bytes:
        return self.joined[self.ends[token] : self.ends[token + 1]]

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The lowest id of the bytes of every ordinary token; needed for prompts only."""
        return {self[token]: token for token in reversed(range(len(self))) if self[token]}


def read_tokens(path: Path) -> Tokens:
    """Read tokens.json: the bytes of each ordinary token id; special tokens are empty."""
    content = read_json(path, MOST_BYTES)
    try:
        return Tokens(a2b_base64(row, strict_mode=True) if row else b"" for row in list_of(content))
    except (ValueError, KeyError, TypeError) as error:
        raise RunnerProblem(
            f"{path}: the token table cannot be read ({error})",
            "copy the artifact again",
        ) from None


def list_of(content: Any) -> list[Any]:
    """Return the rows of the token table."""
    rows = content["bytes"]
    if not isinstance(rows, list):
        raise TypeError("`bytes` is not a list")
    return rows


def to_text(tokens: list[int], table: Tokens) -> str:
    """Return the text of tokens. Bytes are joined first: a character may span several tokens."""
    joined = b"".join(table[token] for token in tokens if token < len(table))
    return joined.decode("utf-8", errors="replace").strip()


def join(pieces: list[str]) -> str:
    """Join the texts of successive windows with spaces."""
    return " ".join(piece for piece in pieces if piece)
