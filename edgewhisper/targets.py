"""Compressing to a target: a search within a recipe, for a size, a cost or an error rate.

The recipe says itself what may be searched (its [[search]] tables). Every trial runs the whole
recipe with other values there, training included, and is measured; steps before the first searched
one are the same in all trials and run once. No trial is the best of all: those of which no other is
smaller and no less accurate are the front, and the targets choose one of them. What a trial would
take on a device is predicted from a table of operators that was measured there.

Trials are kept in ./edgewhisper-runs until the search has succeeded, so that the same command,
typed again after an interruption or with another target of the same kind, makes none of them twice.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.latency import Table, find_table, predict
from benchmarks.result import in_milliseconds
from edgewhisper import pipeline, runs, whisper
from edgewhisper.pipeline import Job, Say
from edgewhisper.recipe import Recipe, available, searchable, value_at, with_values
from edgewhisper.resume import Interrupted, digest
from edgewhisper.search import Found, Point, Tried, minimise
from edgewhisper.training import Training, start_accelerator
from export.cost import window_macs
from export.files import new_directory
from export.problem import Problem
from export.prompt import language_for

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

FORMAT = 1
PARETO = "pareto.json"
TRIALS = 12
STARTUP = 5
"""Trials before the search stops drawing at random: it has few in all."""
HOPELESS = 1.5
"""How many times the limit a size must be at both ends of the search for it to be given up."""
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s)\s*")
SIZES = ("parameters", "macs", "latency")
NAMES = {
    "parameters": "parameters",
    "macs": "MACs",
    "latency": "ms of predicted latency",
    "wer": "dev WER",
}


# --------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Amount:
    """A count, or a share of what the model has before."""

    number: float
    share: bool = False

    def of(self, whole: int) -> int:
        return math.floor(self.number * whole) if self.share else round(self.number)


@dataclass(frozen=True)
class Targets:
    parameters: Amount | None = None
    macs: Amount | None = None
    """Multiply-accumulates of one full window and 32 tokens."""
    latency_s: float | None = None
    """Seconds of the same on a device."""
    wer_loss: float | None = None
    """Points of dev WER that may be lost: 1.0 is one word in a hundred."""

    def axes(self) -> list[str]:
        """What trials are compared by: the sizes that have a target, and dev WER."""
        asked = zip(SIZES, (self.parameters, self.macs, self.latency_s), strict=True)
        sizes = [name for name, wanted in asked if wanted is not None]
        return [*(sizes or ["parameters"]), "wer"]


def parse(
    params: str | None, macs: str | None, max_wer_loss: float | None, latency: str | None = None
) -> Targets:
    """What the command line says. Raises Problem."""
    if max_wer_loss is not None and not 0 <= max_wer_loss <= 100:
        raise Problem(
            f"--max-wer-loss {max_wer_loss:g} is not between 0 and 100 points",
            hint="1.0 is one point: from 5 % to 6 % of the words",
        )
    return Targets(
        None if params is None else parse_amount("--target-params", params),
        None if macs is None else parse_amount("--target-macs", macs),
        None if latency is None else parse_time("--target-latency", latency),
        max_wer_loss,
    )


def parse_amount(option: str, text: str) -> Amount:
    """ "900000", "0.9M" or "60%"."""
    bare, share = text.strip().removesuffix("%"), text.strip().endswith("%")
    unit = 1.0
    if not share and bare[-1:].lower() in UNITS:
        unit, bare = UNITS[bare[-1].lower()], bare[:-1]
    try:
        number = float(bare) * unit / (100 if share else 1)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or (not share and number < 1):
        raise Problem(
            f"{option} {text} is neither a count nor a share",
            hint="write 900000, 0.9M or 60% (of what the model has now)",
        )
    return Amount(number, share)


def parse_time(option: str, text: str) -> float:
    """Seconds of "400ms" or "0.4s"."""
    found = TIME.fullmatch(text)
    seconds = float(found[1]) * (1e-3 if found[2] == "ms" else 1) if found else 0.0
    if not 0 < seconds < math.inf:
        raise Problem(f"{option} {text} is no time", hint="write 400ms or 0.4s")
    return seconds


def table_of(latency: str | None, device: str | None) -> Table | None:
    """The latency table of a device for which a time is asked. Raises Problem: one of both is not
    named, there is no table."""
    if latency is None and device is None:
        return None
    if device is None:
        raise Problem(
            f"--target-latency {latency}: on no device",
            hint="add --device: `edgewhisper devices` lists those that are known",
        )
    if latency is None:
        raise Problem(
            f"--device {device}: nothing is asked of it",
            hint="add --target-latency 400ms, or leave it out: `export` and `bench` take a device",
        )
    return find_table(device)


def limits_of(targets: Targets, before: Mapping[str, Any]) -> dict[str, float]:
    """Axis -> the most it may be, infinite where nothing was asked.

    Raises Problem for a size that the model has already.
    """
    dense = position(before)
    limits = dict.fromkeys(targets.axes(), math.inf)
    for axis in limits.keys() & {"parameters", "macs"}:
        amount = getattr(targets, axis)
        limits[axis] = math.inf if amount is None else amount.of(int(dense[axis]))
    if targets.latency_s is not None:
        limits["latency"] = targets.latency_s
    for axis in SIZES:
        if dense.get(axis, math.inf) <= limits.get(axis, math.inf) < math.inf:
            raise Problem(
                f"a target of {worded(axis, limits[axis])} is met at once: the model has "
                f"{amount_of(axis, dense[axis])} before anything is done",
                hint="ask for less, or leave that target out",
            )
    if targets.wer_loss is not None:
        limits["wer"] = dense["wer"] + targets.wer_loss / 100
    return limits


def position(measured: Mapping[str, Any]) -> dict[str, float]:
    """Axis -> value of what pipeline.measure found."""
    return {
        "parameters": measured["parameters"]["total"],
        "macs": window_macs(measured["macs"]),
        **({"latency": measured["latency_s"]} if "latency_s" in measured else {}),
        "wer": measured["dev"]["wer"],
    }


def refuse_unsearchable(recipe: Recipe) -> None:
    if not recipe.knobs:
        named = [name for name in available() if searchable(name)]
        raise Problem(
            f"recipe {recipe.name}: it does not say what may be searched, so no target can be met",
            hint=f"use {', '.join(named)}, or add a table [[search]] with field, low and high",
        )


# ------------------------------------------------------------------------------ front and choice


def front(tried: Sequence[Tried]) -> list[Tried]:
    """The trials of which no other is as good everywhere and better somewhere; of equals one."""
    good = [trial for trial in tried if works(trial)]
    return [
        trial
        for number, trial in enumerate(good)
        if not any(dominates(other, trial) for other in good)
        and trial.values not in [earlier.values for earlier in good[:number]]
    ]


def works(trial: Tried) -> bool:
    return trial.told.get("refused") is None


def dominates(one: Tried, other: Tried) -> bool:
    return one.values != other.values and all(
        a <= b for a, b in zip(one.values, other.values, strict=True)
    )


def choose(tried: Sequence[Tried], limits: Mapping[str, float]) -> Tried | None:
    """The smallest that keeps all limits; where only sizes are asked for, the most accurate."""
    good = [trial for trial in front(tried) if excess(trial.values, limits) == 0]
    if not good:
        return None
    if limits["wer"] == math.inf:
        return min(good, key=lambda trial: (trial.values[-1], trial.values))
    return min(good, key=lambda trial: trial.values)


def excess(values: Sequence[float], limits: Mapping[str, float]) -> float:
    """How far beyond the limits: of a size as a share of the limit, of WER as it is. 0: within."""
    beyond = 0.0
    for value, (axis, limit) in zip(values, limits.items(), strict=True):
        over = max(0.0, value - limit - 1e-9)
        beyond += over if axis == "wer" else over / limit
    return beyond


def out_of_reach(tried: Sequence[Tried], limits: Mapping[str, float]) -> Problem:
    nearest = min(filter(works, tried), key=lambda trial: excess(trial.values, limits))
    asked = {axis: limit for axis, limit in limits.items() if limit < math.inf}
    return Problem(
        f"none of {len(tried)} trials has at most {listed(asked)}; the nearest has "
        f"{listed(dict(zip(limits, nearest.values, strict=True)))}, with {said(nearest.point)}",
        hint="ask for that, widen [[search]] in the recipe, or add --trials: those made are kept",
    )


def refuse_hopeless(recipe: Recipe, finished: Sequence[Tried], limits: Mapping[str, float]) -> None:
    """Sizes hardly go beyond those at the two ends of what is searched: where these are tried and
    far too large, more trials would only take time."""
    if len(finished) < len(first_points(recipe)) or not any(map(works, finished)):
        return
    for place, (axis, limit) in enumerate(limits.items()):
        smallest = min(trial.values[place] for trial in finished if works(trial))
        if axis != "wer" and smallest > HOPELESS * limit:
            raise out_of_reach(finished, limits)


def listed(values: Mapping[str, float]) -> str:
    return " and ".join(worded(axis, value) for axis, value in values.items())


def worded(axis: str, value: float) -> str:
    return f"{amount_of(axis, value)} {NAMES[axis]}"


def amount_of(axis: str, value: float) -> str:
    """In the unit that NAMES has."""
    if axis == "latency":
        return in_milliseconds(value)
    return f"{100 * value:.2f} %" if axis == "wer" else f"{value:,.0f}"


def said(point: Point) -> str:
    return ", ".join(f"{name} = {shown(value)}" for name, value in point.items())


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class Start:
    """What every trial starts from: the model after the steps that nothing is searched in."""

    model: WhisperForConditionalGeneration
    record: dict[str, Any]
    steps: int


def compress_to(
    targets: Targets,
    trials: int = TRIALS,
    model: str | None = None,
    recipe: str | None = None,
    speech: Path | None = None,
    dev: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    say: Say = print,
    language: str | None = None,
    table: Table | None = None,
    allow_loss: bool = False,
) -> tuple[Path, list[dict[str, str]]]:
    """Search within the recipe; return the directory of the chosen checkpoint and all trials as
    rows of a table. `table` says what a trial takes on the device for which a time is asked; the
    other arguments are those of pipeline.compress.

    Raises Problem as that does, and: a recipe that says nothing of what may be searched, a target
    that is met before anything is done, one that no trial met. Trials that failed because of their
    values (a rank above the width, a loss that is not finite) count as tried.
    """
    found = pipeline.recipe_for(model, recipe, speech)
    refuse_unsearchable(found)
    if targets.latency_s is not None and table is None:
        raise Problem("a time is asked, and there is no latency table", hint="see find_table()")
    axes = targets.axes()
    purpose = f"search {axes}"
    job = pipeline.prepare(found, model, speech, dev, out, seed, revision, purpose, language)
    job = replace(job, before=job.before | latency_of(job.dense, table))
    for line in (*job.notes, f"{job.source}: {pipeline.describe(job.before)}"):
        say(line)
    limits = limits_of(targets, job.before)
    begun = begin(job, say)
    tried = minimise(
        partial(run_trial, job, begun, table, limits, trials, Clock(), say),
        {knob.field: knob.dimension for knob in job.recipe.knobs},
        trials=trials,
        first=first_points(job.recipe),
        limits=list(limits.values()),
        startup=STARTUP,
        run_dir=job.work.run_dir,
        name=search_name(job, axes, table),
        seed=seed,
        accelerator=start_accelerator(Training()),
    )
    chosen = choose(tried, limits)
    if chosen is None:
        raise out_of_reach(tried, limits)
    if targets.wer_loss is None and not allow_loss:
        refuse_loss(job, chosen)
    find_again(job, begun, table, tried, say)
    place = out or runs.new_path("checkpoint", f"-{job.recipe.name}")
    rows = told_of(tried, chosen)
    if runs.main_process():
        write(place, job, targets, limits, tried, rows, table)
        shutil.rmtree(job.work.run_dir, ignore_errors=True)
    return place, printed(rows)


def refuse_loss(job: Job, chosen: Tried) -> None:
    """Raise Problem where nothing was said of WER and the choice loses more than the recipe's
    max_wer_loss."""
    before, after = job.before["dev"]["wer"], chosen.values[-1]
    limit = job.recipe.max_wer_loss
    if 100 * (after - before) > limit + 1e-9:
        raise Problem(
            f"the most accurate of the trials that meet the target has {100 * after:.1f} % dev "
            f"WER, against {100 * before:.1f} % before: more than max_wer_loss = {limit:g} points",
            hint="ask for less, add --max-wer-loss POINTS as a target, or accept it with "
            "--allow-loss: the trials made are kept",
        )


def latency_of(model: WhisperForConditionalGeneration, table: Table | None) -> dict[str, float]:
    """What is measured of a model where there is a table: the seconds that it predicts."""
    return {} if table is None else {"latency_s": predict(table, model)}


def search_name(job: Job, axes: Sequence[str], table: Table | None = None) -> str:
    """A name that two searches share only if their trials measure the same thing."""
    work = job.work
    clips = [[(c.audio.name, c.text, c.lang) for c in clips] for clips in (work.train, work.dev)]
    told = [
        job.recipe.text,
        list(axes),
        clips,
        language_for(job.dense.generation_config),
        work.seed,
        *([] if table is None else [asdict(table)]),
    ]
    return f"targets-{digest(job.dense.state_dict(), told)[:16]}"


def first_points(recipe: Recipe) -> list[Point]:
    """The recipe as it is written, where that lies within its bounds, and the two ends of them."""
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


def begin(job: Job, say: Say) -> Start:
    """Run the steps before the first that is searched, or find that they were run."""
    steps = min(knob.step for knob in job.recipe.knobs)
    if steps == 0:
        return Start(job.dense, {}, 0)
    place = job.work.run_dir / "beginning"
    if not place.exists():
        work = replace(job.work, record={})
        slim = pipeline.run_steps(copy.deepcopy(job.dense), job.recipe, work, say, last=steps)
        if runs.main_process():
            whisper.save(slim, work.processor, place, {"steps": work.record})
    together()
    record = whisper.compression_record(place)["steps"]
    return Start(whisper.load(place), record, steps)


def run_trial(
    job: Job,
    begun: Start,
    table: Table | None,
    limits: Mapping[str, float],
    trials: int,
    clock: Clock,
    say: Say,
    point: Point,
    finished: Sequence[Tried],
) -> Found:
    """One run of the recipe; its checkpoint is kept while it stands on the front."""
    for earlier in finished:
        if earlier.point == point:
            return Found(earlier.values, earlier.told)
    refuse_hopeless(job.recipe, finished, limits)
    say(f"trial {len(finished) + 1} of {trials}: {said(point)}")
    try:
        slim, measured, record = make(job, begun, table, point, say)
    except Problem as error:
        if is_not_about_values(error) or not any(map(works, finished)):
            raise
        say(f"this cannot be: {error}")
        return refused(job, list(limits), str(error))
    found = Found(tuple(position(measured)[axis] for axis in limits), {"measured": measured})
    keep(job, slim, record, Tried(point, found.values, found.told), finished)
    say(f"{pipeline.describe(measured)}{clock.left(trials - len(finished) - 1)}")
    return found


def make(
    job: Job, begun: Start, table: Table | None, point: Point, say: Say
) -> tuple[WhisperForConditionalGeneration, dict[str, Any], dict[str, Any]]:
    """The model, what it measures, and its compression.json."""
    work = replace(job.work, run_dir=trial_dir(job, point), record=dict(begun.record))
    recipe = with_values(job.recipe, point)
    model = copy.deepcopy(begun.model)
    model, after = pipeline.finish(
        pipeline.run_steps(model, recipe, work, say, first=begun.steps), work
    )
    after |= latency_of(model, table)
    return model, after, pipeline.record_of(job, work, after, point)


def is_not_about_values(error: Problem) -> bool:
    """Ctrl-C, a full disk: other values would not help."""
    return isinstance(error, Interrupted) or isinstance(error.__cause__, OSError)


def refused(job: Job, axes: Sequence[str], told: str) -> Found:
    """Values that a search avoids: as large as the model before, and all words wrong ten times."""
    before = position(job.before) | {"wer": 10.0}
    return Found(tuple(before[axis] for axis in axes), {"refused": told})


class Clock:
    """When the trials of this run will be over, from how long they took so far."""

    def __init__(self) -> None:
        self.started, self.made = time.monotonic(), 0

    def left(self, trials: int) -> str:
        self.made += 1
        minutes = (time.monotonic() - self.started) / self.made * trials / 60
        return f"; about {math.ceil(minutes)} min left" if trials else ""


# ---------------------------------------------------------------------- checkpoints of the trials


def trial_dir(job: Job, point: Point) -> Path:
    return job.work.run_dir / "trials" / key_of(point)


def kept_dir(job: Job, point: Point) -> Path:
    return job.work.run_dir / "kept" / key_of(point)


def key_of(point: Point) -> str:
    return sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:16]


def keep(
    job: Job,
    model: WhisperForConditionalGeneration,
    record: dict[str, Any],
    trial: Tried,
    finished: Sequence[Tried],
) -> None:
    """Save the trial if it stands on the front, and remove those that stood there before it."""
    on_front = [other.point for other in front([*finished, trial])]
    if runs.main_process():
        place = kept_dir(job, trial.point)
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed just then
        if trial.point in on_front:
            whisper.save(model, job.work.processor, place, record)
        for other in finished:
            if other.point not in on_front:
                shutil.rmtree(kept_dir(job, other.point), ignore_errors=True)
        shutil.rmtree(trial_dir(job, trial.point), ignore_errors=True)
    together()


def find_again(
    job: Job, begun: Start, table: Table | None, tried: Sequence[Tried], say: Say
) -> None:
    """Make the checkpoints of the front that are not here, because another machine made them."""
    missing = [trial for trial in front(tried) if not kept_dir(job, trial.point).exists()]
    together()
    for trial in missing:
        say(f"once more, for its checkpoint: {said(trial.point)}")
        slim, _, record = make(job, begun, table, trial.point, say)
        if runs.main_process():
            whisper.save(slim, job.work.processor, kept_dir(job, trial.point), record)
    together()


def together() -> None:
    """All processes wait for each other."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


