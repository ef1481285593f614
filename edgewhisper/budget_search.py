"""The trials of a recipe that is searched for the share that `obs` removes.

`obs` knows what each level saves before it prunes, so a size target needs one trial: the budget of
`obs` is then that size. A limit of WER is approached by bisection. A front adds shares at equal
distances. The first trial calibrates, and later ones reuse its measurements
(compress/stored_curves.py). Optuna is not needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewhisper import runs
from edgewhisper.compress.budgets import Budget, total_of
from edgewhisper.recipe import Recipe
from edgewhisper.search import Objective, Point, Trial
from edgewhisper.targets import Targets
from export.files import new_file

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.latency import Table

STEP = "step.1."
REMOVE = f"{STEP}remove"
NEAR = 0.01
"""Bisection ends if the smallest share that loses too much is this close to one that does not."""


def applies(recipe: Recipe) -> bool:
    """Return whether `remove` of a first step `obs` is all that a recipe's search changes."""
    return recipe.steps[0].method == "obs" and [k.field for k in recipe.knobs] == [REMOVE]


@dataclass(frozen=True)
class Plan:
    """The shares to try."""

    first: Sequence[Point]
    low: float
    """Bounds of the bisection."""
    high: float
    wer: float
    """The limit of the dev WER; infinite if there is none."""
    others: dict[str, Any]
    """The other fields of a point of the bisection."""

    @property
    def trials(self) -> int:
        """The largest number of trials."""
        halvings = math.log2(max(1.0, (self.high - self.low) / NEAR))
        return len(self.first) + (math.ceil(halvings) if self.wer < math.inf else 0)

    def next(self, finished: Sequence[Trial]) -> Point | None:
        """Return the next point, or None if no more are needed."""
        tried = [trial.point for trial in finished]
        for point in self.first:
            if point not in tried:
                return point
        if self.wer == math.inf:
            return None
        good = [t.point[REMOVE] for t in finished if t.values[-1] <= self.wer + 1e-9]
        low = max(good, default=self.low)
        bad = [t.point[REMOVE] for t in finished if t.values[-1] > self.wer + 1e-9]
        high = min((share for share in bad if share >= low), default=self.high)
        return None if high - low < NEAR else {REMOVE: (low + high) / 2} | self.others


def plan_of(
    recipe: Recipe,
    model: nn.Module,
    targets: Targets,
    limits: dict[str, float],
    before: dict[str, float],
    table: Table | None,
    shares: int,
) -> Plan:
    """Return the plan for targets. `limits` and `before` are values by axis, `before` those of the
    dense model; `shares` is the number of shares of a front, 0 for none."""
    bounds = recipe.knobs[0].dimension
    axes = [axis for axis in limits if axis != "wer"]
    others = {axis: fields_of(axis, targets, table) for axis in axes}
    needed = [
        {REMOVE: (before[axis] - limit) / total_of(model, budget(axis, targets, table))}
        | others[axis]
        for axis, limit in limits.items()
        if axis != "wer" and limit < math.inf
    ]
    low = max([bounds.low, *(point[REMOVE] for point in needed)])
    grid = [bounds.low + (bounds.high - bounds.low) * i / max(1, shares - 1) for i in range(shares)]
    first = [*needed, *({REMOVE: round(share, 4)} | others[axes[0]] for share in grid)]
    return Plan(first, low, max(bounds.high, low), limits["wer"], others[axes[0]])


def budget(axis: Any, targets: Targets, table: Table | None) -> Budget:
    return Budget(axis, targets.precision, table)


def fields_of(axis: str, targets: Targets, table: Table | None) -> dict[str, Any]:
    """Return the fields of `obs` that make an axis its budget."""
    fields = {f"{STEP}budget_of": axis}
    if axis == "bytes":
        fields[f"{STEP}precision"] = targets.precision
    if axis == "latency" and table is not None:
        fields[f"{STEP}device"] = table.device
    return fields


def run_plan(plan: Plan, trial: Objective, file: Path) -> list[Trial]:
    """Run the trials of a plan. Finished ones are in `file` and not repeated."""
    finished = list(read(file))
    while (point := plan.next(finished)) is not None:
        result = trial(point, finished)
        finished.append(Trial(point, result.values, result.record))
        if runs.main_process():
            with new_file(file) as temporary:
                temporary.write_text(json.dumps([asdict(each) for each in finished]), "utf-8")
    return finished


def read(file: Path) -> Iterator[Trial]:
    if file.is_file():
        for record in json.loads(file.read_text("utf-8")):
            yield Trial(record["point"], tuple(record["values"]), record["record"])
