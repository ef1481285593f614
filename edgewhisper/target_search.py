"""Compress to a target: search within a recipe for a size, a latency or an error rate.

The [[search]] tables of a recipe define what may vary. Each trial runs the whole recipe, training
included, with other values, and measures the result. Steps before the first searched one are the
same in all trials and run once. The trials that no other trial dominates form the Pareto front, and
the targets choose one of them. The latency of a trial is predicted from a table of operators that
were timed on the device.

Unfinished trials are kept in ./edgewhisper-runs until the search succeeds. The same command then
resumes an interrupted search, and another target on the same axes reuses its trials.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.latency import Table, predict
from edgewhisper import budget_search, runs, whisper
from edgewhisper.card import card_of
from edgewhisper.front import (
    choose,
    excess,
    front,
    point_text,
    succeeded,
    table_rows,
    trial_records,
    write_pareto,
)
from edgewhisper.guard import exceeds, points_lost
from edgewhisper.job import Job, Request, Say, describe, finish, prepare, recipe_for, run_steps
from edgewhisper.provenance import record_of
from edgewhisper.recipe import Recipe, available, searchable, value_at, with_values
from edgewhisper.resume import Interrupted, digest
from edgewhisper.search import Outcome, Point, Trial, minimise
from edgewhisper.targets import Targets, limits_of, listed, position
from edgewhisper.training import Training, start_accelerator
from export.cost import artifact_bytes
from export.files import new_directory
from export.problem import Problem
from export.prompt import prompt_language

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

TRIALS = 12
STARTUP = 5
"""Random trials before the search models the objective. A search has few trials in all."""
HOPELESS = 1.5
"""Give up if a size exceeds its limit by this factor at both ends of the search."""


class Clock:
    """Estimates the remaining time from the trials made so far."""

    def __init__(self) -> None:
        self.started, self.made = time.monotonic(), 0

    def left(self, trials: int) -> str:
        """Count one trial and return the estimate for `trials` more."""
        self.made += 1
        minutes = (time.monotonic() - self.started) / self.made * trials / 60
        return f"; about {math.ceil(minutes)} min left" if trials else ""


@dataclass(frozen=True)
class Search:
    """What all trials share."""

    job: Job
    start: WhisperForConditionalGeneration
    """The model after the steps before the first searched one."""
    start_record: dict[str, Any]
    """The records of these steps."""
    start_steps: int
    """The number of these steps."""
    limits: dict[str, float]
    """Axis -> largest allowed value."""
    trials: int
    table: Table | None
    precision: str
    """Precision of the artifact whose bytes are predicted."""
    say: Say
    clock: Clock


def compress_to(
    targets: Targets,
    request: Request,
    trials: int = TRIALS,
    say: Say = print,
    table: Table | None = None,
) -> tuple[Path, list[dict[str, str]]]:
    """Search within a recipe; return the directory of the chosen checkpoint and a table of trials.

    `table` predicts latencies and is required for a latency target. Raises Problem as
    pipeline.compress does, and if the recipe has no [[search]] table, if the dense model meets a
    target already, and if no trial meets the targets. Trials whose values cannot be used (a rank
    above the width, a loss that is not finite) count as tried.
    """
    recipe = recipe_for(request)
    refuse_unsearchable(recipe)
    if targets.latency_s is not None and table is None:
        raise Problem(
            "a latency target needs a latency table", hint="see benchmarks.latency.find_table"
        )
    axes = targets.axes()
    job = prepare(request, recipe, f"search {axes}")
    before = job.before | predictions(job.dense, table, targets.precision)
    job = replace(job, before=before)
    for line in (*job.notes, f"{job.source}: {describe(job.before)}"):
        say(line)
    limits = limits_of(targets, job.before)
    start = run_start(job, say)
    search = Search(job, *start, limits, trials, table, targets.precision, say, Clock())
    tried = run_trials(search, targets, request.seed)
    chosen = choose(tried, limits)
    if chosen is None:
        raise out_of_reach(tried, limits)
    # --max-wer-loss replaces the recipe's limit: `chosen` is within it, even if it is higher
    if targets.wer_loss is None and not request.allow_loss:
        refuse_loss(job, chosen)
    remake_missing(search, tried)
    place = request.out or runs.new_path("checkpoint", f"-{recipe.name}")
    records = trial_records(tried, chosen, job)
    if runs.main_process():
        write(place, search, targets, tried, records)
        shutil.rmtree(job.context.run_dir, ignore_errors=True)
    if any(record.get("exceeded") for record in records):
        say(f"! marks losses above the recipe's max_wer_loss, {recipe.max_wer_loss:g} points")
    return place, table_rows(records)


def write(
    place: Path,
    search: Search,
    targets: Targets,
    tried: Sequence[Trial],
    records: Sequence[dict[str, Any]],
) -> None:
    """Write the chosen checkpoint, the rest of the front in subfolders, and pareto.json."""
    with new_directory(place) as folder:
        for trial, record in zip(tried, records, strict=True):
            if record["checkpoint"] is not None:
                target = folder / record["checkpoint"]
                shutil.copytree(kept_dir(search.job, trial.point), target, dirs_exist_ok=True)
        write_pareto(folder, search.job, targets, search.limits, records, search.table)


def run_trials(search: Search, targets: Targets, seed: int) -> list[Trial]:
    """Run the trials: those that sizes known in advance need, or those that Optuna chooses."""
    job, axes = search.job, targets.axes()
    measured = [*axes, search.precision] if "bytes" in axes else axes
    name = search_name(job, measured, search.table)
    if budget_search.applies(job.recipe):
        plan = budget_search.plan_of(
            job.recipe,
            job.dense,
            targets,
            search.limits,
            position(job.before),
            search.table,
            shares=search.trials if targets.front else 0,
        )
        trial = partial(run_trial, replace(search, trials=plan.trials))
        return budget_search.run_plan(plan, trial, job.context.run_dir / f"{name}.json")
    return minimise(
        partial(run_trial, search),
        {knob.field: knob.dimension for knob in job.recipe.knobs},
        trials=search.trials,
        first=first_points(job.recipe),
        limits=list(search.limits.values()),
        startup=STARTUP,
        run_dir=job.context.run_dir,
        name=name,
        seed=seed,
        accelerator=start_accelerator(Training()),
    )


# ------------------------------------------------------------------------------------ refusals


def refuse_unsearchable(recipe: Recipe) -> None:
    """Raise Problem if a recipe has no [[search]] table."""
    if not recipe.knobs:
        named = [name for name in available() if searchable(name)]
        raise Problem(
            f"recipe {recipe.name} has no [[search]] table, so it cannot be searched for a target",
            hint=f"use {', '.join(named)}, or add a table [[search]] with field, low and high",
        )


def refuse_loss(job: Job, chosen: Trial) -> None:
    """Raise Problem if the chosen trial loses more WER than the recipe's max_wer_loss."""
    before, after = job.before["dev"]["wer"], chosen.values[-1]
    limit = job.recipe.max_wer_loss
    if exceeds(points_lost(before, after), limit):
        raise Problem(
            f"the most accurate trial that meets the target has {100 * after:.1f} % dev WER, "
            f"against {100 * before:.1f} % before: more than max_wer_loss = {limit:g} points",
            hint="set an easier target, add --max-wer-loss POINTS as a target, or accept the loss "
            "with --allow-loss; the trials are kept",
        )


