"""Greedy decoding, token for token what `generate(num_beams=1, do_sample=False)` returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

LOOP_TOKENS = 30
LOOP_COPIES = 5
"""A loop is at least 30 tokens which are at least 5 copies of one phrase, in a row."""


@dataclass(frozen=True)
class Rules:
    """The `decoding` entry of an artifact's manifest."""

    prompt: tuple[int, ...]
    eos: int
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    timestamp_begin: int | None
    """Ids from here on are timestamps, which the prompt forbids."""
    max_new_tokens: int

    @classmethod
    def from_manifest(cls, decoding: dict) -> "Rules":
        """Build the rules from JSON."""
        return cls(
            prompt=tuple(decoding["prompt"]),
            eos=decoding["eos"],
            suppress_tokens=tuple(decoding["suppress_tokens"]),
            begin_suppress_tokens=tuple(decoding["begin_suppress_tokens"]),
            timestamp_begin=decoding["timestamp_begin"],
            max_new_tokens=decoding["max_new_tokens"],
        )


def greedy(step: Callable[[Sequence[int]], Logits], rules: Rules, stop_loops: bool) -> list[int]:
    """Return the generated tokens, without prompt and end token.

    `step(ids)` feeds tokens behind those already fed and returns the logits (vocab,) that follow
    the last one. With `stop_loops`, decoding ends where the text has begun to repeat itself and
    one copy is kept.
    """
    tokens: list[int] = []
    ids: Sequence[int] = rules.prompt
    while len(tokens) < rules.max_new_tokens:
        token = choose(step(ids), rules, first=not tokens)
        if token == rules.eos:
            break
        tokens.append(token)
        ids = (token,)
        if stop_loops and (period := loop_period(tokens)):
            return cut_loop(tokens, period)
    return tokens


def choose(logits: Logits, rules: Rules, first: bool) -> int:
    """Return the likeliest token that is not suppressed; the lower id of equals, as torch does."""
    logits = logits.copy()
    logits[list(rules.suppress_tokens)] = -np.inf
    if first:
        logits[list(rules.begin_suppress_tokens)] = -np.inf
    if rules.timestamp_begin is not None:
        logits[rules.timestamp_begin :] = -np.inf
    return int(logits.argmax())


def loop_period(tokens: Sequence[int]) -> int:
    """Return the length of the phrase that the text has fallen into repeating, or 0."""
    for period in range(1, len(tokens) // LOOP_COPIES + 1):
        copies = max(LOOP_COPIES, -(-LOOP_TOKENS // period))
        tail = tokens[-period * copies :]
        if len(tail) == period * copies and tail[period:] == tail[:-period]:
            return period
    return 0


def cut_loop(tokens: list[int], period: int) -> list[int]:
    """Keep what stands before the loop, and its phrase once."""
    start = len(tokens) - period
    while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
        start -= 1
    return tokens[: start + period]
