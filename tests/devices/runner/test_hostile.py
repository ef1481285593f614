"""Untrusted artifacts: whatever is wrong, an error message names the file and the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from copy import deepcopy
from pathlib import Path

import hostile_graphs
import numpy as np
import onnx
import pytest
import soundfile
import torch
from small_whisper import random_whisper

from benchmarks.speech.clips import read_manifest as read_clips
from devices.device import RUNNER
from devices.runner.artifact import graph_file
from devices.runner.artifact import manifest as contract
from devices.runner.decode.text import read_tokens
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper.verify import verify
from export.artifact import write_manifest
from export.layouts import graph_files, needed_files
from export.onnx.to_onnx import export_onnx

LARGEST_BYTES = 64 * 2**20
"""Limit of Python's memory for parsing a hostile file."""


def random_artifact(folder: Path, digits: Path, processor, seed: int, precision: str, **sizes):
    torch.manual_seed(seed)
    export_onnx(random_whisper(digits, **sizes), processor, folder, precision)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory, digits, processor, module_seed) -> Path:
    """A small random model as an int8 artifact."""
    folder = tmp_path_factory.mktemp("hostile") / "artifact"
    return random_artifact(folder, digits, processor, module_seed, "int8")


@pytest.fixture(scope="module")
def other(tmp_path_factory, digits, processor, module_seed) -> Path:
    """Another artifact, with four heads instead of two."""
    folder = tmp_path_factory.mktemp("hostile") / "other"
    return random_artifact(folder, digits, processor, module_seed, "int8", heads=4, ffn=32)


@pytest.fixture
def artifact(original, tmp_path) -> Path:
    """A copy of the artifact to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def manifest(original) -> dict:
    return json.loads((original / "manifest.json").read_text())


@pytest.fixture(scope="module")
def one_clip(clips, tmp_path_factory) -> Path:
    """A manifest of one shipped clip."""
    row = json.loads(clips.read_text().splitlines()[1])
    row["audio"] = str(clips.parent / row["audio"])
    path = tmp_path_factory.mktemp("clips") / "one.jsonl"
    path.write_text(json.dumps(row))
    return path


def sign(folder: Path) -> None:
    """Update hashes and sizes in the manifest, as an attacker could."""
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))


def store(folder: Path, manifest: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, one_clip: Path) -> str:
    """Return the runner's error; `verify` must refuse the artifact too and name the same file."""
    with pytest.raises(RunnerProblem) as error:
        Recognizer(folder, threads=1)
    report = verify(folder, one_clip)
    assert report.error is not None
    assert len(str(error.value)) + len(str(report.error)) < 3000
    str(error.value).encode(), str(report.error).encode()  # both can be printed
    named = {word.strip(":,").rsplit("/")[-1] for word in str(error.value).split()}
    known = {*os.listdir(folder), "manifest.json", "encoder.onnx", "decoder.onnx", "tokens.json"}
    assert any(name in str(report.error) for name in named & known), (error.value, report.error)
    return str(error.value)


def test_the_unchanged_artifact_is_accepted(original, one_clip):
    """`verify` fails only at its last check: the gate was not run."""
    assert Recognizer(original, threads=1)
    assert [row["result"] for row in verify(original, one_clip).rows] == [*["ok"] * 4, "failed"]


# -------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "tokens.json"])
def test_truncated_files_are_refused(name, original, artifact, one_clip, rng):
    whole = (original / name).read_bytes()
    for place in rng.integers(0, len(whole) - 2, size=8):
        (artifact / name).write_bytes(whole[:place])
        assert f"{name}: damaged, {place} bytes instead of {len(whole)}" in refused(
            artifact, one_clip
        )
    sign(artifact)
    assert name in refused(artifact, one_clip)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "tokens.json"])
def test_a_flipped_bit_is_refused(name, original, artifact, one_clip, rng):
    data = bytearray((original / name).read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    (artifact / name).write_bytes(data)
    assert f"{name}: damaged, its SHA-256 is not the manifest's" in refused(artifact, one_clip)


def test_flipped_bytes_never_crash_the_graph_parser(original, tmp_path, rng):
    """With matching hashes, a flip in the structure gives an error message or is harmless."""
    whole, path = (original / "decoder.onnx").read_bytes(), tmp_path / "x.onnx"
    errors = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), size=int(rng.integers(1, 200))):
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            graph_file.read_graph(path)
        except RunnerProblem as error:
            errors += 1
            assert str(error).startswith(f"{path}: ")
    assert errors > 50


