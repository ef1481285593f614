"""Detects a text that repeats one phrase, and cuts it to one copy."""

from collections.abc import Sequence

LOOP_TOKENS = 30
LOOP_COPIES = 5
"""A loop is a phrase repeated at least 5 times in a row, over at least 30 tokens."""


def loop_period(tokens: Sequence[int]) -> int:
    """Return the length of the phrase that the end of the text repeats, or 0."""
    for period in range(1, len(tokens) // LOOP_COPIES + 1):
        if tokens[-1] != tokens[-1 - period]:
            continue
        copies = max(LOOP_COPIES, -(-LOOP_TOKENS // period))
        tail = tokens[-period * copies :]
        if len(tail) == period * copies and tail[period:] == tail[:-period]:
            return period
    return 0


def without_loop(tokens: list[int]) -> list[int]:
    """Return the text up to the first loop, with its phrase once."""
    for length in range(LOOP_TOKENS, len(tokens) + 1):
        if period := loop_period(tokens[:length]):
            return cut_loop(tokens[:length], period)
    return tokens


def cut_loop(tokens: list[int], period: int) -> list[int]:
    """Return the text before the loop at its end, with the loop's phrase once."""
    start = len(tokens) - period
    while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
        start -= 1
    return tokens[: start + period]
