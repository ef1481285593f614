"""Minimise a costly function of a few options with Optuna.

A function may have several values with limits; the caller then chooses among the trials. Trials are
stored in a database: an SQLite file, from which an interrupted search resumes, or a URL that
several machines share. The point of trial n depends only on the seed and the trials finished
before it, so an interrupted search makes the same trials as an uninterrupted one.
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
"""Environment variable with the URL of a shared database. It is not a field of a recipe, because
recipes are copied into checkpoints, which must not contain a password."""


@dataclass(frozen=True)
class Dimension:
    """The range of an option: two inclusive bounds, or a list of choices."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    """Draw uniformly on a logarithmic scale."""
    whole: bool = False
    """Draw integers only."""
    choices: tuple[Value, ...] = ()
    """If not empty, low and high are ignored."""

    def holds(self, value: Value) -> bool:
        """Return whether the value is within the range."""
        if self.choices or isinstance(value, str):
            return value in self.choices
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Outcome:
    """The result of the function at a point: its values, and a record (JSON) to store with them."""

    values: tuple[float, ...]
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A finished trial: the point, the values and the record that was stored with them."""

    point: Point
    values: tuple[float, ...]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The first value."""
        return self.values[0]


Objective = Callable[[Point, Sequence[Trial]], Outcome]
"""(point, trials finished before it) -> the values to minimise."""


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
) -> list[Trial]:
    """Run trials in `space` until `trials` are finished. Returns all of them, oldest first.

    - `first` are points to try before the search draws its own. It draws at random until `startup`
      trials are finished, and then with a tree-structured Parzen estimator (TPE).
    - `limits` has a limit for each value of the objective. The search prefers points near trials
      within all limits.
    - `name` identifies the search in the database. It must determine the objective's values, for
      example by a hash.
    - With several processes, the first one reads and writes the database and sends each point to
      the others.

    Raises Problem if Optuna is not installed or the database cannot be opened. An exception of
    `objective` is raised again, and its point is tried again by the next search.
    """
    main = accelerator.is_main_process
    shared = bool(os.environ.get(STORAGE))
    study = open_study(run_dir, name, len(limits)) if main else None
    if study is not None:
        prepare(study, shared)
    while True:
        trial, asked = None, None
        if study is not None:
            queue_next(study, first)
            trial, asked = ask(study, space, trials, sampler(study, seed, startup, shared))
        point, finished = broadcast(asked, accelerator)
        if point is None:
            return finished
        try:
            result = objective(point, finished)
        except BaseException:
            if study is not None and trial is not None:
                give_up(study, trial.number, point)
            raise
        if study is not None and trial is not None:
            finish(study, trial, result, limits)


def best(tried: Sequence[Trial]) -> Trial:
    """Return the trial with the smallest value, the oldest one of equal values."""
    return min(tried, key=lambda trial: trial.value)


# ----------------------------------------------------------------------------------- the database


def open_study(run_dir: Path, name: str, values: int) -> optuna.Study:
    """Open or create the search of this name. Raises Problem if the database cannot be opened."""
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
            hint=f"set {STORAGE} to a URL that SQLAlchemy supports, such as "
            "sqlite:///search.db, or unset it",
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
    """Return the URL of the database."""
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

Asked = tuple[Point | None, list[Trial]]
"""The point of a trial (None: the search is finished), and the trials finished before it."""

RECORD = "told"
"""Name of the record in the database."""


def prepare(study: optuna.Study, shared: bool) -> None:
    """Queue the points of trials that were running when the search was killed. In a shared
    database, a running trial may belong to another machine and is left unchanged."""
    from optuna.trial import TrialState

    if not shared:
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            give_up(study, trial.number, trial.params)


def queue_next(study: optuna.Study, first: Sequence[Point]) -> None:
    """Queue the next of the first points, unless an interrupted trial is queued already."""
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
    """Mark a trial as failed and queue its point again."""
    from optuna.trial import TrialState

    study.tell(number, state=TrialState.FAIL)
    if point:
        study.enqueue_trial(point)


def sampler(study: optuna.Study, seed: int, startup: int, shared: bool) -> Any:
    """Return a sampler seeded with the seed and the number of finished trials. In a shared search
    it is not seeded, because all machines would draw the same points."""
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


def finish(
    study: optuna.Study, trial: optuna.Trial, result: Outcome, limits: Sequence[float]
) -> None:
    """Store the result of a trial, and by how much each value exceeds its limit."""
    for number, (value, limit) in enumerate(zip(result.values, limits, strict=True)):
        if limit < math.inf:
            trial.set_constraint(str(number), value - limit)
    trial.set_user_attr(RECORD, result.record)
    study.tell(trial, list(result.values))


def complete(study: optuna.Study) -> list[Trial]:
    """Return the finished trials, oldest first."""
    from optuna.trial import TrialState

    trials = study.get_trials(states=(TrialState.COMPLETE,))
    return [
        Trial(dict(trial.params), tuple(map(float, trial.values)), trial.user_attrs.get(RECORD, {}))
        for trial in trials
    ]


def broadcast(asked: Asked | None, accelerator: Accelerator) -> Asked:
    """Send the next point of the first process to all processes."""
    if accelerator.num_processes == 1:
        assert asked is not None
        return asked
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([asked])[0]
