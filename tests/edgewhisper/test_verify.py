"""`verify` and `inspect` on artifacts of the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from small_whisper import random_whisper
from some_clips import manifest_of_some

from benchmarks.speech.clips import read_manifest
from edgewhisper import inspect, pipeline, whisper
from edgewhisper.cli import main
from edgewhisper.verify import CHECKS, verify
from export.artifact import write_manifest
from export.problem import Problem


@pytest.fixture(scope="module")
def few(clips, tmp_path_factory) -> Path:
    """A manifest of three shipped clips."""
    return manifest_of_some(clips, slice(3), tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def exported(digits, few, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "int8"
    return pipeline.export(str(digits), "int8", few, out, lambda text: None)


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["edgewhisper", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


# ----------------------------------------------------------------------------------------- verify


def test_an_artifact_is_verified_against_the_record_of_its_gate(exported, few, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "verify", exported, "--speech", few, "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True)
    assert [row["check"] for row in report["checks"]] == list(CHECKS)
    assert {row["result"] for row in report["checks"]} == {"ok"}
    assert "the tokens of all 3 clips are those of the gate" in report["checks"][-1]["found"]


def test_with_a_checkpoint_the_gate_is_repeated(exported, few, digits):
    report = verify(exported, few, str(digits))
    assert report.error is None
    assert "repeated: 100% of 3 clips get the checkpoint's tokens" in report.rows[-1]["found"]


def test_another_checkpoint_than_the_artifacts_is_refused(exported, few, digits, tmp_path, seed):
    import torch

    torch.manual_seed(seed)
    processor = whisper.load_processor(digits)
    whisper.save(random_whisper(digits), processor, tmp_path / "other", {})
    report = verify(exported, few, str(tmp_path / "other"))
    assert "its layers are not those of" in str(report.error)


def test_a_failed_check_prints_an_error_and_exits_with_1(
    exported, few, tmp_path, monkeypatch, capsys
):
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    (broken / "config.json").write_text("{}")
    code, out, err = run(monkeypatch, capsys, "verify", broken, "--speech", few)
    assert code == 1
    assert "failed" in out
    assert "not reached" in out
    assert err.startswith(f"error: {broken}/config.json: damaged, 2 bytes instead of")
    assert err.splitlines()[1].startswith("try:   ")
    code, out, _ = run(monkeypatch, capsys, "verify", broken, "--speech", few, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert "config.json: damaged" in json.loads(out)["error"]


def test_other_tokens_than_the_gates_are_detected(exported, few, tmp_path):
    """The artifact is valid, but its gate recorded other tokens and was exact."""
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["gate"] |= {"tokens_hash": "0" * 64, "exact": True}
    manifest["gate"]["clip_tokens"][1] = "0" * 8
    write_manifest(broken, manifest)
    report = verify(broken, few)
    message = str(report.error)
    assert message.startswith("1 of 3 clips get other tokens than at the gate; WER")
    assert re.search(r"\nclip: +001.ogg \(en\)\n", message)


def test_other_clips_than_the_gates_are_refused(exported, clips):
    report = verify(exported, clips)
    assert "the gate was run on 3 other clips than these 40" in str(report.error)


@pytest.mark.parametrize(
    "layout",
    [
        "single",
        pytest.param("sherpa", marks=pytest.mark.slow),
        pytest.param("transformers", marks=pytest.mark.slow),
    ],
)
def test_other_layouts_are_verified_too(layout, digits, few, tmp_path, monkeypatch, capsys):
    """Their reference runtimes run the graphs. Some of them only have the model's full window."""
    model, processor = whisper.load(digits), whisper.load_processor(digits)
    model.config.edgewhisper = {"format": 1, "windows": [150, 300]}
    whisper.save(model, processor, tmp_path / "two", {})
    place = pipeline.export(
        str(tmp_path / "two"), "int8", few, tmp_path / "out", lambda text: None, layout
    )
    report = verify(place, few)
    assert report.error is None
    assert "the tokens of all 3 clips are those of the gate" in report.rows[-1]["found"]
    assert (
        "repeated: 100% of 3 clips" in verify(place, few, str(tmp_path / "two")).rows[-1]["found"]
    )

    manifest = json.loads((place / "manifest.json").read_text())
    manifest["gate"] |= {"tokens_hash": "0" * 64, "exact": True}
    manifest["gate"]["clip_tokens"][1] = "0" * 8
    write_manifest(place, manifest)
    assert "1 of 3 clips get other tokens than at the gate" in str(verify(place, few).error)

    sound = read_manifest(few)[0].audio
    for words in (["transcribe", place, sound], ["eval", place, "--speech", few], ["bench", place]):
        monkeypatch.chdir(tmp_path)
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 1
        assert f"the layout is {layout!r}; this runner reads 'native'" in err
        assert "Traceback" not in err


# ---------------------------------------------------------------------------------------- inspect


def test_an_artifacts_parts_add_up_to_its_folder(exported):
    contents = inspect.inspect(str(exported))
    assert contents["kind"] == "artifact"
    assert sum(contents["bytes"].values()) == sum(p.stat().st_size for p in exported.iterdir())
    vocabulary, width = 783, 128
    assert contents["bytes"]["token table"] == vocabulary * (width + 4)  # int8, a scale per token
    assert min(contents["bytes"].values()) > 0


