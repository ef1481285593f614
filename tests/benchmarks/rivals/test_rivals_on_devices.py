"""Rivals benched with artifacts, on this machine and over SSH.

A fake engine replaces sherpa-onnx; the real engines are tested if they are installed.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import sshd
from fake_device import FakeDevice
from installed_rivals import needs_rivals
from some_clips import manifest_of_some
from waiting import wait_until
from wheels_for_pip import make_wheel, raised

from benchmarks import bench as benching
from benchmarks.bench import BenchOptions, Candidate, bench_all
from benchmarks.candidates import in_own_form
from benchmarks.result import RATIO, other_texts, read, table_rows
from benchmarks.rivals import engines
from benchmarks.rivals.engines import ENGINES, RIVALS
from benchmarks.speech.clips import read_manifest
from devices.device import Packages, open_device
from devices.ssh import SshDevice
from devices.wheels import Target
from edgewhisper import pipeline, runs, shipped
from export.problem import Problem

real_ssh = pytest.mark.skipif(not sshd.EXISTS, reason=sshd.MISSING)

ENGINE = """
from types import SimpleNamespace

class OfflineRecognizer:
    @classmethod
    def from_whisper(cls, encoder, decoder, tokens, **options):
        assert all(open(path, "rb").read(1) for path in (encoder, decoder, tokens))
        return cls()

    def create_stream(self):
        stream = SimpleNamespace()
        stream.accept_waveform = lambda rate, pcm: setattr(stream, "heard", len(pcm))
        return stream

    def decode_stream(self, stream):
        stream.result = SimpleNamespace(tokens=["x"], text=f" {stream.heard} samples ")
"""
"""A fake sherpa-onnx whose text is the number of samples."""

STEPS_ASIDE = """
import os, sys
here = os.path.dirname(os.path.dirname(__file__))
sys.path.remove(here)
del sys.modules["numpy"]
import numpy
sys.path.insert(0, here)
"""
"""A one-line numpy that loads the next numpy on the path."""


@pytest.fixture
def few(clips, tmp_path) -> Path:
    """A manifest of two clips."""
    return manifest_of_some(clips, slice(0, 10, 5), tmp_path)


def heard(manifest: Path) -> list[str]:
    """Return the fake engine's texts of the clips."""
    return [f"{len(clip.pcm())} samples" for clip in read_manifest(manifest)]


@pytest.fixture(scope="module")
def sherpa(digits, tmp_path_factory) -> Candidate:
    """The embedded model converted for sherpa-onnx."""
    folder = tmp_path_factory.mktemp("forms")
    return in_own_form(Candidate(digits, "sherpa-onnx"), folder, lambda text: None)


def make_engine(folder: Path) -> None:
    pins = dict(pin.split("==") for pin in ENGINES["sherpa-onnx"].packages.requirements)
    make_wheel(folder, "sherpa_onnx", pins["sherpa-onnx"], ENGINE)
    make_wheel(folder, "numpy", pins["numpy"], STEPS_ASIDE)


# ---------------------------------------------------------------------------------------- over SSH


@real_ssh
def test_a_rival_is_pushed_once_and_takes_turns(server, index, exported, sherpa, few):
    make_engine(index)
    progress: list[str] = []
    with open_device("rpi", "pi", progress.append) as device:
        both = [sherpa, Candidate(exported)]
        results = bench_all(both, device, read_manifest(few), BenchOptions(2, 1), progress.append)
    rival, ours = results
    assert rival["texts"] == heard(few) != ours["texts"]
    assert rival["name"] == "whisper-digits (sherpa-onnx)"
    assert rival["device"]["name"] == ours["device"]["name"] == "rpi"
    assert rival["clips_hash"] == ours["clips_hash"]
    assert rival["parameters"] == ours["parameters"]
    assert rival["artifact_bytes"] == sum(path.stat().st_size for path in sherpa.form.iterdir())
    assert "pi lacks sherpa-onnx and numpy: downloading wheels for" in progress[0]
    turns = [line for line in progress if "round" in line]
    assert [line.endswith(f"round {n} of 2") for n, line in zip((1, 1, 2, 2), turns, strict=True)]
    assert [line.startswith("whisper-digits") for line in turns] == [True, False] * 2

    shutil.rmtree(index)
    with open_device("rpi", "pi", progress.append) as device:
        again = benching.prepare([sherpa], device, read_manifest(few), BenchOptions(1, 1))
        assert device.sent_bytes == again.places[0].sent_bytes == 0
        assert benching.run_round(again, 0)["texts"] == heard(few)
    assert len([line for line in progress if "lacks" in line]) == 1


