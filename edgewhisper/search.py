"""Searching a few options for the smallest values of a costly function, on Optuna.

A function may have several values, and limits that they shall keep; then none is the best, and the
caller takes its choice among the trials. Trials stand in a database: an SQLite file that an
interrupted search goes on from, or one at a URL that several machines share. What trial n draws
follows from the seed and the trials finished before it, so a search that was stopped makes the same
trials as one that was not.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from export.problem import Problem

if TYPE_CHECKING:
    import optuna
    from accelerate import Accelerator

Value = float | int | str | bool
Point = dict[str, Any]
"""Name -> Value."""

STORAGE = "EDGEWHISPER_STORAGE"
"""Environment variable with the URL of a database that machines share. It is no field of a recipe:
recipes may come from strangers, and are copied into checkpoints, where no password belongs."""


@dataclass(frozen=True)
class Dimension:
    """What one name of a point may be: between two bounds, both allowed, or one of some values."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    """Draw evenly over orders of magnitude."""
    whole: bool = False
    choices: tuple[Value, ...] = ()
    """If there are any, low and high count for nothing."""

    def holds(self, value: Value) -> bool:
        if self.choices or isinstance(value, str):
            return value in self.choices
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Found:
    """What a function says of a point: its values, and what else is to be remembered (JSON)."""

    values: tuple[float, ...]
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    point: Point
    values: tuple[float, ...]
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The only one, or the first."""
        return self.values[0]


Objective = Callable[[Point, Sequence[Tried]], Found]
"""A point and the trials finished before it -> what shall be small."""


def minimise(
    objective: Objective,
    space: Mapping[str, Dimension],
    *,
    trials: int,
    first: Sequence[Point] = (),
    limits: Sequence[float] = (math.inf,),
    startup: int = 10,
    run_dir: Path,
    name: str,
    seed: int,
    accelerator: Accelerator,
) -> list[Tried]:
    """Try points of the box `space` until `trials` are finished -> all of them, oldest first.

    The points `first` are tried before the search draws its own: at random until `startup` trials
    are finished, then by a tree of Parzen estimators. Each value of the objective has one of the
    `limits`; where trials keep them all, the search goes on near those.
    `name` must say all that decides an objective's value: trials of one name are one search,
    whoever makes them. With several processes the first one keeps the database and tells the
    others. Raises what `objective` raises, after noting that the point is to be tried again, and
    Problem: no optuna, no such database.
    """
    main = accelerator.is_main_process
    shared = bool(os.environ.get(STORAGE))
    study = open_study(run_dir, name, len(limits)) if main else None
    if study is not None:
        prepare(study, shared)
    while True:
        trial, asked = None, None
        if study is not None:
            line_up(study, first)
            trial, asked = ask(study, space, trials, sampler(study, seed, startup, shared))
        point, finished = tell_all(asked, accelerator)
        if point is None:
            return finished
        try:
            found = objective(point, finished)
        except BaseException:
            if study is not None and trial is not None:
                give_up(study, trial.number, point)
            raise
        if study is not None and trial is not None:
            finish(study, trial, found, limits)


def best(tried: Sequence[Tried]) -> Tried:
    """The smallest value; of equal ones the oldest."""
    return min(tried, key=lambda trial: trial.value)


# ----------------------------------------------------------------------------------- the database


def open_study(run_dir: Path, name: str, values: int) -> optuna.Study:
    optuna = import_optuna()
    url = address(run_dir)
    try:
        return optuna.create_study(
            storage=url, study_name=name, directions=["minimize"] * values, load_if_exists=True
        )
    except Exception as error:
        raise Problem(
            f"search: the storage {without_password(url)} cannot be opened "
            f"({type(error).__name__})",
            hint="give a URL that SQLAlchemy knows, such as sqlite:///search.db, or leave it out",
        ) from error


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise Problem(
            "search: Optuna is not installed", hint="pip install 'edgewhisper[search]'"
        ) from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def address(run_dir: Path) -> str:
    url = os.environ.get(STORAGE)
    if url:
        return url
    run_dir.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{run_dir.resolve() / 'search.db'}"


def without_password(url: str) -> str:
    try:
        password = urlsplit(url).password
    except ValueError:
        return url
    return url.replace(f":{password}@", ":...@") if password else url


# --------------------------------------------------------------------------------------- one trial

Asked = tuple[Point | None, list[Tried]]
"""The point of a trial (None: the search is over), and the trials finished before it."""

TOLD = "told"


def prepare(study: optuna.Study, shared: bool) -> None:
    """Put in line what was being tried when the search was killed.

    In a shared database a trial that runs may be another machine's, so it is left alone; a dead
    one counts nowhere.
    """
    from optuna.trial import TrialState

    if not shared:
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            give_up(study, trial.number, trial.params)


def line_up(study: optuna.Study, first: Sequence[Point]) -> None:
    """Put the next of the first points in line, unless something waits there: one that was given
    up keeps its turn."""
    from optuna.trial import TrialState

    if study.get_trials(states=(TrialState.WAITING,)):
        return
    begun = study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING))
    known = [trial.params for trial in begun]
    for point in first:
        if point not in known:
            study.enqueue_trial(point)
            return


def give_up(study: optuna.Study, number: int, point: Point) -> None:
    from optuna.trial import TrialState

    study.tell(number, state=TrialState.FAIL)
    if point:
        study.enqueue_trial(point)


def sampler(study: optuna.Study, seed: int, startup: int, shared: bool) -> Any:
    """Draws that follow from the seed and the number of trials finished; machines that share a
    search would draw the same point from the same seed."""
    from optuna.samplers import TPESampler

    seed_now = None if shared else seed + len(complete(study))
    return TPESampler(seed=seed_now, n_startup_trials=startup)


def ask(
    study: optuna.Study, space: Mapping[str, Dimension], trials: int, sampler: Any
) -> tuple[optuna.Trial | None, Asked]:
    finished = complete(study)
    if len(finished) >= trials:
        return None, (None, finished)
    study.sampler = sampler
    trial = study.ask()
    return trial, ({name: draw(trial, name, of) for name, of in space.items()}, finished)


def draw(trial: optuna.Trial, name: str, of: Dimension) -> Value:
    if of.choices:
        return trial.suggest_categorical(name, of.choices)
    if of.whole:
        return trial.suggest_int(name, int(of.low), int(of.high), log=of.log)
    return trial.suggest_float(name, of.low, of.high, log=of.log)


def finish(study: optuna.Study, trial: optuna.Trial, found: Found, limits: Sequence[float]) -> None:
    for number, (value, limit) in enumerate(zip(found.values, limits, strict=True)):
        if limit < math.inf:
            trial.set_constraint(str(number), value - limit)
    trial.set_user_attr(TOLD, found.told)
    study.tell(trial, list(found.values))


def complete(study: optuna.Study) -> list[Tried]:
    from optuna.trial import TrialState

    trials = study.get_trials(states=(TrialState.COMPLETE,))
    return [
        Tried(dict(trial.params), tuple(map(float, trial.values)), trial.user_attrs.get(TOLD, {}))
        for trial in trials
    ]


def tell_all(asked: Asked | None, accelerator: Accelerator) -> Asked:
    """What the first process asked for, on every process."""
    if accelerator.num_processes == 1:
        assert asked is not None
        return asked
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([asked])[0]
