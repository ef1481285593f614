"""The study: experiments, runs, verdicts, and counts of the papers' sizes."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.sizes import SIZES, Size
from benchmarks.speech.clips import read_manifest
from benchmarks.study import accounting, one_shot, real, run, tables, training_cost
from benchmarks.study.experiments import (
    BATCH,
    EXPERIMENTS,
    STEPS,
    TRAINED,
    CostOf,
    Experiment,
    methods,
    recipe_text,
)
from benchmarks.study.stored import read
from edgewhisper import decoding, recipe, whisper
from edgewhisper.checkpoints import openai
from edgewhisper.compress import METHODS
from edgewhisper.compress.imp import kept_after
from export.problem import Problem

ARMS = [(name, arm) for name, of in EXPERIMENTS.items() for arm in of.arms]
READY = [(name, arm) for name, arm in ARMS if methods(name) <= METHODS.keys()]


def steps_of(name: str, arm: str) -> list[dict]:
    """Return the arm's steps, with 0.5 for another arm's cost."""
    number = {True: 0.5}
    return [
        {key: number.get(isinstance(value, CostOf), value) for key, value in step.items()}
        for step in EXPERIMENTS[name].arms[arm]
    ]


# ------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_is_read_from_toml_unchanged(name, arm):
    steps = steps_of(name, arm)
    assert tomllib.loads(recipe_text(steps, arm))["step"] == steps


@pytest.mark.parametrize(("name", "arm"), READY)
def test_an_arm_is_a_recipe(name, arm):
    parsed = recipe.parse(arm, recipe_text(steps_of(name, arm), arm))
    assert len(parsed.steps) == len(EXPERIMENTS[name].arms[arm])


def optimiser_steps(step: recipe.Step) -> int:
    options = step.options
    if step.method == "imp":
        rounds = len(kept_after(options.share, options.target))
        return options.start.steps + rounds * options.training.steps + options.recovery.steps
    tables = [getattr(options, name, None) for name in ("training", "recovery")]
    assert all(table.batch_size == BATCH for table in tables if table and table.steps)
    return sum(table.steps for table in tables if table)


UNTRAINED = ("naive", "rounded, not trained")
TRAINED_ARMS = [
    (name, arm)
    for name, arm in READY
    if EXPERIMENTS[name].budget == TRAINED and arm not in UNTRAINED
]


@pytest.mark.parametrize(("name", "arm"), TRAINED_ARMS)
def test_arms_that_train_have_the_same_budget(name, arm):
    parsed = recipe.parse(arm, recipe_text(steps_of(name, arm), arm))
    assert sum(map(optimiser_steps, parsed.steps)) == STEPS


def test_an_experiment_compares_its_own_arms():
    for name, experiment in EXPERIMENTS.items():
        known = {*experiment.arms, *experiment.chosen_on_dev}
        named = {arm for pair in experiment.pairs for arm in pair} | set(experiment.published)
        named |= {arm for among in experiment.chosen_on_dev.values() for arm in among}
        assert named <= known, name


# -------------------------------------------------------------------------------------- runs


def line(arm: str, seed: int, wrong: int, experiment: str = "made", **more) -> dict:
    score = {"wer": wrong / 100, "cer": 0.0, "words": 100, "normalizer": "whisper-basic"}
    score |= {"substitutions": wrong, "deletions": 0, "insertions": 0}
    return {
        "experiment": experiment,
        "arm": arm,
        "seed": seed,
        "base": "whisper-digits",
        "recipe": "",
        "parameters": {"total": 2_000_000, "token_table": 1_000_000, "nonzero": 1_000_000},
        "macs": {"encoder": 1_000_000},
        "scores": {"clean": score, "noisy": score},
        "dev": score,
        "speech": {"clean": "c", "noisy": "n"},
        "lite_cost": None,
        "minutes": 0.1,
    } | more


@pytest.fixture
def made(monkeypatch):
    """An experiment of two arms; the second depends on the first's cost."""
    arms = {
        "first": [{"method": "lite"}],
        "second": [{"method": "lite", "budget": CostOf("first")}],
    }
    experiment = Experiment("which?", "none", arms, (("first", "second"),))
    monkeypatch.setitem(EXPERIMENTS, "made", experiment)
    return experiment


@pytest.fixture
def runs_made(monkeypatch):
    """Replace real runs by fake ones; return the list of their keys."""
    calls = []

    def run_one(key, text, speech, base):
        calls.append(key)
        experiment, arm, seed = key
        return line(arm, seed, 3, experiment, recipe=text, lite_cost=0.25 + seed)

    monkeypatch.setattr(run, "run_one", run_one)
    return calls


