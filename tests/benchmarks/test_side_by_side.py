"""Bench on several devices at once; a failing device does not stop the others."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from fake_device import FakeDevice

from benchmarks import side_by_side
from benchmarks.bench import BenchOptions, Candidate
from benchmarks.result import STAGES
from benchmarks.side_by_side import bench_places
from benchmarks.speech.clips import read_manifest
from devices.device import DeviceProblem, Finished, Place

PATIENCE_S = 60


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, digits, processor) -> Path:
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    out = tmp_path_factory.mktemp("side") / "digits"
    export_onnx(load(digits), processor, out, "int8")
    return out


@pytest.fixture
def few(clips):
    return read_manifest(clips)[:2]


@pytest.fixture
def devices(monkeypatch) -> dict[str, FakeDevice]:
    """Fake devices that are opened by the addresses a, b and c."""
    found = {name: FakeDevice(name=name) for name in "abc"}
    monkeypatch.setattr(side_by_side, "open_device", lambda _, address, say: found[address])
    return found


def answer(_: object) -> Finished:
    stages = {stage: [0.1] for stage in STAGES} | {"end_to_end_s": [0.1, 0.1]}
    rest = {"mel_share": 0.2, "peak_rss_bytes": 1, "versions": {}, "texts": ["one", "two"]}
    return Finished(0, json.dumps(stages | rest), "")


PLACES = [Place("rpi4", name) for name in "abc"]


def test_all_devices_are_prepared_before_all_measure_at_once(artifact, few, devices, monkeypatch):
    together = threading.Barrier(3)

    def run(device, argv, *_):
        together.wait(PATIENCE_S)  # fails unless all three devices get here
        assert all(("push", "clips") in other.calls for other in devices.values())
        return answer(argv)

    monkeypatch.setattr(FakeDevice, "run", run)
    heard = []
    results, failed = bench_places(
        [Candidate(artifact)], PLACES, few, BenchOptions(2), heard.append
    )
    assert [result["device"]["name"] for result in results] == ["rpi4 a", "rpi4 b", "rpi4 c"]
    assert failed == []
    assert heard.count("rpi4 b: digits: round 2 of 2") == 1
    assert all(device.calls[-1] == ("close",) for device in devices.values())


@pytest.mark.parametrize("when", ["describe", "run"])
def test_a_device_that_fails_does_not_stop_the_others(artifact, few, devices, monkeypatch, when):
    usual = {"describe": lambda _: {"emulated": False}, "run": lambda *_: answer(None)}

    def fail(device, *words):
        if device.name in ("b", "rpi4 b"):
            raise DeviceProblem("b: it went away", "plug it in")
        return usual[when](device, *words)

    for name, act in (usual | {when: fail}).items():
        monkeypatch.setattr(FakeDevice, name, act)
    results, failed = bench_places(
        [Candidate(artifact)], PLACES, few, BenchOptions(1), lambda _: None
    )
    assert [result["device"]["name"] for result in results] == ["rpi4 a", "rpi4 c"]
    assert [str(error) for error in failed] == ["b: it went away"]
    assert all(device.calls[-1] == ("close",) for device in devices.values())


def test_ctrl_c_closes_every_device(artifact, few, devices, monkeypatch):
    """Closing a device ends its programs, like a killed process."""
    closed = threading.Event()

    def run(device, *_):
        assert closed.wait(PATIENCE_S)
        raise DeviceProblem(f"{device.name}: it was closed")

    def close(device):
        device.calls.append(("close",))
        closed.set()

    def interrupted(futures):
        for _ in futures:
            raise KeyboardInterrupt

    gather = side_by_side.gather
    later = iter([gather, interrupted])
    monkeypatch.setattr(FakeDevice, "run", run)
    monkeypatch.setattr(FakeDevice, "close", close)
    monkeypatch.setattr(side_by_side, "gather", lambda futures: next(later)(futures))
    with pytest.raises(KeyboardInterrupt):
        bench_places([Candidate(artifact)], PLACES, few, BenchOptions(1), lambda _: None)
    assert all(device.calls[-1] == ("close",) for device in devices.values())


def test_ctrl_c_closes_a_device_that_is_being_opened(artifact, few, monkeypatch):
    late, opening, given_up = FakeDevice(), threading.Event(), threading.Event()

    def open_late(*_):
        opening.set()
        assert given_up.wait(PATIENCE_S)
        return late

    def interrupted(_):
        assert opening.wait(PATIENCE_S)
        threading.Timer(0.2, given_up.set).start()  # usually after the devices were closed
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side, "open_device", open_late)
    monkeypatch.setattr(side_by_side, "gather", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_places([Candidate(artifact)], PLACES[:1], few, BenchOptions(1), lambda _: None)
    assert late.calls == [("close",)]


def test_two_devices_of_one_profile_have_different_names(artifact, few, monkeypatch):
    monkeypatch.setattr(FakeDevice, "run", lambda *_: answer(None))
    monkeypatch.setattr(side_by_side, "open_device", lambda *_: FakeDevice(name="rpi4"))
    rest = ([Candidate(artifact)], PLACES[:2], few, BenchOptions(1), lambda _: None)
    results, _ = bench_places(*rest)
    assert [result["device"]["name"] for result in results] == ["rpi4 a", "rpi4 b"]