def test_random_bytes_never_crash_the_graph_parser(tmp_path, rng):
    for size in rng.integers(1, 5000, size=100):
        (tmp_path / "x.onnx").write_bytes(rng.bytes(size))
        with pytest.raises(RunnerProblem, match=r"x\.onnx: "):
            graph_file.read_graph(tmp_path / "x.onnx")


def test_flipped_graphs_never_crash_the_runner(artifact, original, rng, spoken):
    """Three flips near the end, where the nodes are: the process ends with a result or an error."""
    whole = bytearray((original / "decoder.onnx").read_bytes())
    first_node = whole.find(b"look_up/")
    for _ in range(3):
        data = bytearray(whole)
        data[first_node + int(rng.integers(8000))] ^= 1 << int(rng.integers(8))
        (artifact / "decoder.onnx").write_bytes(data)
        sign(artifact)
        done = run(artifact, spoken)
        assert done.returncode in (0, 1)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
def test_a_graph_of_another_artifact_is_refused(name, other, artifact, one_clip):
    shutil.copy(other / name, artifact / name)
    assert f"{name}: damaged" in refused(artifact, one_clip)
    sign(artifact)
    assert f"{name}: " in refused(artifact, one_clip)


def test_swapped_graphs_are_refused(artifact, one_clip):
    (artifact / "encoder.onnx").rename(artifact / "x")
    (artifact / "decoder.onnx").rename(artifact / "encoder.onnx")
    (artifact / "x").rename(artifact / "decoder.onnx")
    sign(artifact)
    assert "encoder.onnx: its" in refused(artifact, one_clip)


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx", "tokens.json"])
def test_links_are_refused(name, artifact, one_clip, tmp_path):
    (artifact / name).rename(tmp_path / "elsewhere")
    (artifact / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name}: a link" in refused(artifact, one_clip)


@pytest.mark.parametrize("name", ["manifest.json", "decoder.onnx", "tokens.json"])
def test_pipes_and_folders_are_refused_without_blocking(name, artifact, one_clip):
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    assert f"{name}: not a regular file" in refused(artifact, one_clip)
    (artifact / name).unlink()
    (artifact / name).mkdir()
    assert f"{name}: not a regular file" in refused(artifact, one_clip)


# ------------------------------------------------------------------------------- other layouts

OTHERS = ("transformers", "sherpa", "single")
HEAVY = ("transformers", "sherpa")
"""Layouts whose runtime imports transformers: 5 s of CPU time for each process of `verify`."""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, digits, processor, module_seed) -> Path:
    """Folders of int8 artifacts in the other layouts; `wide` has those of a wider model."""
    root = tmp_path_factory.mktemp("layouts")
    for place, d_model in ((root, 32), (root / "wide", 64)):
        torch.manual_seed(module_seed)
        model = random_whisper(digits, d_model=d_model)
        for layout in OTHERS:
            export_onnx(model, processor, place / layout, "int8", layout=layout)
    return root


def why_not(folder: Path, one_clip: Path, check: str) -> str:
    """Return the error message of `verify`, which must come from the given check."""
    report = verify(folder, one_clip, threads=1)
    assert report.error is not None
    assert [row["check"] for row in report.rows if row["result"] == "failed"] == [check]
    assert len(str(report.error)) < 1500
    assert report.error.hint
    return str(report.error)


def graphs_in(folder: Path, layout: str) -> list[Path]:
    return [folder / name for name in graph_files(layout, "int8").values()]


@pytest.mark.parametrize(
    "layout", ["single", *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]
)
def test_unchanged_artifacts_of_other_layouts_are_accepted(layout, layouts, one_clip):
    """`verify` fails only because the gate was not run."""
    assert "has passed no gate" in why_not(layouts / layout, one_clip, "gate")


@pytest.mark.parametrize("layout", OTHERS)
def test_truncated_files_of_other_layouts_are_refused(layout, layouts, one_clip, tmp_path, rng):
    """Every file without, then graphs and their weights with, matching hashes."""
    names = needed_files(layout, "int8")
    folder = Path(shutil.copytree(layouts / layout, tmp_path / layout))
    for name in names:
        whole = (folder / name).read_bytes()
        place = int(rng.integers(0, len(whole) - 2))
        (folder / name).write_bytes(whole[:place])
        found = why_not(folder, one_clip, "files")
        assert f"{name}: damaged, {place} bytes instead of {len(whole)}" in found
        if ".onnx" in name:
            sign(folder)
            assert name.rsplit("/")[-1] in why_not(folder, one_clip, "graphs")
        (folder / name).write_bytes(whole)
        sign(folder)