def test_finished_runs_are_not_repeated(made, runs_made, tmp_path):
    out = tmp_path / "study.jsonl"
    run.run_all(["made"], [0], None, out, "base")
    assert runs_made == [("made", "first", 0), ("made", "second", 0)]
    run.run_all(["made"], [0, 1], None, out, "base")
    assert runs_made[2:] == [("made", "first", 1), ("made", "second", 1)]
    assert [run.key_of(entry) for entry in read(out)] == runs_made


def test_the_cost_of_another_arm_has_the_same_seed(made, runs_made, tmp_path):
    out = tmp_path / "study.jsonl"
    run.run_all(["made"], [0, 1], None, out, "base")
    found = {run.key_of(entry): tomllib.loads(entry["recipe"]) for entry in read(out)}
    assert found["made", "second", 0]["step"][0]["budget"] == 0.25
    assert found["made", "second", 1]["step"][0]["budget"] == 1.25


def test_a_stored_run_of_another_recipe_is_refused(made, runs_made, tmp_path):
    out = tmp_path / "study.jsonl"
    out.write_text(json.dumps(line("first", 0, 3, recipe="old")) + "\n")
    with pytest.raises(Problem, match="another recipe"):
        run.run_all(["made"], [0], None, out, "base")
    assert runs_made == []


def test_a_missing_cost_is_reported(made):
    with pytest.raises(Problem, match="not measured"):
        run.recipe_of(("made", "second", 0), [])


def test_an_unknown_experiment_is_refused():
    with pytest.raises(Problem, match="unknown experiment 'purning'"):
        list(run.keys(["purning"], [0]))


def test_the_cost_that_low_rank_layers_leave():
    layers = {
        "a": {"outputs": 4, "inputs": 6, "rank": None},
        "b": {"outputs": 10, "inputs": 10, "rank": 2},
    }
    assert run.lite_cost({"lite": {"layers": layers}}) == (24 + 2 * 20) / 124
    assert run.lite_cost({}) is None


def test_a_run_measures_the_model_of_its_recipe(clips, digits):
    few = read_manifest(clips)[:4]
    speech = run.Speech(few, few, {"here": few})
    key = ("dense", "dense", 0)
    entry = run.run_one(key, run.recipe_of(key, []), speech, str(digits))
    assert entry["parameters"]["total"] == 1_548_672
    assert entry["parameters"]["nonzero"] <= entry["parameters"]["rest"]
    assert entry["scores"]["here"]["utterances"] == 4
    assert entry["dev"] is None  # this experiment chooses nothing
    assert json.loads(json.dumps(entry))["recipe"] == entry["recipe"]


def test_recipes_can_be_written_for_the_command_line(tmp_path):
    run.write_recipes(tmp_path)
    written = recipe.load_recipe(tmp_path / "pruning" / "IMP.toml")
    assert [step.method for step in written.steps] == ["imp", "shrink"]


# ---------------------------------------------------------------------------------- verdicts


def paired(first: list[int], second: list[int]) -> list[dict]:
    return [
        line(arm, seed, wrong)
        for arm, errors in (("first", first), ("second", second))
        for seed, wrong in enumerate(errors)
    ]


def test_an_interval_with_a_known_answer():
    mean, low, high = tables.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)  # 4.3027 / sqrt(3)


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ([1, 2, 3], [5, 6, 7], "yes"),
        ([5, 6, 7], [1, 2, 3], "no, worse"),
        ([1, 2, 3], [2, 4, 2], "not significant"),
        ([1, 2, 3], [1, 2, 3], "the same"),
        ([1], [9], "unknown"),
    ],
    ids=["better", "worse", "noise", "same", "one-seed"],
)
def test_a_verdict_compares_seed_by_seed(made, first, second, answer):
    runs = tables.runs_of("made", paired(first, second))
    sentence = tables.verdict("first", "second", runs)
    assert str(sentence).startswith(f"first better than second: **{answer}**, ")


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ([1, 2, 3], [5, 6, 7], "yes"),
        ([5, 6, 7], [1, 2, 3], "no, worse, but smaller"),
    ],
    ids=["better", "worse"],
)
def test_a_verdict_mentions_different_sizes(made, first, second, answer):
    lines = paired(first, second)
    smaller = {"total": 1, "token_table": 1_000_000, "nonzero": 500_000}
    lines = [
        entry | {"parameters": smaller} if entry["arm"] == "first" else entry for entry in lines
    ]
    sentence = tables.verdict("first", "second", tables.runs_of("made", lines))
    assert "nonzero 1.500 M against 2.000 M" in str(sentence)
    assert sentence.answer == answer


