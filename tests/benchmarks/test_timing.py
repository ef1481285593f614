"""Medians, intervals and ratios, compared with known values and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.timing import by_round, median_interval, rank_below_median, ratio, summarise


def test_the_summary_of_a_small_list():
    found = summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.median == 3
    assert found.interval == (1, 100)
    assert found.outliers == 0.2
    assert not found.unstable


def test_a_single_sample_is_its_own_interval():
    assert summarise([0.5]).as_dict() == {
        "median": 0.5,
        "interval": (0.5, 0.5),
        "outliers": 0.0,
        "unstable": False,
    }


@pytest.mark.parametrize("count", [1, 5, 6, 20, 100, 500, 501, 3000])
def test_the_order_statistics_agree_with_scipys_binomial(count):
    rank = rank_below_median(count)
    exact = int(stats.binom.ppf(0.025, count, 0.5))
    assert abs(rank - exact) <= (1 if count > 500 else 0)
    if 6 <= count <= 500:
        assert stats.binom.cdf(rank - 1, count, 0.5) <= 0.025


def test_the_interval_holds_the_median_about_95_times_in_100(rng):
    samples = rng.exponential(size=(2000, 40))
    bounds = np.array([median_interval(row) for row in samples])
    covered = np.mean((bounds[:, 0] <= np.log(2)) & (np.log(2) <= bounds[:, 1]))
    assert covered > 0.95 - 4 * 0.005


def test_rounds_that_disagree_are_unstable():
    assert summarise([1.0] * 10 + [1.2] * 10, rounds=2).unstable
    assert not summarise([1.0] * 10 + [1.05] * 10, rounds=2).unstable
    assert not summarise([1.0, 1.5, 2.0] * 4, rounds=4).unstable  # clips differ, rounds do not


def test_samples_that_do_not_divide_count_as_one_round():
    assert by_round(np.arange(7.0), 2).shape == (1, 7)
    assert by_round(np.arange(8.0), 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_ratio_of_two_finds_two(rng):
    base = rng.normal(1.0, 0.02, 100)
    value, (low, high) = ratio(2 * rng.normal(1.0, 0.02, 100), base, 5, 5)
    assert low < value < high
    assert 1.9 < low < 2.1 > high > 1.95


def test_rounds_that_jump_widen_the_interval(rng):
    calm = rng.normal(1.0, 0.01, (5, 20))
    jumpy = calm * np.array([[1.0], [1.3], [0.9], [1.2], [1.0]])
    narrow = ratio(calm.ravel(), calm.ravel(), 5, 5)[1]
    wide = ratio(jumpy.ravel(), calm.ravel(), 5, 5)[1]
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


def test_equal_times_rarely_give_a_significant_ratio(rng):
    """With only five rounds (clusters), the interval must still contain 1 in most cases."""
    wrong = 0
    for _ in range(40):
        a, b = (rng.normal(1, 0.05, (5, 1)) + rng.normal(0, 0.02, (5, 10)) for _ in range(2))
        low, high = ratio(a.ravel(), b.ravel(), 5, 5)[1]
        wrong += not low <= 1 <= high
    assert wrong < 18
