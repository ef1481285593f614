"""Bench: what is pushed and run on the device, and the results."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_device import FakeDevice

from benchmarks.bench import BenchOptions, Candidate, bench, bench_all
from benchmarks.metadata import artifact_hash, clips_hash, file_hash, folder_hash
from benchmarks.prepare import prepare
from benchmarks.result import STAGES, validate
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from benchmarks.wer import word_errors
from devices.device import Finished, open_device
from devices.runner.audio import read_wav
from export.artifact import read_manifest as read_artifact
from export.problem import Problem


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, digits, processor) -> Path:
    """The shipped checkpoint in int8."""
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    out = tmp_path_factory.mktemp("bench") / "digits-int8"
    export_onnx(load(digits), processor, out, "int8")
    return out


@pytest.fixture(scope="module")
def few(clips):
    """Three shipped clips: one, two and three words."""
    return read_manifest(clips)[:3]


def reply(texts, **changes) -> Finished:
    """Return a runner's answer for three clips of 10, 20 and 30 ms."""
    stages = {stage: [0.01, 0.02, 0.03] for stage in STAGES} | {"load_s": [0.1]}
    rest = {"mel_share": 0.2, "peak_rss_bytes": 50_000_000, "versions": {"onnxruntime": "1.31"}}
    return Finished(0, json.dumps(stages | rest | {"texts": texts} | changes), "")


# --------------------------------------------------------------------------------- on a fake device


def test_the_device_learns_the_oldest_runtime_that_runs_all_artifacts(artifact, few, tmp_path):
    both = [artifact, *(tmp_path / name for name in ("older", "wrong"))]
    manifest = json.loads((artifact / "manifest.json").read_text())
    for folder, runtime in zip(both[1:], ({"onnxruntime": "1.9"}, {"onnxruntime": 1}), strict=True):
        shutil.copytree(artifact, folder)
        (folder / "manifest.json").write_text(json.dumps(manifest | {"runtime": runtime}))
    fake = FakeDevice()
    prepare([Candidate(folder) for folder in both[:2]], fake, few, BenchOptions())
    assert fake.oldest_runtime == manifest["runtime"]["onnxruntime"] == "1.27"
    with pytest.raises(Problem, match="its manifest needs onnxruntime '1', which is no version"):
        prepare([Candidate(both[2])], fake, few, BenchOptions())


def test_rounds_are_interleaved_and_samples_kept(artifact, few, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    right = [clip.text for clip in few]
    fake = FakeDevice(
        replies=[
            reply(right, peak_rss_bytes=1),
            reply(["", "", ""]),
            reply(right, peak_rss_bytes=7),
            reply(["", "", ""]),
        ],
        machine={"cores": 4, "emulated": False},
    )
    first, second = bench_all([Candidate(artifact), Candidate(other)], fake, few, BenchOptions(2))
    pushed = [call[1] for call in fake.calls if call[0] == "push"]
    assert pushed == ["runner", "artifacts/0", "artifacts/1", "clips"]
    runs = [call for call in fake.calls if call[0] == "run"]
    assert [call[5] for call in runs] == ["artifacts/0", "artifacts/1"] * 2
    options = ("clips/clips.json", "--repeats", "1", "--threads", "4")
    assert runs[0] == ("run", "python3", "-m", "runner", "bench", "artifacts/0", *options)
    assert first["end_to_end_s"] == [0.01, 0.02, 0.03] * 2
    assert first["load_s"] == [0.1, 0.1]
    assert first["rounds"] == 2
    assert first["peak_rss_bytes"] == 7
    assert (first["wer"], second["wer"]) == (0, 1)
    assert second["clip_errors"] == second["clip_words"] == [len(c.text.split()) for c in few]


def test_a_result_describes_what_was_measured(artifact, few):
    fake = FakeDevice(replies=[reply(["", "", ""])])
    found = bench(artifact, fake, few, BenchOptions(1, 3))
    manifest = read_artifact(artifact)
    assert found == validate(found)
    assert found["name"] == "digits-int8"
    assert found["artifact_hash"] == artifact_hash(manifest)
    assert found["artifact_bytes"] == sum(p.stat().st_size for p in artifact.iterdir())
    assert found["parameters"] == manifest["parameters"]
    assert found["macs"] == manifest["macs"]
    assert (found["precision"], found["rival"], found["threads"]) == ("int8", None, 3)
    assert found["clips_hash"] == clips_hash(few)
    assert found["device"]["name"] == "fake"
    assert found["versions"]["onnxruntime"] == "1.31"
    assert found["mel_share"] == 0.2


def test_unavailable_memory_is_reported_as_such(artifact, few):
    fake = FakeDevice(replies=[reply([""] * 3, peak_rss_bytes="unavailable")])
    assert bench(artifact, fake, few, BenchOptions(1))["peak_rss_bytes"] == "unavailable"


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        ("encoder_s", None),
        ("end_to_end_s", [0.1, float("nan")]),
        ("end_to_end_s", [0.1, 0.1]),
        ("load_s", [-1.0]),
        ("per_token_s", ["fast"]),
        ("texts", ["one"]),
        ("texts", ["one", 2, "three"]),
        ("peak_rss_bytes", 1e6),
        ("peak_footprint_bytes", "1 GB"),
        ("mel_share", 7.0),
        ("versions", {"onnxruntime": ["1.31"]}),
    ],
)
def test_an_invalid_answer_is_refused(artifact, few, wrong, value):
    answer = json.loads(reply([""] * 3).stdout) | {wrong: value}
    fake = FakeDevice(replies=[Finished(0, json.dumps(answer), "")])
    with pytest.raises(Problem, match=f"fake: the runner's answer has no usable {wrong}$"):
        bench(artifact, fake, few, BenchOptions(1))


