"""A simulated Raspberry Pi 4 over SSH (make test-devices).

Only its sshd is real. Its python3 is an AArch64 program in qemu-user with a Pi's /proc and /sys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd

from benchmarks.aarch64 import __main__ as command
from benchmarks.aarch64 import machine
from benchmarks.bench import BenchOptions, bench
from benchmarks.result import brief_rows
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.wav import write_clips
from devices import connection
from devices.device import RUNNER, Device, open_device, run_runner

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(not sshd.EXISTS, reason=sshd.MISSING),
]

CPU = "cortex-a72"
MODEL = "Raspberry Pi 4 Model B Rev 1.4"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[sshd.Server]:
    machine.build(command.PLACE)
    root, seen = command.PLACE / "root", tmp_path_factory.mktemp("pi") / "seen"
    machine.describe(root, CPU, seen)
    board = seen / "proc/device-tree/model"
    board.parent.mkdir(exist_ok=True)
    board.write_bytes(f"{MODEL}\0".encode())
    found = sshd.Server(tmp_path_factory.mktemp("sshd"))
    python = str(root / f"usr/bin/python{machine.PYTHON}")
    found.script(":", ["/usr/bin/qemu-aarch64", "-cpu", CPU, "-L", str(seen), python])
    yield found
    found.stop()


@pytest.fixture
def few(clips) -> list[Clip]:
    return read_manifest(clips)[:2]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, digits, processor) -> Path:
    """An int8 artifact, which is twice as fast as fp32 in an emulator."""
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    out = tmp_path_factory.mktemp("exported") / "int8"
    export_onnx(load(digits), processor, out, "int8")
    return out


@pytest.fixture(autouse=True)
def configured(server, monkeypatch) -> None:
    monkeypatch.setenv(connection.CONFIG, str(server.config))


def test_an_emulated_pi_is_described_without_timings(artifact, few):
    with open_device("rpi4", "pi") as device:
        result = bench(artifact, device, few, BenchOptions(1, 1))
    assert result["device"]["model"] == MODEL
    assert result["device"]["architecture"] == "aarch64"
    assert result["device"]["isa"] == ["asimd"]
    assert result["emulated"] is True
    assert result["peak_rss_bytes"] == "unavailable"
    (row,) = brief_rows([result])
    assert {row[title] for title in row if title.endswith(" ms")} == {"-"}


def test_the_same_clips_give_the_same_tokens_there_and_here(artifact, few, tmp_path):
    write_clips(few, tmp_path)
    there, here = (
        tokens(*names, artifact, tmp_path) for names in (("rpi4", "pi"), ("local", None))
    )
    assert there == here
    assert all(any(clip) for clip in here)


def tokens(name: str, host: str | None, artifact: Path, clips: Path) -> list[list[list[int]]]:
    with open_device(name, host) as device:
        push_all(device, artifact, clips)
        found = run_runner(device, ["check", "artifact", "clips/clips.json", "--threads", "1"])
    answer: list[list[list[int]]] = found["tokens"]
    return answer


def push_all(device: Device, artifact: Path, clips: Path) -> None:
    for local, remote in ((RUNNER, "runner"), (artifact, "artifact"), (clips, "clips")):
        device.push(local, remote)
