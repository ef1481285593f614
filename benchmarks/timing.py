"""Statistics of measured times: the median, its interval, and the ratio of two medians.

Medians are used because disturbances only make a time longer. Results store every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

COVERAGE = 0.95
RESAMPLES = 2000
UNSTABLE_SPREAD = 0.10
"""A run is unstable if the medians of its rounds differ by more than this share."""
ENOUGH_ROUNDS = 3
"""With fewer rounds, the variation between rounds cannot be estimated."""


@dataclass(frozen=True)
class Summary:
    """Summary of samples, in their unit."""

    median: float
    interval: tuple[float, float]
    """95 % confidence interval of the median; the whole range for fewer than six samples."""
    outliers: float
    """Share of samples above the upper quartile by more than 1.5 interquartile ranges (Tukey)."""
    unstable: bool
    """Whether the medians of the rounds differ by more than 10 %."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: Sequence[float], rounds: int = 1) -> Summary:
    """Summarise samples that consist of `rounds` equal consecutive parts."""
    values = np.asarray(samples, float)
    low, high = np.quantile(values, [0.25, 0.75])
    medians = np.median(by_round(values, rounds), axis=1)
    return Summary(
        median=float(np.median(values)),
        interval=median_interval(values),
        outliers=float(np.mean(values > high + 1.5 * (high - low))),
        unstable=bool(np.ptp(medians) > UNSTABLE_SPREAD * np.median(medians)),
    )


def by_round(samples: np.ndarray, rounds: int) -> np.ndarray:
    """Return samples as (rounds, samples per round); as one round if they do not divide evenly."""
    return samples.reshape(rounds if len(samples) % rounds == 0 else 1, -1)


def median_interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the order statistics that enclose the median with at least 95 % confidence.

    Distribution-free: the number of samples below the median is binomial (n, 1/2). David and
    Nagaraja, Order Statistics (2003), 7.1.
    """
    ordered = np.sort(samples)
    skipped = max(rank_below_median(len(ordered)) - 1, 0)
    return float(ordered[skipped]), float(ordered[-1 - skipped])


def rank_below_median(count: int) -> int:
    """Return the largest rank k, from 1, with P(Binomial(count, 1/2) < k) <= 2.5 %; or 0."""
    tail = (1 - COVERAGE) / 2
    if count > 500:  # the normal approximation, within one sample here
        return int((count + NormalDist().inv_cdf(tail) * math.sqrt(count)) / 2)
    k, total = 0, 0
    while (total := total + math.comb(count, k)) <= tail * 2**count:
        k += 1
    return k


def ratio(
    samples: Sequence[float], base: Sequence[float], rounds: int, base_rounds: int
) -> tuple[float, tuple[float, float]]:
    """Return the ratio of the medians and its 95 % interval.

    The bootstrap has two stages, rounds and then samples within them, because the samples of a
    round share its disturbances (Davison and Hinkley, Bootstrap Methods, 1997, 3.8).
    """
    rng = np.random.default_rng(0)
    medians = resampled_medians(by_round(np.asarray(samples, float), rounds), rng)
    base_medians = resampled_medians(by_round(np.asarray(base, float), base_rounds), rng)
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(medians / base_medians, [tail, 100 - tail])
    return float(np.median(samples) / np.median(base)), (float(low), float(high))


def resampled_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (RESAMPLES,) medians of rounds and samples drawn with replacement from (rounds, n)."""
    rounds, count = values.shape
    drawn = rng.integers(rounds, size=(RESAMPLES, rounds, 1))
    places = rng.integers(count, size=(RESAMPLES, rounds, count))
    return np.median(values[drawn, places].reshape(RESAMPLES, -1), axis=1)
