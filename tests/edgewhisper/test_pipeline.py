"""The stages on shipped clips: compress, export, bench, report; interruption and clean-up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ctrl_c import count_calls, press_ctrl_c
from some_clips import copy_of_some

from benchmarks.bench import BenchOptions
from benchmarks.speech.clips import read_manifest
from edgewhisper import job, pipeline, runs, training_speech, transcription, whisper
from edgewhisper.compress.context import Context
from edgewhisper.recipe import parse
from edgewhisper.resume import Interrupted
from edgewhisper.training import Loop
from edgewhisper.whisper import load
from export.artifact import read_manifest as read_artifact
from export.problem import Problem

QUICK = """
[[step]]
method = "tspar"
search = false
c1 = 0.2
c2 = 0.8
[step.training]
steps = 3
batch_size = 4

[[step]]
method = "shrink"
"""


@pytest.fixture
def few(clips, tmp_path) -> Path:
    """Six of the shipped clips."""
    return copy_of_some(clips, 6, tmp_path / "speech")


@pytest.fixture
def quick(tmp_path) -> str:
    (tmp_path / "quick.toml").write_text(QUICK)
    return "quick.toml"


def test_an_unknown_rival_is_refused_before_the_baseline_is_loaded(tmp_path):
    with pytest.raises(Problem, match="unknown rival 'siri'"):
        pipeline.bench([tmp_path], rivals=("siri",))


def test_the_stages_pass_their_records_on(empty, few, quick, digits):
    slim = pipeline.compress(pipeline.Request(str(digits), quick, few, few, allow_loss=True))
    record = json.loads((slim / "compression.json").read_text())
    assert record["recipe"]["text"] == QUICK
    assert record["after"]["parameters"]["total"] < record["before"]["parameters"]["total"]
    assert sum(p.numel() for p in load(slim).parameters()) == record["after"]["parameters"]["total"]

    # after three steps of training the gate would fail
    artifact = pipeline.export(precision="fp32", speech=few, gating=pipeline.Gating("off"))
    manifest = read_artifact(artifact)
    assert manifest["provenance"] == record
    clips = read_manifest(few)
    pcms, languages = [clip.pcm() for clip in clips], [clip.lang for clip in clips]
    texts = [transcription.transcriber(str(s), 1, languages)(pcms) for s in (slim, artifact)]
    assert texts[0] == texts[1]

    once = BenchOptions(repeats=1)
    results, place, _ = pipeline.bench([artifact], speech=few, baseline=str(digits), options=once)
    assert [result["rival"] for result in results] == ["transformers", None]
    assert results[1]["parameters"] == record["after"]["parameters"]["total"]
    assert results[0]["clips_hash"] == results[1]["clips_hash"]
    assert runs.newest("result") == place

    pipeline.report([], Path("page.html"))
    assert "http" not in Path("page.html").read_text().replace("http://www.w3.org", "")
    assert not list(runs.RUNS.glob("unfinished-*")), "a finished run leaves no state behind"


def test_export_without_arguments_exports_the_embedded_model(empty):
    artifact = pipeline.export()
    manifest = read_artifact(artifact)
    assert artifact.parent == runs.RUNS
    assert manifest["precision"] == "int8"
    assert manifest["gate"]["wer_loss_points"] <= 0.5
    assert manifest["gate"]["clips"] == 40


def test_no_word_is_lost_or_repeated_at_window_boundaries(empty, clips, digits):
    (long,) = [c for c in read_manifest(clips.parent / "other.jsonl") if c.text]
    assert len(long.pcm()) > 3 * 96000, "several windows"
    for source in (str(digits), str(pipeline.export(str(digits), "fp32", clips))):
        assert transcription.transcriber(source)([long.pcm()]) == [long.text]


def test_an_artifact_reports_segments_and_language(empty, clips, exported):
    clip = next(clip for clip in read_manifest(clips) if clip.text)
    segments = []
    recognise = transcription.recogniser(str(exported), beams=2)
    transcript = recognise(clip.pcm(), segments.append)
    assert transcript["language"] == "en"
    assert transcript["text"] == clip.text
    assert [segment.as_dict() for segment in segments] == transcript["segments"]


def test_a_full_disk_leaves_no_partial_artifact(empty, digits, full_disk):
    with pytest.raises(Problem, match="cannot be written"):
        pipeline.export(str(digits))
    assert not list(runs.RUNS.iterdir())


SHORT_STEPS = """
[[step]]
method = "tspar"
evaluations = 2
[step.training]
steps = 2
batch_size = 2
[step.recovery]
steps = 2
batch_size = 2

