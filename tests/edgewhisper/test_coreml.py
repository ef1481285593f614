"""Core ML artifacts: the decoding loop, the gate, and the commands that use them.

Packages run in EdgeWhisper's interpreter. Tests of the code for Macs replace coremltools' classes,
because Core ML itself only runs on Apple's systems.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import warnings
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
from fake_device import FakeDevice
from gates import run_gate
from small_whisper import random_whisper
from some_clips import manifest_of_some

from benchmarks import bench as benching
from benchmarks import reference_runtimes
from benchmarks.gate import Bounds, GateFailure, bounds_for, checkpoint_tokens
from benchmarks.gate_record import states_again
from benchmarks.result import STAGES
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from devices.runner.decode.beam import Branches
from devices.runner.engines import coreml
from devices.runner.measure import bench as measure
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer, Transcript
from edgewhisper import decoding, gating, inspect, pipeline, runs, transcription, whisper
from edgewhisper.cli import main
from edgewhisper.coreml import chosen
from edgewhisper.verify import check_manifest, verify
from export.artifact import read_manifest as read_artifact
from export.artifact import write_manifest
from export.coreml.package import HEADER, SENTINEL
from export.coreml.to_coreml import export_coreml
from export.problem import Problem
from export.shrink import layer_shapes, windows_of
from tests.interop.check import irregular

PARTS = ("mel", "states", "key_cache", "value_cache", "logits")


@pytest.fixture(scope="module")
def model(digits):
    loaded, _, _ = pipeline.load_for("whisperkit", str(digits))
    return loaded


@pytest.fixture(scope="module")
def few(clips, tmp_path_factory) -> Path:
    """A manifest of four shipped clips."""
    return manifest_of_some(clips, slice(None, None, 10), tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def fp32(digits, few, tmp_path_factory) -> Path:
    """The embedded model as a Core ML artifact in float32 that has passed its gate."""
    out = tmp_path_factory.mktemp("coreml") / "fp32"
    options = {"precision": "fp32", "layout": "whisperkit", "target": "coreml"}
    return pipeline.export(str(digits), speech=few, out=out, say=lambda text: None, **options)


@pytest.fixture(scope="module")
def recognizer(fp32) -> Recognizer:
    return reference_runtimes.recognizer(fp32, threads=None, guards=False)


@pytest.fixture(scope="module")
def pcms(few) -> list[np.ndarray]:
    return [clip.pcm() for clip in read_manifest(few)]


# ------------------------------------------------------------------------------- the decode loop


@pytest.fixture(scope="module")
def long(clips) -> np.ndarray:
    """A recording of several windows."""
    others = read_manifest(clips.parent / "other.jsonl")
    return next(clip for clip in others if clip.audio.stem == "long").pcm()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestamps": True},
        {"beams": 3},
        {"fallback": True, "beams": 2},
        {"language": "auto"},
        {"previous": True, "language": "de", "timestamps": True},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_transcripts_equal_those_of_the_onnx_runner(options, recognizer, exported, pcms, long):
    onnx = Recognizer(exported, threads=1, guards=False)
    for pcm in [*pcms, long]:
        actual, expected = (each.transcribe(pcm, **options) for each in (recognizer, onnx))
        assert (actual.text, actual.tokens) == (expected.text, expected.tokens)
        assert actual.segments == expected.segments
        assert actual.language == expected.language


def test_every_step_has_the_inputs_that_whisperkit_passes(recognizer, pcms, monkeypatch):
    """A token, its position, the caches before it, and the masks for that position."""
    fed, package = [], recognizer.engine.decoder
    predict = package.predict

    def record(feed, state=None):
        fed.append({name: array.copy() for name, array in feed.items()})
        return predict(feed, state)

    monkeypatch.setattr(package, "predict", record)
    tokens = recognizer.window(pcms[-1])
    expected = [*recognizer.rules.prompt, *tokens]
    assert [int(feed["input_ids"][0]) for feed in fed] == expected
    assert [int(feed["cache_length"][0]) for feed in fed] == list(range(len(expected)))
    room = fed[0]["kv_cache_update_mask"].shape[1]
    for here, feed in enumerate(fed):
        assert np.array_equal(feed["kv_cache_update_mask"][0], np.eye(room)[here])
        behind = np.arange(room) > here
        assert np.array_equal(feed["decoder_key_padding_mask"][0], np.where(behind, -1e4, 0))
        for name in coreml.CACHES:
            assert np.array_equal(feed[name][..., :here], fed[-1][name][..., :here])
            assert np.abs(feed[name][..., :here]).max(initial=1.0) > 0.1


def test_transcripts_do_not_depend_on_earlier_ones(recognizer, fp32, pcms):
    fresh = reference_runtimes.recognizer(fp32, threads=None, guards=False)
    memory = recognizer.engine.rooms(1)[0][0]["key_cache"]
    texts = [recognizer.transcribe(pcm, beams=2).text for pcm in reversed(pcms)]
    assert recognizer.engine.rooms(1)[0][0]["key_cache"] is memory
    assert texts == [fresh.transcribe(pcm).text for pcm in reversed(pcms)]


def test_times_have_one_entry_per_window_and_per_token(recognizer, pcms):
    times = Transcript()
    tokens = recognizer.window(pcms[0], times)
    assert [len(list_) for list_ in (times.graph_s, times.mel_s, times.prompt_s)] == [1, 1, 1]
    assert len(times.per_token_s) == len(tokens)
    assert 0 < times.mel_s[0] < times.graph_s[0]


@pytest.mark.parametrize("stateful", [False, True], ids=["caches", "states"])
def test_beams_continue_from_their_parents(stateful, digits, processor, rng, tmp_path):
    """For random parents and tokens, the logits equal those of the whole text."""
    precision = "fp16" if stateful else "fp32"
    small = random_whisper(digits)
    export_coreml(small, processor, tmp_path / "a", precision, stateful=stateful)
    recognizer = reference_runtimes.recognizer(tmp_path / "a", threads=None, guards=False)
    decoder = recognizer.decoder_over(rng.standard_normal(16_000).astype("f4"), Transcript())
    texts = [list(recognizer.rules.prompt)] * 4
    decoder(recognizer.rules.prompt)
    branches, parents = Branches(decoder, 4), [0] * 4
    for _ in range(5):
        tokens = rng.integers(0, 370, 4).tolist()
        rows = branches(parents, tokens)
        texts = [[*texts[p], t] for p, t in zip(parents, tokens, strict=True)]
        for text, logits in zip(texts, rows, strict=True):
            decoder.fed = 0
            assert np.allclose(decoder(text), logits, atol=2e-3)
        parents = rng.integers(0, 4, 4).tolist()


# ------------------------------------------------------------------------------------- contract


@pytest.fixture
def copy(fp32, tmp_path) -> Path:
    return Path(shutil.copytree(fp32, tmp_path / "copy"))


def refused(folder: Path) -> str:
    with pytest.raises((RunnerProblem, Problem)) as error:
        reference_runtimes.recognizer(folder, threads=None)
    assert error.value.hint
    return str(error.value)


def changed(folder: Path, change) -> Path:
    """Change the artifact's manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["contract"], manifest)
    path.write_text(json.dumps(manifest))
    return folder


