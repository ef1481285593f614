"""Ranks of low-rank layers: one threshold per layer, or one budget for all layers.

The arithmetic uses the variances S^2 of a layer's outputs along their principal axes (lite.py, 2).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from export.problem import Problem

# ---------------------------------------------------------------------- a threshold per layer


def energies(variances: Tensor) -> Tensor:
    """S^2 (d,) -> share of the variance that the first k axes keep, at index k; (d + 1,)."""
    kept = torch.cat([variances.new_zeros(1), variances.cumsum(0)])
    return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def energy_at(variances: Tensor, rank: int) -> float:
    """Return the share of the variance that `rank` axes keep.

    `variances` may omit trailing zeros, so `rank` may exceed its length.
    """
    return float(energies(variances)[min(rank, len(variances))])


def rank_for(variances: Tensor, d_out: int, theta: float, round_to: int = 16) -> int | None:
    """Return the smallest multiple of `round_to` below d_out that keeps more than theta.

    Returns None if there is none.
    """
    shares = energies(variances).tolist()
    ranks = range(round_to, d_out, round_to)
    return next((k for k in ranks if shares[min(k, len(variances))] > theta), None)


def worth_it(rank: int | None, d_out: int, d_in: int, max_cost: float = 1.0) -> bool:
    """Return whether two factors of this rank have at most `max_cost` of the layer's weights."""
    return rank is not None and rank * (d_out + d_in) <= max_cost * d_out * d_in


# -------------------------------------------------------------------- a budget for all layers


class Choice(NamedTuple):
    """A form that a layer may take: dense (rank None), or split with a rank."""

    rank: int | None
    cost: float
    loss: float


def choices(
    variances: Tensor,
    d_out: int,
    d_in: int,
    *,
    unit: float,
    theta: float,
    round_to: int,
    max_cost: float,
) -> list[Choice]:
    """Return all choices of a layer by falling cost: dense, and every rank that costs less.

    `unit` is the cost of one weight. Losses are lost shares of variance, in units of 1 - theta.
    """
    dense = Choice(None, unit * d_out * d_in, 0.0)
    split = []
    shares = energies(variances).tolist()
    for rank in reversed(range(round_to, d_out, round_to)):
        cost = unit * rank * (d_out + d_in)
        if worth_it(rank, d_out, d_in, max_cost) and cost < dense.cost and theta < 1:
            lost = 1 - shares[min(rank, len(variances))]
            split.append(Choice(rank, cost, max(lost, 0.0) / (1 - theta)))
    return [dense, *split]


def price(dear: Choice, cheap: Choice) -> float:
    """Return the added loss per saved cost of replacing one choice by a cheaper one."""
    return (cheap.loss - dear.loss) / (dear.cost - cheap.cost)


def convex_hull(options: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of loss over cost; prices rise along it.

    `options` and the result are ordered by falling cost.
    """
    hull: list[Choice] = []
    for choice in options:
        while len(hull) > 1 and price(hull[-1], choice) <= price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def allocate(layers: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, int | None]:
    """Return a rank for each layer, such that all costs add up to at most `budget` of the dense.

    `layers` has the choices of each layer by falling cost. Steps with the lowest price are taken
    first. Raises Problem if even the lowest ranks exceed the budget.
    """
    taken = {name: options[0] for name, options in layers.items()}
    dense = sum(choice.cost for choice in taken.values())
    over = dense * (1 - budget)
    least = sum(options[-1].cost for options in layers.values())
    if dense - least < over:
        raise Problem(
            f"lite: budget is {budget:g}, but the lowest ranks that the options allow already cost "
            f"{least / dense:.3f} of the chosen layers",
            hint="raise budget, lower round_to, or choose more layers",
        )
    steps = [
        (price(dear, cheap), name, dear, cheap)
        for name, options in layers.items()
        for dear, cheap in pairwise(convex_hull(options))
    ]
    for _, name, dear, cheap in sorted(steps, key=lambda step: step[0]):
        if over <= 0:
            break
        if dear.cost - cheap.cost > over:  # part of the last step may suffice
            enough = [c for c in layers[name] if dear.cost - c.cost >= over]
            cheap = min(enough, key=lambda c: (c.loss, c.cost))
        taken[name] = cheap
        over -= dear.cost - cheap.cost
    return {name: choice.rank for name, choice in taken.items()}