@pytest.mark.slow
@pytest.mark.parametrize("layout", HEAVY)
def test_other_layouts_refuse_an_encoder_of_another_export(layout, layouts, one_clip, tmp_path):
    folder = Path(shutil.copytree(layouts / layout, tmp_path / layout))
    encoder = graphs_in(folder, layout)[0]
    shutil.copy(graphs_in(layouts / "wide" / layout, layout)[0], encoder)
    sign(folder)
    assert f"{encoder}: " in why_not(folder, one_clip, "contract")


@pytest.mark.slow
@pytest.mark.parametrize("layout", HEAVY)
def test_swapped_graphs_are_refused_in_other_layouts(layout, layouts, one_clip, tmp_path):
    folder = Path(shutil.copytree(layouts / layout, tmp_path / layout))
    first, second = graphs_in(folder, layout)[-2:]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    sign(folder)
    assert f"{first}: its" in why_not(folder, one_clip, "contract")


@pytest.mark.slow
def test_unmerged_decoders_of_another_model_are_refused(
    layouts, digits, processor, one_clip, tmp_path
):
    """Shapes are the same and weights differ: only the outputs reveal it."""
    other = tmp_path / "other"
    export_onnx(random_whisper(digits), processor, other, "int8", layout="transformers")
    folder = Path(shutil.copytree(layouts / "transformers", tmp_path / "mixed"))
    weights = "decoder_model_merged_quantized.onnx_data"
    shutil.copy(other / "onnx" / weights, folder / "onnx/else.onnx_data")
    for path in graphs_in(folder, "transformers")[2:]:
        found = onnx.load(other / "onnx" / path.name, load_external_data=False)
        for tensor in found.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entry.value.replace(weights, "else.onnx_data")
        onnx.save(found, path)
    sign(folder)
    found = why_not(folder, one_clip, "contract")
    assert (
        "decoder_model_quantized.onnx: it and decoder_with_past_model_quantized.onnx choose"
        in found
    )


ODD_FILES = [
    ("transformers", "config.json", '"encoder_attention_heads": 2', '"encoder_attention_heads": 0'),
    ("transformers", "config.json", '"decoder_layers": 2', '"decoder_layers": 3'),
    ("transformers", "tokenizer.json", '"model"', '"mode"'),
    ("transformers", "preprocessor_config.json", '"hop_length": 160', '"hop_length": 0'),
    ("sherpa", "whisper-tokens.txt", " 10\n", " 10 10\n"),
    ("single", "tokens.json", '"bytes"', '"byte"'),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name", "old", "new"), ODD_FILES, ids=[f"{row[1]}-{row[3]}" for row in ODD_FILES]
)
def test_malformed_companion_files_of_other_layouts_are_refused(
    layout, name, old, new, layouts, one_clip, tmp_path
):
    folder = Path(shutil.copytree(layouts / layout, tmp_path / layout))
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    sign(folder)
    assert name in why_not(folder, one_clip, "contract")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "n_text_state",
            "1000000000000",
            r"a cache of \[2, \d+, 1000000000000\], the decoder takes",
        ),
        ("n_text_layer", "two", "ValueError: invalid literal"),
        ("no_speech", None, "its metadata has no no_speech"),
    ],
)
def test_absurd_metadata_of_sherpas_encoder_is_refused(
    key, value, message, layouts, one_clip, tmp_path
):
    folder = Path(shutil.copytree(layouts / "sherpa", tmp_path / "sherpa"))
    path = folder / "whisper-encoder.int8.onnx"
    graph = onnx.load(path)
    told = {p.key: p.value for p in graph.metadata_props} | {key: value}
    onnx.helper.set_model_props(graph, {k: v for k, v in told.items() if v is not None})
    onnx.save(graph, path)
    sign(folder)
    assert re.search(f"{path}: .*{message}", why_not(folder, one_clip, "contract"))