def test_the_summary_counts_our_variants(made, monkeypatch):
    arms = {"first (ours)": made.arms["first"], "second": made.arms["second"]}
    ours = replace(made, arms=arms, pairs=(("first (ours)", "second"), ("second", "first (ours)")))
    monkeypatch.setitem(EXPERIMENTS, "made", ours)
    lines = [line("first (ours)", s, w) for s, w in enumerate([5, 6, 7])]
    lines += [line("second", s, w) for s, w in enumerate([1, 2, 3])]
    summary = tables.summary(lines)
    assert "1 comparisons" in summary and "1 “no, worse”" in summary
    assert "first (ours) than second" in summary


def test_there_is_no_verdict_without_a_common_seed(made):
    lines = [line("first", 0, 1), line("second", 1, 1)]
    assert tables.verdicts("made", lines) == []


def test_the_arm_chosen_on_dev_has_the_fewest_errors_there(made, monkeypatch):
    chosen = replace(made, chosen_on_dev={"best": ("first", "second")})
    monkeypatch.setitem(EXPERIMENTS, "made", chosen)
    lines = paired([4, 1, 3], [2, 5, 3])
    best = tables.runs_of("made", lines)["best"]
    assert {seed: entry["arm"] for seed, entry in best.items()} == {
        0: "second",
        1: "first",
        2: "first",
    }


def test_runs_of_other_speech_are_refused(made):
    lines = paired([1], [2])
    with pytest.raises(Problem, match="speech"):
        tables.markdown([lines[0], lines[1] | {"speech": {"clean": "other"}}])


def test_a_table_has_a_row_for_every_arm_with_its_interval(made):
    rows = tables.rows("made", paired([1, 2, 3], [5, 6, 7]))
    assert [row["arm"] for row in rows] == ["first", "second"]
    assert rows[0]["WER % clean"] == "2.0 (0.0 to 4.5)"
    assert rows[0]["stored"] == rows[0]["nonzero"] == "2.000 M"


def test_the_plot_of_the_same_lines_is_the_same_file(made, tmp_path):
    for name in ("a.png", "b.png"):
        tables.plot(paired([1, 2, 3], [5, 6, 7]), tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "b.png").read_bytes()


# -------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_openai_checkpoints(name):
    size, checkpoint = SIZES[name], openai.SIZES[name]
    assert size.width == checkpoint.d_model
    assert size.layers == checkpoint.encoder_layers == checkpoint.decoder_layers
    assert (size.mels, size.vocabulary) == (checkpoint.num_mel_bins, checkpoint.vocab_size)


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 37.76), ("base", 72.59), ("small", 241.73), ("medium", 763.86)]
)
def test_whispers_sizes_are_counted_exactly(name, millions):
    size = SIZES[name]
    d, layers = size.width, size.layers
    encoder = layers * (12 * d**2 + 12 * d) + 3 * d * (size.mels + d) + 2 * d + 1500 * d + 2 * d
    decoder = layers * (16 * d**2 + 17 * d) + size.vocabulary * d + 448 * d + 2 * d
    counted = accounting.parameters(accounting.build(name))
    assert counted == encoder + decoder
    assert counted / 1e6 == pytest.approx(millions, abs=0.006)


def found(lines, model: str, what: str) -> float:
    return next(entry.ours for entry in lines if entry.model == model and entry.what == what)


def test_baldwhispers_sizes_are_reproduced():
    lines = list(accounting.bald())
    assert found(lines, "base", "6 layers to 3") == pytest.approx(59.98, abs=0.005)
    assert found(lines, "base", "and rank 96") == pytest.approx(38.46, abs=0.005)
    assert found(lines, "base", "and rank 96: parameters") == pytest.approx(-48, abs=1.0)


def test_kdqs_sizes_are_reproduced():
    lines = list(accounting.kdq())
    assert found(lines, "small", "teacher, fp16") == pytest.approx(483.5, abs=0.05)
    assert found(lines, "base", "student") == pytest.approx(93.46, abs=0.005)
    assert found(lines, "tiny", "student") == pytest.approx(46.16, abs=0.005)
    assert found(lines, "base", "smaller than small") == pytest.approx(5.17, abs=0.005)
    assert found(lines, "tiny", "smaller than small") == pytest.approx(10.47, abs=0.005)


