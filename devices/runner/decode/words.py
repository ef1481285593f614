"""Word timestamps from the attention of the alignment heads, as in OpenAI's whisper/timing.py.

Each row of the attention is a token, each column an encoder position of 0.02 s. The attention of
each head is normalised over the tokens and smoothed by a median filter over time, then the heads
are averaged. Dynamic time warping finds the monotonic path through the result with the most
attention. A token begins where the path enters its row. Unlike OpenAI's, borders of words are then
moved to the edges of pauses.
"""

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..audio import FRAME, SAMPLING_RATE, quiet_power, runs
from ..interfaces import Pcm
from .text import Tokens

Floats = npt.NDArray[np.floating]

STEP_S = 0.02
"""Seconds per encoder position."""
MEDIAN_WIDTH = 7
MEDIAN_NETWORK = (
    *((0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6)),
    *((2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4)),
)
"""Pairs to put in order, one after the other, so that the median of 7 values is in the middle
(Devillard, Fast median search, 1998). np.partition takes three times as long."""
UNSPACED = frozenset(("zh", "ja", "th", "lo", "my", "yue"))
"""Languages without spaces between words: each character is a word."""
BEFORE_WORD = frozenset("\"'“¿([{-")
AFTER_WORD = frozenset("\"'.。,，!！?？:：”)]}、")
SENTENCE_END = frozenset(".。!！?？")
LONGEST_MEDIAN_S = 0.7
NEAR_S = 0.3
"""A border is moved to a pause by at most this."""
PAUSE_S = 0.15
"""Longer than the closure of a stop consonant."""


class TimedWord(NamedTuple):
    """A word of a window: its text with the space before it, times in seconds from the start of the
    window, and its tokens as a range of the window's text tokens."""

    text: str
    start_s: float
    end_s: float
    first: int
    stop: int


def timed_words(
    attention: Floats,
    before: int,
    tokens: Sequence[int],
    table: Tokens,
    language: str | None,
    delay_s: float = 0.0,
) -> list[TimedWord]:
    """Return the words of a window's text tokens.

    `attention` (heads, rows, positions) has a row for each of the `before` + 1 tokens of the
    prompt, of the text, and of the end token. `delay_s` is how late these heads are.
    """
    late = np.array(token_starts(attention, before))
    starts = np.clip(late - delay_s, 0, attention.shape[-1] * STEP_S).tolist()
    groups = characters(tokens, table)
    if language not in UNSPACED:
        groups = spaced(groups)
    ends = np.cumsum([0, *(size for _, size in groups)])
    words = [
        TimedWord(text, starts[a], starts[b], int(a), int(b))
        for (text, _), (a, b) in zip(groups, pairwise(ends), strict=True)
    ]
    return with_punctuation(shortened(words))


# --------------------------------------------------------------------------------- times of tokens


def token_starts(attention: Floats, before: int) -> list[float]:
    """Return the start of each text token and the end of the last in seconds: (tokens + 1,)."""
    deviation = attention.std(axis=1, keepdims=True)
    weights = (attention - attention.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-12)
    matrix = median_filter(weights).mean(axis=0)
    rows, columns = warping_path(-matrix[before:-1])
    first = np.searchsorted(rows, np.arange(rows[-1] + 1))  # where the path enters each row
    return [float(column) * STEP_S for column in columns[first]]


def median_filter(weights: Floats) -> Floats:
    """Return the median of MEDIAN_WIDTH neighbours on the last axis, which is mirrored at its ends.
    An axis that is too short for this is returned as it is."""
    half, length = MEDIAN_WIDTH // 2, weights.shape[-1]
    if length <= half:
        return weights
    wide = np.pad(weights, ((0, 0), (0, 0), (half, half)), mode="reflect")
    shifted = [wide[..., i : i + length] for i in range(MEDIAN_WIDTH)]
    for i, j in MEDIAN_NETWORK:
        shifted[i], shifted[j] = (f(shifted[i], shifted[j]) for f in (np.minimum, np.maximum))
    return shifted[half]


