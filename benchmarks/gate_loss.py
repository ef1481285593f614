"""Loss of words between two versions of a model, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.normalizers import name_for
from benchmarks.speech.clips import Clip
from benchmarks.wer import interval, word_errors
from export.problem import Problem

MAX_WER_LOSS = 0.5
"""In points: hundredths of the word error rate."""
GROSS_LOSS = 10.0
"""A loss of this many points beyond the limit fails whatever the interval: it is wide for few
clips."""
MIN_WORDS = 3
"""Fewer additional word errors than this never fail."""

Counts = Sequence[tuple[int, int]]
"""Word errors and reference words of each clip."""


def normalizer_for(clips: Sequence[Clip]) -> str:
    """Return the normalizer of the clips' language, "none" if it has none."""
    return name_for(clips, otherwise="none")


def errors_of(
    clips: Sequence[Clip], texts: Sequence[str], normalizer: str
) -> list[tuple[int, int]]:
    """Return the word errors and reference words of each clip. Raises Problem if no clip has a
    word."""
    counts = word_errors(
        [clip.text for clip in clips], list(texts), normalizer, [clip.lang for clip in clips]
    )
    if not sum(words for _, words in counts):
        raise Problem(
            f"the reference texts of the gate's {len(clips)} clips have no words, so there is no "
            "error rate",
            hint="name clips with texts with --speech, or use --gate off",
        )
    return counts


def rate(counts: Counts) -> float:
    """Return the word error rate as a fraction."""
    errors, words = np.array(counts).sum(axis=0)
    return float(errors / words)


def loss(before: Counts, after: Counts) -> dict[str, Any]:
    """Return the additional word errors, in words and in points of the word error rate.

    The 95 % interval of the points is a paired bootstrap over clips.
    """
    (first, words), (second, _) = np.array(before).T, np.array(after).T
    more = second - first
    low, high = interval(more, words)
    return {
        "word_loss": int(more.sum()),
        "wer_loss_points": 100 * float(more.sum() / words.sum()),
        "wer_loss_interval": [100 * low, 100 * high],
    }


def too_much(lost: Mapping[str, Any], limit: float) -> bool:
    """Return whether a loss of words exceeds the limit, in points, by more than chance.

    It does if the whole 95 % interval of the loss is above the limit; one word in 41 is no reason
    to fail. The interval is too wide for few clips or a single clip that failed completely, so a
    loss of GROSS_LOSS points beyond the limit fails too. Fewer than MIN_WORDS additional errors
    never fail.
    """
    if lost["word_loss"] < MIN_WORDS:
        return False
    return lost["wer_loss_interval"][0] > limit or lost["wer_loss_points"] > limit + GROSS_LOSS
