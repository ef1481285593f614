"""Shorten texts for error messages, around their first difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = 100
"""Characters of a text in an error message."""


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def around_difference(one: str, other: str) -> tuple[str, str]:
    """Return both texts, cut around their first difference."""
    start = common_length(one, other) - SHOWN // 2
    if start <= 0 or max(len(one), len(other)) <= SHOWN:
        return cut(one), cut(other)
    return cut("..." + one[start:]), cut("..." + other[start:])


def cut(text: str) -> str:
    """Return a text of at most SHOWN characters, with "..." if it was longer."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