def test_inserted_words_count_as_errors_in_silence():
    assert word_errors([""], ["one two"], "whisper-basic") == [(2, 0)]
    assert word_errors(["one"], ["two"], "whisper-basic") == [(1, 1)]


def test_clips_arrive_sample_by_sample(few, tmp_path):
    seconds = write_clips(few, tmp_path)
    names = json.loads((tmp_path / "clips.json").read_text())
    assert seconds == sum(len(clip.pcm()) for clip in few) / 16_000
    for clip, name in zip(few, names, strict=True):
        assert np.array_equal(read_wav(tmp_path / name), clip.pcm())
        found, rate = soundfile.read(tmp_path / name, dtype="float32")  # any other reader, too
        assert rate == 16_000 and np.array_equal(found, clip.pcm())


def test_clips_written_again_are_the_same_bytes(few, tmp_path, monkeypatch):
    """Otherwise they would be copied to a device for every bench."""
    now = time.time()
    for day in range(2):
        monkeypatch.setattr(time, "time", lambda day=day: now + 86_400 * day)
        (tmp_path / str(day)).mkdir()
        write_clips(few, tmp_path / str(day))
    first, second = (sorted((tmp_path / str(day)).iterdir()) for day in range(2))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_damaged_artifact_is_not_measured(artifact, few, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    content = bytearray((broken / "encoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "encoder.onnx").write_bytes(content)
    fake = FakeDevice()
    with pytest.raises(Problem, match=r"encoder\.onnx: damaged"):
        bench(broken, fake, few)
    assert fake.calls == []


def test_impossible_requests_are_refused(artifact, digits, few, tmp_path):
    with pytest.raises(Problem, match="no clips to bench on"):
        bench(artifact, FakeDevice(), [])
    with pytest.raises(Problem, match="unknown rival 'siri'") as error:
        bench_all([Candidate(digits, rival="siri")], FakeDevice(), few)
    assert "transformers" in error.value.hint
    with pytest.raises(Problem, match="runs on this machine only, not on fake"):
        bench_all([Candidate(digits, rival="transformers")], FakeDevice(), few)
    with pytest.raises(Problem, match="no such directory"):
        bench_all([Candidate(tmp_path / "x", rival="transformers")], FakeDevice(), few)


# -------------------------------------------------------------------------------- on this machine


def test_artifact_and_rival_give_the_same_texts(artifact, digits, few):
    candidates = [Candidate(digits, rival="transformers"), Candidate(artifact, name="int8")]
    with open_device("local") as device:
        rival, ours = bench_all(candidates, device, few, BenchOptions(1, 1))
    assert rival["name"] == "whisper-digits (transformers)"
    assert rival["parameters"] == ours["parameters"]
    assert rival["mel_share"] is None
    assert len(rival["texts"]) == len(ours["texts"]) == 3
    assert rival["clip_words"] == ours["clip_words"] == [1, 2, 3]
    for result in (rival, ours):
        assert len(result["mel_s"]) == len(result["encoder_s"]) == len(result["prompt_s"]) == 3
        assert all(time > 0 for stage in STAGES for time in result[stage])
        inside = sum(sum(result[s]) for s in ("mel_s", "encoder_s", "prompt_s", "per_token_s"))
        assert inside <= sum(result["end_to_end_s"])
    assert len(rival["per_token_s"]) > 0
    assert 20e6 < ours["peak_rss_bytes"] < rival["peak_rss_bytes"]


def test_the_rival_refuses_a_compressed_checkpoint(digits, few, tmp_path):
    slim = tmp_path / "slim"
    shutil.copytree(digits, slim)
    config = json.loads((slim / "config.json").read_text())
    (slim / "config.json").write_text(json.dumps(config | {"edgewhisper": {"format": 1}}))
    from benchmarks.rivals.transformers import refuse_slim
    from devices.runner.problem import RunnerProblem

    with pytest.raises(RunnerProblem, match="transformers loads dense layers only"):
        refuse_slim(slim)
    with pytest.raises(RunnerProblem, match=r"no readable config\.json"):
        refuse_slim(tmp_path)


# ----------------------------------------------------------------------------------------- hashes


def test_hashes_depend_on_content_and_not_on_paths(few, clips, tmp_path):
    for clip in few:
        shutil.copy(clip.audio, tmp_path / clip.audio.name)
    rows = [{"audio": clip.audio.name, "text": clip.text, "lang": clip.lang} for clip in few]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert clips_hash(read_manifest(tmp_path / "m.jsonl")) == clips_hash(few)
    rows[0]["text"] += "!"
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert clips_hash(read_manifest(tmp_path / "m.jsonl")) != clips_hash(few)
    assert clips_hash(few[::-1]) != clips_hash(few)


def test_every_file_counts_in_a_folders_hash(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep/x").write_text("1")
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")
    (tmp_path / "b/deep/x").write_text("2")
    assert folder_hash(tmp_path / "a") != folder_hash(tmp_path / "b")
    soundfile.write(tmp_path / "s.wav", np.zeros(9), 16_000)
    assert len(file_hash(tmp_path / "s.wav")) == 64