def refuse_hopeless(recipe: Recipe, finished: Sequence[Trial], limits: Mapping[str, float]) -> None:
    """Raise Problem if both ends of the search are tried and far too large.

    Sizes between the two ends are rarely smaller, so more trials would only take time.
    """
    if len(finished) < len(first_points(recipe)) or not any(map(succeeded, finished)):
        return
    for axis_index, (axis, limit) in enumerate(limits.items()):
        smallest = min(trial.values[axis_index] for trial in finished if succeeded(trial))
        if axis != "wer" and smallest > HOPELESS * limit:
            raise out_of_reach(finished, limits)


def out_of_reach(tried: Sequence[Trial], limits: Mapping[str, float]) -> Problem:
    """Return the error for targets that no trial meets, with the nearest trial."""
    nearest = min(filter(succeeded, tried), key=lambda trial: excess(trial.values, limits))
    targets = {axis: limit for axis, limit in limits.items() if limit < math.inf}
    return Problem(
        f"none of {len(tried)} trials has at most {listed(targets)}; the nearest has "
        f"{listed(dict(zip(limits, nearest.values, strict=True)))}, with "
        f"{point_text(nearest.point)}",
        hint="set an easier target, widen [[search]] in the recipe, or increase --trials; the "
        "finished trials are kept",
    )


