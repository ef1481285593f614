"""Compressing to a target: the options, the Pareto front, the choice, and resumed searches."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ctrl_c import count_calls, press_ctrl_c
from made_table import make_table
from some_clips import copy_of_some

from benchmarks import latency
from benchmarks.latency import Cost
from benchmarks.wer import Score
from edgewhisper import job, pipeline, runs, search, target_search, targets
from edgewhisper.compress.context import Context
from edgewhisper.front import choose, excess, front
from edgewhisper.job import Request
from edgewhisper.recipe import parse as parse_recipe
from edgewhisper.resume import Interrupted
from edgewhisper.search import Trial
from edgewhisper.targets import Amount, Targets
from edgewhisper.training import Loop
from edgewhisper.whisper import load, save
from export.cost import count_parameters
from export.problem import Problem

RANK = """
[[step]]
method = "shear"
rank = 32
calibration = 2
[step.training]
steps = 0

[[search]]
field = "step.1.rank"
low = 4
high = 96
"""
TWO_STEPS = '[[step]]\nmethod = "shrink"\n' + RANK.replace("step.1", "step.2")
DENSE = 1_548_672
ROOT = Path(pipeline.__file__).parent.parent


# ------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize(
    ("text", "of_a_million"),
    [
        pytest.param("900000", 900_000, id="count"),
        pytest.param("0.9M", 900_000, id="millions"),
        pytest.param("650k", 650_000, id="thousands"),
        pytest.param("1.5G", 1_500_000_000, id="billions"),
        pytest.param("60%", 600_000, id="share"),
        pytest.param(" 12.5 % ", 125_000, id="share with blanks"),
    ],
)
def test_amounts_are_counts_or_shares(text, of_a_million):
    assert targets.parse_amount("--target-params", text).of(1_000_000) == of_a_million


@pytest.mark.parametrize(
    "text", ["", "M", "%", "0", "-5", "0.6", "nan", "inf", "many", "0%", "1e999"]
)
def test_invalid_amounts_are_refused(text):
    with pytest.raises(Problem, match=r"--target-macs .* is neither a count nor a share") as error:
        targets.parse_amount("--target-macs", text)
    assert "60%" in error.value.hint


@pytest.mark.parametrize("points", [-0.1, 101, math.nan])
def test_an_invalid_loss_is_refused(points):
    with pytest.raises(Problem, match="is not between 0 and 100 points"):
        targets.parse(None, None, points)


@pytest.mark.parametrize(("text", "seconds"), [("400ms", 0.4), ("0.4s", 0.4), (" 1.5 s ", 1.5)])
def test_a_time_is_read_with_its_unit(text, seconds):
    parsed = targets.parse(None, None, None, text)
    assert parsed.latency_s == pytest.approx(seconds)
    assert parsed.axes() == ["latency", "wer"]


@pytest.mark.parametrize("text", ["", "400", "0ms", "-1s", "nan s", "1e3ms", "60%", "4 min"])
def test_invalid_times_are_refused(text):
    with pytest.raises(Problem, match=r"--target-latency .* is not a valid time") as error:
        targets.parse(None, None, None, text)
    assert error.value.hint == "write 400ms or 0.4s"


def test_a_latency_target_needs_a_device_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert targets.table_of(None, None) is None
    with pytest.raises(Problem, match="--target-latency 400ms needs a device"):
        targets.table_of("400ms", None)
    with pytest.raises(
        Problem, match="--device rpi5 has no effect without --target-latency or --front"
    ):
        targets.table_of(None, "rpi5")
    with pytest.raises(Problem, match="there is no latency table of rpi5") as error:
        targets.table_of("400ms", "rpi5")
    assert "edgewhisper devices calibrate --device rpi5" in error.value.hint
    latency.write(make_table())
    assert targets.table_of("400ms", "rpi5") == make_table()


# ------------------------------------------------------------------------------ front and choice


def trials_with(*values: tuple[float, ...]) -> list[Trial]:
    return [Trial({"x": float(i)}, v, {"measured": {}}) for i, v in enumerate(values)]


def test_a_precision_must_be_known_and_needs_a_target_of_bytes():
    with pytest.raises(Problem, match="unknown --precision 'int5'"):
        targets.parse(None, None, None, size="30M", precision="int5")
    with pytest.raises(Problem, match="--precision int8 is for --target-bytes"):
        targets.parse(None, None, None, precision="int8")


def test_the_front_of_known_trials():
    trials = trials_with((9, 0.1), (5, 0.2), (5, 0.3), (7, 0.2), (3, 0.4), (9, 0.1), (4, 0.5))
    assert [trial.values for trial in front(trials)] == [(9, 0.1), (5, 0.2), (3, 0.4)]


def test_a_refused_trial_is_not_on_the_front():
    refused = Trial({"x": 1.0}, (1, 0.0), {"refused": "no"})
    assert front([refused, *trials_with((5, 0.2))]) == trials_with((5, 0.2))


@pytest.mark.parametrize("axes", [2, 3])
def test_no_trial_on_the_front_is_dominated(axes, rng):
    drawn = rng.integers(0, 6, size=(int(rng.integers(1, 40)), axes))
    points = trials_with(*(tuple(map(float, row)) for row in drawn))
    on_front = {trial.values for trial in front(points)}
    for trial in points:
        dominated = any(
            all(a <= b for a, b in zip(other.values, trial.values, strict=True))
            and other.values != trial.values
            for other in points
        )
        assert (trial.values in on_front) == (not dominated)
    assert len(front(points)) == len(on_front), "equal trials are on the front once"


@pytest.mark.parametrize("limited", ["size", "wer", "both"])
def test_the_choice_is_the_best_trial_within_the_limits(limited, rng):
    drawn = rng.uniform(0, 1, size=(int(rng.integers(2, 30)), 2))
    points = trials_with(*(tuple(map(float, row)) for row in drawn))
    limits = {"parameters": math.inf, "wer": math.inf}
    if limited != "wer":
        limits["parameters"] = float(rng.uniform(0.2, 1))
    if limited != "size":
        limits["wer"] = float(rng.uniform(0.2, 1))
    good = [
        p for p in points if p.values[0] <= limits["parameters"] and p.values[1] <= limits["wer"]
    ]
    chosen = choose(points, limits)
    if not good:
        assert chosen is None
    elif limited == "size":
        assert chosen.values[1] == min(p.values[1] for p in good)
    else:
        assert chosen.values[0] == min(p.values[0] for p in good)


def test_the_excess_adds_shares_of_sizes_and_differences_of_wer():
    limits = {"parameters": 100, "macs": math.inf, "wer": 0.05}
    assert excess((150, 7, 0.08), limits) == pytest.approx(0.5 + 0.03)
    assert excess((100, 7, 0.05), limits) == 0


# ------------------------------------------------------------------------------------ the search


@pytest.fixture
def few(clips, tmp_path) -> Path:
    """Two of the shipped clips."""
    return copy_of_some(clips, 2, tmp_path / "speech")


@pytest.fixture
def wer_by_size(monkeypatch) -> list[int]:
    """Replace dev WER by 0.1 times the share of removed parameters; returns the sizes measured."""
    sizes: list[int] = []

    def wer(self: Context, model) -> Score:
        size = count_parameters(model)["total"]
        sizes.append(size)
        rate = 0.1 * (1 - size / DENSE)
        return Score(rate, rate, rate, (rate, rate + 0.01), 0, 0, 0, 100, 2, 0, "none")

    monkeypatch.setattr(Context, "wer", wer)
    return sizes


@pytest.fixture
def run(empty, few, digits, wer_by_size):
    """Run compress_to() with the embedded model, two clips and a recipe."""

    def run(asked, recipe=RANK, trials=6, out="out", seed=0, say=lambda text: None, table=None):
        (empty / "mine.toml").write_text(recipe)
        request = Request(str(digits), "mine.toml", few, few, Path(out), seed)
        return target_search.compress_to(asked, request, trials, say, table)

    return run


def pareto(place: Path) -> dict:
    return json.loads((place / "pareto.json").read_text())


def test_a_size_target_gets_the_most_accurate_trial_within_it(run, digits):
    place, rows = run(Targets(parameters=Amount(0.96, share=True)))
    record = pareto(place)
    (chosen,) = [trial for trial in record["trials"] if trial["chosen"]]
    within = [t for t in record["trials"] if t["parameters"] <= 0.96 * DENSE]
    assert chosen["dev_wer"] == min(trial["dev_wer"] for trial in within)
    assert chosen["checkpoint"] == "." and chosen["front"]
    assert count_parameters(load(place))["total"] == chosen["parameters"] <= 0.96 * DENSE
    compression = json.loads((place / "compression.json").read_text())
    assert compression["recipe"]["values"] == chosen["values"]
    assert compression["steps"]["shear"]
    assert len(record["trials"]) == len(rows) == 6
    assert record["limits"] == {"parameters": math.floor(0.96 * DENSE)}
    assert not list(runs.RUNS.glob("unfinished-*")), "a finished search leaves no state behind"


def test_the_checkpoints_of_the_front_match_their_records(run):
    place, _ = run(Targets(wer_loss=0.4))
    record = pareto(place)
    on_front = [trial for trial in record["trials"] if trial["front"]]
    assert len(on_front) > 2
    for trial in on_front:
        slim = load(place / trial["checkpoint"])
        assert count_parameters(slim)["total"] == trial["parameters"]
        assert slim.model.decoder.embed_tokens.rows.embedding_dim == trial["values"]["step.1.rank"]
    folders = {path.relative_to(place).as_posix() for path in (place / "front").iterdir()}
    assert folders == {trial["checkpoint"] for trial in on_front} - {"."}


def test_each_checkpoint_of_a_search_has_a_card_with_its_loss_and_the_limit(run):
    lines: list[str] = []
    place, rows = run(Targets(wer_loss=0.5), recipe=f"max_wer_loss = 0.3\n{RANK}", say=lines.append)
    record = pareto(place)
    assert record["max_wer_loss"] == 0.3
    on_front = [trial for trial in record["trials"] if trial["front"]]
    assert {trial["exceeded"] for trial in on_front} == {True, False}
    for trial in on_front:
        lost = 100 * (trial["dev_wer"] - record["before"]["dev_wer"])
        assert trial["wer_loss_points"] == pytest.approx(lost)
        assert trial["exceeded"] == (lost > 0.3)
        compression = json.loads((place / trial["checkpoint"] / "compression.json").read_text())
        assert compression["dev_wer"]["max_wer_loss"] == 0.3
        assert compression["dev_wer"]["exceeded"] == trial["exceeded"]
        (whole,) = compression["dev_wer"]["losses"]
        assert (whole["step"], whole["points"]) == (None, pytest.approx(lost))
        card = (place / trial["checkpoint"] / "README.md").read_text()
        assert "Trained or calibrated on 2 clips" in card
        assert ("**This checkpoint lost more than the recipe allows" in card) == trial["exceeded"]
        assert ("Dev WER changed by" in card) != trial["exceeded"]
    marked = {row["trial"] for row in rows if row["points lost"].startswith("!")}
    assert marked == {str(t["trial"]) for t in record["trials"] if t["exceeded"]}
    assert "! marks losses above the recipe's max_wer_loss, 0.3 points" in lines


def test_a_loss_target_replaces_the_limit_of_the_recipe(run):
    strict = f"max_wer_loss = 0.1\n{RANK}"
    with pytest.raises(Problem, match=r"more than max_wer_loss = 0\.1 points"):
        run(Targets(parameters=Amount(0.94, share=True)), recipe=strict)
    place, _ = run(Targets(wer_loss=0.6), recipe=strict)
    (chosen,) = [trial for trial in pareto(place)["trials"] if trial["chosen"]]
    assert 0.1 < chosen["wer_loss_points"] <= 0.6 and chosen["exceeded"]
    assert "cost 0." in (place / "README.md").read_text()


def test_a_loss_target_gets_the_smallest_trial_within_it(run):
    place, _ = run(Targets(wer_loss=0.4))
    record = pareto(place)
    (chosen,) = [trial for trial in record["trials"] if trial["chosen"]]
    within = [t for t in record["trials"] if t["dev_wer"] <= record["before"]["dev_wer"] + 0.004]
    assert 0 < len(within) < 6
    assert chosen["parameters"] == min(trial["parameters"] for trial in within)


def test_macs_are_a_separate_axis(run):
    place, _ = run(Targets(macs=Amount(0.999, share=True), parameters=Amount(0.99, share=True)))
    record = pareto(place)
    (chosen,) = [trial for trial in record["trials"] if trial["chosen"]]
    assert chosen["macs"] <= 0.999 * record["before"]["macs"]
    assert set(record["limits"]) == {"parameters", "macs"}


LOGITS = make_table({"logits": Cost(0.0, s_per_mac=1e-6)})
"""A device where only the token table takes time: 1 us for each multiply-accumulate."""


def time_of_rank(rank: int) -> float:
    """Predicted seconds for 32 tokens, with 783 tokens in the table and width 128."""
    return 32 * 1e-6 * rank * (783 + 128)


def test_a_latency_target_gets_the_most_accurate_trial_within_it(run):
    limit = time_of_rank(40) + 1e-6
    place, rows = run(Targets(latency_s=limit), table=LOGITS)
    record = pareto(place)
    for trial in record["trials"]:
        assert trial["latency_s"] == pytest.approx(time_of_rank(trial["values"]["step.1.rank"]))
    (chosen,) = [trial for trial in record["trials"] if trial["chosen"]]
    within = [trial for trial in record["trials"] if trial["latency_s"] <= limit]
    assert chosen["dev_wer"] == min(trial["dev_wer"] for trial in within)
    assert 32 <= chosen["values"]["step.1.rank"] <= 40
    assert record["before"]["latency_s"] == pytest.approx(32 * 1e-6 * 783 * 128)
    assert record["limits"] == {"latency": limit}
    assert record["latency_is"] == "of the same, predicted for rpi5, int8, 4 threads"
    shown = [float(row["predicted ms"].replace(",", "")) for row in rows]
    assert shown == pytest.approx(
        [1e3 * time_of_rank(int(row["step.1.rank"])) for row in rows], 0.01
    )


def test_a_loss_and_a_latency_target_are_both_met(run):
    place, _ = run(Targets(latency_s=time_of_rank(90), wer_loss=0.5), table=LOGITS)
    record = pareto(place)
    (chosen,) = [trial for trial in record["trials"] if trial["chosen"]]
    within = [
        trial
        for trial in record["trials"]
        if trial["latency_s"] <= time_of_rank(90)
        and trial["dev_wer"] <= record["before"]["dev_wer"] + 0.005
    ]
    assert chosen["latency_s"] == min(trial["latency_s"] for trial in within)


def test_impossible_latency_targets_are_refused(run):
    with pytest.raises(Problem, match="needs a latency table"):
        run(Targets(latency_s=5.0))
    with pytest.raises(Problem, match=r"the target of 5000 ms of predicted latency is met already"):
        run(Targets(latency_s=5.0), table=LOGITS)
    with pytest.raises(
        Problem, match=r"at most 60 ms of predicted latency; the nearest has 117 ms"
    ):
        run(Targets(latency_s=0.06), table=LOGITS)


def test_the_recipes_own_values_are_tried_first_and_then_both_ends(run):
    place, _ = run(Targets(wer_loss=50), trials=4)
    ranks = [trial["values"]["step.1.rank"] for trial in pareto(place)["trials"]]
    assert ranks[:3] == [32, 4, 96]
    assert 4 <= ranks[3] <= 96


def test_a_resumed_search_repeats_no_finished_trial(run, wer_by_size, monkeypatch, rng):
    whole, _ = run(Targets(wer_loss=0.4), out="whole", seed=3)
    made = len(wer_by_size) - 1  # minus the dense model; a rank drawn twice runs once
    before, last = len(wer_by_size), int(rng.integers(1, made + 1))

    def stopped(self, model, inner=Context.wer):
        if len(wer_by_size) == before + last:
            wer_by_size.append(0)
            raise KeyboardInterrupt
        return inner(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "wer", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(Targets(wer_loss=0.4), seed=3)
    assert not Path("out").exists()
    resumed, _ = run(Targets(wer_loss=0.4), seed=3)
    assert len(wer_by_size) - before == 2 + made + 1, (
        "the dense model and the stopped trial were measured twice"
    )
    assert pareto(resumed) == pareto(whole)


def test_a_target_out_of_reach_names_the_nearest_trial_and_keeps_the_trials(run, wer_by_size):
    with pytest.raises(Problem, match=r"none of 6 trials has at most 1,393,804 param") as error:
        run(Targets(parameters=Amount(0.9, share=True)))
    assert "the nearest has 1,452,092 parameters and 0.62 % dev WER, with step.1.rank = 4" in str(
        error.value
    )
    assert "--trials" in error.value.hint
    assert not Path("out").exists()
    assert not [path for path in runs.RUNS.iterdir() if not path.name.startswith("unfinished-")]
    made = len(wer_by_size)
    place, _ = run(Targets(parameters=Amount(0.96, share=True)))
    assert len(wer_by_size) == made + 1, "only the dense model was measured again"
    assert len(pareto(place)["trials"]) == 6


def test_a_target_far_beyond_both_ends_is_given_up_early(run, wer_by_size):
    with pytest.raises(Problem, match=r"none of 3 trials has at most 774,336 parameters"):
        run(Targets(parameters=Amount(0.5, share=True)))
    assert len(wer_by_size) == 1 + 3, "the dense model, the recipe's own value, and both ends"


def test_a_target_that_the_dense_model_meets_is_refused(run, wer_by_size):
    for asked in (Amount(2e6), Amount(1.0, share=True)):
        with pytest.raises(Problem, match="is met already: the model has 1,548,672"):
            run(Targets(parameters=asked, wer_loss=1.0))
    assert len(wer_by_size) == 2
    assert not Path("out").exists()


def test_a_recipe_without_a_search_table_is_refused(run, wer_by_size):
    plain = RANK.partition("[[search]]")[0]
    with pytest.raises(Problem, match=r"recipe mine has no \[\[search\]\] table") as error:
        run(Targets(wer_loss=1.0), recipe=plain)
    assert "quick" in error.value.hint and "imp" not in error.value.hint
    assert not wer_by_size and not runs.RUNS.exists()


def test_values_that_cannot_be_used_count_as_tried(run):
    wide = RANK.replace("low = 4\nhigh = 96", "choices = [8, 500, 32]")
    place, rows = run(Targets(wer_loss=50), recipe=wide, trials=3)
    trials = pareto(place)["trials"]
    assert [trial["values"]["step.1.rank"] for trial in trials[:2]] == [32, 8]
    (bad,) = [trial for trial in trials if trial["values"]["step.1.rank"] == 500] or [None]
    if bad is None:  # the third draw repeated a tried value
        assert trials[2]["parameters"] in [trial["parameters"] for trial in trials[:2]]
        return
    assert "rank 500 is more than a table" in bad["refused"]
    assert not bad["front"] and bad["checkpoint"] is None
    assert rows[-1]["parameters"] == "-"


def test_a_first_trial_that_cannot_run_stops_the_search(run):
    wide = RANK.replace("rank = 32", "rank = 500").replace("high = 96", "high = 500")
    with pytest.raises(Problem, match="rank 500 exceeds the highest rank"):
        run(Targets(wer_loss=50), recipe=wide)


def test_a_full_disk_stops_the_search(run, monkeypatch):
    def full(search, point, inner=target_search.make):
        if point["step.1.rank"] == 96:
            raise Problem("it cannot be written") from OSError("no space")
        return inner(search, point)

    with monkeypatch.context() as patch:
        patch.setattr(target_search, "make", full)
        with pytest.raises(Problem, match="cannot be written"):
            run(Targets(wer_loss=50))
    place, _ = run(Targets(wer_loss=50))
    assert not any("refused" in trial for trial in pareto(place)["trials"])


def test_steps_before_the_first_searched_one_run_once(run):
    lines: list[str] = []
    place, _ = run(Targets(wer_loss=50), recipe=TWO_STEPS, trials=3, say=lines.append)
    assert lines.count("step 1 of 2: shrink") == 1
    assert lines.count("step 2 of 2: shear") == 3
    assert set(json.loads((place / "compression.json").read_text())["steps"]) == {"shrink", "shear"}


def test_a_shared_search_runs_only_trials_with_missing_checkpoints_again(
    run, tmp_path, monkeypatch
):
    monkeypatch.setenv(search.STORAGE, f"sqlite:///{tmp_path / 'shared.db'}")
    one, _ = run(Targets(wer_loss=0.4), out="one")
    lines: list[str] = []
    two, _ = run(Targets(wer_loss=0.4), out="two", say=lines.append)
    assert pareto(one) == pareto(two)
    assert not [text for text in lines if text.startswith("trial")]
    assert all(
        (two / t["checkpoint"] / "README.md").is_file() for t in pareto(two)["trials"] if t["front"]
    )
    again = [text for text in lines if text.startswith("running again")]
    assert len(again) == sum(trial["front"] for trial in pareto(two)["trials"])


def test_a_search_stopped_during_training_resumes_in_that_trial(
    empty, few, make_whisper, processor, rng, monkeypatch
):
    recipe = RANK.replace("steps = 0", "steps = 3\nbatch_size = 2\ncheckpoint_steps = 1")
    (empty / "mine.toml").write_text(
        recipe.replace("rank = 32", "rank = 8").replace("96", "12").replace("low = 4", "low = 2")
    )
    save(make_whisper(d_model=16, ffn=16), processor, empty / "start", {})

    def search_to(out: str) -> Path:
        request = Request("start", "mine.toml", few, few, Path(out))
        asked = Targets(parameters=Amount(0.999, share=True))
        return target_search.compress_to(asked, request, 3, lambda text: None)[0]

    with monkeypatch.context() as patch:
        calls = count_calls(patch, Loop, "update")
        whole = search_to("whole")
    assert len(calls) == 9
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        done = press_ctrl_c(patch, Loop, "update", call=int(rng.integers(1, 10)))
        search_to("stopped")
    left = count_calls(monkeypatch, Loop, "update")
    resumed = search_to("stopped")
    assert len(done) + len(left) == 9, "no training step ran twice"
    assert pareto(resumed) == pareto(whole)
    expected, actual = (load(place).state_dict() for place in (whole, resumed))
    assert all(tensor.equal(actual[name]) for name, tensor in expected.items())
    assert not list(runs.RUNS.glob("unfinished-*"))


def test_searches_with_another_seed_recipe_or_axis_share_nothing(empty, few, digits, wer_by_size):
    def name(recipe=RANK, axes=("parameters", "wer"), seed=0, table=None):
        request = Request(str(digits), None, few, few, seed=seed)
        prepared = job.prepare(request, parse_recipe("mine", recipe), "search")
        return target_search.search_name(prepared, axes, table)

    other = RANK.replace("calibration = 2", "calibration = 1")
    names = [name(), name(other), name(axes=("macs", "wer")), name(seed=1)]
    names += [name(table=make_table()), name(table=LOGITS)]
    assert len(set(names)) == 6
    assert name() == names[0]


def test_one_trial_gives_the_same_weights_as_the_recipe_without_a_search(empty, few, digits):
    """The first trial has the recipe's own values."""
    trained = RANK.replace("steps = 0", "steps = 1\nbatch_size = 2")
    (empty / "mine.toml").write_text(trained)
    request = Request(str(digits), "mine.toml", few, few, Path("plain"))
    plain = pipeline.compress(request, lambda text: None)
    request = replace(request, out=Path("searched"))
    searched, _ = target_search.compress_to(Targets(wer_loss=100), request, 1, lambda text: None)
    left, right = (load(place).state_dict() for place in (plain, searched))
    assert left.keys() == right.keys()
    assert all(tensor.equal(right[name]) for name, tensor in left.items())


TWO_PROCESSES = """
import sys
from pathlib import Path
from edgewhisper import target_search
from edgewhisper.job import Request
from edgewhisper.targets import Targets
clips = Path(sys.argv[2])
request = Request(sys.argv[1], "mine.toml", clips, clips, Path("out"))
target_search.compress_to(Targets(wer_loss=100.0), request, 3, lambda text: None)
"""


@pytest.mark.slow
def test_two_processes_search_together(empty, few, digits):
    trained = RANK.replace("steps = 0", "steps = 1\nbatch_size = 2")
    (empty / "mine.toml").write_text(trained)
    (empty / "search.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "search.py", str(digits), str(few)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    record = pareto(empty / "out")
    assert len(record["trials"]) == 3
    for trial in record["trials"]:
        if trial["front"]:
            size = count_parameters(load(empty / "out" / trial["checkpoint"]))["total"]
            assert size == trial["parameters"]
    assert not list((empty / runs.RUNS).glob("unfinished-*"))