[[step]]
method = "lite"
theta_attn = 0.9
theta_mlp = 0.9
round_to = 1
clips = 2
[step.recovery]
steps = 2
batch_size = 2
"""


@pytest.fixture
def random_start(make_whisper, processor, tmp_path) -> str:
    whisper.save(make_whisper(d_model=16, ffn=16), processor, tmp_path / "random", {})
    return str(tmp_path / "random")


@pytest.mark.parametrize(
    ("interrupted_in", "raised"),
    [
        pytest.param((Loop, "update"), Interrupted, id="in training"),
        pytest.param((Context, "wer"), KeyboardInterrupt, id="while measuring dev WER"),
    ],
)
def test_a_run_resumed_after_ctrl_c_gives_the_same_weights(
    interrupted_in, raised, empty, few, random_start, rng, monkeypatch
):
    (empty / "mine.toml").write_text(SHORT_STEPS)

    def compress(out: str) -> Path:
        # the WER of a random model may rise
        request = pipeline.Request(random_start, "mine.toml", few, few, Path(out), allow_loss=True)
        return pipeline.compress(request, lambda text: None)

    with monkeypatch.context() as patch:
        calls = count_calls(patch, *interrupted_in)
        whole = compress("whole")
    with monkeypatch.context() as patch, pytest.raises(raised):
        press_ctrl_c(patch, *interrupted_in, call=int(rng.integers(1, len(calls) + 1)))
        compress("stopped")
    assert not Path("stopped").exists()
    again = compress("stopped")
    assert not list(runs.RUNS.glob("unfinished-*"))
    expected, actual = (load(place).state_dict() for place in (whole, again))
    assert actual.keys() == expected.keys()
    assert all(tensor.equal(actual[name]) for name, tensor in expected.items())


def test_without_dev_clips_the_speech_is_split_the_same_way_each_time(few, clips):
    first = training_speech.choose_speech("some/model", clips, None)
    again = training_speech.choose_speech("some/model", clips, None)
    assert first == again
    assert len(first.dev) == 4
    assert not set(first.train) & set(first.dev)
    with pytest.raises(Problem, match="has 6 clips: too few"):
        training_speech.choose_speech("some/model", few, None)


def test_a_failing_gate_leaves_nothing_behind(empty, digits, few, monkeypatch):
    from edgewhisper import decoding

    # make the checkpoint output other tokens than its artifact
    greedy = decoding.greedy
    monkeypatch.setattr(
        decoding, "greedy", lambda *given: [[*tokens, *tokens[-1:]] for tokens in greedy(*given)]
    )
    with pytest.raises(Problem, match="clips get other tokens"):
        pipeline.export(str(digits), "fp32", few)
    assert not list(runs.RUNS.iterdir())


def test_newest_sorts_outputs_by_name(empty):
    for name in ("checkpoint-20260102-000000-b", "checkpoint-20260101-000000-z"):
        (runs.RUNS / name).mkdir(parents=True)
    assert runs.newest("checkpoint") == runs.RUNS / "checkpoint-20260102-000000-b"
    assert runs.newest("artifact") is None


def test_a_method_may_occur_twice_in_a_recipe(tiny_whisper, processor, clips, tmp_path):
    step = '[[step]]\nmethod = "wsap"\n[step.recovery]\nsteps = 1\nbatch_size = 2\n'
    two = read_manifest(clips)[:2]
    context = Context(processor=processor, train=two, dev=two, run_dir=tmp_path / "run")
    job.run_steps(tiny_whisper, parse("twice", 2 * step), context, say=lambda text: None)
    assert set(context.record) == {"wsap", "wsap-2"}
    assert context.record["wsap"]["variations"] != context.record["wsap-2"]["variations"]
