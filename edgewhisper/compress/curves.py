"""The loss of each branch at each level, measured on the dense model.

The loss of a level is first that of the branch's own output (surgeon.py). Two levels of each kind
of structure are then tried in the whole model. The Kullback-Leibler divergence of its next-token
distributions is measured on clips of the fit and on others (walk.effect). A power law through the
two converts losses to divergences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgewhisper.compress.allocation import Level
from edgewhisper.compress.branches import FFN, SIDES, Branch, branches_of
from edgewhisper.compress.budgets import Budget, Kept, cost_of
from edgewhisper.compress.fits import (
    GROUPS,
    Fit,
    branch_modules,
    directions_of,
    first_directions,
    fit_of,
    placed,
    put_product,
    put_units,
    reduce_scores,
    reduce_values,
    remove_branch,
    restored,
    root_of,
    whole_of,
)
from edgewhisper.compress.low_rank import principal_axes, spectrum
from edgewhisper.compress.surgeon import (
    damped,
    fitted_loss,
    remove_blocks,
    remove_columns,
    score_directions,
)
from edgewhisper.compress.walk import ScoreSums, Walk

if TYPE_CHECKING:
    from edgewhisper.compress.obs import Options

STEPS = 32
"""Levels of a feed-forward branch."""
SHARES = ("score_dims", "rank")
"""Curves whose losses are shares of a variance before divergences are measured."""
TINY = 1e-30
"""Replaces zero in divisions: the output of a dead branch is zero."""

Change = Callable[[int], Tensor | None]
"""Changes a branch to a size. Returns the weight for `Walk.move` if only the values changed."""


@dataclass(frozen=True)
class Curve:
    """The loss at each size of one kind of structure. The first size is the dense one."""

    sizes: list[int]
    losses: list[float]

    def at(self, size: int) -> float:
        return self.losses[self.sizes.index(size)]

    def checked(self) -> "Curve":
        """Return the curve. Raises ValueError if sizes and losses differ in number."""
        if not self.sizes or len(self.sizes) != len(self.losses):
            raise ValueError(f"{len(self.sizes)} sizes and {len(self.losses)} losses")
        return self


def sizes_of(total: int, step: int, most_removed: float) -> list[int]:
    """Return sizes to try: the dense one, then multiples of `step` down to the smallest allowed."""
    least = max(1, total * (1 - most_removed))
    return [total, *(n for n in range(total - 1, 0, -1) if n % step == 0 and n >= least)]


def unit_curve(fit: Fit, options: "Options") -> tuple[Curve, Callable[[int], Tensor]]:
    """Return the losses of numbers of units, and a function of a number that gives removed
    units."""
    d = len(fit.h)
    step = max(1, -(-d // STEPS // options.round_to) * options.round_to) if d >= STEPS else 1
    sizes = sizes_of(d, step, options.most_removed)
    removal = remove_columns(fit.weight, fit.h, max(1, d // GROUPS), d - sizes[-1])
    order = torch.cat([*removal.order, torch.empty(0).long()])
    counts = torch.tensor([0, *(len(g) for g in removal.order)]).cumsum(0).double()
    losses = [interpolated(counts, removal.losses, d - size) for size in sizes]
    return Curve(sizes, losses), lambda size: order[: d - size]


def interpolated(counts: Tensor, losses: Sequence[float], at: int) -> float:
    """Return the loss after `at` single removals, interpolated between groups."""
    place = int(torch.searchsorted(counts, float(at)))
    if place == 0:
        return losses[0]
    low, high = float(counts[place - 1]), float(counts[place])
    return losses[place - 1] + (losses[place] - losses[place - 1]) * (at - low) / (high - low)


def head_curve(fit: Fit, total: int, options: "Options") -> Curve:
    """Return the losses of numbers of heads."""
    sizes = sizes_of(total, 1, options.most_removed)
    removal = remove_blocks(fit.weight, fit.h, len(fit.h) // total, total - sizes[-1])
    return Curve(sizes, [removal.losses[total - size] for size in sizes])


def value_curve(fit: Fit, total: int, options: "Options") -> Curve:
    """Return the losses of numbers of value dimensions in each head."""
    width = len(fit.h) // total
    directions = directions_of(fit, total, range(total))
    sizes = sizes_of(width, options.round_to, options.most_removed)
    losses = [0.0]
    for dims in sizes[1:]:
        basis = placed(first_directions(directions, dims), len(fit.h))
        losses.append(max(0.0, fitted_loss(fit.weight, fit.wanted, fit.h, basis)))
    return Curve(sizes, losses)


def score_curve(sums: ScoreSums, options: "Options", damping: float) -> Curve:
    """Return the losses of numbers of query and key dimensions in each head, as shares of the
    variance of the scores; mean over heads."""
    width = sums.queries.shape[-1]
    sizes = sizes_of(width, options.round_to, options.most_removed)
    per_head = [
        score_directions(damped(q, damping), damped(k, damping))[2]
        for q, k in zip(sums.queries, sums.keys, strict=True)
    ]
    shares = torch.stack([losses / losses.sum().clamp_min(TINY) for losses in per_head]).mean(0)
    return Curve(sizes, [float(shares[size:].sum()) for size in sizes])


def rank_curve(fits: Sequence[Fit], options: "Options") -> Curve:
    """Return the losses of ranks of both layers of a feed-forward branch, as shares of the variance
    of their outputs; sum over the layers. The first size is the rank that saves no parameters."""
    units, d = fits[0].weight.shape
    sizes = sizes_of(units * d // (units + d), options.round_to, options.most_removed)
    variances = [spectrum(root_of(fit)) for fit in fits]  # (min(units, d),) each
    losses = sum(own / own.sum().clamp_min(TINY) for own in variances)
    return Curve(sizes, [0.0, *(float(losses[size:].sum()) for size in sizes[1:])])


def scaled(curve: Curve, measured: dict[int, float]) -> Curve:
    """Convert the losses of a curve to divergences, by a power law through the measured ones."""
    points = sorted((curve.at(size), value) for size, value in measured.items())
    points = [(max(loss, TINY), max(value, 1e-9)) for loss, value in points]
    (low, first), (high, second) = points[0], points[-1]
    power = 1.0
    if high > low * 1.01:
        ratio = torch.tensor([second / first, high / low]).log()
        power = min(max(float(ratio[0] / ratio[1]), 0.5), 2.0)
    anchor, value = (low, first) if len(points) == 1 else (high, second)
    return Curve(
        curve.sizes,
        [value * (loss / anchor) ** power if loss > 0 else 0.0 for loss in curve.losses],
    )


# ------------------------------------------------------------------------------ the dense model

Tries = dict[str, tuple[Curve, Change]]
"""The curve of each kind of structure, and what changes the branch to one of its sizes."""


@dataclass(frozen=True)
class Part:
    """One branch with its losses at all levels."""

    branch: Branch
    curves: dict[str, Curve]
    """"units" and "rank"; or "heads", "value_dims" and "score_dims"; and "whole" with the sizes 1
    and 0. Losses are divergences."""


def measure_parts(walk: Walk, options: "Options", done: Callable[[], None]) -> list[Part]:
    """Return the curves of all branches, from one pass through the dense model."""
    model, parts = walk.model, []
    for side in SIDES:
        if side == "decoder":
            walk.enter_decoder()
        dense = walk.dense()
        for branch in branches_of(model, side):
            parts.append(measure_part(walk, branch, dense, options))
            walk.move(branch)
            done()
    return parts


def measure_part(walk: Walk, branch: Branch, dense: list[Tensor], options: "Options") -> Part:
    damping = damping_of(branch, options)
    moments = walk.collect(branch, store=True)
    fit = fit_of(branch.last_of(walk.model), moments, damping)
    energy = max(float((fit.wanted * fit.weight).sum()), TINY)  # variance of its output
    of_kind = ffn_tries if branch.kind == "ffn" else attention_tries
    tries = of_kind(walk, branch, fit, options)
    if options.branches:
        drop = Curve([1, 0], [0.0, energy])
        tries["whole"] = drop, lambda _: remove_branch(walk.model, branch, fit)
    measured = try_levels(walk, branch, tries, dense)
    curves = {}
    for kind, (curve, _) in tries.items():
        if kind not in SHARES:
            curve = Curve(curve.sizes, [loss / energy for loss in curve.losses])
        curves[kind] = scaled(curve, measured[kind]) if measured[kind] else curve
    return Part(branch, curves)


def ffn_tries(walk: Walk, branch: Branch, fit: Fit, options: "Options") -> Tries:
    tries: Tries = {}
    if options.units:
        curve, removed = unit_curve(fit, options)
        tries["units"] = curve, lambda size: put_units(walk.model, branch, fit, removed(size))
    if options.low_rank:
        layers = [getattr(branch.layer_of(walk.model), name) for name in FFN]
        inside = walk.collect(branch, layers[0])
        fits = [fit_of(layers[0], inside, damping_of(branch, options)), fit]
        axes = [principal_axes(root_of(of_layer), len(of_layer.weight)) for of_layer in fits]

        def put_products(rank: int) -> None:
            for layer, of_layer, own in zip(layers, fits, axes, strict=True):
                put_product(layer, of_layer, own[:, :rank])

        tries["rank"] = rank_curve(fits, options), put_products
    return tries


def attention_tries(walk: Walk, branch: Branch, fit: Fit, options: "Options") -> Tries:
    model, damping = walk.model, damping_of(branch, options)
    attention = branch.attention_of(model)
    total, width = attention.num_heads, len(fit.h) // attention.num_heads
    tries: Tries = {}
    if options.heads:
        tries["heads"] = (
            head_curve(fit, total, options),
            lambda size: reduce_values(model, branch, fit, size, width),
        )
    if options.value_dims:
        tries["value_dims"] = (
            value_curve(fit, total, options),
            lambda size: reduce_values(model, branch, fit, total, size),
        )
    if options.score_dims:
        scores = walk.collect_scores(branch)
        tries["score_dims"] = (
            score_curve(scores, options, damping),
            lambda size: reduce_scores(model, branch, scores, size, damping),
        )
    return tries


def try_levels(
    walk: Walk, branch: Branch, tries: Tries, dense: list[Tensor]
) -> dict[str, dict[int, float]]:
    """Return the divergences of each kind with about a quarter and a half of its structures
    removed; none if there are no windows to measure them on."""
    measured: dict[str, dict[int, float]] = {kind: {} for kind in tries}
    if not dense:
        return measured
    chosen = [(kind, size) for kind, (curve, _) in tries.items() for size in tried_sizes(curve)]
    at_once = 1 if branch.side == "encoder" else max(1, len(chosen))  # large or small states
    for start in range(0, len(chosen), at_once):
        group = chosen[start : start + at_once]
        changes = [changed_states(walk, branch, tries[kind][1], size) for kind, size in group]
        found = walk.divergences(branch, changes, dense)
        for (kind, size), loss in zip(group, found, strict=True):
            measured[kind][size] = loss
    return measured


def tried_sizes(curve: Curve) -> list[int]:
    """Return the sizes nearest to three quarters and a half of the dense one, without it."""
    smaller, whole = curve.sizes[1:], curve.sizes[0]
    near = [min(smaller, key=lambda size: abs(size - s * whole)) for s in (0.75, 0.5) if smaller]
    return list(dict.fromkeys(near))


def changed_states(walk: Walk, branch: Branch, change: Change, size: int) -> dict[int, Tensor]:
    """Return the output states of a branch that is changed for this pass."""
    with restored(branch_modules(walk.model, branch)):
        return walk.changed(branch, change(size))


def damping_of(branch: Branch, options: "Options") -> float:
    return options.damping if branch.side == "encoder" else options.decoder_damping


# ------------------------------------------------------------------------------ levels and costs


def levels_of(model: nn.Module, part: Part, options: "Options", budget: Budget) -> list[Level]:
    """Return all levels of a branch, with what they save of the budget."""
    weigh = options.decoder_weight if part.branch.side == "decoder" else 1.0
    whole = whole_of(model, part.branch)
    cost = cost_of(model, part.branch, budget)
    levels = []
    if "whole" in part.curves:  # `shrink` leaves one of each, unless it removes the layer
        saved = cost(whole) - cost((1,) * len(whole))
        levels.append(Level((0,) * len(whole), saved, weigh * part.curves["whole"].at(0)))
    if part.branch.kind == "ffn":
        curve = part.curves.get("units", Curve([whole[0]], [0.0]))
        losses: dict[Kept, float] = {(size,): curve.at(size) for size in curve.sizes}
        ranks = part.curves.get("rank", Curve([0], [0.0]))
        losses |= {(*whole, size): ranks.at(size) for size in ranks.sizes[1:]}
        return levels + [
            Level(kept, cost(whole) - cost(kept), weigh * loss) for kept, loss in losses.items()
        ]
    curves = [
        part.curves.get(kind, Curve([size], [0.0]))
        for kind, size in zip(("heads", "value_dims", "score_dims"), whole, strict=True)
    ]
    for kept in product(*(curve.sizes for curve in curves)):
        heads, values, scores = (c.at(size) for c, size in zip(curves, kept, strict=True))
        # only remaining heads can lose dimensions
        loss = heads + (values + scores) * kept[0] / whole[0]
        levels.append(Level(kept, cost(whole) - cost(kept), weigh * loss))
    return levels