def test_liteasrs_sizes_are_consistent():
    lines = list(accounting.lite())
    assert found(lines, "large-v3", "encoder") == pytest.approx(635, rel=0.01)
    assert found(lines, "large-v3", "encoder (b)") == pytest.approx(377, rel=0.01)
    low, high = (found(lines, "large-v3", f"encoder (c), {end} ranks") for end in ENDS)
    assert low < 308 < high  # the published ranks allow the published size


ENDS = ("smallest", "largest")


def test_the_cost_of_short_windows_is_reproduced():
    lines = list(accounting.short())
    assert found(lines, "small", "encoder, 10 s") == pytest.approx(0.28, abs=0.005)
    assert found(lines, "small", "encoder, 5 s") == pytest.approx(0.13, abs=0.005)


@pytest.mark.parametrize("measured", [accounting.parameters, accounting.work])
def test_the_widest_model_is_found(measured, rng):
    limit = float(rng.uniform(0.8, 0.99)) * measured(accounting.build("tiny"))
    width = accounting.widest("tiny", measured, limit)
    at, above = (measured(accounting.build("tiny", ffn=w)) for w in (width, width + 1))
    assert at <= limit < above


def test_the_stored_accounting_is_up_to_date():
    stored = [json.loads(text) for text in accounting.STORED.read_text().splitlines()]
    counted = [vars(entry) for system in (accounting.bald, accounting.kdq) for entry in system()]
    systems = {entry["system"] for entry in counted}
    assert [entry for entry in stored if entry["system"] in systems] == counted
    assert {entry["system"] for entry in stored} > systems


# ------------------------------------------------------------------------------ training cost


def test_the_cost_of_a_training_step_is_measured_in_the_real_loop(monkeypatch):
    monkeypatch.setitem(SIZES, training_cost.MODEL, Size(64, 1))
    case = {"batch_size": 2, "accumulate": 2, "precision": "no"}
    entry = training_cost.measure(case, steps=1)
    assert entry["steps"] == len(entry["step_cpu_s"]) == 1
    assert entry["median_step_cpu_s"] > 0
    assert entry["peak_rss_bytes"] > entry["least_bytes"] == 16 * entry["parameters"]
    assert training_cost.rows([entry])[0]["passes per step"] == "2"


def test_magnitude_removes_the_smallest_units_of_each_layer(tiny_whisper):
    from edgewhisper.compress.masks import removed_share

    layers = [*tiny_whisper.model.encoder.layers, *tiny_whisper.model.decoder.layers]
    for layer in layers:
        layer.fc1.weight.data[::2] *= 1e-3
    one_shot.magnitude(0.1)(tiny_whisper, None)
    removed = [(layer.fc1.weight == 0).all(dim=1).nonzero().flatten() for layer in layers]
    assert len({len(units) for units in removed}) == 1
    assert all((units % 2 == 0).all() for units in removed)
    assert removed_share(tiny_whisper) == pytest.approx(0.1, abs=0.02)


# ------------------------------------------------------------------------------- real models


def real_line(wer: float, **more) -> dict:
    return {
        "model": "tiny.en",
        "recipe": "lite",
        "failed": None,
        "parameters": [{"total": 2_000_000}, {"total": 1_000_000}],
        "dev_wer": [0.1, 0.1],
        "test_wer": [wer, wer],
        "steps": 0,
        "minutes": 1.0,
    } | more


def test_english_test_clips_are_scored_with_whisper_english(monkeypatch):
    texts = [clip.text.upper() for clip in real.test_clips()]
    for name in ("load", "load_processor"):
        monkeypatch.setattr(whisper, name, lambda source: None)
    monkeypatch.setattr(decoding, "transcribe", lambda *given: texts)
    score = real.test_score("tiny.en")
    assert (score.normalizer, score.wer, score.utterances) == ("whisper-english", 0, 80)


def test_the_table_of_recipes_names_the_normalizer_of_each_line():
    old, new = real_line(0.093), real_line(0.091, test_normalizer="whisper-english")
    named = [real.row(line)["test normalizer"] for line in (old, new)]
    assert named == ["whisper-basic", "whisper-english"]


def test_a_stored_error_rate_is_used_again_with_the_same_normalizer_only(monkeypatch):
    monkeypatch.setattr(real, "test_score", lambda model: SimpleNamespace(wer=0.091))
    old, new = real_line(0.093), real_line(0.09, test_normalizer="whisper-english")
    assert real.dense_wer("models/tiny.en", [old]) == 0.091
    assert real.dense_wer("models/tiny.en", [old, new]) == 0.09
    assert real.dense_wer("models/base", [old, new]) == 0.091
