"""Whisper's timestamps: the rules for generating them, and the segments that they delimit.

A timestamp is a token for a time within the window, in steps of 0.02 s. A segment is generated as
<begin> text <end>, and the next one starts with another timestamp, so timestamps between segments
come in pairs.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..interfaces import Logits
from .rules import Rules
from .softmax import log_sum_exp

STEP_SAMPLES = 320
"""0.02 s at 16 kHz."""

Part = tuple[int, int, list[int]]
"""Begin and end in steps from the window's start, and the tokens with their timestamps."""


def forbid(scores: Logits, tokens: Sequence[int], rules: Rules) -> None:
    """Set the scores (vocab,) of tokens that may not follow to -inf, in place.

    The first token must be a timestamp up to max_initial_timestamp_index. Timestamps come in pairs,
    except before the end token, and never decrease. If all timestamps together are more probable
    than any text token, a timestamp must follow.
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


def parts(tokens: list[int], rules: Rules, length: int) -> tuple[list[Part], int]:
    """Return the finished segments of a window, and the step at which the next window begins.

    `length` is the window's audio in steps. Text after the last pair is left out unless a timestamp
    closes it, as the next window begins with it. A window without pairs is one segment: it begins
    at the model's timestamp and ends with the window if no timestamp closes it. (Whisper begins it
    with the window, and ends an unclosed one where it began.)
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
    pieces = [tokens[a:b] for a, b in pairwise(cuts)]
    timed = [(piece[0] - begin, piece[-1] - begin, piece) for piece in pieces]
    return timed, length if closed else timed[-1][1]