def test_a_checkpoints_parts_are_its_weights_and_files(digits):
    contents = inspect.inspect(str(digits))
    parts = contents["bytes"]
    assert parts["encoder"] + parts["decoder"] + parts["token table"] == 4 * contents["parameters"]
    assert parts["token table"] == 4 * 783 * 128
    assert contents["layers"]["encoder"][0]["self_attn"] == {"heads": 4, "qk_dim": 32, "v_dim": 32}


def test_a_checkpoint_and_its_artifact_have_the_same_layers_and_costs(digits, exported):
    one, other = inspect.inspect(str(digits)), inspect.inspect(str(exported))
    for name in ("layers", "parameters", "macs_by_window"):
        assert one[name] == other[name]


def test_irregular_layers_are_shown_one_by_one():
    attention = {"heads": 3, "qk_dim": 24, "v_dim": 32}
    layer = {"self_attn": attention, "ffn": 100, "ranks": {"self_attn.q_proj": 16, "fc1": 8}}
    layer |= {"inputs": {}, "bits": {"fc1": 4, "fc2": 4}}
    rows = inspect.layer_rows({"layers": {"encoder": [layer], "decoder": []}})
    assert rows == [
        {
            "layer": "encoder 0",
            "self-attention": "3 x 24/32",
            "cross-attention": "",
            "units": "100",
            "ranks": "q 16 fc1 8",
            "inputs": "",
            "bits": "all 4",
        }
    ]


def test_time_is_split_by_part_and_compared_with_a_floor(exported, monkeypatch, capsys):
    words = ["inspect", exported, "--threads", 1, "--json", "--time"]
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    timed = json.loads(out)["time"]
    assert timed["window_s"] == 6
    for stage in ("encoder", "token"):
        assert sum(timed[stage]["shares"].values()) == pytest.approx(1)
        assert timed[stage]["floor_s"] > 0
        assert timed[stage]["measured_s"] > 0
    parts = {"log-mel", "stem", "self-attention", "feed-forward", "cross keys and values"}
    assert parts <= timed["encoder"]["shares"].keys()
    parts = {"look-up", "self-attention", "cross-attention", "feed-forward", "logits"}
    assert parts <= timed["token"]["shares"].keys()
    assert max(timed["encoder"]["shares"].get("other", 0), timed["token"]["shares"]["other"]) < 0.5


def test_the_floor_counts_every_multiplication_and_byte_once(exported):
    """Compare with a manual count for the embedded model, 300 positions and 32 tokens."""
    manifest = json.loads((exported / "manifest.json").read_text())
    from devices.runner.artifact.graph_file import read_graph

    encoder, decoder = (read_graph(exported / f"{name}.onnx") for name in ("encoder", "decoder"))
    d, units = 128, 512
    block = 4 * d * d + 2 * d * units
    assert inspect.integer_weights(encoder) == 4 * block + 2 * 2 * d * d
    layers = 2 * (block + 2 * d * d)
    assert inspect.integer_weights(decoder) == layers
    read = inspect.bytes_a_token(decoder, manifest, 300, 32)
    keys = 2 * (2 * 300 * d + 2 * 32 * d * 4)
    floats = read - layers - keys - 783 * d
    assert 0 < floats < 40_000  # scales, biases, norms


def test_a_checkpoint_has_no_graphs_to_time(digits):
    with pytest.raises(Problem, match="there are no graphs to time") as error:
        inspect.time_artifact(digits, 5)
    assert "edgewhisper export" in error.value.hint


def test_tables_are_shown(exported, few, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "inspect", exported)
    assert code == 0
    assert "artifact, int8, 1,548,672 parameters" in out
    assert "token table" in out
    assert "encoder 3" in out
    assert len(read_manifest(few)) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("macs_by_window", None, "macs_by_window is missing"),
        ("macs_by_window", {"300": {"encoder": 1}}, "no costs of the window '300'"),
        ("macs_by_window", {"x": {}}, "no costs of the window 'x'"),
        ("parameters", "many", "parameters is 'many', not a whole number"),
        ("layers", {"encoder": [{}], "decoder": []}, "ffn is missing"),
        ("layers", None, "layers is missing"),
    ],
)
def test_missing_and_invalid_facts_raise_a_problem(name, value, message, exported, tmp_path):
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    manifest = json.loads((broken / "manifest.json").read_text()) | {name: value}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message) as error:
        inspect.inspect(str(broken))
    assert error.value.hint


def test_4_bit_and_8_bit_graphs_have_the_same_number_of_weights(digits, processor, tmp_path, rng):
    """A byte holds two 4-bit weights. Blocks of 32 inputs divide these widths."""
    from devices.runner.artifact.graph_file import read_graph
    from export.onnx.to_onnx import export_onnx

    model, counts = random_whisper(digits, ffn=64), {}
    for precision in ("int8", "int4"):
        export_onnx(model, processor, tmp_path / precision, precision)
        for name in ("encoder", "decoder"):
            parts = read_graph(tmp_path / precision / f"{name}.onnx")
            counts[precision, name] = inspect.integer_weights(parts)
    assert counts["int8", "encoder"] == counts["int4", "encoder"] > 0
    assert counts["int8", "decoder"] == counts["int4", "decoder"] > 0
