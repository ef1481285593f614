"""The accuracy limit of `compress`: a step that loses too much dev WER stops the run.

Dev WER is measured before and after every step, and at the end against the model before the first
step. The loss is the difference in percentage points: from 6.5 % to 8.0 % is 1.5 points. A recipe
sets the limit with `max_wer_loss`. With `--allow-loss`, losses are recorded and the run continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgewhisper.compress import METHODS
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

    from benchmarks.wer import Score
    from edgewhisper.recipe import Step


@dataclass(frozen=True)
class Loss:
    """Dev WER before and after one step, or the whole recipe (step None)."""

    step: int | None
    method: str
    before: Score
    after: Score

    @property
    def points(self) -> float:
        return points_lost(self.before.wer, self.after.wer)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry for compression.json."""
        return {
            "step": self.step,
            "method": self.method,
            "before": self.before.wer,
            "after": self.after.wer,
            "points": self.points,
        }


class AccuracyLoss(Problem):
    """A step, or the whole recipe, lost more dev WER than the limit allows."""

    def __init__(
        self, message: str, hint: str, loss: Loss, model: WhisperForConditionalGeneration
    ) -> None:
        super().__init__(message, hint)
        self.loss, self.model = loss, model

    @property
    def suffix(self) -> str:
        """Suffix of the failed checkpoint's name."""
        if self.loss.step is None:
            return "-failed"
        return f"-failed-step-{self.loss.step}-{self.loss.method}"


@dataclass
class Guard:
    """The limit of a run, and the losses of its steps so far."""

    limit: float
    """Maximum loss in points of dev WER."""
    allow: bool = False
    losses: list[Loss] = field(default_factory=list)

    def check(
        self, loss: Loss, cause: str, model: WhisperForConditionalGeneration, say: Any
    ) -> None:
        """Record a loss. Raises AccuracyLoss if it exceeds the limit, unless losses are allowed."""
        self.losses.append(loss)
        say(f"dev WER {percent(loss.before.wer)} -> {percent(loss.after.wer)} ({signed(loss)})")
        if not exceeds(loss.points, self.limit):
            return
        message = described(loss, self.limit)
        if self.allow:
            say(f"warning: {message}; the run continues because of --allow-loss")
            return
        raise AccuracyLoss(message, cause, loss, model)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry for compression.json."""
        return {
            "max_wer_loss": self.limit,
            "allow_loss": self.allow,
            "exceeded": any(exceeds(loss.points, self.limit) for loss in self.losses),
            "losses": [loss.as_dict() for loss in self.losses],
        }


def points_lost(before: float, after: float) -> float:
    """Return the difference of two dev WERs, which are fractions, in percentage points."""
    return 100 * (after - before)


def exceeds(points: float, limit: float) -> bool:
    """Return whether a loss is above the limit; rounding errors do not count."""
    return points > limit + 1e-9


def described(loss: Loss, limit: float) -> str:
    """Return the message for a loss above the limit."""
    what = "the whole recipe" if loss.step is None else f"step {loss.step} ({loss.method})"
    return (
        f"{what} raised dev WER from {percent(loss.before.wer)} to {percent(loss.after.wer)} on "
        f"{loss.after.utterances} clips of {loss.after.words} words: {loss.points:.1f} points, "
        f"more than max_wer_loss = {limit:g}"
    )


def percent(wer: float) -> str:
    return f"{100 * wer:.1f} %"


def signed(loss: Loss) -> str:
    return f"{loss.points:+.1f} points"


# ---------------------------------------------------------------------------------- likely cause


def likely_cause(step: Step, record: dict[str, Any], after: float) -> str:
    """Return a hint what to change in a step that lost too much. It uses the dev WER after each
    stage if the step recorded it under "dev_wer", and otherwise the step's options."""
    stages = record.get(step.method, {}).get("dev_wer", {})
    rates, shares = trained_with(step.options), removed_by(step)
    if "trained" in stages and rates:
        by_training = stages["trained"] - stages["before"]
        if by_training >= (after - stages["before"]) / 2:
            return (
                f"training alone raised dev WER from {percent(stages['before'])} to "
                f"{percent(stages['trained'])}: lower the learning rate ({rates})"
            )
        return (
            f"after training alone, dev WER was {percent(stages['trained'])}, so pruning is the "
            f"cause: remove less ({shares}), or train longer ({rates})"
        )
    if rates and shares:
        return f"remove less ({shares}), lower the learning rate or train longer ({rates})"
    if rates:
        return f"the learning rate is probably too high, or the training too short ({rates})"
    return f"remove less ({shares})" if shares else "remove this step from the recipe"


def trained_with(options: Any) -> str:
    """Describe the trainings of a step: "training: 240 steps at learning_rate 0.0003, ..."."""
    return ", ".join(
        f"{name}: {epochs_or_steps(table)} at learning_rate {table.learning_rate:g}"
        for name, table in trainings_of(options)
    )


def trainings_of(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and options of every training in a step's options."""
    if not is_dataclass(options):
        return
    for each in fields(options):
        table = getattr(options, each.name)
        if hasattr(table, "learning_rate") and (table.steps or table.epochs):
            yield each.name, table


def epochs_or_steps(table: Any) -> str:
    return f"{table.epochs:g} epochs" if table.epochs else f"{table.steps} steps"


def removed_by(step: Step) -> str:
    """Describe how much a step removes: "min_removed = 0.355"."""
    settings = []
    for name in getattr(import_module(METHODS[step.method]), "REMOVES", ()):
        value = step.options
        for part in name.split("."):
            value = getattr(value, part)
        if value not in (0.0, "", ()):
            settings.append(f"{name} = {value}")
    return ", ".join(settings)