@pytest.mark.parametrize("layout", OTHERS)
def test_absurd_manifests_of_other_layouts_are_refused(layout, layouts, one_clip, tmp_path):
    whole = json.loads((layouts / layout / "manifest.json").read_text())
    graph = next(iter(whole["contract"]))
    for where, value, message in (
        ("audio.window_samples", 10**12, "a whole number from 1 to 960000"),
        ("decoding.max_new_tokens", 10**9, "a whole number from 0 to"),
        ("decoding.prompt", [], "it is empty"),
        ("decoding.eos", None, "a whole number"),
        ("contract", {}, f"contract.{graph} is missing"),
        (f"contract.{graph}.inputs.0.shape", [10**5, 10**5], "takes 40000000000 bytes"),
        ("files", {"../secret": {"sha256": "0" * 64, "bytes": 1}}, "outside the artifact"),
        ("layers.encoder.0.self_attn.heads", 0, "a whole number"),
    ):
        store(tmp_path, changed(whole, where, value))
        found = why_not(tmp_path, one_clip, "manifest")
        assert found.startswith(f"{tmp_path / 'manifest.json'}: ")
        assert message in found


# ----------------------------------------------------------------------------------- the manifest

TEXTS = [
    pytest.param(b"\xff\xfe{}", "'utf-8' codec can't decode", id="not-utf-8"),
    pytest.param(b"[" * 200_000, "nested too deeply", id="deep-lists"),
    pytest.param(b'{"a":' * 200_000, "nested too deeply", id="deep-objects"),
    pytest.param(b'{"format": NaN}', "NaN is not a JSON number", id="nan"),
    pytest.param(b'{"format": ' + b"9" * 5000 + b"}", "digits", id="long-number"),
    pytest.param(b" " * (8 * 2**20 + 1), "8388609 bytes; the limit is 8388608", id="large"),
    pytest.param(b"", "cannot be read", id="empty"),
    pytest.param(b"\0" * 1000, "cannot be read", id="zeros"),
    pytest.param(b'{"format": 2, "target": "tflite"}', "for 'tflite'", id="other-target"),
    pytest.param(b'{"format": true, "target": "onnx"}', "format True", id="format-true"),
    pytest.param(b'{"format": 2, "target": "onnx"}', "files is missing", id="nothing-else"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_a_file_that_is_not_a_manifest_is_refused(text, message, artifact, one_clip):
    (artifact / "manifest.json").write_bytes(text)
    assert message in refused(artifact, one_clip)


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"bytes": {"a": 1}}', b'{"bytes": [1]}', b'{"bytes": ["?"]}', b"[]"]
)
def test_a_malformed_token_table_is_refused(text, tmp_path):
    (tmp_path / "tokens.json").write_bytes(text)
    with pytest.raises(RunnerProblem, match=r"tokens\.json"):
        read_tokens(tmp_path / "tokens.json")


ABSURD = [
    ("audio.window_samples", -1, "a whole number from 1 to 960000"),
    ("audio.window_samples", 10**12, "a whole number from 1 to 960000"),
    ("audio.window_samples", "96000", "a whole number"),
    ("audio.windows_samples", [], "must ascend"),
    ("audio.windows_samples", [96000, 32000], "must ascend"),
    ("audio.windows_samples", [32001, 96000], "not a multiple of 320"),
    ("audio.windows_samples", [-320, 96000], "a whole number"),
    ("audio.windows_samples", [320] * 10**5, "a list of at most 64"),
    ("audio.hop_samples", 0, "a whole number"),
    ("audio.sampling_rate", 8000, "not 16000"),
    ("decoding.max_new_tokens", 10**9, "a whole number from 0 to"),
    ("decoding.max_new_tokens", -1, "a whole number from 0 to"),
    ("decoding.prompt", [], "it is empty"),
    ("decoding.prompt", [10**9], "a whole number from 0 to"),
    ("decoding.prompt", [1] * 1000, "a list of at most"),
    ("decoding.eos", None, "a whole number"),
    ("decoding.suppress_tokens", {"a": 1}, "a list"),
    ("decoding.suppress_tokens", [-1], "a whole number"),
    ("decoding.timestamp_begin", -5, "a whole number"),
    ("contract.encoder.inputs", None, "a list"),
    ("contract.decoder.outputs.0.shape", [1, 1, 10**15], "a whole number from 1 to"),
    ("contract.decoder.outputs.0.shape", [1, 10**5, 10**5], "takes 40000000000 bytes"),
    ("contract.decoder.outputs.0.dtype", "string", "not one of float32"),
    ("contract.decoder.inputs.2.shape", [1, 2, 3, 4], "and it gets"),
    ("contract.decoder.inputs.4.dtype", "float32", "and it gets"),
    ("files", {"../secret": {"sha256": "0" * 64, "bytes": 1}}, "outside the artifact"),
    ("files", {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}, "outside the artifact"),
    ("files", {"C:\\x": {"sha256": "0" * 64, "bytes": 1}}, "outside the artifact"),
    ("files", {"a\0b": {"sha256": "0" * 64, "bytes": 1}}, "outside the artifact"),
    ("files", {"a": {"sha256": "x", "bytes": 1}}, "64 hexadecimal digits"),
    ("files", {"\ud800": {"sha256": 1, "bytes": -1}}, "a whole number"),
    ("files", {}, "does not list encoder.onnx"),
    ("parameters", -1, "a whole number"),
    ("macs", {"x\ny" * 1000: -1}, "a whole number"),
    ("layers.encoder.0.self_attn.heads", 0, "a whole number"),
    ("layers.decoder.0.encoder_attn", None, "an object"),
    ("gate", [], "not an object"),
    ("layout", "sherpa", "the layout is 'sherpa'"),
]


