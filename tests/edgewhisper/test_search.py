"""Searches: the points that are tried, resumption, and databases shared by machines."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from edgewhisper import search
from edgewhisper.search import Dimension, Outcome, best, minimise
from export.problem import Problem

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
SPACE = {"x": Dimension(-4.0, 6.0), "y": Dimension(0.0, 1.0)}


def bowl(point, finished):
    return Outcome(((point["x"] - 1) ** 2 + point["y"],))


@pytest.fixture
def run(tmp_path, seed):
    """Run minimise() with the arguments that all tests share."""

    def run(objective=bowl, trials=14, where="run", **more):
        options = {"run_dir": tmp_path / where, "name": "n", "seed": seed, "accelerator": ALONE}
        return minimise(objective, SPACE, trials=trials, **(options | more))

    return run


def test_a_search_stays_in_its_space_and_finds_low_values(run):
    tried = run(trials=30)
    assert len(tried) == 30
    for trial in tried:
        assert all(of.holds(trial.point[name]) for name, of in SPACE.items())
        assert trial.values == bowl(trial.point, []).values
    assert best(tried).value == min(trial.value for trial in tried) < 2


def test_first_points_are_tried_first_and_the_oldest_of_equal_trials_is_best(run):
    first = [{"x": 2.0, "y": 0.5}, {"x": 0.0, "y": 0.5}]
    tried = run(first=first, trials=2)
    assert [trial.point for trial in tried] == first
    assert best(tried).point == first[0]


def test_the_objective_gets_the_finished_trials(run):
    numbers = []
    run(lambda point, finished: numbers.append(len(finished)) or Outcome((0.0,)), trials=3)
    assert numbers == [0, 1, 2]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_interrupted_search_makes_the_same_trials(how, run, rng, monkeypatch):
    first = [{"x": 2.0, "y": 0.5}, {"x": 1.0, "y": 0.0}, {"x": -4.0, "y": 1.0}]
    whole = run(where="whole", first=first)
    last = int(rng.integers(0, 13))
    points = []

    def interrupted(point, finished):
        if len(finished) == last and not points:
            points.append(point)
            raise KeyboardInterrupt
        return bowl(point, finished)

    if how == "killed":  # the trial is not marked as failed
        monkeypatch.setattr(search, "give_up", lambda study, number, point: None)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, first=first)
    monkeypatch.undo()
    resumed = run(interrupted, first=first)
    assert resumed == whole
    assert resumed[last].point == points[0]


def test_a_finished_search_is_not_repeated(run):
    tried = run(trials=4)
    assert run(lambda point, finished: pytest.fail("tried again"), trials=4) == tried
    assert len(run(trials=5)) == 5


def test_searches_of_different_names_are_independent(run):
    run(trials=4)
    assert len(run(trials=2, name="other")) == 2


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    """A database that two machines use."""
    monkeypatch.setenv(search.STORAGE, f"sqlite:///{tmp_path / 'shared.db'}")
    return tmp_path / "shared.db"


def test_machines_share_a_database(run, tmp_path, shared):
    first = run(trials=3, where="one")
    both = run(trials=5, where="two")
    assert both[:3] == first and len(both) == 5
    assert shared.exists()
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()


def test_a_running_trial_of_another_machine_is_not_changed(run, shared):
    def meanwhile(point, finished):
        if not finished:  # the other machine starts and finishes during this trial
            assert len(run(trials=2, where="two")) == 2
        return bowl(point, finished)

    assert len(run(meanwhile, trials=3, where="one")) == 3


def test_an_invalid_database_is_an_error_without_the_password(run, monkeypatch):
    monkeypatch.setenv(search.STORAGE, "nonsense")
    with pytest.raises(Problem, match="storage nonsense cannot be opened"):
        run()
    monkeypatch.setenv(search.STORAGE, "nonsense://me:secret@host/db")
    with pytest.raises(Problem, match=r"nonsense://me:...@host/db cannot be opened") as problem:
        run()
    assert "secret" not in str(problem.value)


def test_without_optuna_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Problem, match="Optuna is not installed") as problem:
        run()
    assert "edgewhisper[search]" in problem.value.hint


# ----------------------------------------------------------- several values, limits, other spaces


def lens(point, finished):
    """Two conflicting values: the Pareto front has x between 0 and 2."""
    return Outcome((point["x"] ** 2, (point["x"] - 2) ** 2), {"drawn": point["x"]})


def test_several_values_are_returned_with_their_record(run):
    tried = run(lens, trials=8, limits=(1.0, math.inf))
    assert all(trial.values == lens(trial.point, []).values for trial in tried)
    assert [trial.record["drawn"] for trial in tried] == [trial.point["x"] for trial in tried]
    assert run(lens, trials=8, limits=(1.0, math.inf)) == tried


def test_the_excess_over_the_limits_is_stored_as_constraints(run, tmp_path):
    tried = run(lens, trials=3, limits=(0.25, math.inf))
    study = optuna.load_study(study_name="n", storage=f"sqlite:///{tmp_path / 'run/search.db'}")
    stored = [trial.constraints for trial in study.get_trials()]
    assert stored == [{"0": trial.values[0] - 0.25} for trial in tried]


def test_integers_logarithmic_ranges_and_choices_are_drawn(tmp_path, seed):
    space = {
        "rank": Dimension(2, 64, log=True, whole=True),
        "rate": Dimension(1e-5, 1e-1, log=True),
        "start": Dimension(choices=("svd", "mix")),
        "on": Dimension(choices=(True, False)),
    }
    first = [{"rank": 9, "rate": 1e-2, "start": "mix", "on": False}]
    options = dict(run_dir=tmp_path, name="n", seed=seed, accelerator=ALONE)
    tried = minimise(lambda p, f: Outcome((p["rate"],)), space, trials=30, first=first, **options)
    assert tried[0].point == first[0]
    for trial in tried:
        assert type(trial.point["rank"]) is int and type(trial.point["on"]) is bool
        assert all(of.holds(trial.point[name]) for name, of in space.items())
    assert sum(trial.point["rate"] < 1e-3 for trial in tried) > 5
    assert {trial.point["start"] for trial in tried} == {"svd", "mix"}
