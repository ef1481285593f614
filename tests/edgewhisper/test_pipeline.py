"""The whole road on a few shipped clips: compress, export, bench, compare, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ctrl_c import count_calls, press_ctrl_c

from benchmarks.bench import Measuring
from benchmarks.speech.clips import read_manifest
from edgewhisper import pipeline, runs, whisper
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
def empty(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few(clips, tmp_path) -> Path:
    """Six of the shipped clips."""
    shutil.copytree(clips.parent / "test", tmp_path / "speech/test")
    manifest = tmp_path / "speech/few.jsonl"
    manifest.write_text("\n".join(clips.read_text().splitlines()[:6]) + "\n")
    return manifest


@pytest.fixture
def quick(tmp_path) -> str:
    (tmp_path / "quick.toml").write_text(QUICK)
    return "quick.toml"


def test_the_whole_road(empty, few, quick, digits):
    slim = pipeline.compress(str(digits), quick, speech=few, dev=few, allow_loss=True)
    record = json.loads((slim / "compression.json").read_text())
    assert record["recipe"]["text"] == QUICK
    assert record["after"]["parameters"]["total"] < record["before"]["parameters"]["total"]
    assert sum(p.numel() for p in load(slim).parameters()) == record["after"]["parameters"]["total"]

    # three steps of training leave a model that says little sense, which the gate would refuse
    artifact = pipeline.export(precision="fp32", speech=few, gating=pipeline.Gating("off"))
    manifest = read_artifact(artifact)
    assert manifest["provenance"] == record
    clips = read_manifest(few)
    pcms, languages = [clip.pcm() for clip in clips], [clip.lang for clip in clips]
    said = [pipeline.transcriber(str(source), 1, languages)(pcms) for source in (slim, artifact)]
    assert said[0] == said[1]

    once = Measuring(repeats=1)
    results, place, _ = pipeline.bench([artifact], speech=few, baseline=str(digits), how=once)
    assert [result["rival"] for result in results] == ["transformers", None]
    assert results[1]["parameters"] == record["after"]["parameters"]["total"]
    assert results[0]["clips_hash"] == results[1]["clips_hash"]
    assert runs.newest("result") == place

    pipeline.report([], Path("page.html"))
    assert "http" not in Path("page.html").read_text().replace("http://www.w3.org", "")
    assert not list(runs.RUNS.glob("unfinished-*")), "finished work leaves no state behind"


def test_a_bare_export_takes_the_embedded_model_and_passes_its_gate(empty):
    artifact = pipeline.export()
    manifest = read_artifact(artifact)
    assert artifact.parent == runs.RUNS
    assert manifest["precision"] == "int8"
    assert manifest["gate"]["wer_loss_points"] <= 0.5
    assert manifest["gate"]["clips"] == 40


def test_no_word_is_lost_or_doubled_where_long_audio_is_cut(empty, clips, digits):
    (long,) = [c for c in read_manifest(clips.parent / "other.jsonl") if c.text]
    assert len(long.pcm()) > 3 * 96000, "several windows"
    for source in (str(digits), str(pipeline.export(str(digits), "fp32", clips))):
        assert pipeline.transcriber(source)([long.pcm()]) == [long.text]


def test_an_artifact_tells_segments_and_language(empty, clips, exported):
    clip = next(clip for clip in read_manifest(clips) if clip.text)
    told = []
    (found,) = pipeline.transcribe(
        str(exported), [clip.pcm()], said=lambda number, s: told.append((number, s.text)), beams=2
    )
    assert found["language"] == "en"
    assert found["text"] == clip.text
    assert told == [(0, segment["text"]) for segment in found["segments"]]


def test_a_full_disk_leaves_no_half_artifact(empty, digits, full_disk):
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
    ("busy_with", "raised"),
    [
        pytest.param((Loop, "update"), Interrupted, id="in training"),
        pytest.param((Context, "wer"), KeyboardInterrupt, id="while it judges"),
    ],
)
def test_the_same_command_after_ctrl_c_gives_the_same_weights(
    busy_with, raised, empty, few, random_start, rng, monkeypatch
):
    (empty / "mine.toml").write_text(SHORT_STEPS)

    def compress(out: str) -> Path:
        return pipeline.compress(
            random_start,
            "mine.toml",
            speech=few,
            dev=few,
            out=Path(out),
            say=lambda text: None,
            allow_loss=True,  # the WER of a random model may rise
        )

    with monkeypatch.context() as patch:
        calls = count_calls(patch, *busy_with)
        whole = compress("whole")
    with monkeypatch.context() as patch, pytest.raises(raised):
        press_ctrl_c(patch, *busy_with, call=int(rng.integers(1, len(calls) + 1)))
        compress("stopped")
    assert not Path("stopped").exists()
    again = compress("stopped")
    assert not list(runs.RUNS.glob("unfinished-*"))
    wanted, found = (load(place).state_dict() for place in (whole, again))
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(found[name]) for name, tensor in wanted.items())


def test_speech_without_dev_is_split_the_same_way_each_time(few, clips):
    first = pipeline.choose_speech("some/model", clips, None)
    again = pipeline.choose_speech("some/model", clips, None)
    assert first == again
    assert len(first.dev) == 4
    assert not set(first.train) & set(first.dev)
    with pytest.raises(Problem, match="names 6 clips: too few"):
        pipeline.choose_speech("some/model", few, None)


def test_a_failing_gate_leaves_nothing_behind(empty, digits, few, monkeypatch):
    from edgewhisper import decoding

    # the checkpoint is made to say something else than its files
    greedy = decoding.greedy
    monkeypatch.setattr(
        decoding, "greedy", lambda *given: [[*tokens, *tokens[-1:]] for tokens in greedy(*given)]
    )
    with pytest.raises(Problem, match="clips get other tokens"):
        pipeline.export(str(digits), "fp32", few)
    assert not list(runs.RUNS.iterdir())


def test_the_newest_output_is_found_by_name(empty):
    for name in ("checkpoint-20260102-000000-b", "checkpoint-20260101-000000-z"):
        (runs.RUNS / name).mkdir(parents=True)
    assert runs.newest("checkpoint") == runs.RUNS / "checkpoint-20260102-000000-b"
    assert runs.newest("artifact") is None


def test_a_method_may_come_twice_in_a_recipe(tiny_whisper, processor, clips, tmp_path):
    step = '[[step]]\nmethod = "wsap"\n[step.recovery]\nsteps = 1\nbatch_size = 2\n'
    two = read_manifest(clips)[:2]
    work = Context(processor=processor, train=two, dev=two, run_dir=tmp_path / "run")
    pipeline.run_steps(tiny_whisper, parse("twice", 2 * step), work, say=lambda text: None)
    assert set(work.record) == {"wsap", "wsap-2"}
    assert work.record["wsap"]["variations"] != work.record["wsap-2"]["variations"]