def changed(manifest: dict, where: str, value: object) -> dict:
    """Return a copy with another value in one place."""
    found = deepcopy(manifest)
    place, *keys = found, *where.split(".")
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(keys[-1]) if isinstance(place, list) else keys[-1]] = value
    return found


@pytest.mark.parametrize(
    ("where", "value", "message"), ABSURD, ids=[f"{i}-{row[0]}" for i, row in enumerate(ABSURD)]
)
def test_absurd_metadata_is_refused(where, value, message, manifest, tmp_path):
    store(tmp_path, changed(manifest, where, value))
    with pytest.raises(RunnerProblem) as error:
        contract.read_manifest(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'manifest.json'}: ")
    assert message in str(error.value)
    assert len(str(error.value)) < 700
    str(error.value).encode()
    assert error.value.hint


def places(value: object, where: str = "") -> list[str]:
    """Yield every path in a manifest, including whole objects and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, held in inner:
        found.append(f"{where}{key}")
        if isinstance(held, dict | list):
            found += places(held, f"{where}{key}.")
    return [place for place in found if "." not in str(key) or place]


WRONG = [None, True, -1, 10**12, 10**40, 1.5, "", "x" * 10**5, "\ud800", [], {}, [[]], {"": {}}]


def test_wrong_values_anywhere_give_an_error_message_at_most(manifest, tmp_path, rng):
    """Values that the runner computes with always have the right type."""
    told = {
        key: manifest[key] for key in manifest if key not in ("files", "provenance", "versions")
    }
    drawn = rng.choice(sorted(places({**told, "files": {}})), size=250)
    refusals = 0
    for where in drawn:
        value = WRONG[rng.integers(len(WRONG))]
        store(tmp_path, changed(manifest, str(where), value))
        try:
            found = contract.read_manifest(tmp_path)
        except RunnerProblem as error:
            refusals += 1
            str(error).encode()
            assert len(str(error)) < 700
        else:
            assert type(found["audio"]["window_samples"]) is int
            assert type(found["decoding"]["max_new_tokens"]) is int
    assert refusals > 120


def test_missing_fields_are_named(manifest, tmp_path):
    for where in ("audio", "decoding", "contract", "contract.decoder", "decoding.eos", "files"):
        *outer, last = where.split(".")
        found = deepcopy(manifest)
        place = found
        for key in outer:
            place = place[key]
        del place[last]
        store(tmp_path, found)
        with pytest.raises(RunnerProblem, match=rf"{where} is missing"):
            contract.read_manifest(tmp_path)


def test_an_artifact_without_optional_entries_opens(manifest, artifact):
    optional = ("precision", "parameters", "macs_by_window", "layers", "provenance", "gate")
    store(artifact, {key: manifest[key] for key in manifest if key not in optional})
    assert Recognizer(artifact, threads=1)


def test_unknown_keys_are_ignored(manifest, tmp_path):
    found = changed(manifest, "news", {"of": ["a later release"]})
    found["audio"]["channels"] = 1
    store(tmp_path, found)
    assert contract.read_manifest(tmp_path) == found


# ------------------------------------------------------------------------------------- the graphs


@pytest.mark.parametrize("name", hostile_graphs.GRAPHS)
def test_dangerous_graphs_are_refused(name, artifact, one_clip):
    make, message = hostile_graphs.GRAPHS[name]
    hostile_graphs.write(artifact / "encoder.onnx", make())
    sign(artifact)
    tracemalloc.start()
    with pytest.raises(RunnerProblem, match=message) as error:
        Recognizer(artifact, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGEST_BYTES
    assert str(error.value).startswith(f"{artifact / 'encoder.onnx'}: ")
    report = verify(artifact, one_clip)
    assert report.rows[2]["result"] == "failed"
    assert str(report.error) == str(error.value)


def test_weights_in_a_link_within_the_folder_are_refused(artifact, tmp_path):
    """A linked folder leads out of the artifact, even if the manifest lists the file."""
    (tmp_path / "secret").write_bytes(b"0123")
    (artifact / "weights.bin").write_bytes(b"0123")
    hostile_graphs.write(artifact / "encoder.onnx", hostile_graphs.outside("weights.bin"))
    sign(artifact)
    graph_file.read_graph(artifact / "encoder.onnx", [artifact / "weights.bin"])
    (artifact / "weights.bin").unlink()
    (artifact / "weights.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(RunnerProblem, match=r"'weights\.bin', which is not a file of the artifact"):
        Recognizer(artifact, threads=1)


def test_loops_are_accepted_for_layouts_that_have_them(tmp_path):
    make, _ = hostile_graphs.GRAPHS["loop"]
    hostile_graphs.write(tmp_path / "x.onnx", make())
    kinds = [n.kind for n in graph_file.read_graph(tmp_path / "x.onnx", subgraphs=True).nodes]
    assert kinds == ["Identity", "Identity", "Loop"]


def test_deeply_nested_subgraphs_are_refused(tmp_path):
    hostile_graphs.write(tmp_path / "x.onnx", hostile_graphs.deep())
    with pytest.raises(RunnerProblem, match="subgraphs more than 4 deep"):
        graph_file.read_graph(tmp_path / "x.onnx", subgraphs=True)


def test_parsed_graphs_equal_those_of_onnx(original):
    import onnx

    for name in ("encoder.onnx", "decoder.onnx"):
        wanted, found = onnx.load(original / name).graph, graph_file.read_graph(original / name)
        assert [(n.name, n.kind, n.inputs, n.outputs) for n in found.nodes] == [
            (n.name, n.op_type, list(n.input), list(n.output)) for n in wanted.node
        ]
        assert {c.name: (c.dims, c.data_type, c.bytes) for c in found.constants.values()} == {
            t.name: (tuple(t.dims), t.data_type, len(t.raw_data)) for t in wanted.initializer
        }


@pytest.fixture
def spoken(clips) -> Path:
    return read_clips(clips)[1].audio


def run(artifact: Path, spoken: Path) -> subprocess.CompletedProcess:
    """`python -m runner transcribe`, as on a device."""
    work = artifact.parent
    if not (work / "runner").exists():
        shutil.copytree(RUNNER, work / "runner", ignore=shutil.ignore_patterns("__pycache__"))
        soundfile.write(work / "a.wav", soundfile.read(spoken)[0], 16_000)
    return subprocess.run(
        [sys.executable, "-m", "runner", "transcribe", artifact.name, "a.wav", "--threads", "1"],
        cwd=work,
        env={},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_graph_that_allocates_too_much_at_run_time_is_refused(artifact, one_clip, spoken):
    """A computed shape asks for 4 GB: the process hits its memory limit and reports it."""
    hostile_graphs.greedy_for_memory(artifact / "encoder.onnx")
    sign(artifact)
    done = run(artifact, spoken)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "encoder.onnx: the graph cannot be run" in json.loads(done.stdout)["error"]
    report = verify(artifact, one_clip)
    assert [row["result"] for row in report.rows] == [*["ok"] * 3, "failed", "not reached"]
    assert "encoder.onnx: the graph cannot be run" in str(report.error)


def test_a_run_that_does_not_end_is_killed(original, one_clip):
    report = verify(original, one_clip, timeout_s=0.05)
    assert "did not end within 0.05 s" in str(report.error)


def test_unrelated_files_in_the_folder_are_ignored(artifact, rng):
    (artifact / "notes.txt").write_bytes(rng.bytes(100))
    assert Recognizer(artifact, threads=1).window(np.zeros(100, np.float32)) == []
