"""Targets of a recipe whose first step is `obs`: known sizes, bisection of WER, and the front."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from made_table import make_table
from some_clips import copy_of_some

from benchmarks import latency
from benchmarks.latency import Cost, predict
from benchmarks.wer import Score
from edgewhisper import budget_search, job, target_search
from edgewhisper.budget_search import REMOVE, Plan
from edgewhisper.compress import obs
from edgewhisper.compress.context import Context
from edgewhisper.job import Request
from edgewhisper.recipe import load_recipe, parse, with_values
from edgewhisper.search import Outcome, Trial
from edgewhisper.targets import Amount, Targets
from edgewhisper.whisper import load
from export.cost import count_parameters

RECIPE = """
[[step]]
method = "obs"
own_words = false
effect_clips = 0
round_to = 1
clips = 2

[[step]]
method = "shrink"

[[search]]
field = "step.1.remove"
low = 0.05
high = 0.3
"""


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Replace dev WER by the share of removed parameters; returns the sizes measured."""
    measured: list[int] = []

    def wer(self: Context, model) -> Score:
        size = count_parameters(model)["total"]
        measured.append(size)
        rate = 1 - size / 1_548_672
        return Score(rate, rate, rate, (rate, rate + 0.01), 0, 0, 0, 100, 2, 0, "none")

    monkeypatch.setattr(Context, "wer", wer)
    return measured


@pytest.fixture
def calibrations(monkeypatch) -> list[int]:
    """The number of branches of each calibration."""
    calls: list[int] = []
    measure_parts = obs.measure_parts

    def counted(*arguments):
        parts = measure_parts(*arguments)
        calls.append(len(parts))
        return parts

    monkeypatch.setattr(obs, "measure_parts", counted)
    return calls


@pytest.fixture
def run(empty, clips, tmp_path, digits, sizes):
    """Run compress_to() with the embedded model and two clips; returns the parsed pareto.json."""
    few = copy_of_some(clips, 2, tmp_path / "speech")

    def run(asked: Targets, out: str = "out", trials: int = 12, table=None) -> dict:
        (empty / "mine.toml").write_text(RECIPE)
        request = Request(str(digits), "mine.toml", few, few, Path(out), allow_loss=True)
        place, _ = target_search.compress_to(asked, request, trials, lambda text: None, table)
        assert (place / "front.png").read_bytes().startswith(b"\x89PNG")
        return json.loads((place / "pareto.json").read_text())

    return run


def chosen(record: dict) -> dict:
    (trial,) = [trial for trial in record["trials"] if trial["chosen"]]
    return trial


@pytest.mark.parametrize(
    ("axis", "key"),
    [("parameters", "parameters"), ("macs", "macs"), ("bytes", "predicted_bytes")],
)
def test_a_size_target_is_met_closely_by_one_trial(axis, key, run):
    record = run(Targets(**{axis: Amount(0.85, share=True)}))
    assert len(record["trials"]) == 1
    assert 0.83 < chosen(record)[key] / record["before"][key] <= 0.85
    assert chosen(record)["values"]["step.1.budget_of"] == axis


def test_a_latency_target_is_met_by_the_latency_that_the_table_predicts(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = make_table({kind: Cost(1e-6, s_per_mac=1e-10) for kind in ("linear", "product")})
    latency.write(table)
    dense = predict(table, load(str(job.DEFAULT_MODEL)))
    record = run(Targets(latency_s=0.9 * dense), table=table)
    assert len(record["trials"]) == 1
    assert 0.85 * dense < chosen(record)["latency_s"] <= 0.9 * dense
    assert chosen(record)["latency_s"] == pytest.approx(predict(table, load("out")))


def test_a_limit_of_wer_is_approached_by_bisection(run, calibrations):
    record = run(Targets(wer_loss=10.0))
    assert len(calibrations) == 1, "later trials reuse the measurements of the first"
    assert 0.08 < chosen(record)["dev_wer"] - record["before"]["dev_wer"] <= 0.1
    assert len(record["trials"]) <= 5


def test_a_front_covers_the_range_and_a_later_target_measures_nothing_again(run, calibrations):
    record = run(Targets(front="parameters"), trials=4)
    assert [trial["values"][REMOVE] for trial in record["trials"]] == [0.05, 0.1333, 0.2167, 0.3]
    assert all(trial["front"] for trial in record["trials"])
    rates = [trial["dev_wer"] for trial in record["trials"]]
    assert rates == sorted(rates)
    run(Targets(parameters=Amount(0.9, share=True)), out="later")
    assert len(calibrations) == 1


def test_an_interrupted_plan_repeats_no_trial(tmp_path):
    plan = Plan([{REMOVE: share} for share in (0.1, 0.2, 0.3)], 0.1, 0.3, math.inf, {})
    made: list[float] = []

    def trial(point, finished):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(point[REMOVE])
        return Outcome((1.0, 0.1), {"measured": {}})

    with pytest.raises(KeyboardInterrupt):
        budget_search.run_plan(plan, trial, tmp_path / "trials.json")
    made.clear()
    trials = budget_search.run_plan(plan, trial, tmp_path / "trials.json")
    assert made == [0.3]
    assert [each.point[REMOVE] for each in trials] == [0.1, 0.2, 0.3]


def test_bisection_halves_between_the_largest_good_share_and_the_smallest_bad_one():
    plan = Plan([], 0.0, 0.4, wer=0.1, others={})
    finished = [Trial({REMOVE: 0.2}, (1.0, 0.09)), Trial({REMOVE: 0.3}, (1.0, 0.2))]
    assert plan.next(finished) == {REMOVE: pytest.approx(0.25)}
    near = [*finished, Trial({REMOVE: 0.209}, (1.0, 0.11))]
    assert plan.next(near) is None
    assert plan.next([Trial({REMOVE: 0.0}, (1.0, 0.2))]) is None, "the smallest share is too much"


def test_only_recipes_that_search_the_share_of_a_first_obs_have_a_plan():
    assert budget_search.applies(load_recipe("oneshot"))
    assert not budget_search.applies(load_recipe("lite"))
    assert not budget_search.applies(parse("mine", RECIPE.replace(".remove", ".damping")))


def test_the_fields_of_a_point_replace_those_of_the_recipe():
    recipe = with_values(parse("mine", RECIPE), {REMOVE: 0.2, "step.1.budget_of": "macs"})
    assert recipe.steps[0].options == replace(
        parse("mine", RECIPE).steps[0].options, remove=0.2, budget_of="macs"
    )