def spec(contract, package: str, side: str, name: str) -> dict:
    return next(spec for spec in contract[package][side] if spec["name"] == name)


CHANGES = {
    "another type": (
        lambda c, _: spec(c, "TextDecoder", "inputs", "input_ids").update(dtype="int64"),
        r"input_ids' is int64 \[1\], which does not fit WhisperKit's \[1\] of int32",
    ),
    "another shape": (
        lambda c, _: spec(c, "AudioEncoder", "outputs", "encoder_output_embeds").update(
            shape=[1, 128, 1, 299]
        ),
        "encoder_output_embeds' is float32",
    ),
    "a symbol": (
        lambda c, _: spec(c, "AudioEncoder", "inputs", "melspectrogram_features").update(
            shape=[1, 80, 1, "frames"]
        ),
        "melspectrogram_features' is float32",
    ),
    "a missing output": (
        lambda c, _: c["TextDecoder"]["outputs"].pop(),
        "contract.TextDecoder.outputs lacks value_cache_updates",
    ),
    "a stranger": (
        lambda c, _: c["AudioEncoder"]["inputs"].append(
            {"name": "more", "shape": [1], "dtype": "int32"}
        ),
        "'more' is int32",
    ),
    "a missing package": (lambda c, _: c.pop("AudioEncoder"), "contract.AudioEncoder is missing"),
    "too long a text": (
        lambda _, m: m["decoding"].update(max_new_tokens=10**6),
        "decoding.max_new_tokens is 1000000",
    ),
    "another window": (
        lambda _, m: m["audio"].update(window_samples=32_000, windows_samples=[32_000]),
        "audio.window_samples is 32000, not the 96000 of MelSpectrogram",
    ),
    "another type than the package's": (
        lambda c, _: spec(c, "TextDecoder", "outputs", "logits").update(dtype="float16"),
        "'logits' of its outputs is float32",
    ),
    "an unlisted file": (
        lambda _, m: m["files"].pop("TextDecoder.mlpackage/Data/com.apple.CoreML/model.mlmodel"),
        "the manifest does not list it",
    ),
    "no package": (
        lambda _, m: m["files"].pop("TextDecoder.mlpackage/Manifest.json"),
        "does not list TextDecoder.mlpackage/Manifest.json",
    ),
    "whisper.cpp's layout": (
        lambda _, m: m.update(layout="encoder"),
        "the layout is 'encoder'; this runner reads 'whisperkit'",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_manifest_that_differs_from_the_packages_is_refused(kind, copy):
    import re

    change, message = CHANGES[kind]
    error = refused_by_runner(changed(copy, change))
    assert re.search(message, error), error


def refused_by_runner(folder: Path) -> str:
    with pytest.raises(RunnerProblem) as error:
        Recognizer(folder, open_package=reference_runtimes.InterpretedPackage)
    assert error.value.hint
    return str(error.value)


def test_changed_files_of_a_package_are_refused(copy):
    weights = copy / "AudioEncoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its SHA-256 is not the manifest's" in refused(copy)
    weights.write_bytes(whole[:-8])
    assert f"{len(whole) - 8} bytes instead of {len(whole)}" in refused(copy)
    weights.write_bytes(whole)
    (weights.parent / "more.bin").write_bytes(b"more")
    assert "the manifest does not list it" in refused(copy)
    (weights.parent / "more.bin").unlink()
    assert reference_runtimes.recognizer(copy, threads=None)
    shutil.move(copy / "AudioEncoder.mlpackage", copy.parent / "elsewhere")
    (copy / "AudioEncoder.mlpackage").symlink_to(copy.parent / "elsewhere")
    assert "a link, not a folder" in refused(copy)


def test_without_a_mac_the_runner_explains_where_core_ml_runs(fp32, exported):
    with pytest.raises(RunnerProblem, match="this machine runs Linux, and Core ML needs an Apple"):
        Recognizer(fp32)
    with pytest.raises(RunnerProblem, match="this machine runs Linux"):
        reference_runtimes.recognizer(fp32, None, compute_units="cpu-ane")
    with pytest.raises(RunnerProblem, match="unknown compute units 'gpu'") as error:
        reference_runtimes.recognizer(fp32, None, compute_units="gpu")
    assert error.value.hint == "choose one of all, cpu, cpu-ane, cpu-gpu"
    with pytest.raises(RunnerProblem, match="need a Core ML artifact"):
        Recognizer(exported, compute_units="cpu")


# ------------------------------------------------------- on a Mac, with replaced coremltools


@pytest.fixture
def mac(monkeypatch) -> list[tuple]:
    """A Mac whose coremltools runs packages in the interpreter.

    As the real one, it converts float16 arrays in the caller's dictionary to float32. Returns the
    list of opened packages with their compute units.
    """
    opened = []

    class Model:
        def __init__(self, path, compute_units):
            opened.append((type(self).__name__, Path(path).name, compute_units))
            self.package = reference_runtimes.InterpretedPackage(
                Path(path).with_suffix(".mlpackage")
            )
            self.make_state = self.package.new_state

        def predict(self, inputs, **more):
            for name, array in inputs.items():
                if array.dtype == np.float16:
                    inputs[name] = array.astype(np.float32)
            return self.package.predict(inputs, **more)

    import coremltools

    fake = ModuleType("coremltools")
    fake.models = SimpleNamespace(
        MLModel=type("MLModel", (Model,), {}), CompiledMLModel=type("CompiledMLModel", (Model,), {})
    )
    fake.utils, fake.ComputeUnit = coremltools.utils, coremltools.ComputeUnit
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    return opened


def test_on_a_mac_core_ml_runs_the_packages(mac, fp32, recognizer, pcms):
    on_mac = Recognizer(fp32, compute_units="cpu-ane")
    assert [(kind, name, units.name) for kind, name, units in mac] == [
        ("MLModel", f"{name}.mlpackage", "CPU_AND_NE")
        for name in ("MelSpectrogram", "AudioEncoder", "TextDecoder")
    ]
    for pcm in pcms:
        assert on_mac.transcribe(pcm).tokens == recognizer.transcribe(pcm).tokens
    mac.clear()
    reference_runtimes.open_artifact(fp32)
    assert {units.name for _, _, units in mac} == {"ALL"}


def test_compiled_packages_are_not_compiled_again(mac, copy):
    (copy / "AudioEncoder.mlmodelc").mkdir()
    Recognizer(copy)
    assert [kind for kind, _, _ in mac] == ["MLModel", "CompiledMLModel", "MLModel"]


def test_states_are_copied_by_reading_and_writing(mac, digits, processor, tmp_path, rng):
    export_coreml(random_whisper(digits), processor, tmp_path / "a", "fp16", stateful=True)
    package = coreml.Installed(tmp_path / "a" / "TextDecoder.mlpackage", "all")
    assert sorted(spec.name for spec in package.states) == ["key_cache", "value_cache"]
    drawn = {spec.name: rng.standard_normal(spec.shape) for spec in package.states}
    copied: dict = {}
    source = SimpleNamespace(read_state=drawn.__getitem__)
    package.copy_state(source, SimpleNamespace(write_state=copied.__setitem__))
    assert copied == drawn


def test_a_bench_on_a_mac_times_log_mel_separately(mac, fp32, few, tmp_path):
    write_clips(read_manifest(few), tmp_path)
    times = measure.bench(fp32, tmp_path / "clips.json", 1, compute_units="cpu")
    assert {units.name for _, _, units in mac} == {"CPU_ONLY"}
    assert times["mel_share"] is None
    assert len(times["mel_s"]) == len(times["encoder_s"]) == 4
    assert min(*times["mel_s"], *times["encoder_s"]) > 0
    assert times["versions"]["coremltools"] == "9.0"
    assert times["texts"] == [clip.text for clip in read_manifest(few)]


# ------------------------------------------------------------------------------------------ gate


def test_the_gate_compares_every_part_with_torch(fp32):
    gate = read_artifact(fp32)["gate"]
    assert gate["identical_tokens"] == 1
    assert gate["exact"] is True
    assert tuple(gate["max_errors"]) == PARTS
    assert all(0 < error <= 1e-4 for error in gate["max_errors"].values())
    assert gate["max_logits_error"] == gate["max_errors"]["logits"]


def weights_of(folder: Path, package: str) -> Path:
    return folder / f"{package}.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


def damage(folder: Path, package: str, change) -> Path:
    """Change the largest constant of a package, and update the hashes."""
    path = weights_of(folder, package)
    content = bytearray(path.read_bytes())
    marks = [at for at in range(0, len(content) - HEADER.size, 64) if is_header(content, at)]
    at = max(marks, key=lambda at: HEADER.unpack_from(content, at)[2])
    _, kind, size, begin, _ = HEADER.unpack_from(content, at)
    values = np.frombuffer(content, {1: "<f2", 2: "<f4"}[kind], size // {1: 2, 2: 4}[kind], begin)
    content[begin : begin + size] = change(values).astype(values.dtype).tobytes()
    path.write_bytes(content)
    write_manifest(folder, read_artifact(folder))
    return folder


def is_header(content: bytearray, at: int) -> bool:
    return struct.unpack_from("<I", content, at)[0] == SENTINEL


@pytest.fixture(scope="module")
def judged(model, processor, few, fp32):
    """The gate of a folder with the bounds of a precision. Torch's results are cached."""
    clips = read_manifest(few)
    reference = checkpoint_tokens(partial(decoding.greedy, model, processor), clips, 96_000)
    ask = gating.torch_parts(model, processor, read_artifact(fp32))
    parts = cache(lambda raw, tokens: ask(np.frombuffer(raw, "<f4"), list(tokens)))

    def gate(folder: Path, bounds: Bounds) -> dict:
        return run_gate(
            folder,
            reference,
            clips,
            bounds,
            lambda pcm, tokens, language: parts(pcm.tobytes(), tuple(tokens)),
        )

    return gate


@pytest.mark.parametrize(
    ("package", "change", "message"),
    [
        ("TextDecoder", lambda w: np.roll(w, 1), "clips get other tokens"),
        ("AudioEncoder", lambda w: w * 1.002, "encoder states differ by .* from the checkpoint's"),
        (
            "MelSpectrogram",
            lambda w: w * 1.001,
            r"log-mel features differ by .*; at most 0\.0001\d* is allowed",
        ),
        ("TextDecoder", lambda w: w * np.inf, "clips get other tokens"),
    ],
    ids=["rolled", "encoder scaled", "mel scaled", "infinite"],
)
def test_a_damaged_weight_fails_the_float32_gate(package, change, message, judged, copy):
    with np.errstate(invalid="ignore"), pytest.raises(GateFailure, match=message):
        judged(damage(copy, package, change), bounds_for("coreml", "fp32"))


def test_irregular_layers_pass_the_same_gate(digits, few, tmp_path):
    """Layers of different heads and units, padded with zeros for the Neural Engine."""
    options = {"layout": "whisperkit", "target": "coreml", "neural_engine": True}
    source = irregular(digits, tmp_path / "irregular")
    place = pipeline.export(str(source), "fp32", few, tmp_path / "out", **options)
    gate = read_artifact(place)["gate"]
    assert gate["identical_tokens"] == 1
    assert all(0 < gate["max_errors"][part] <= 1e-4 for part in PARTS)


def test_the_bounds_depend_on_the_precision(judged, copy):
    """A loss that fails float16 and int8 is only a warning for a palette."""
    damage(copy, "TextDecoder", partial(np.roll, shift=1))
    with pytest.raises(GateFailure, match=r"clips get other tokens .*, 98% must get the same"):
        judged(copy, bounds_for("coreml", "fp16"))
    with pytest.raises(GateFailure, match=r"a loss of .* points .*; at most 0\.5 points"):
        judged(copy, bounds_for("coreml", "int8"))
    with pytest.warns(match=r"a loss of .* points .*; at most 0\.5 points"):
        figures = judged(copy, bounds_for("coreml", "pal4"))
    assert figures["max_wer_loss_points"] == figures["wer_loss_points"] > 0.5
    assert bounds_for("onnx", "int4").strict


def test_one_of_several_windows_is_exported_and_gated(digits, processor, few, tmp_path):
    """Longer clips are cut, as in the reference."""
    two = whisper.load(digits)
    whisper.set_windows(two.config, [100, 200, 300])
    whisper.save(two, processor, tmp_path / "two", {})
    options = {"layout": "whisperkit", "target": "coreml", "window": 2.0}
    place = pipeline.export(
        str(tmp_path / "two"), "fp32", few, tmp_path / "out", lambda text: None, **options
    )
    manifest = read_artifact(place)
    assert manifest["audio"]["window_samples"] == 32_000
    assert manifest["gate"]["windows"] > manifest["gate"]["clips"]
    model, _, _ = pipeline.load_for("whisperkit", str(tmp_path / "two"), 2.0)
    assert windows_of(model.config) == [100, 300]
    assert layer_shapes(model) == manifest["layers"]  # `verify --checkpoint` compares them
    with pytest.raises(Problem, match=r"no window of 3 s; it was made for 2 and 4 and 6 s"):
        pipeline.export(
            str(tmp_path / "two"), speech=few, out=tmp_path / "no", **options | {"window": 3.0}
        )


# ------------------------------------------------------------ the encoder for whisper.cpp


@pytest.fixture(scope="module")
def lone(digits, few, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("coreml") / "lone"
    options = {"precision": "fp32", "layout": "encoder", "target": "coreml"}
    return pipeline.export(str(digits), speech=few, out=out, say=lambda text: None, **options)


def test_an_encoder_is_gated_with_the_checkpoints_decoder(lone, few, digits):
    gate = read_artifact(lone)["gate"]
    assert gate["identical_tokens"] == 1
    assert 0 < gate["max_errors"]["states"] < 1e-4
    report = verify(lone, few, threads=1)
    assert report.error is None, report.error
    assert report.rows[-1]["found"] == "the encoder's states of all 4 clips are those of the gate"
    with pytest.raises(RunnerProblem, match="the layout is 'encoder'; this runner reads"):
        transcription.open_artifact(str(lone))


def test_a_damaged_encoder_fails_its_gate(lone, few, model, processor, tmp_path):
    broken = Path(shutil.copytree(lone, tmp_path / "broken"))
    damage(broken, "coreml-encoder", partial(np.roll, shift=1))
    manifest, clips = read_artifact(broken), read_manifest(few)
    with pytest.raises(GateFailure, match="clips get other tokens"):
        gating.gate(broken, manifest, model, processor, clips)
    write_clips(clips, tmp_path)
    now = reference_runtimes.answer_of(broken, tmp_path / "clips.json", None)["states"]
    with pytest.raises(GateFailure, match="states of 4 clips differ by"):
        states_again(manifest["gate"], clips, now)


# -------------------------------------------------------------------------------- verify, inspect


def test_a_package_is_verified(fp32, few, digits):
    report = verify(fp32, few, threads=1)
    assert report.error is None, report.error
    rows = {row["check"]: row["found"] for row in report.rows}
    assert "specification 7" in rows["graphs"]
    assert rows["contract"].startswith("14 inputs and outputs")
    assert rows["gate"] == "the tokens of all 4 clips are those of the gate"


def failed_at(folder: Path, few: Path) -> tuple[str, str]:
    report = verify(folder, few, threads=1)
    assert report.error is not None
    return next((r["check"], r["found"]) for r in report.rows if r["result"] == "failed")


def test_damage_fails_the_matching_check(copy, few, rng):
    """The hashes are updated, as an attacker would do."""
    data = copy / "TextDecoder.mlpackage/Data/com.apple.CoreML"
    weights, model = data / "weights/weight.bin", data / "model.mlmodel"
    whole = weights.read_bytes(), model.read_bytes()

    weights.write_bytes(whole[0][: len(whole[0]) // 2])
    assert failed_at(copy, few)[0] == "files"
    weights.write_bytes(whole[0])

    model.write_bytes(rng.bytes(len(whole[1])))
    write_manifest(copy, read_artifact(copy))
    check, error = failed_at(copy, few)
    assert (check, "not a Core ML model" in error) == ("graphs", True)

    model.write_bytes(whole[1])
    damage(copy, "TextDecoder", partial(np.roll, shift=1))
    check, error = failed_at(copy, few)
    assert (check, "clips get other tokens than at the gate" in error) == ("gate", True)


@pytest.mark.parametrize("layout", ["whisperkit", "encoder"])
def test_missing_and_wrong_manifest_entries_raise_problems(layout, fp32, lone, tmp_path, rng):
    """Entries of the first two levels are removed or replaced. Some of them are not required."""
    whole = (fp32 if layout == "whisperkit" else lone) / "manifest.json"
    manifest, refused = json.loads(whole.read_text()), 0
    places = [(key,) for key in manifest]
    tables = {key: value for key, value in manifest.items() if isinstance(value, dict)}
    places += [(key, sub) for key, table in tables.items() for sub in table]
    places = [places[n] for n in rng.permutation(len(places))[:25]]
    for path in places:
        for value in ("gone", None, [], {}, -1, "text", [[]]):
            changed = json.loads(whole.read_text())
            *way, last = path
            parent = changed[way[0]] if way else changed
            parent.pop(last) if value == "gone" else parent.update({last: value})
            (tmp_path / "manifest.json").write_text(json.dumps(changed))
            try:
                check_manifest(tmp_path, {})
            except (Problem, RunnerProblem) as error:
                assert error.hint
                refused += 1
    assert refused > len(places)


def test_inspect_shows_operations_sizes_and_bits(fp32, digits, processor, tmp_path, model):
    export_coreml(model, processor, tmp_path / "pal4", "pal4")
    for folder, version, form in ((fp32, 7, "float32"), (tmp_path / "pal4", 7, "palette4")):
        contents = inspect.inspect(str(folder))
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        assert sum(contents["bytes"].values()) == sum(sizes)
        assert contents["packages"].keys() == {"MelSpectrogram", "AudioEncoder", "TextDecoder"}
        for name in ("AudioEncoder", "TextDecoder"):
            package = contents["packages"][name]
            assert package["specification_version"] == version
            assert next(iter(package["weights"])) == form
            assert package["operations"]["softmax"] == 4
        rows = {row["package"]: row for row in inspect.package_rows(contents)}
        assert rows["MelSpectrogram"]["numbers"].endswith(" float32")
    assert 4 < float(rows["AudioEncoder"]["bits each"]) < 6


# --------------------------------------------------------------------------------- the commands


@pytest.fixture
def edgewhisper(monkeypatch, capsys, tmp_path):
    """Exit code, stdout and stderr of a command, in an empty directory."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["edgewhisper", *map(str, words)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as end:
                main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


def test_export_of_the_embedded_model(edgewhisper, few, tmp_path):
    code, out, err = edgewhisper("export", "--target", "coreml", "--speech", few)
    assert code == 0, err
    (place,) = (tmp_path / "edgewhisper-runs").iterdir()
    assert place.name.endswith("-coreml-fp16")
    assert "deployment target iOS16, specification 7: the oldest that" in out
    assert "AudioEncoder         1.87 MB   weights in float16 866,304" in out
    assert "no word timestamps" in out
    gate = read_artifact(place)["gate"]
    assert gate["identical_tokens"] == 1
    assert 1e-4 < gate["max_errors"]["states"] < 0.05
    assert runs.newest("artifact") == place.relative_to(tmp_path)
    assert runs.newest("artifact", without="-coreml-") is None
    code, _, err = edgewhisper("bench", place)
    assert code == 1
    assert (
        "is a Core ML artifact, which can be timed on Apple systems only; local runs Linux" in err
    )


@pytest.mark.parametrize(
    ("changes", "forms", "line"),
    [
        ({"stateful": True}, ["float16"], "iOS18, specification 9: the oldest that has a cache in"),
        ({}, ["int8", "int4"], "iOS18, specification 9: the oldest that has 4-bit weights"),
        ({"asked": "iOS18"}, ["int8"], "iOS18, specification 9: as requested"),
    ],
    ids=["states", "blocks", "asked"],
)
def test_the_reason_for_a_deployment_target_is_shown(changes, forms, line, fp32):
    manifest = read_artifact(fp32)
    manifest["coreml"] |= {"deployment_target": "iOS18", "specification_version": 9} | changes
    manifest["coreml"]["weights"]["TextDecoder"] = dict.fromkeys(forms, 1000)
    lines = list(chosen(manifest, {"deployment_target": changes.get("asked")}))
    assert line in lines[0]
    assert lines[3].endswith(f"weights in {' and '.join(f'{form} 1,000' for form in forms)}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layout whisperkit", "--layout whisperkit is for --target coreml, and --target is onnx"),
        ("--precision pal4", "--precision pal4 is for --target coreml, and --target is onnx"),
        ("--target coreml --layout sherpa", "--layout sherpa is for --target onnx"),
        ("--target coreml --layout mlx", "unknown --layout 'mlx'"),
        ("--target coreml --device rpi4", "--target coreml for rpi4 (Raspberry Pi 4 Model B)"),
        ("--stateful --window 6", "--stateful and --window: for Core ML, and --target is onnx"),
        ("--no-word-timestamps", "--word-timestamps: for Core ML, and --target is onnx"),
        ("--target coreml --deployment-target iOS9", "unknown deployment target 'iOS9'"),
        ("--target coreml --deployment-target iOS17 --precision int4", "new in iOS18"),
        ("--target coreml --word-timestamps", "need alignment heads"),
        ("--target coreml --layout encoder --stateful", "whisper.cpp has its own decoder"),
    ],
    ids=lambda text: text if text.startswith("--") else "",
)
def test_options_of_another_target_are_refused(words, message, edgewhisper, few, tmp_path):
    code, _, err = edgewhisper("export", "--speech", few, *words.split())
    assert code == 1
    assert message in err
    assert "try:   " in err
    assert not list((tmp_path / "edgewhisper-runs").glob("*"))


def test_without_a_mac_the_interpreter_transcribes_and_is_named(edgewhisper, fp32, few, tmp_path):
    clips = read_manifest(few)
    for number, clip in enumerate(clips[:2]):
        soundfile.write(tmp_path / f"{number}.wav", clip.pcm(), 16_000)
    code, out, err = edgewhisper("transcribe", fp32, "0.wav", "1.wav", "--beams", "2")
    assert code == 0
    assert out == f"0.wav\t{clips[0].text}\n1.wav\t{clips[1].text}\n"
    assert err.count("EdgeWhisper's interpreter of Core ML packages") == 1
    code, out, err = edgewhisper("eval", fp32, "--speech", few)
    assert (code, "WER 0.00%" in out) == (0, True)
    for words in (["transcribe", fp32, "0.wav"], ["eval", fp32, "--speech", few]):
        code, _, err = edgewhisper(*words, "--compute-units", "all")
        assert (code, "this machine runs Linux" in err) == (1, True)


def test_a_checkpoint_has_no_compute_units(edgewhisper, digits, few):
    code, _, err = edgewhisper("eval", digits, "--speech", few, "--compute-units", "cpu")
    assert (code, "compute units 'cpu' are for Core ML" in err) == (1, True)


def test_a_device_with_core_ml_benches_a_package(fp32, few):
    """The files and commands that are sent to a Mac."""
    clips = read_manifest(few)
    answer = {stage: [0.1] for stage in STAGES} | {"peak_rss_bytes": 1, "mel_share": None}
    answer |= {"tokens": [], "texts": [clip.text for clip in clips], "versions": {}}
    answer["end_to_end_s"] = [0.1] * len(clips)
    reply = SimpleNamespace(exit_code=0, stdout=json.dumps(answer), stderr="")
    first = SimpleNamespace(exit_code=0, stdout='{"compile_s": [2], "cold_load_s": [1]}', stderr="")
    again = SimpleNamespace(exit_code=0, stdout='{"compile_s": [], "cold_load_s": [1]}', stderr="")
    replies = [first, again, reply, reply]
    device = FakeDevice(machine={"kernel": "Darwin 24.0", "emulated": False}, replies=replies)
    candidate = benching.Candidate(fp32)
    how = benching.BenchOptions(1, compute_units=("cpu-ane", "cpu"))
    results = benching.bench_all([candidate], device, clips, how)
    assert device.libraries == ("coremltools",)
    assert [result["name"] for result in results] == ["fp32 (cpu-ane)", "fp32 (cpu)"]
    assert [result["compute_units"] for result in results] == ["cpu-ane", "cpu"]
    assert [result.get("compile_s") for result in results] == [[2], None]
    assert [result["cold_load_s"] for result in results] == [[1], [1]]
    ran = [call for call in device.calls if call[0] == "run"]
    assert [call[-2:] for call in ran] == [
        ("--compute-units", name) for name in how.compute_units * 2
    ]
    assert [call[4:6] for call in ran[::2]] == [
        ("compile", "artifacts/0"),
        ("bench", "artifacts/0"),
    ]
    device = FakeDevice(machine={"kernel": "Linux 6", "emulated": False})
    with pytest.raises(
        Problem, match="is a Core ML artifact, which can be timed on Apple systems only"
    ):
        benching.bench_all([candidate], device, clips, benching.BenchOptions(1))
