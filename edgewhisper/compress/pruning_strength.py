"""How far to prune: a strength between 0 (nothing) and 1 (the recipe's thresholds).

The smallest strength reaches the shares that a recipe requires; the largest stays within a limit
of dev WER. Both are found by bisection, with a function that prunes the model to a strength.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from edgewhisper.compress.masks import (
    Masks,
    guarded,
    removed_share,
    set_pruned,
    weights_of,
    zero_share,
)
from edgewhisper.progress import progress_bar
from export.problem import Problem

SHARES: dict[str, Callable[[nn.Module], float]] = {
    "min_removed": removed_share,
    "min_zero": zero_share,
}
"""Options that require a share of the parameters, and the functions that measure it."""


def largest_strength(
    wer_at: Callable[[float], float], floor: float, limit: float, evaluations: int
) -> tuple[float, list[dict[str, float]]]:
    """Return the largest strength, at least `floor`, with a dev WER of at most `limit`.

    Also returns the strengths that were evaluated, with their dev WER.
    """
    trials: list[dict[str, float]] = []
    with progress_bar(evaluations, "tspar: choosing thresholds") as show:

        def acceptable(strength: float) -> bool:
            wer = wer_at(strength)
            trials.append({"strength": strength, "dev_wer": wer})
            show(len(trials), f"dev WER {100 * wer:.1f} %")
            return wer <= limit

        return largest(acceptable, floor, evaluations), trials


def largest(acceptable: Callable[[float], bool], low: float, evaluations: int) -> float:
    """Return the largest acceptable strength between `low` and 1, by bisection.

    `low` is accepted without an evaluation. The result is `low` or was evaluated as acceptable.

    Bisection assumes that a higher strength prunes more. This holds if pass_order is
    "statistics_then_apply" or c2 is infinite, except for the largest column of each matrix, which
    is always kept. In the default order, a larger c1 changes the statistics that c2 refers to, so
    that a column may be kept again.
    """
    high = 1.0
    if low >= high or acceptable(high):
        return high
    for _ in range(evaluations - 1):
        middle = (low + high) / 2
        low, high = (middle, high) if acceptable(middle) else (low, middle)
    return low


def smallest_strength(
    name: str,
    share: float,
    model: nn.Module,
    prune_to: Callable[[float], None],
    thresholds: str,
) -> float:
    """Return the smallest strength that reaches the share required by option `name`.

    Raises Problem if strength 1 does not reach it; `thresholds` describes that in the message.
    """
    measure = SHARES[name]
    low, high = 0.0, 1.0
    while high - low > 1 / 256:
        middle = (low + high) / 2
        prune_to(middle)
        low, high = (low, middle) if measure(model) >= share else (middle, high)
    if high == 1:
        prune_to(high)
        if (reached := measure(model)) < share:
            raise Problem(
                f"tspar: {name} asks for {share:.3f} of the parameters outside the token table; "
                f"at full strength, {thresholds} reach {reached:.3f}",
                hint=f"raise c1 or rho, lower c2, extend `layers`, or set {name} to "
                f"{math.floor(1000 * reached) / 1000:g} or less",
            )
    return high


def refuse_unreachable(
    model: Any, shares: Mapping[str, float], layers: str, protected: Masks
) -> None:
    """Raise Problem before training if pruning all of `layers` cannot reach the shares.

    `shares` maps names of options to required shares; protected weights are not pruned.
    """
    if not shares:
        return
    dense = {name: weight.clone() for name, weight in weights_of(model, layers).items()}
    none_kept = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in dense.items()}
    set_pruned(model, dense, guarded(none_kept, protected))
    available = {name: SHARES[name](model) for name in shares}
    set_pruned(model, dense, {name: ~mask for name, mask in none_kept.items()})
    for name, share in shares.items():
        if share > available[name]:
            raise Problem(
                f"tspar: {name} asks for {share:.3f} of the parameters outside the token table; "
                f"the layers {layers!r} have only {available[name]:.3f} that may be pruned",
                hint=f"lower {name}, or extend `layers`",
            )
