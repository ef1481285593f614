"""Searching a few numbers for the smallest value of a costly function, on Optuna.

Trials stand in a database: an SQLite file that an interrupted search goes on from, or one at a URL
that several machines share. What trial n draws follows from the seed and the trials finished
before it, so a search that was stopped makes the same trials as one that was not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from export.problem import Problem

if TYPE_CHECKING:
    import optuna
    from accelerate import Accelerator

Point = dict[str, float]
Objective = Callable[[Point, int], float]
"""A point and the number of trials finished before it -> what shall be small."""

STORAGE = "EDGEWHISPER_STORAGE"
"""Environment variable with the URL of a database that machines share. It is no field of a recipe:
recipes may come from strangers, and are copied into checkpoints, where no password belongs."""


@dataclass(frozen=True)
class Tried:
    point: Point
    value: float


def minimise(
    objective: Objective,
    space: Mapping[str, tuple[float, float]],
    *,
    trials: int,
    first: Sequence[Point] = (),
    run_dir: Path,
    name: str,
    seed: int,
    accelerator: Accelerator,
) -> list[Tried]:
    """Try points of the box `space` until `trials` are finished -> all of them, oldest first.

    The points `first` are tried before the search draws its own (a tree of Parzen estimators).
    `name` must say all that decides an objective's value: trials of one name are one search,
    whoever makes them. With several processes the first one keeps the database and tells the
    others. Raises what `objective` raises, after noting that the point is to be tried again, and
    Problem: no optuna, no such database.
    """
    main = accelerator.is_main_process
    shared = bool(os.environ.get(STORAGE))
    study = open_study(run_dir, name) if main else None
    if study is not None:
        prepare(study, first, shared)
    while True:
        asked = ask(study, space, trials, seed, shared) if study is not None else None
        number, point, finished = tell_all(asked, accelerator)
        if point is None:
            return finished
        try:
            value = objective(point, len(finished))
        except BaseException:
            if study is not None:
                give_up(study, number, point)
            raise
        if study is not None:
            study.tell(number, value)


def best(tried: Sequence[Tried]) -> Tried:
    """The smallest value; of equal ones the oldest."""
    return min(tried, key=lambda trial: trial.value)


# ----------------------------------------------------------------------------------- the database


def open_study(run_dir: Path, name: str) -> optuna.Study:
    optuna = import_optuna()
    url = address(run_dir)
    try:
        return optuna.create_study(
            storage=url, study_name=name, direction="minimize", load_if_exists=True
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

Asked = tuple[int, Point | None, list[Tried]]
"""Number of a trial, its point (None: the search is over), and the trials finished before it."""


def prepare(study: optuna.Study, first: Sequence[Point], shared: bool) -> None:
    """Put the first points in line, and those that were being tried when the search was killed.

    In a shared database a trial that runs may be another machine's, so it is left alone; a dead
    one counts nowhere.
    """
    from optuna.trial import TrialState

    for point in first:
        study.enqueue_trial(point, skip_if_exists=True)
    if not shared:
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            give_up(study, trial.number, trial.params)


def give_up(study: optuna.Study, number: int, point: Point) -> None:
    from optuna.trial import TrialState

    study.tell(number, state=TrialState.FAIL)
    if point:
        study.enqueue_trial(point)


def ask(
    study: optuna.Study,
    space: Mapping[str, tuple[float, float]],
    trials: int,
    seed: int,
    shared: bool,
) -> Asked:
    from optuna.samplers import TPESampler

    finished = complete(study)
    if len(finished) >= trials:
        return -1, None, finished
    # machines that share a search would draw the same point from the same seed
    study.sampler = TPESampler(seed=None if shared else seed + len(finished))
    trial = study.ask()
    point = {name: trial.suggest_float(name, *bounds) for name, bounds in space.items()}
    return trial.number, point, finished


def complete(study: optuna.Study) -> list[Tried]:
    from optuna.trial import TrialState

    trials = study.get_trials(states=(TrialState.COMPLETE,))
    return [Tried(dict(trial.params), float(trial.values[0])) for trial in trials]


def tell_all(asked: Asked | None, accelerator: Accelerator) -> Asked:
    """What the first process asked for, on every process."""
    if accelerator.num_processes == 1:
        assert asked is not None
        return asked
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([asked])[0]