# ------------------------------------------------------------------------------------- the output


def told_of(tried: Sequence[Tried], chosen: Tried) -> list[dict[str, Any]]:
    """Every trial as pareto.json has it."""
    on_front = front(tried)
    rows = []
    for number, trial in enumerate(tried, start=1):
        ours = next((other for other in on_front if other is trial), None)
        place = None if ours is None else "." if trial is chosen else f"front/{number:02d}"
        rows.append(
            {
                "trial": number,
                "values": trial.point,
                **told_measured(trial),
                "front": ours is not None,
                "chosen": trial is chosen,
                "checkpoint": place,
            }
        )
    return rows


def told_measured(trial: Tried) -> dict[str, Any]:
    if not works(trial):
        return {"refused": trial.told["refused"]}
    measured = trial.told["measured"]
    return {
        "parameters": measured["parameters"]["total"],
        "macs": window_macs(measured["macs"]),
        **{name: measured[name] for name in ("latency_s",) if name in measured},
        "dev_wer": measured["dev"]["wer"],
        "dev_wer_interval": list(measured["dev"]["wer_interval"]),
    }


def write(
    place: Path,
    job: Job,
    targets: Targets,
    limits: Mapping[str, float],
    tried: Sequence[Tried],
    rows: Sequence[dict[str, Any]],
    table: Table | None,
) -> None:
    """The chosen checkpoint, with the rest of the front in folders of their own."""
    before = Tried({}, (), {"measured": job.before})
    told = {
        "format": FORMAT,
        "recipe": job.recipe.name,
        "searched": {knob.field: asdict(knob.dimension) for knob in job.recipe.knobs},
        "asked": asdict(targets),
        "limits": {axis: limit for axis, limit in limits.items() if limit < math.inf},
        "macs_are": "of one full window and 32 tokens",
        **({} if table is None else {"latency_is": f"of the same, predicted for {table}"}),
        "before": told_measured(before),
        "trials": list(rows),
    }
    with new_directory(place) as folder:
        for trial, row in zip(tried, rows, strict=True):
            if row["checkpoint"] is not None:
                target = folder / row["checkpoint"]
                shutil.copytree(kept_dir(job, trial.point), target, dirs_exist_ok=True)
        (folder / PARETO).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")


def printed(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table, smallest first."""
    times = any("latency_s" in row for row in rows)
    ordered = sorted(rows, key=lambda row: (row.get("parameters", math.inf), row["trial"]))
    return [
        {
            "trial": str(row["trial"]),
            **{name: shown(value) for name, value in row["values"].items()},
            **told_sizes(row, times),
            "front": "yes" if row["front"] else "",
            "checkpoint": "chosen" if row["chosen"] else row["checkpoint"] or "",
        }
        for row in ordered
    ]


def told_sizes(row: Mapping[str, Any], times: bool) -> dict[str, str]:
    if "refused" in row:
        titles = ("parameters", "MMAC", *(["predicted ms"] if times else []), "dev WER %", "95 %")
        return dict.fromkeys(titles, "-")
    low, high = row["dev_wer_interval"]
    return {
        "parameters": f"{row['parameters']:,}",
        "MMAC": f"{row['macs'] / 1e6:,.1f}",
        **({"predicted ms": in_milliseconds(row["latency_s"])} if times else {}),
        "dev WER %": f"{100 * row['dev_wer']:.2f}",
        "95 %": f"{100 * low:.1f} to {100 * high:.1f}",
    }
