"""Damaged, truncated and manipulated artifacts are refused with the name of the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.artifact import read_manifest, verify, write_manifest
from export.files import links_outside, stays_inside
from export.layouts import LAYOUTS
from export.problem import Problem

GRAPHS = LAYOUTS["native"].files


@pytest.fixture
def artifact(tmp_path, rng):
    """A folder with random files in place of graphs, and its manifest."""
    directory = tmp_path / "artifact"
    directory.mkdir()
    for name in (*GRAPHS, "config.json"):
        (directory / name).write_bytes(rng.bytes(1000))
    write_manifest(directory, {"target": "onnx", "gate": None})
    return directory


def rewrite(artifact, change):
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_manifest_comes_back_as_it_was_written(artifact):
    manifest = {"target": "onnx", "gate": {"exact": True}, "provenance": {"name": "Ümläut 数字"}}
    write_manifest(artifact, manifest)
    assert read_manifest(artifact) == verify(artifact) == manifest
    assert manifest["format"] == 2


def test_every_file_is_listed_and_the_manifest_itself_is_not(artifact):
    write_manifest(artifact, {})  # writing it again must not list the old one
    assert verify(artifact)["files"].keys() == {*GRAPHS, "config.json"}
    assert {path.name for path in artifact.iterdir()} == {*GRAPHS, "config.json", "manifest.json"}


def test_the_manifest_lists_sizes_and_hashes(artifact):
    (artifact / "config.json").write_bytes(b"abc")
    write_manifest(artifact, {})
    assert verify(artifact)["files"]["config.json"] == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "bytes": 3,
    }


@pytest.mark.parametrize("name", [*GRAPHS, "config.json"])
def test_a_changed_byte_names_the_file(name, artifact, rng):
    data = bytearray((artifact / name).read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    (artifact / name).write_bytes(data)
    with pytest.raises(Problem, match=f"{name}: damaged, its SHA-256 is not") as problem:
        verify(artifact)
    assert "copy the whole folder again" in problem.value.hint


def test_a_truncated_file_is_named_with_both_sizes(artifact):
    (artifact / "encoder.onnx").write_bytes(b"0" * 999)
    with pytest.raises(Problem, match=r"encoder.onnx: damaged, 999 bytes instead of 1000"):
        verify(artifact)


def test_a_missing_file_is_named(artifact):
    (artifact / "decoder.onnx").unlink()
    with pytest.raises(Problem, match=r"decoder.onnx: missing from the artifact"):
        verify(artifact)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(Problem, match="no artifact here") as problem:
        read_manifest(tmp_path)
    assert "edgewhisper export" in problem.value.hint
    with pytest.raises(Problem, match=r"no artifact here \(there is no such directory\)"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(Problem, match=r"no artifact here \(it is a checkpoint\)"):
        read_manifest(tmp_path)


def test_a_truncated_manifest_is_refused(artifact, rng):
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text[: rng.integers(len(text) - 2)])
    with pytest.raises(Problem, match=r"manifest.json: damaged, not JSON"):
        read_manifest(artifact)


def test_a_manifest_that_is_not_text_is_refused(artifact):
    (artifact / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Problem, match=r"manifest.json: damaged, not JSON"):
        read_manifest(artifact)


@pytest.mark.parametrize("version", [1, 4, 0, "1", 1.5, True, None], ids=repr)
def test_an_unknown_format_is_refused(version, artifact):
    rewrite(artifact, lambda manifest: manifest.update(format=version))
    with pytest.raises(Problem, match=r"format .*; this version reads formats 2 and 3"):
        read_manifest(artifact)


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "{}"])
def test_json_that_is_not_a_manifest_is_refused(content, artifact):
    (artifact / "manifest.json").write_text(content)
    with pytest.raises(Problem, match="format None"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../b",
        "..\\secret",
        "C:\\x",
        "C:x",
        "\\\\host\\x",
        "",
        "a\0b",
    ],
)
def test_file_names_outside_the_folder_are_refused(name, artifact):
    entry = {"sha256": "0", "bytes": 1}
    rewrite(artifact, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(Problem, match="outside the artifact"):
        read_manifest(artifact)


def test_a_link_out_of_the_folder_is_refused(artifact, tmp_path):
    original = artifact / "tokens.json"
    original.rename(tmp_path / "elsewhere.json")
    original.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(Problem, match=r"tokens.json: a link"):
        verify(artifact)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_manifest_must_list_what_inference_needs(name, artifact):
    rewrite(artifact, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(Problem, match=f"does not list {name}"):
        read_manifest(artifact)


@pytest.mark.parametrize("entry", [None, {}, {"sha256": "0"}, "x"], ids=repr)
def test_an_entry_without_hash_and_size_is_refused(entry, artifact):
    rewrite(artifact, lambda manifest: manifest["files"].update({"encoder.onnx": entry}))
    with pytest.raises(Problem, match=r"no hash and size for encoder.onnx"):
        read_manifest(artifact)


def test_a_manifest_without_files_is_refused(artifact):
    rewrite(artifact, lambda manifest: manifest.pop("files"))
    with pytest.raises(Problem, match="it lists no files"):
        read_manifest(artifact)


def test_values_outside_json_are_never_written(artifact):
    before = (artifact / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(artifact, {"gate": {"wer": float("nan")}})
    assert (artifact / "manifest.json").read_bytes() == before


def test_on_a_full_disk_the_old_manifest_is_kept(artifact, full_disk):
    names, before = sorted(artifact.iterdir()), read_manifest(artifact)
    with pytest.raises(Problem, match=r"manifest\.json cannot be written"):
        write_manifest(artifact, {"note": "x" * 400_000})
    assert read_manifest(artifact) == before
    assert sorted(artifact.iterdir()) == names


def test_reading_an_artifact_imports_the_standard_library_only():
    code = "import sys, export.artifact; print(sorted({'torch', 'numpy', 'onnx'} & {*sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# ------------------------------------------------------------------------------- the hub's cache


def as_the_hub_leaves_it(artifact: Path, folder: Path) -> Path:
    """Return a copy in the form of a hub cache: a snapshot whose files are links to blobs."""
    model = folder / "models--me--small"
    (model / "blobs").mkdir(parents=True)
    snapshot = model / "snapshots/abc"
    for path in [p for p in artifact.rglob("*") if p.is_file()]:
        name = path.relative_to(artifact)
        blob = model / "blobs" / f"{len(list((model / 'blobs').iterdir())):040x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_artifact_in_the_hub_cache_is_read(
    precision, digits, processor, tmp_path, clips, monkeypatch
):
    from benchmarks.speech.clips import read_manifest as read_clips
    from devices.runner.recognizer import Recognizer
    from edgewhisper.verify import verify as whole
    from edgewhisper.whisper import load
    from export.onnx import save, to_onnx

    monkeypatch.setattr(save, "LARGE", 10_000)  # so that weights are stored in files of their own
    to_onnx.export_onnx(load(digits), processor, tmp_path / "artifact", precision)
    snapshot = as_the_hub_leaves_it(tmp_path / "artifact", tmp_path)
    pcm = read_clips(clips)[0].pcm()
    texts = [Recognizer(place).transcribe(pcm).text for place in (snapshot, tmp_path / "artifact")]
    assert texts[0] == texts[1] != ""
    assert verify(snapshot) == verify(tmp_path / "artifact")
    (tmp_path / "linked").symlink_to(snapshot)
    assert Recognizer(tmp_path / "linked").transcribe(pcm).text == texts[0]
    assert whole(str(snapshot)) is not None


@pytest.mark.parametrize("target", ["outside", "../../blobs/../secret", "/etc/hostname", "gone"])
@pytest.mark.parametrize("name", ["manifest.json", "tokens.json", "encoder.onnx"])
def test_a_link_out_of_the_hub_cache_is_refused_by_name(exported, tmp_path, target, name):
    from devices.runner.artifact.files import links_outside as on_devices
    from devices.runner.problem import RunnerProblem
    from devices.runner.recognizer import Recognizer

    snapshot = as_the_hub_leaves_it(exported, tmp_path)
    for secret in (snapshot / "outside", snapshot.parents[1] / "secret"):
        secret.write_bytes((exported / name).read_bytes())
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(target)
    assert links_outside(snapshot / name) and on_devices(snapshot / name)
    with pytest.raises(RunnerProblem, match=name):
        Recognizer(snapshot)
    with pytest.raises(Problem, match=name):
        verify(snapshot)


@given(st.text(alphabet="ab./\\:\0", max_size=8))
def test_the_devices_copy_of_the_path_check_gives_the_same_answer(name):
    from devices.runner.artifact.files import stays_inside as on_devices

    assert stays_inside(name) == on_devices(name)