# ---------------------------------------------------------------------------------- the search


def predictions(
    model: WhisperForConditionalGeneration, table: Table | None, precision: str
) -> dict[str, float]:
    """Return "predicted_bytes" of the artifact, and with a table "latency_s"."""
    latency = {} if table is None else {"latency_s": predict(table, model)}
    return latency | {"predicted_bytes": round(artifact_bytes(model, precision))}


def search_name(job: Job, axes: Sequence[str], table: Table | None = None) -> str:
    """Return a name that two searches share only if their trials measure the same."""
    context = job.context
    clips = [
        [(c.audio.name, c.text, c.lang) for c in clips] for clips in (context.train, context.dev)
    ]
    parts = [
        job.recipe.text,
        list(axes),
        clips,
        prompt_language(job.dense.generation_config),
        context.seed,
        *([] if table is None else [asdict(table)]),
    ]
    return f"targets-{digest(job.dense.state_dict(), parts)[:16]}"


def first_points(recipe: Recipe) -> list[Point]:
    """Return the recipe's own values, if they are within its bounds, and both ends of the bounds.

    These points are tried first.
    """
    own = {knob.field: value_at(recipe, knob) for knob in recipe.knobs}
    ends = [
        {
            knob.field: (
                knob.dimension.choices[end]
                if knob.dimension.choices
                else (knob.dimension.low, knob.dimension.high)[end]
            )
            for knob in recipe.knobs
        }
        for end in (0, -1)
    ]
    inside = all(knob.dimension.holds(own[knob.field]) for knob in recipe.knobs)
    return [own, *ends] if inside else ends


def run_start(job: Job, say: Say) -> tuple[WhisperForConditionalGeneration, dict[str, Any], int]:
    """Run the steps before the first searched one, or load their checkpoint.

    Returns the model, the records of these steps, and their number.
    """
    steps = min(knob.step for knob in job.recipe.knobs)
    if steps == 0:
        return job.dense, {}, 0
    place = job.context.run_dir / "beginning"
    if not place.exists():
        context = replace(job.context, record={})
        slim = run_steps(copy.deepcopy(job.dense), job.recipe, context, say, last=steps)
        if runs.main_process():
            whisper.save(slim, context.processor, place, {"steps": context.record})
    wait_for_all()
    return whisper.load(place), whisper.compression_record(place)["steps"], steps


def run_trial(search: Search, point: Point, finished: Sequence[Trial]) -> Outcome:
    """Run the recipe once with the values `point`, and save its checkpoint if it is on the front.

    `finished` are the trials before it.
    """
    for earlier in finished:
        if earlier.point == point:
            return Outcome(earlier.values, earlier.record)
    refuse_hopeless(search.job.recipe, finished, search.limits)
    search.say(f"trial {len(finished) + 1} of {search.trials}: {point_text(point)}")
    try:
        slim, measured, record = make(search, point)
    except Problem as error:
        if is_not_about_values(error) or not any(map(succeeded, finished)):
            raise
        search.say(f"these values cannot be used: {error}")
        return refused(search, str(error))
    values = tuple(position(measured)[axis] for axis in search.limits)
    result = Outcome(values, {"measured": measured})
    update_front(search.job, slim, record, Trial(point, values, result.record), finished)
    left = search.clock.left(search.trials - len(finished) - 1)
    search.say(f"{describe(measured)}{left}")
    return result