@real_ssh
def test_a_rival_without_a_wheel_is_refused(server, index, sherpa, few):
    index.mkdir()
    with open_device("rpi", "pi") as device:
        found = raised(lambda: bench_all([sherpa], device, read_manifest(few), BenchOptions(1, 1)))
        assert "no wheels of sherpa-onnx and numpy for Python 3." in str(found)
        assert "No matching distribution found for sherpa-onnx" in str(found)
        assert found.hint.endswith("or leave sherpa-onnx out there")
        broken = "raise ImportError('libfoo.so')"
        make_engine(index)
        (wheel,) = index.glob("sherpa*")
        make_wheel(index, "sherpa_onnx", wheel.name.split("-")[1], broken)
        found = raised(lambda: bench_all([sherpa], device, read_manifest(few), BenchOptions(1, 1)))
        assert "sherpa-onnx and numpy were copied but cannot be imported there" in str(found)
        assert "libfoo.so" in str(found)
    assert list((server.private / "runtime").iterdir()) == []


@real_ssh
def test_the_runner_cannot_import_a_rivals_packages(server, index):
    make_engine(index)
    with SshDevice("pi", "rpi") as device:
        other = device.having(ENGINES["sherpa-onnx"].packages, Path())
        code = ["python3", "-c", "import sherpa_onnx; print(sherpa_onnx.__file__)"]
        assert str(server.private / "runtime") in other.run(code).stdout
        assert "No module named 'sherpa_onnx'" in device.run(code).stderr
        where = ["python3", "-c", "import os; print(os.getcwd())"]
        assert other.run(where).stdout == device.run(where).stdout


def test_each_set_of_packages_has_its_own_runtime():
    targets = [Target((3, 13), "aarch64", 36)]
    for name in ("faster-whisper", "whisper.cpp", "sherpa-onnx"):
        targets.append(replace(targets[0], only=ENGINES[name].packages.requirements))
        assert all("==" in pin for pin in targets[-1].only)
    assert len({target.name for target in targets}) == 4
    assert ENGINES["whisper.cpp"].packages == ENGINES["whisper.cpp-f16"].packages


# ------------------------------------------------------------------------------ unsupported


def test_rivals_are_refused_on_devices_without_ssh(sherpa, digits, few):
    clips, fake = read_manifest(few), FakeDevice()
    found = raised(lambda: bench_all([sherpa], fake, clips))
    assert str(found) == "fake: sherpa-onnx==2.0.1 cannot be installed there"
    assert "over SSH" in found.hint
    assert not any(call[0] == "push" for call in fake.calls)
    with pytest.raises(Problem, match="the rival transformers runs on this machine only"):
        bench_all([Candidate(digits, "transformers")], fake, clips)


def test_a_missing_local_environment_is_reported(sherpa, digits, few, tmp_path, monkeypatch):
    monkeypatch.setenv(engines.PYTHON, str(tmp_path / "python"))
    with open_device() as device, pytest.raises(Problem, match=r"there is no .*/python") as found:
        bench_all([sherpa], device, read_manifest(few))
    assert "make rivals-env" in found.value.hint
    with pytest.raises(Problem, match="its model is written by CTranslate2's converter") as found:
        in_own_form(Candidate(digits, "faster-whisper"), tmp_path, lambda text: None)
    assert "make rivals-env" in found.value.hint


@pytest.mark.parametrize("name", RIVALS)
def test_no_rival_accepts_a_compressed_checkpoint(digits, tmp_path, name):
    slim = tmp_path / "slim"
    shutil.copytree(digits, slim)
    config = json.loads((slim / "config.json").read_text())
    (slim / "config.json").write_text(json.dumps(config | {"edgewhisper": {"format": 1}}))
    with pytest.raises(ValueError, match="individual shapes"):
        in_own_form(Candidate(slim, name), tmp_path, lambda text: None)


# ---------------------------------------------------------------------------- on this machine


