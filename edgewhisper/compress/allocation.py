"""Choose how much each part of a model is reduced: dynamic programming over levels of removal.

Every part (a branch of a layer) has several levels. A level saves some cost and has a loss. The
best selection of levels for a given total saving is a multiple-choice knapsack, as in SPDY (Frantar
and Alistarh 2022, arXiv:2201.13096) and ZipLM (Kurtic et al. 2023, arXiv:2302.04089).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from export.problem import Problem

BUCKETS = 4000
"""Savings are counted in units of 1/BUCKETS of the requested total."""


class Level(NamedTuple):
    """One size of a part."""

    kept: tuple[int, ...]
    """What remains: (units,) of a feed-forward branch, or (units, rank) if it is factorised;
    (heads, v_dim, qk_dim) of an attention."""
    saved: float
    """Saved cost, compared with the dense part."""
    loss: float
    """Loss of the model, in the same unit for all parts."""


def front(levels: Sequence[Level]) -> list[Level]:
    """Return the Pareto front of saving and loss, by rising saving."""
    best: list[Level] = []
    for level in sorted(levels, key=lambda level: (-level.saved, level.loss)):
        if not best or level.loss < best[-1].loss:
            best.append(level)
    return best[::-1]


def allocate(parts: Sequence[Sequence[Level]], wanted: float) -> list[Level]:
    """Return one level of each part, with the smallest sum of losses that saves at least `wanted`.

    Savings are rounded down to 1/4000 of `wanted`, so the result may save a little more than
    needed. Raises Problem if the highest levels together save less.
    """
    fronts = [front(levels) for levels in parts]
    most = sum(levels[-1].saved for levels in fronts)
    if most < wanted:
        raise Problem(
            f"obs: {wanted:,.0f} are to be saved, and the highest levels save {most:,.0f}",
            hint="lower remove, raise most_removed, or allow more kinds of structure",
        )
    if wanted <= 0:
        return [levels[0] for levels in fronts]
    unit = wanted / BUCKETS
    best = np.full(BUCKETS + 1, np.inf)  # least loss that saves at least so many units
    best[0] = 0.0
    picks = []
    for levels in fronts:
        best, pick = add_part(best, levels, unit)
        picks.append(pick)
    if not np.isfinite(best[-1]):  # rounding left no selection but the highest levels
        return [levels[-1] for levels in fronts]
    return walk_back(fronts, picks, unit)


def add_part(
    best: np.ndarray, levels: Sequence[Level], unit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the table with one more part, and the level that each entry (saved units) uses."""
    total = len(best) - 1
    after = np.full(total + 1, np.inf)
    pick = np.zeros(total + 1, dtype=np.int64)
    index = np.arange(total + 1)
    for number, level in enumerate(levels):
        units = min(int(level.saved / unit), total)
        losses = best[np.maximum(index - units, 0)] + level.loss
        better = losses < after
        after[better], pick[better] = losses[better], number
    return after, pick


def walk_back(
    fronts: Sequence[Sequence[Level]], picks: Sequence[np.ndarray], unit: float
) -> list[Level]:
    at, chosen = BUCKETS, []
    for levels, pick in zip(reversed(fronts), reversed(picks), strict=True):
        level = levels[int(pick[at])]
        chosen.append(level)
        at = max(at - int(level.saved / unit), 0)
    return chosen[::-1]