def make(
    search: Search, point: Point
) -> tuple[WhisperForConditionalGeneration, dict[str, Any], dict[str, Any]]:
    """Run the recipe with the values `point`; return model, measurements and compression.json."""
    job = search.job
    context = replace(job.context, run_dir=trial_dir(job, point), record=dict(search.start_record))
    recipe, model = with_values(job.recipe, point), copy.deepcopy(search.start)
    model = run_steps(model, recipe, context, search.say, first=search.start_steps)
    model, after = finish(model, context)
    after |= predictions(model, search.table, search.precision)
    return model, after, record_of(job, context, after, point) | {"dev_wer": loss_of(job, after)}


def loss_of(job: Job, after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry "dev_wer" of a trial's compression.json.

    A search measures the dev WER of a trial once, so there is only the loss of the whole recipe. A
    trial that exceeds the limit may be on the front.
    """
    before_wer, after_wer = job.before["dev"]["wer"], after["dev"]["wer"]
    points, limit = points_lost(before_wer, after_wer), job.recipe.max_wer_loss
    whole = {"before": before_wer, "after": after_wer, "points": points}
    return {
        "max_wer_loss": limit,
        "exceeded": exceeds(points, limit),
        "losses": [{"step": None, "method": job.recipe.name, **whole}],
    }


def is_not_about_values(error: Problem) -> bool:
    """Return whether an error, such as Ctrl-C or a full disk, would occur with any values."""
    return isinstance(error, Interrupted) or isinstance(error.__cause__, OSError)


def refused(search: Search, reason: str) -> Outcome:
    """Return a result that the search avoids: the size of the dense model, and a WER of 1000 %."""
    worst = position(search.job.before) | {"wer": 10.0}
    return Outcome(tuple(worst[axis] for axis in search.limits), {"refused": reason})


# ---------------------------------------------------------------------- checkpoints of the trials


def trial_dir(job: Job, point: Point) -> Path:
    """Return the directory with the state of a running trial."""
    return job.context.run_dir / "trials" / key_of(point)


def kept_dir(job: Job, point: Point) -> Path:
    """Return the directory with the checkpoint of a trial on the front."""
    return job.context.run_dir / "kept" / key_of(point)


def key_of(point: Point) -> str:
    """Return a hash of a trial's values."""
    return sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:16]


def update_front(
    job: Job,
    model: WhisperForConditionalGeneration,
    record: dict[str, Any],
    trial: Trial,
    finished: Sequence[Trial],
) -> None:
    """Save the trial if it is on the front, and remove the trials that it dominates."""
    on_front = [other.point for other in front([*finished, trial])]
    if runs.main_process():
        # left by a run that was killed while saving
        shutil.rmtree(kept_dir(job, trial.point), ignore_errors=True)
        if trial.point in on_front:
            save(job, model, record, trial.point)
        for other in finished:
            if other.point not in on_front:
                shutil.rmtree(kept_dir(job, other.point), ignore_errors=True)
        shutil.rmtree(trial_dir(job, trial.point), ignore_errors=True)
    wait_for_all()


def save(
    job: Job, model: WhisperForConditionalGeneration, record: dict[str, Any], point: Point
) -> None:
    """Write the checkpoint of a trial with its record and model card."""
    place = kept_dir(job, point)
    whisper.save(model, job.context.processor, place, record, card_of(record))


def remake_missing(search: Search, tried: Sequence[Trial]) -> None:
    """Run the trials on the front again whose checkpoints are on another machine."""
    job = search.job
    missing = [trial for trial in front(tried) if not kept_dir(job, trial.point).exists()]
    wait_for_all()
    for trial in missing:
        search.say(f"running again, because its checkpoint is missing: {point_text(trial.point)}")
        slim, _, record = make(search, trial.point)
        if runs.main_process():
            save(job, slim, record, trial.point)
    wait_for_all()


def wait_for_all() -> None:
    """Wait until all processes of a torchrun are here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
