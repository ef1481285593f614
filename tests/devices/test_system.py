"""A fully emulated AArch64 computer over SSH, with realistic memory use (make test-devices)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import emulated_computer
import pytest
import sshd

from benchmarks.aarch64 import __main__ as command
from benchmarks.bench import BenchOptions, bench
from benchmarks.result import brief_rows
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.wav import write_clips
from devices import connection
from devices.device import RUNNER, Device, DeviceProblem, open_device, run_runner

MISSING = [
    package
    for tool, package in emulated_computer.TOOLS.items()
    if not which(tool, path=emulated_computer.SBIN)
]
pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {' '.join(MISSING)}; make test-devices"),
]

PLACE = command.PLACE / "system"
BOOTS = 2
SPREAD = 1.2
"""Pages of mapped files count as well, and depend on what the kernel has read ahead: three boots of
a busy machine differed by 7 %."""
CORES = 2
MEMORY_BYTES = 1 << 30
GROWTH = """
import re, sys
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
block = b"x" * int(sys.argv[1])
print(peak() - before)
"""
SWITCH_OFF = "open('/proc/sysrq-trigger', 'w').write('b'); input()"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, digits, processor) -> Path:
    """An int8 artifact, which is twice as fast as fp32 in an emulator."""
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    out = tmp_path_factory.mktemp("exported") / "int8"
    export_onnx(load(digits), processor, out, "int8")
    return out


@pytest.fixture
def few(clips) -> list[Clip]:
    """One short clip: what takes a moment here takes minutes there."""
    return sorted(read_manifest(clips), key=lambda clip: len(clip.pcm()))[2:3]


@contextmanager
def computer(monkeypatch) -> Iterator[Device]:
    """A freshly booted computer."""
    emulated_computer.build(PLACE)
    port = sshd.free_port()
    with emulated_computer.booted(PLACE, port, "cortex-a72", MEMORY_BYTES, CORES):
        monkeypatch.setenv(connection.CONFIG, str(emulated_computer.ssh_config(PLACE, port)))
        with open_device("rpi4", "computer") as device:
            yield device


def test_peak_memory_is_reproducible_across_boots(artifact, few, monkeypatch):
    peaks = []
    for _ in range(BOOTS):
        with computer(monkeypatch) as device:
            # in a second process all files are cached, so more pages are mapped at once
            result = bench(artifact, device, few, BenchOptions(2, 1))
        peaks.append(result["peak_rss_bytes"])
        assert result["emulated"] is True
        assert result["device"]["model"] == "linux,dummy-virt"
        assert result["device"]["governor"] == "unavailable"
        (row,) = brief_rows([result])
        assert {row[title] for title in row if title.endswith(" ms")} == {"-"}
    print("peaks in bytes:", peaks)
    assert max(peaks) <= SPREAD * min(peaks)


def test_memory_limits_apply_and_tokens_are_the_same(artifact, few, tmp_path, monkeypatch):
    wanted = 200 << 20
    write_clips(few, tmp_path)
    with computer(monkeypatch) as there:
        grown = int(there.run([there.python, "-c", GROWTH, str(wanted)]).stdout)
        assert grown == pytest.approx(wanted, rel=0.01)
        with open_device("local") as here:
            assert tokens(there, artifact, tmp_path) == tokens(here, artifact, tmp_path)
        # more than its memory: the kernel kills the program
        done = there.run([there.python, "-c", GROWTH, str(2 * MEMORY_BYTES)])
        assert done.exit_code == -9 or "MemoryError" in done.stderr
        with pytest.raises(DeviceProblem, match="computer: "):
            there.run([there.python, "-c", SWITCH_OFF])


def tokens(device: Device, artifact: Path, clips: Path) -> list[list[list[int]]]:
    for local, remote in ((RUNNER, "runner"), (artifact, "artifact"), (clips, "clips")):
        device.push(local, remote)
    found = run_runner(device, ["check", "artifact", "clips/clips.json", "--threads", "1"])
    answer: list[list[list[int]]] = found["tokens"]
    assert all(any(clip) for clip in answer)
    return answer