def warping_path(cost: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows and columns of the cheapest monotonic path from the first to the last cell.

    Cells of one anti-diagonal depend on the two before it only, and are computed at once. In a
    C-ordered array with columns + 1 columns they are `columns` apart.
    """
    rows, columns = cost.shape
    total = np.full((rows + 1) * (columns + 1), np.inf)
    total[0] = 0
    steps = np.zeros((rows + 1) * (columns + 1), np.int8)
    own = np.zeros((rows + 1, columns + 1))
    own[1:, 1:] = cost
    flat = own.reshape(-1)
    for diagonal in range(2, rows + columns + 1):
        low, high = max(1, diagonal - columns), min(rows, diagonal - 1)
        here = slice(low * columns + diagonal, high * columns + diagonal + 1, columns)
        both, down, right = (
            total[here.start - back : here.stop - back : columns]
            for back in (columns + 2, columns + 1, 1)
        )
        step = np.where(
            (both < down) & (both < right), 0, np.where((down < both) & (down < right), 1, 2)
        )
        steps[here] = step
        total[here] = flat[here] + np.choose(step, (both, down, right))
    return backtrace(steps.reshape(rows + 1, columns + 1))


def backtrace(
    steps: npt.NDArray[np.int8],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Follow the steps (0 both, 1 row, 2 column) from the last cell to the first."""
    row, column = steps.shape[0] - 1, steps.shape[1] - 1
    path = []
    while row > 0 or column > 0:
        path.append((row - 1, column - 1))
        step = 2 if row == 0 else 1 if column == 0 else steps[row, column]
        row, column = row - (step != 2), column - (step != 1)
    rows, columns = np.array(path[::-1]).T
    return rows, columns


# ------------------------------------------------------------------------------------------ words


def characters(tokens: Sequence[int], table: Tokens) -> list[tuple[str, int]]:
    """Return texts and numbers of tokens, split wherever the tokens end in a whole character."""
    groups, content, size = [], b"", 0
    for token in tokens:
        content, size = content + table[token], size + 1
        try:
            groups.append((content.decode(), size))
        except UnicodeDecodeError:
            continue
        content, size = b"", 0
    return [*groups, (content.decode(errors="replace"), size)] if size else groups


def spaced(groups: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Join groups of tokens to words, which begin with a space or are punctuation."""
    words: list[tuple[str, int]] = []
    for text, size in groups:
        mark = text.strip() in string.punctuation
        if text.startswith(" ") or mark or not words:
            words.append((text, size))
        else:
            words[-1] = words[-1][0] + text, words[-1][1] + size
    return words


def shortened(words: list[TimedWord]) -> list[TimedWord]:
    """Shorten words beside the end of a sentence that last longer than twice the median: they
    include a pause."""
    durations = [word.end_s - word.start_s for word in words if word.end_s > word.start_s]
    longest = 2 * min(LONGEST_MEDIAN_S, float(np.median(durations))) if durations else 0.0
    result = words[:1]
    for before, word in pairwise(words):
        if word.end_s - word.start_s > longest:
            if word.text in SENTENCE_END:
                word = word._replace(end_s=word.start_s + longest)
            elif before.text in SENTENCE_END:
                word = word._replace(start_s=word.end_s - longest)
        result.append(word)
    return result


def at_pauses(words: Sequence[TimedWord], pcm: Pcm) -> list[TimedWord]:
    """Move the borders between words to the edges of the nearest pause, if it is within NEAR_S. The
    attention is vague in a pause, so that one of the words would last through it."""
    if not words:
        return []
    borders = np.array([*(word.start_s for word in words), words[-1].end_s])
    result = list(words)
    for begin, end in sorted(pauses(pcm), key=lambda span: span[1] - span[0]):  # longest last
        away = np.maximum(0, np.maximum(begin - borders, borders - end))
        i = int(away.argmin())
        if away[i] > NEAR_S:
            continue
        if i > 0 and begin > result[i - 1].start_s:
            result[i - 1] = result[i - 1]._replace(end_s=begin)
        if i < len(words) and end < result[i].end_s:
            result[i] = result[i]._replace(start_s=end)
    return result


def pauses(pcm: Pcm) -> list[tuple[float, float]]:
    """Return start and end in seconds of the stretches of at least PAUSE_S that are quiet, compared
    with the loud parts. In a noisy recording there are none."""
    frames = pcm[: len(pcm) // FRAME * FRAME].reshape(-1, FRAME)
    if len(frames) < 3:
        return []
    power = np.convolve(np.square(frames).mean(axis=1), np.ones(3) / 3, mode="same")
    spans = runs(power < quiet_power(power)) * (FRAME / SAMPLING_RATE)
    return [(float(a), float(b)) for a, b in spans if b - a >= PAUSE_S]


def with_punctuation(words: Sequence[TimedWord]) -> list[TimedWord]:
    """Join punctuation to the word after it or before it; the times are those of the word."""
    joined: list[TimedWord] = []
    for word in reversed(words):
        if joined and word.text.startswith(" ") and word.text.strip() in BEFORE_WORD:
            after = joined[-1]
            joined[-1] = after._replace(text=word.text + after.text, first=word.first)
        else:
            joined.append(word)
    result: list[TimedWord] = []
    for word in reversed(joined):
        if result and word.text in AFTER_WORD and not result[-1].text.endswith(" "):
            before = result[-1]
            result[-1] = before._replace(text=before.text + word.text, stop=word.stop)
        else:
            result.append(word)
    return result