@pytest.fixture
def made_environment(tmp_path, monkeypatch) -> None:
    """A rivals' environment: this interpreter with the fake engine on its path."""
    make_engine(tmp_path / "wheels")
    (wheel,) = (tmp_path / "wheels").glob("sherpa*")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{tmp_path}/site:$PYTHONPATH"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv(engines.PYTHON, str(python))


def test_bench_writes_results_of_rivals_and_artifacts(
    exported, few, made_environment, tmp_path, monkeypatch, capsys
):
    from edgewhisper.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["bench", str(exported), "--rival", "sherpa-onnx", "--repeats", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["edgewhisper", *words, "--speech", str(few)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    rival, ours = read(runs.newest("result"))
    assert (rival["rival"], ours["rival"]) == ("sherpa-onnx", None)
    assert rival["texts"] == heard(few)
    assert len(rival["end_to_end_s"]) == len(ours["end_to_end_s"]) == 4
    assert rival["versions"]["sherpa-onnx"] == ENGINES["sherpa-onnx"].packages.requirements[0][13:]
    printed = capsys.readouterr().out
    assert "(sherpa-onnx)" in printed
    assert rival["checkpoint_wer"] == 0
    assert "checkpoint_wer" not in ours
    message = f"WER {100 * rival['wer']:.1f} %, the checkpoint's 0.0 %: other texts"
    assert f"! {rival['name']} on local: {message}" in printed


def test_an_artifact_of_another_model_needs_its_checkpoint(exported, tmp_path):
    from edgewhisper.provenance import embedded_of, file_hashes

    assert embedded_of([exported]) == shipped.DEFAULT_MODEL
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    manifest = json.loads((other / "manifest.json").read_text())
    first = {"base": {"files": file_hashes(shipped.DEFAULT_MODEL), "compression": None}}
    second = {"base": {"files": {"config.json": "another"}, "compression": first}}

    def recorded(record: dict) -> list[Path]:
        (other / "manifest.json").write_text(json.dumps(manifest | {"provenance": record}))
        return [exported, other]

    assert embedded_of(recorded(second)) == shipped.DEFAULT_MODEL
    second["base"]["compression"] = None
    with pytest.raises(
        Problem, match=r"other was not made from the embedded digits model"
    ) as found:
        embedded_of(recorded(second))
    assert "--baseline" in found.value.hint
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    with pytest.raises(Problem, match="was not made from the embedded digits model"):
        embedded_of(recorded({}))


def test_closing_a_device_ends_a_rivals_process():
    with open_device() as device:
        other = device.having(Packages((), ()), Path(sys.executable))
        code = "import time; open('started', 'w'); time.sleep(60)"
        ended = []
        thread = threading.Thread(
            target=lambda: ended.append(other.run([other.python, "-c", code]).exit_code)
        )
        thread.start()
        wait_until((device.work / "started").exists)
    thread.join(30)
    assert ended == [-9]


@needs_rivals
def test_the_real_rivals_transcribe_the_clips(exported, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["faster-whisper", "whisper.cpp", "sherpa-onnx"]
    once = BenchOptions(repeats=1, threads=1)
    found = pipeline.bench(
        [exported], speech=few, options=once, rivals=names, say=lambda text: None
    )
    assert [result["rival"] for result in found.results] == [*names, None]
    texts = [clip.text for clip in read_manifest(few)]
    assert [result["texts"] for result in found.results] == [texts] * 4
    assert [result.get("checkpoint_wer") for result in found.results] == [0, 0, 0, None]
    assert [row[RATIO] != "-" for row in table_rows(found.results)[:3]] == [True] * 3
    builds = {result["rival"]: result.get("build", "") for result in found.results}
    assert builds["whisper.cpp"].startswith(("wheel: ", "built from source: "))


def test_a_checkpoint_that_is_a_candidate_is_not_run_again(digits, exported, few):
    once = BenchOptions(repeats=1, threads=1)
    candidates = [Candidate(digits, "transformers"), Candidate(exported)]
    with open_device() as device:
        ready = benching.prepare(candidates, device, read_manifest(few), once)
        assert benching.checkpoint_wers(ready) == {}
        rival, ours = benching.measure(ready)
    assert rival["checkpoint_wer"] == rival["wer"] == 0
    assert "checkpoint_wer" not in ours
    assert other_texts(rival) is None
    assert other_texts(rival | {"wer": 0.02}) is not None
