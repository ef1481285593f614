"""Compressing to a target: what is asked, the front, the choice, and going on."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ctrl_c import count_calls, press_ctrl_c
from made_table import make_table

from benchmarks import latency
from benchmarks.latency import Cost
from benchmarks.wer import Score
from edgewhisper import pipeline, runs, search, targets
from edgewhisper.compress.context import Context
from edgewhisper.recipe import parse as parse_recipe
from edgewhisper.resume import Interrupted
from edgewhisper.search import Tried
from edgewhisper.targets import Amount, Targets, choose, excess, front
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


# ---------------------------------------------------------------------------------- what is asked


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
def test_what_is_no_amount_is_a_letter(text):
    with pytest.raises(
        Problem, match=r"--target-macs .* is neither a count nor a share"
    ) as problem:
        targets.parse_amount("--target-macs", text)
    assert "60%" in problem.value.hint


@pytest.mark.parametrize("points", [-0.1, 101, math.nan])
def test_a_loss_that_cannot_be_is_a_letter(points):
    with pytest.raises(Problem, match="is not between 0 and 100 points"):
        targets.parse(None, None, points)


@pytest.mark.parametrize(("text", "seconds"), [("400ms", 0.4), ("0.4s", 0.4), (" 1.5 s ", 1.5)])
def test_a_time_has_its_unit(text, seconds):
    asked = targets.parse(None, None, None, text)
    assert asked.latency_s == pytest.approx(seconds)
    assert asked.axes() == ["latency", "wer"]


@pytest.mark.parametrize("text", ["", "400", "0ms", "-1s", "nan s", "1e3ms", "60%", "4 min"])
def test_what_is_no_time_is_a_letter(text):
    with pytest.raises(Problem, match=r"--target-latency .* is no time") as problem:
        targets.parse(None, None, None, text)
    assert problem.value.hint == "write 400ms or 0.4s"


def test_a_time_and_a_device_belong_together(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert targets.table_of(None, None) is None
    with pytest.raises(Problem, match="--target-latency 400ms: on no device"):
        targets.table_of("400ms", None)
    with pytest.raises(Problem, match="--device rpi5: nothing is asked of it"):
        targets.table_of(None, "rpi5")
    with pytest.raises(Problem, match="there is no latency table of rpi5") as problem:
        targets.table_of("400ms", "rpi5")
    assert "edgewhisper devices calibrate --device rpi5" in problem.value.hint
    latency.write(make_table())
    assert targets.table_of("400ms", "rpi5") == make_table()


# ------------------------------------------------------------------------------ front and choice


def tried(*values: tuple[float, ...]) -> list[Tried]:
    return [Tried({"x": float(i)}, v, {"measured": {}}) for i, v in enumerate(values)]


def test_the_front_of_trials_whose_answer_is_known():
    all_of_them = tried((9, 0.1), (5, 0.2), (5, 0.3), (7, 0.2), (3, 0.4), (9, 0.1), (4, 0.5))
    assert [trial.values for trial in front(all_of_them)] == [(9, 0.1), (5, 0.2), (3, 0.4)]


def test_a_refused_trial_stands_on_no_front():
    refused = Tried({"x": 1.0}, (1, 0.0), {"refused": "no"})
    assert front([refused, *tried((5, 0.2))]) == tried((5, 0.2))


@pytest.mark.parametrize("axes", [2, 3])
def test_the_front_is_what_no_other_trial_beats(axes, rng):
    drawn = rng.integers(0, 6, size=(int(rng.integers(1, 40)), axes))
    points = tried(*(tuple(map(float, row)) for row in drawn))
    on_front = {trial.values for trial in front(points)}
    for trial in points:
        beaten = any(
            all(a <= b for a, b in zip(other.values, trial.values, strict=True))
            and other.values != trial.values
            for other in points
        )
        assert (trial.values in on_front) == (not beaten)
    assert len(front(points)) == len(on_front), "equals stand there once"


@pytest.mark.parametrize("asked", ["size", "wer", "both"])
def test_the_choice_is_the_best_of_all_that_keep_the_limits(asked, rng):
    drawn = rng.uniform(0, 1, size=(int(rng.integers(2, 30)), 2))
    points = tried(*(tuple(map(float, row)) for row in drawn))
    limits = {"parameters": math.inf, "wer": math.inf}
    if asked != "wer":
        limits["parameters"] = float(rng.uniform(0.2, 1))
    if asked != "size":
        limits["wer"] = float(rng.uniform(0.2, 1))
    good = [
        p for p in points if p.values[0] <= limits["parameters"] and p.values[1] <= limits["wer"]
    ]
    chosen = choose(points, limits)
    if not good:
        assert chosen is None
    elif asked == "size":
        assert chosen.values[1] == min(p.values[1] for p in good)
    else:
        assert chosen.values[0] == min(p.values[0] for p in good)


def test_the_excess_is_a_share_of_the_size_and_points_of_wer():
    limits = {"parameters": 100, "macs": math.inf, "wer": 0.05}
    assert excess((150, 7, 0.08), limits) == pytest.approx(0.5 + 0.03)
    assert excess((100, 7, 0.05), limits) == 0


# ------------------------------------------------------------------------------------ the search


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few(clips, tmp_path) -> Path:
    """Two of the shipped clips."""
    shutil.copytree(clips.parent / "test", tmp_path / "speech/test")
    manifest = tmp_path / "speech/few.jsonl"
    manifest.write_text("\n".join(clips.read_text().splitlines()[:2]) + "\n")
    return manifest


@pytest.fixture
def wer_by_size(monkeypatch) -> list[int]:
    """Dev WER grows as parameters go, 10 points from all of them to none; the sizes evaluated."""
    seen: list[int] = []

    def wer(self: Context, model) -> Score:
        size = count_parameters(model)["total"]
        seen.append(size)
        rate = 0.1 * (1 - size / DENSE)
        return Score(rate, rate, rate, (rate, rate + 0.01), 0, 0, 0, 100, 2, 0, "none")

    monkeypatch.setattr(Context, "wer", wer)
    return seen


@pytest.fixture
def run(empty, few, digits, wer_by_size):
    """compress_to() with what is the same in all tests."""

    def run(asked: Targets, recipe: str = RANK, trials: int = 6, out: str = "out", **more):
        (empty / "mine.toml").write_text(recipe)
        told = {"model": str(digits), "recipe": "mine.toml", "speech": few, "dev": few}
        say = more.pop("say", lambda text: None)
        return targets.compress_to(asked, trials, **told, out=Path(out), say=say, **more)

    return run


def pareto(place: Path) -> dict:
    return json.loads((place / "pareto.json").read_text())


def test_a_size_gets_the_most_accurate_that_has_it(run, digits):
    place, rows = run(Targets(parameters=Amount(0.96, share=True)))
    told = pareto(place)
    (chosen,) = [trial for trial in told["trials"] if trial["chosen"]]
    kept = [t for t in told["trials"] if t["parameters"] <= 0.96 * DENSE]
    assert chosen["dev_wer"] == min(trial["dev_wer"] for trial in kept)
    assert chosen["checkpoint"] == "." and chosen["front"]
    assert count_parameters(load(place))["total"] == chosen["parameters"] <= 0.96 * DENSE
    record = json.loads((place / "compression.json").read_text())
    assert record["recipe"]["values"] == chosen["values"]
    assert record["steps"]["shear"]
    assert len(told["trials"]) == len(rows) == 6
    assert told["limits"] == {"parameters": math.floor(0.96 * DENSE)}
    assert not list(runs.RUNS.glob("unfinished-*")), "finished work leaves no state behind"


def test_every_member_of_the_front_is_a_checkpoint_that_is_what_it_says(run):
    place, _ = run(Targets(wer_loss=0.4))
    told = pareto(place)
    on_front = [trial for trial in told["trials"] if trial["front"]]
    assert len(on_front) > 2
    for trial in on_front:
        slim = load(place / trial["checkpoint"])
        assert count_parameters(slim)["total"] == trial["parameters"]
        assert slim.model.decoder.embed_tokens.rows.embedding_dim == trial["values"]["step.1.rank"]
    folders = {path.relative_to(place).as_posix() for path in (place / "front").iterdir()}
    assert folders == {trial["checkpoint"] for trial in on_front} - {"."}


def test_a_loss_gets_the_smallest_that_keeps_it(run):
    place, _ = run(Targets(wer_loss=0.4))
    told = pareto(place)
    (chosen,) = [trial for trial in told["trials"] if trial["chosen"]]
    kept = [t for t in told["trials"] if t["dev_wer"] <= told["before"]["dev_wer"] + 0.004]
    assert 0 < len(kept) < 6
    assert chosen["parameters"] == min(trial["parameters"] for trial in kept)


def test_macs_are_an_axis_of_their_own(run):
    place, _ = run(Targets(macs=Amount(0.999, share=True), parameters=Amount(0.99, share=True)))
    told = pareto(place)
    (chosen,) = [trial for trial in told["trials"] if trial["chosen"]]
    assert chosen["macs"] <= 0.999 * told["before"]["macs"]
    assert set(told["limits"]) == {"parameters", "macs"}


LOGITS = make_table({"logits": Cost(0.0, s_per_mac=1e-6)})
"""A device on which only the token table takes time: a microsecond a product."""


def time_of_rank(rank: int) -> float:
    """Of 32 tokens, in seconds: 783 of them, width 128."""
    return 32 * 1e-6 * rank * (783 + 128)


def test_a_time_gets_the_most_accurate_that_takes_no_longer(run):
    asked = time_of_rank(40) + 1e-6
    place, rows = run(Targets(latency_s=asked), table=LOGITS)
    told = pareto(place)
    for trial in told["trials"]:
        assert trial["latency_s"] == pytest.approx(time_of_rank(trial["values"]["step.1.rank"]))
    (chosen,) = [trial for trial in told["trials"] if trial["chosen"]]
    kept = [trial for trial in told["trials"] if trial["latency_s"] <= asked]
    assert chosen["dev_wer"] == min(trial["dev_wer"] for trial in kept)
    assert 32 <= chosen["values"]["step.1.rank"] <= 40
    assert told["before"]["latency_s"] == pytest.approx(32 * 1e-6 * 783 * 128)
    assert told["limits"] == {"latency": asked}
    assert told["latency_is"] == "of the same, predicted for rpi5, int8, 4 threads"
    shown = [float(row["predicted ms"].replace(",", "")) for row in rows]
    assert shown == pytest.approx(
        [1e3 * time_of_rank(int(row["step.1.rank"])) for row in rows], 0.01
    )


def test_a_loss_and_a_time_keep_both(run):
    place, _ = run(Targets(latency_s=time_of_rank(90), wer_loss=0.5), table=LOGITS)
    told = pareto(place)
    (chosen,) = [trial for trial in told["trials"] if trial["chosen"]]
    kept = [
        trial
        for trial in told["trials"]
        if trial["latency_s"] <= time_of_rank(90)
        and trial["dev_wer"] <= told["before"]["dev_wer"] + 0.005
    ]
    assert chosen["latency_s"] == min(trial["latency_s"] for trial in kept)


def test_times_out_of_reach_or_met_at_once_or_without_a_table_are_letters(run):
    with pytest.raises(Problem, match="there is no latency table"):
        run(Targets(latency_s=5.0))
    with pytest.raises(Problem, match=r"a target of 5000 ms of predicted latency is met at once"):
        run(Targets(latency_s=5.0), table=LOGITS)
    with pytest.raises(
        Problem, match=r"at most 60 ms of predicted latency; the nearest has 117 ms"
    ):
        run(Targets(latency_s=0.06), table=LOGITS)


def test_the_recipe_as_written_is_tried_first_and_then_both_ends(run):
    place, _ = run(Targets(wer_loss=50), trials=4)
    ranks = [trial["values"]["step.1.rank"] for trial in pareto(place)["trials"]]
    assert ranks[:3] == [32, 4, 96]
    assert 4 <= ranks[3] <= 96


def test_an_interrupted_search_goes_on_and_repeats_no_finished_trial(
    run, wer_by_size, monkeypatch, rng
):
    whole, _ = run(Targets(wer_loss=0.4), out="whole", seed=3)
    made = len(wer_by_size) - 1  # the first is of the model before; a rank drawn twice is made once
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
    assert len(wer_by_size) - before == 2 + made + 1, "dense twice, one trial twice"
    assert pareto(resumed) == pareto(whole)


def test_a_target_out_of_reach_is_a_letter_with_the_nearest_and_keeps_the_trials(run, wer_by_size):
    with pytest.raises(Problem, match=r"none of 6 trials has at most 1,393,804 param") as found:
        run(Targets(parameters=Amount(0.9, share=True)))
    assert "the nearest has 1,452,092 parameters and 0.62 % dev WER, with step.1.rank = 4" in str(
        found.value
    )
    assert "--trials" in found.value.hint
    assert not Path("out").exists()
    assert not [path for path in runs.RUNS.iterdir() if not path.name.startswith("unfinished-")]
    made = len(wer_by_size)
    place, _ = run(Targets(parameters=Amount(0.96, share=True)))
    assert len(wer_by_size) == made + 1, "only the model before was measured anew"
    assert len(pareto(place)["trials"]) == 6


def test_a_target_far_beyond_both_ends_is_given_up_after_them(run, wer_by_size):
    with pytest.raises(Problem, match=r"none of 3 trials has at most 774,336 parameters"):
        run(Targets(parameters=Amount(0.5, share=True)))
    assert len(wer_by_size) == 1 + 3, "the model before, the recipe's own value, and the two ends"


def test_a_target_that_is_met_at_once_is_a_letter_before_any_trial(run, wer_by_size):
    for asked in (Amount(2e6), Amount(1.0, share=True)):
        with pytest.raises(Problem, match="is met at once: the model has 1,548,672"):
            run(Targets(parameters=asked, wer_loss=1.0))
    assert len(wer_by_size) == 2
    assert not Path("out").exists()


def test_a_recipe_that_says_nothing_of_a_search_is_a_letter(run, wer_by_size):
    plain = RANK.partition("[[search]]")[0]
    with pytest.raises(Problem, match="mine: it does not say what may be searched") as found:
        run(Targets(wer_loss=1.0), recipe=plain)
    assert "quick" in found.value.hint and "imp" not in found.value.hint
    assert not wer_by_size and not runs.RUNS.exists()


def test_values_that_cannot_be_count_as_tried(run):
    wide = RANK.replace("low = 4\nhigh = 96", "choices = [8, 500, 32]")
    place, rows = run(Targets(wer_loss=50), recipe=wide, trials=3)
    trials = pareto(place)["trials"]
    assert [trial["values"]["step.1.rank"] for trial in trials[:2]] == [32, 8]
    (bad,) = [trial for trial in trials if trial["values"]["step.1.rank"] == 500] or [None]
    if bad is None:  # the third draw fell on one that was tried
        assert trials[2]["parameters"] in [trial["parameters"] for trial in trials[:2]]
        return
    assert "rank 500 is more than a table" in bad["refused"]
    assert not bad["front"] and bad["checkpoint"] is None
    assert rows[-1]["parameters"] == "-"


def test_a_first_trial_that_cannot_be_stops_the_search(run):
    wide = RANK.replace("rank = 32", "rank = 500").replace("high = 96", "high = 500")
    with pytest.raises(Problem, match="rank 500 is more than a table"):
        run(Targets(wer_loss=50), recipe=wide)


def test_a_full_disk_is_no_fault_of_the_values(run, monkeypatch):
    def full(job, begun, table, point, say, inner=targets.make):
        if point["step.1.rank"] == 96:
            raise Problem("it cannot be written") from OSError("no space")
        return inner(job, begun, table, point, say)

    with monkeypatch.context() as patch:
        patch.setattr(targets, "make", full)
        with pytest.raises(Problem, match="cannot be written"):
            run(Targets(wer_loss=50))
    place, _ = run(Targets(wer_loss=50))
    assert not any("refused" in trial for trial in pareto(place)["trials"])


def test_steps_before_the_first_searched_one_run_once(run):
    said: list[str] = []
    place, _ = run(Targets(wer_loss=50), recipe=TWO_STEPS, trials=3, say=said.append)
    assert said.count("step 1 of 2: shrink") == 1
    assert said.count("step 2 of 2: shear") == 3
    assert set(json.loads((place / "compression.json").read_text())["steps"]) == {"shrink", "shear"}


def test_of_a_shared_search_only_missing_checkpoints_are_made_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv(search.STORAGE, f"sqlite:///{tmp_path / 'shared.db'}")
    one, _ = run(Targets(wer_loss=0.4), out="one")
    said: list[str] = []
    two, _ = run(Targets(wer_loss=0.4), out="two", say=said.append)
    assert pareto(one) == pareto(two)
    assert not [text for text in said if text.startswith("trial")]
    again = [text for text in said if text.startswith("once more")]
    assert len(again) == sum(trial["front"] for trial in pareto(two)["trials"])


def test_a_search_stopped_inside_the_training_of_a_trial_goes_on_in_it(
    empty, few, make_whisper, processor, rng, monkeypatch
):
    recipe = RANK.replace("steps = 0", "steps = 3\nbatch_size = 2\ncheckpoint_steps = 1")
    (empty / "mine.toml").write_text(
        recipe.replace("rank = 32", "rank = 8").replace("96", "12").replace("low = 4", "low = 2")
    )
    save(make_whisper(d_model=16, ffn=16), processor, empty / "start", {})

    def search_to(out: str) -> Path:
        return targets.compress_to(
            Targets(parameters=Amount(0.999, share=True)),
            trials=3,
            model="start",
            recipe="mine.toml",
            speech=few,
            dev=few,
            out=Path(out),
            say=lambda text: None,
        )[0]

    with monkeypatch.context() as patch:
        calls = count_calls(patch, Loop, "update")
        whole = search_to("whole")
    assert len(calls) == 9
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        done = press_ctrl_c(patch, Loop, "update", call=int(rng.integers(1, 10)))
        search_to("stopped")
    left = count_calls(monkeypatch, Loop, "update")
    resumed = search_to("stopped")
    assert len(done) + len(left) == 9, "no step is done twice"
    assert pareto(resumed) == pareto(whole)
    wanted, found = (load(place).state_dict() for place in (whole, resumed))
    assert all(tensor.equal(found[name]) for name, tensor in wanted.items())
    assert not list(runs.RUNS.glob("unfinished-*"))


def test_searches_of_another_seed_or_recipe_or_size_share_nothing(empty, few, digits, wer_by_size):
    def name(recipe=RANK, axes=("parameters", "wer"), seed=0, table=None):
        job = pipeline.prepare(
            parse_recipe("mine", recipe), str(digits), few, few, None, seed, None, "search"
        )
        return targets.search_name(job, axes, table)

    other = RANK.replace("calibration = 2", "calibration = 1")
    names = [name(), name(other), name(axes=("macs", "wer")), name(seed=1)]
    names += [name(table=make_table()), name(table=LOGITS)]
    assert len(set(names)) == 6
    assert name() == names[0]


def test_a_search_with_training_says_what_the_same_recipe_gives_without_one(empty, few, digits):
    """The recipe's own values are the first trial: the same model to the bit."""
    trained = RANK.replace("steps = 0", "steps = 1\nbatch_size = 2")
    (empty / "mine.toml").write_text(trained)
    quiet = {"say": lambda text: None}
    told = dict(recipe="mine.toml", speech=few, dev=few, **quiet)
    plain = pipeline.compress(str(digits), out=Path("plain"), **told)
    found, _ = targets.compress_to(
        Targets(wer_loss=100), 1, model=str(digits), out=Path("found"), **told
    )
    left, right = (
        {name: tensor for name, tensor in load(place).state_dict().items()}
        for place in (plain, found)
    )
    assert left.keys() == right.keys()
    assert all(tensor.equal(right[name]) for name, tensor in left.items())


TWO_PROCESSES = """
import sys
from pathlib import Path
from edgewhisper import targets
targets.compress_to(
    targets.Targets(wer_loss=100.0), 3, model=sys.argv[1], recipe="mine.toml",
    speech=Path(sys.argv[2]), dev=Path(sys.argv[2]), out=Path("out"), say=lambda text: None,
)
"""


def test_two_processes_search_together(empty, few, digits):
    trained = RANK.replace("steps = 0", "steps = 1\nbatch_size = 2")
    (empty / "mine.toml").write_text(trained)
    (empty / "search.py").write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "search.py", str(digits), str(few)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = pareto(empty / "out")
    assert len(told["trials"]) == 3
    for trial in told["trials"]:
        if trial["front"]:
            found = count_parameters(load(empty / "out" / trial["checkpoint"]))["total"]
            assert found == trial["parameters"]
    assert not list((empty / runs.RUNS).glob("unfinished-*"))
