"""Ranks: thresholds, break-even, and the allocation of a budget."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from edgewhisper.compress.ranks import (
    Choice,
    allocate,
    choices,
    convex_hull,
    energies,
    price,
    rank_for,
    worth_it,
)
from export.problem import Problem

# ---------------------------------------------------------------------------------------- rank rule


def test_ranks_of_a_small_spectrum_by_hand():
    variances = torch.tensor([50.0, 30.0, 15.0, 4.0, 1.0, 0.0])
    assert energies(variances).tolist() == pytest.approx([0, 0.5, 0.8, 0.95, 0.99, 1, 1])
    assert rank_for(variances, 6, 0.7, round_to=1) == 2
    assert rank_for(variances, 6, 0.94, round_to=2) == 4
    assert rank_for(variances, 6, 0.0, round_to=2) == 2
    assert rank_for(variances, 6, 1.0, round_to=1) is None


def test_the_threshold_must_be_exceeded_not_met():
    variances = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert rank_for(variances, 4, 0.5, round_to=1) == 3


def test_a_flat_spectrum_stays_dense():
    """No multiple of 16 below 64 keeps more than 0.99; the authors' code splits with rank 63."""
    assert rank_for(torch.ones(64), 64, 0.99) is None
    assert not worth_it(None, 64, 64)


def test_a_higher_threshold_never_lowers_a_rank(rng):
    variances = torch.from_numpy(np.sort(rng.exponential(size=64))[::-1].copy())
    thetas = np.sort(rng.uniform(size=50))
    ranks = [rank_for(variances, 64, theta, 4) or 64 for theta in thetas]
    assert ranks == sorted(ranks)


def test_constant_outputs_get_the_lowest_rank():
    assert rank_for(torch.zeros(64), 64, 0.99) == 16


@pytest.mark.parametrize(
    ("d_out", "d_in", "bound"),
    [(1280, 1280, 640), (5120, 1280, 1024), (1280, 5120, 1024)],
    ids=["attention", "fc1", "fc2"],
)
def test_the_bounds_of_large_v3_are_the_papers(d_out, d_in, bound):
    assert worth_it(bound, d_out, d_in)
    assert not worth_it(bound + 1, d_out, d_in)
    assert not worth_it(bound, d_out, d_in, max_cost=0.99)


# ------------------------------------------------------------------------------------------- budget


def draw_choices(rng) -> dict[str, list[Choice]]:
    layers = {}
    for number in range(int(rng.integers(1, 6))):
        d_out, d_in = (int(n) for n in rng.integers(8, 100, size=2))
        variances = torch.from_numpy(np.sort(rng.exponential(size=d_out))[::-1].copy())
        theta = float(rng.uniform(0.5, 0.999))
        round_to = int(rng.integers(1, 5))
        layers[str(number)] = choices(
            variances, d_out, d_in, unit=1, theta=theta, round_to=round_to, max_cost=1
        )
    return layers


def cost_and_loss(layers, ranks):
    taken = [next(c for c in layers[n] if c.rank == rank) for n, rank in ranks.items()]
    return sum(c.cost for c in taken), sum(c.loss for c in taken)


def test_allocation_of_two_layers_by_hand():
    layers = {
        "cheap": [Choice(None, 100, 0.0), Choice(4, 50, 0.1), Choice(2, 25, 1.0)],
        "dear": [Choice(None, 100, 0.0), Choice(4, 50, 5.0), Choice(2, 25, 6.0)],
    }
    assert allocate(layers, 1.0) == {"cheap": None, "dear": None}
    assert allocate(layers, 0.75) == {"cheap": 4, "dear": None}
    assert allocate(layers, 0.63) == {"cheap": 2, "dear": None}
    assert allocate(layers, 0.3) == {"cheap": 2, "dear": 2}


def test_the_budget_is_kept_and_ranks_fall_with_it(rng):
    layers = draw_choices(rng)
    dense = sum(result[0].cost for result in layers.values())
    least = sum(result[-1].cost for result in layers.values()) / dense
    taken = []
    for budget in np.linspace(1, least + 1e-9, 20):
        ranks = allocate(layers, budget)
        assert cost_and_loss(layers, ranks)[0] <= budget * dense * (1 + 1e-12)
        taken.append({n: rank or 10**9 for n, rank in ranks.items()})
    assert all(less[n] <= more[n] for more, less in pairwise(taken) for n in layers)


def test_allocation_is_optimal_at_costs_on_the_hull(rng):
    """Compared with exhaustive search: greedy is optimal if the budget is spent exactly."""
    from itertools import product

    layers = {n: result[::4] for n, result in list(draw_choices(rng).items())[:3]}
    hulls = {n: convex_hull(result) for n, result in layers.items()}
    steps = sorted(
        (price(a, b), a.cost - b.cost) for hull in hulls.values() for a, b in pairwise(hull)
    )
    dense = sum(result[0].cost for result in layers.values())
    spent = dense - sum(saved for _, saved in steps[: int(rng.integers(0, len(steps) + 1))])
    ranks = allocate(layers, spent / dense + 1e-12)
    _, loss = cost_and_loss(layers, ranks)
    best = min(
        sum(c.loss for c in combination)
        for combination in product(*layers.values())
        if sum(c.cost for c in combination) <= spent + 1e-6
    )
    assert loss <= best + 1e-9


def test_a_budget_that_no_rank_reaches_is_refused():
    layers = {"one": [Choice(None, 100, 0.0), Choice(16, 60, 0.1)]}
    with pytest.raises(Problem, match=r"budget is 0.5, .* already cost 0.600"):
        allocate(layers, 0.5)


def test_layers_with_theta_one_stay_dense():
    variances = torch.ones(32)
    result = choices(variances, 32, 32, unit=1, theta=1.0, round_to=4, max_cost=1)
    assert result == [Choice(None, 1024, 0.0)]


def test_a_layer_that_runs_more_often_is_split_first():
    variances = torch.logspace(0, -3, 32)
    often, seldom = (
        choices(variances, 32, 32, unit=unit, theta=0.99, round_to=4, max_cost=1)
        for unit in (300, 32)
    )
    ranks = allocate({"seldom": seldom, "often": often}, 0.8)
    assert ranks["often"] is not None and ranks["seldom"] is None
