"""Tokens to text by table, so that a device needs no tokenizer library."""

import base64
import json
from pathlib import Path

from .problem import RunnerProblem


def read_tokens(path: Path) -> list[bytes]:
    """Read tokens.json: the bytes of each ordinary token id; special tokens are empty."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["bytes"]
        return [base64.b64decode(row) if row else b"" for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunnerProblem(
            f"{path}: the token table cannot be read ({error})",
            "copy the artifact again",
        ) from None


def to_text(tokens: list[int], table: list[bytes]) -> str:
    """Join the bytes of the tokens first: one letter may be spread over several tokens."""
    joined = b"".join(table[token] for token in tokens if token < len(table))
    return joined.decode("utf-8", errors="replace").strip()


def join(pieces: list[str]) -> str:
    """Put the texts of successive windows together."""
    return " ".join(piece for piece in pieces if piece)
