"""Whisper's timestamps: the rules under which they are said, and the segments they mark out.

A timestamp is a token that stands for a time within the window, in steps of 0.02 s. A segment is
said as <begin> text <end>, the next one starts with another timestamp: in the middle of a text they
come in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .rules import Logits, Rules

STEP_SAMPLES = 320
"""0.02 s at 16 kHz."""

Part = tuple[int, int, list[int]]
"""Begin and end in steps from the window's begin, and the tokens, timestamps among them."""


def forbid(scores: Logits, tokens: Sequence[int], rules: Rules) -> None:
    """Set the scores (vocab,) of what may not follow the tokens to -inf, in place.

    The first token is a timestamp within the first second or so. Timestamps come in pairs, except
    before the end, and never go back. Where all timestamps together are likelier than any text
    token, a timestamp is said.
    """
    begin = rules.timestamp_begin
    assert begin is not None
    text, stamps, added = np.split(scores, [begin, rules.timestamp_end or len(scores)])  # views
    if not tokens:
        text[:] = added[:] = -np.inf
        if rules.max_initial_timestamp_index is not None:
            stamps[rules.max_initial_timestamp_index + 1 :] = -np.inf
        return
    after_stamp = rules.is_timestamp(tokens[-1])
    after_pair = after_stamp and (len(tokens) < 2 or rules.is_timestamp(tokens[-2]))
    if after_pair:
        stamps[:] = -np.inf
        return
    if after_stamp:
        text[: rules.eos] = added[:] = -np.inf
    last = next((token for token in reversed(tokens) if rules.is_timestamp(token)), begin - 1)
    stamps[: last - begin + (not after_stamp)] = -np.inf
    if log_sum_exp(stamps) > max(text.max(), added.max(initial=-np.inf)):
        text[:] = added[:] = -np.inf


def log_sum_exp(scores: Logits) -> float:
    """Return the logarithm of the sum of exponentials; -inf for nothing but -inf."""
    highest = scores.max()
    if highest == -np.inf:
        return -np.inf
    return float(highest + np.log(np.exp(scores - highest).sum()))


def parts(tokens: list[int], rules: Rules, length: int) -> tuple[list[Part], int]:
    """Return the finished segments of a window and the step where the next window begins.

    `length` is the steps of sound in the window. Text behind the
    last pair is left out where no timestamp closes it: the next window begins with it. A window
    without pairs is one segment. Whisper lets that begin with the window, and end where it began if
    no timestamp closes it; here it begins as the model says, and ends with the window.
    """
    begin = rules.timestamp_begin
    assert begin is not None
    is_stamp = [rules.is_timestamp(token) for token in tokens]
    pairs = [i for i in range(1, len(tokens)) if is_stamp[i - 1] and is_stamp[i]]
    if not pairs:
        start = tokens[0] - begin if is_stamp[0] else 0
        stop = tokens[-1] - begin if is_stamp[-1] and len(tokens) > 1 else length
        return [(start, stop, tokens)], length
    closed = is_stamp[-2:] == [False, True]
    cuts = [0, *pairs, *([len(tokens)] if closed else [])]
    found = [tokens[a:b] for a, b in pairwise(cuts)]
    marked = [(part[0] - begin, part[-1] - begin, part) for part in found]
    return marked, length if closed else marked[-1][1]
