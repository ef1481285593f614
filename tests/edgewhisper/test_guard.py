"""The accuracy limit of a recipe, and what happens if a step exceeds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from some_clips import copy_of_some

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import decoding, job, pipeline, runs, training_speech, whisper
from edgewhisper.compress import METHODS, tspar
from edgewhisper.compress.context import Context
from edgewhisper.guard import AccuracyLoss, Guard, Loss, likely_cause
from edgewhisper.job import Job
from edgewhisper.recipe import Recipe, load_recipe, parse
from edgewhisper.training import Training
from export.problem import Problem

SHRINK = '[[step]]\nmethod = "shrink"\n'
RUINOUS = """
[[step]]
method = "wsap"
low = 0.95
middle = 0.95
high = 0.95
[step.recovery]
steps = 0

[[step]]
method = "shrink"
"""


def score(wer: float) -> SimpleNamespace:
    return SimpleNamespace(wer=wer, utterances=60, words=566)


@pytest.fixture
def few(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest of six shipped clips in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ruinous.toml").write_text(RUINOUS)
    return copy_of_some(clips, 6, tmp_path / "speech")


# ----------------------------------------------------------------------------------- the limit


def test_the_default_limit_is_five_points():
    assert parse("mine", SHRINK).max_wer_loss == 5.0
    assert parse("mine", "max_wer_loss = 2\n" + SHRINK).max_wer_loss == 2.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"a lot"', "max_wer_loss: 'a lot' is not a number"),
        ("-1", "max_wer_loss: -1 is not between 0 and 100"),
        ("101", "max_wer_loss: 101 is not between 0 and 100"),
        ("true", "max_wer_loss: True is not a number"),
    ],
)
def test_a_limit_is_checked_by_type_and_range(value: str, message: str):
    with pytest.raises(Problem, match=message):
        parse("mine", f"max_wer_loss = {value}\n{SHRINK}")


@pytest.mark.parametrize(("after", "raises"), [(0.11, False), (0.115, False), (0.1166, True)])
def test_a_loss_is_compared_in_points(after: float, raises: bool):
    guard, lines = Guard(limit=5.0), []
    loss = Loss(2, "tspar", score(0.065), score(after))
    if not raises:
        guard.check(loss, "cause", None, lines.append)
        assert lines == [f"dev WER 6.5 % -> {100 * after:.1f} % ({loss.points:+.1f} points)"]
        return
    with pytest.raises(AccuracyLoss) as error:
        guard.check(loss, "cause", None, lines.append)
    assert str(error.value) == (
        "step 2 (tspar) raised dev WER from 6.5 % to 11.7 % on 60 clips of 566 words: 5.2 points, "
        "more than max_wer_loss = 5"
    )
    assert error.value.hint == "cause"
    assert error.value.suffix == "-failed-step-2-tspar"


def test_an_allowed_loss_is_recorded_and_printed():
    guard, lines = Guard(limit=5.0, allow=True), []
    guard.check(Loss(1, "lite", score(0.1), score(0.8)), "cause", None, lines.append)
    assert "warning: step 1 (lite) raised dev WER from 10.0 % to 80.0 %" in lines[-1]
    record = guard.as_dict()
    assert (record["exceeded"], record["allow_loss"], record["max_wer_loss"]) == (True, True, 5.0)
    assert record["losses"][0]["points"] == pytest.approx(70.0)


# ------------------------------------------------------------------------------ the likely cause


def cause(text: str, record: dict, after: float = 0.858) -> str:
    (step,) = parse("mine", text).steps
    return likely_cause(step, record, after)


TSPAR = """
[[step]]
method = "tspar"
min_removed = 0.35
[step.training]
steps = 18
learning_rate = 3e-4
"""


def test_the_hint_names_training_if_training_lost_accuracy():
    record = {"tspar": {"dev_wer": {"before": 0.065, "trained": 0.8}}}
    hint = cause(TSPAR, record)
    assert hint.startswith("training alone raised dev WER from 6.5 % to 80.0 %")
    assert "training: 18 steps at learning_rate 0.0003" in hint


def test_the_hint_names_pruning_if_training_did_not_lose_accuracy():
    record = {"tspar": {"dev_wer": {"before": 0.065, "trained": 0.07}}}
    hint = cause(TSPAR, record)
    assert "pruning is the cause: remove less (min_removed = 0.35)" in hint


def test_without_measurements_the_hint_names_both():
    assert cause(RUINOUS.split("[step.recovery]")[0], {}).startswith(
        "remove less (low = 0.95, middle = 0.95, high = 0.95), lower the learning rate"
    )
    assert cause('[[step]]\nmethod = "lite"\n', {}) == (
        "remove less (theta_attn = 0.99, theta_mlp = 0.999)"
    )
    assert cause('[[step]]\nmethod = "merge"\npairs = 1\n', {}).startswith(
        "remove less (pairs = 1)"
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_hint_of_every_method_can_be_written(method):
    assert cause(f'[[step]]\nmethod = "{method}"\n', {})


# --------------------------------------------------------------------------------- whole runs


def test_a_ruined_model_stops_the_run_and_is_saved_as_failed(few, digits):
    request = pipeline.Request(str(digits), "ruinous.toml", few, few, Path("slim"))
    with pytest.raises(AccuracyLoss) as error:
        pipeline.compress(request)
    place = Path("slim-failed-step-1-wsap")
    assert f"the checkpoint is in {place}" in str(error.value)
    assert error.value.hint.endswith("or add --allow-loss to accept it")
    assert "low = 0.95" in error.value.hint
    assert not Path("slim").exists()
    record = json.loads((place / "compression.json").read_text())
    assert record["dev_wer"]["exceeded"] and not record["dev_wer"]["allow_loss"]
    assert "**This checkpoint lost more than the recipe allows" in (place / "README.md").read_text()
    assert whisper.load(place)

    # a second time, nothing is overwritten
    with pytest.raises(AccuracyLoss, match="slim-failed-step-1-wsap-2"):
        pipeline.compress(request)


def test_a_failed_checkpoint_is_never_the_newest(few, digits):
    with pytest.raises(AccuracyLoss):
        pipeline.compress(pipeline.Request(str(digits), "ruinous.toml", few, few))
    assert [path.name for path in runs.RUNS.glob("checkpoint-*-failed-step-1-wsap")]
    assert runs.newest("checkpoint") is None


def test_allow_loss_saves_the_model_with_a_warning_in_its_card(few, digits):
    request = pipeline.Request(str(digits), "ruinous.toml", few, few, Path("slim"), allow_loss=True)
    place = pipeline.compress(request)
    record = json.loads((place / "compression.json").read_text())["dev_wer"]
    assert [loss["step"] for loss in record["losses"]] == [1, None], "step 2 only shrinks"
    assert record["allow_loss"] and record["exceeded"]
    assert "step 1 (wsap) cost" in (place / "README.md").read_text()


def test_the_sum_of_small_losses_is_limited(tiny_whisper, processor, clips, tmp_path):
    two = read_manifest(clips)[:2]
    context = Context(processor, two, two, tmp_path)
    wers = iter([0.05, 0.09, 0.13, 0.13])
    context.wer = lambda model: score(next(wers))
    recipe = parse("mine", 2 * '[[step]]\nmethod = "qat"\nencoder = 32\ndecoder = 32\n')
    with pytest.raises(
        AccuracyLoss, match=r"the whole recipe raised dev WER from 5\.0 % to 13\.0 %"
    ):
        job.run_steps(tiny_whisper, recipe, context, lambda text: None, guard=Guard(5.0))


def test_the_command_line_exits_with_1_and_names_the_failed_checkpoint(
    few, digits, capsys, monkeypatch
):
    from edgewhisper import cli

    arguments = ["compress", str(digits), "--recipe", "ruinous.toml", "--speech", str(few)]
    monkeypatch.setattr("sys.argv", ["edgewhisper", *arguments, "--dev", str(few), "--out", "slim"])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 1
    errors = capsys.readouterr().err
    assert "step 1 (wsap) raised dev WER" in errors
    assert "slim-failed-step-1-wsap" in errors


# ------------------------------------------------------------------------------- dev evaluation


def test_a_loss_by_training_counts_in_the_margin_of_tspar(
    tiny_whisper, processor, clips, tmp_path, monkeypatch
):
    """Training raises dev WER from 5 % to 50 %, so no strength is within the margin of 2 points."""
    few = read_manifest(clips)[:3]
    context = Context(processor, few, few, tmp_path)
    before = tiny_whisper.model.encoder.layers[0].fc1.weight.detach().clone()

    def wer(self, model):
        same = torch.equal(model.model.encoder.layers[0].fc1.weight, before)
        return score(0.05 if same else 0.5)

    monkeypatch.setattr(Context, "wer", wer)
    brief = Training(steps=1, batch_size=2, learning_rate=1e-3)
    options = tspar.Options(c1=2.0, c2=-1.0, wer_margin=2.0, evaluations=3, training=brief)
    tspar.apply(tiny_whisper, options, context)
    record = context.record["tspar"]
    assert record["search"]["limit"] == pytest.approx(0.07)
    assert [trial["dev_wer"] for trial in record["search"]["tried"]] == [0.5, 0.5, 0.5]
    assert record["dev_wer"] == {"before": 0.05, "trained": 0.5, "pruned": 0.5}


def test_a_model_is_evaluated_once(tiny_whisper, processor, clips, tmp_path, monkeypatch):
    few = read_manifest(clips)[:2]
    context = Context(processor, few, few, tmp_path)
    calls = []

    def transcribe(model, processor, pcms, *rest, **options):
        calls.append(len(pcms))
        return [clip.text for clip in few[: len(pcms)]]

    monkeypatch.setattr(decoding, "transcribe", transcribe)
    assert context.wer(tiny_whisper) == context.wer(tiny_whisper)
    assert replace(context, record={}).wer(tiny_whisper).wer == 0
    assert calls == [2]
    with torch.no_grad():
        tiny_whisper.model.encoder.layers[0].fc1.weight[0, 0] += 1
    context.wer(tiny_whisper)
    replace(context, dev=few[:1]).wer(tiny_whisper)
    assert calls == [2, 2, 1]


def test_max_tokens_stops_a_model_that_does_not_end(tiny_whisper, processor, clips):
    few = [clip.pcm() for clip in read_manifest(clips)[:2]]
    tiny_whisper.generation_config.suppress_tokens = [tiny_whisper.config.eos_token_id]
    tokens = decoding.greedy(tiny_whisper, processor, few, max_tokens=7)
    assert [len(row) for row in tokens] == [7, 7]


def test_the_token_limit_does_not_change_a_good_model(digits, processor, clips, tmp_path):
    model, few = whisper.load(digits), read_manifest(clips)[:8]
    pcms, languages = [clip.pcm() for clip in few], [clip.lang for clip in few]
    bound = Context(processor, few, few, tmp_path).token_limit()
    free = decoding.transcribe(model, processor, pcms, languages)
    assert decoding.transcribe(model, processor, pcms, languages, max_tokens=bound) == free


# ------------------------------------------------------------------------------ the shipped clips


def test_a_general_model_is_trained_on_the_shipped_clips():
    found = training_speech.choose_speech("some/model", None, None, general=True)
    assert (len(found.train), len(found.dev)) == (60, 60)
    assert "Common Voice (CC0 1.0)" in str(found.source)
    assert not {c.audio for c in found.train} & {c.audio for c in found.dev}
    with pytest.raises(Problem, match="no speech to compress it with"):
        training_speech.choose_speech("some/model", None, None)


def test_matching_transcripts_of_the_model_replace_the_texts(monkeypatch):
    clips = [Clip(Path("a"), "yesterday i waited"), Clip(Path("b"), "for the train")]
    monkeypatch.setattr(Clip, "pcm", lambda self: None)
    texts = ["Yesterday, I waited.", "Thank you. Thank you."]
    monkeypatch.setattr(decoding, "transcribe", lambda *a, **k: texts)
    labelled = training_speech.with_own_transcripts(None, None, clips)
    assert [clip.text for clip in labelled] == ["Yesterday, I waited.", "for the train"]


def test_only_recipes_that_train_want_transcripts():
    assert job.trains(load_recipe("tspar"))
    assert not job.trains(load_recipe("lite"))


def test_notes_for_a_multilingual_model_say_that_the_clips_are_english():
    dense = SimpleNamespace(generation_config=SimpleNamespace(lang_to_id={"<|en|>": 1}))
    dense.generation_config.is_multilingual = True
    job = Job("base", Recipe("r", "", ()), dense, None, {}, {"source": training_speech.SHIPPED})
    assert ["English" in note for note in job.notes] == [True, True]
    assert "use --speech with clips in your language" in job.notes[1]
    assert Job("base", Recipe("r", "", ()), dense, None, {}).notes == []
