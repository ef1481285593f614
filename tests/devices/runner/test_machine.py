"""What the runner reads of its machine, its memory and its cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulated_machine import make

from devices.runner.machine import host as machine
from devices.runner.machine.host import (
    UNAVAILABLE,
    describe,
    give_back_memory,
    mapped,
    peak_rss_bytes,
    unmap_pages,
)
from devices.runner.measure import bench as measure
from devices.runner.recognizer import Recognizer

PROJECT = Path(__file__).parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


# ------------------------------------------------------------------------------------- the machine

PI = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n",
    "proc/meminfo": "MemTotal:        3884452 kB\nMemFree: 1 kB\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "proc/loadavg": "0.42 0.30 0.20 1/99 1234\n",
    "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
}


def test_a_raspberry_pi_is_described_in_si_units(tmp_path):
    for name, text in PI.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = describe(tmp_path)
    assert found["model"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["cpu"] == "implementer 0x41 part 0xd08"
    assert found["isa"] == ["asimd"]
    assert found["governor"] == "ondemand"
    assert found["frequency_hz"] == 1.5e9
    assert found["temperature_c"] == 48.312
    assert found["load_average"] == 0.42
    assert found["memory_bytes"] == 3884452 * 1024
    assert found["os"] == "Debian GNU/Linux 12 (bookworm)"


def test_missing_files_read_unavailable_and_never_zero(tmp_path):
    found = describe(tmp_path)
    silent = ("model", "cpu", "isa", "governor", "frequency_hz", "temperature_c", "memory_bytes")
    assert {name: found[name] for name in silent} == dict.fromkeys(silent, "unavailable")
    assert peak_rss_bytes(tmp_path) == "unavailable"


def test_mapped_pages_are_returned_and_read_again(tmp_path, rng):
    held = rng.integers(0, 256, 2**22, np.uint8)
    held.tofile(tmp_path / "held.weights")
    os.sync()  # pages not written to disk yet cannot be dropped
    array = np.memmap(tmp_path / "held.weights", mode="r")
    assert array.sum() == held.sum()
    before = resident(tmp_path / "held.weights")
    give_back_memory(mapped(tmp_path / "elsewhere"))
    assert resident(tmp_path / "held.weights") == before
    give_back_memory(mapped(tmp_path))
    assert resident(tmp_path / "held.weights") <= before
    assert (array == held).all()


def test_pages_of_a_mapped_file_leave_the_process_and_are_mapped_again(tmp_path, rng):
    held = rng.integers(0, 256, 2**22, np.uint8)
    held.tofile(tmp_path / "held.weights")
    array = np.memmap(tmp_path / "held.weights", mode="r")
    assert (array == held).all()
    (place,) = mapped(tmp_path)
    assert (place.path, place.size) == (str(tmp_path / "held.weights"), 2**22)
    before = resident_bytes(place)
    unmap_pages([place])
    assert (before, resident_bytes(place)) == (2**22, 0)
    assert (array == held).all()
    assert mapped(tmp_path, maps=tmp_path / "not Linux") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sessions_unmap_only_their_own_files(exported):
    """The addresses of closed sessions may belong to other memory, which madvise would erase."""
    closed, kept = (Recognizer(exported).engine for _ in range(2))
    assert closed.mapped and kept.mapped
    assert not set(closed.mapped) & set(kept.mapped)
    del closed
    assert set(kept.mapped) <= set(mapped(exported))


def resident_bytes(place) -> int:
    """The bytes of a mapping that are in this process, from /proc/self/smaps."""
    _, entry = Path("/proc/self/smaps").read_text().split(f"{place.start:x}-", 1)
    return 1024 * int(re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc")
@pytest.mark.parametrize("returned", [False, True])
def test_large_blocks_are_returned_when_they_are_freed(returned):
    """By default, glibc keeps a freed block below a smaller one once it has freed such blocks."""
    program = f"""
import ctypes, re
from devices.runner.machine.host import return_large_blocks
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallopt"): raise SystemExit("no glibc")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
if {returned}: return_large_blocks()
libc.free(libc.malloc(24 << 20))
before, block = resident(), libc.malloc(16 << 20)
above = libc.malloc(100_000)
ctypes.memset(block, 1, 16 << 20)
libc.free(block)
print(resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "no glibc" in run.stderr:
        pytest.skip("mallopt is glibc's")
    assert (int(run.stdout) < 2 << 10) == returned, run


def resident(path):
    """Return the kilobytes of a mapped file that are in memory, or 0 if unknown."""
    try:
        told = Path("/proc/self/smaps").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(rf"{re.escape(str(path))}\n(?:.+\n)*?Rss:\s+(\d+)", told)))


def test_the_high_water_mark_is_in_bytes(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmHWM:\t   61234 kB\n")
    assert peak_rss_bytes(tmp_path) == 61234 * 1024


def test_an_emulators_memory_is_not_reported_as_the_programs(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmHWM:\t   61234 kB\n")
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/arch").write_text("another\n")
    assert peak_rss_bytes(tmp_path) == "unavailable"


# --------------------------------------------------------------------------- memory and cold loads


@linux
def test_memory_peaks_are_measured_per_phase():
    code = (
        "from devices.runner.machine.host import peak_of_phase, peak_rss_bytes\n"
        "peak_of_phase(); block = bytearray(200 << 20); block = None; high = peak_of_phase()\n"
        "print(high, peak_of_phase(), peak_rss_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    if UNAVAILABLE in done.stdout:
        pytest.skip("the high-water mark cannot be reset here")
    high, low, last = map(int, done.stdout.split())
    assert 200 << 20 < high < 260 << 20
    assert max(low, last) < 60 << 20


def test_memory_of_a_phase_is_unavailable_without_a_resettable_peak(tmp_path):
    from devices.runner.machine.host import peak_of_phase

    make(tmp_path, {"proc/self/status": "VmHWM:\t   61234 kB\n"})
    assert peak_of_phase(tmp_path) == UNAVAILABLE


@linux
def test_a_file_is_dropped_from_the_page_cache(tmp_path, rng):
    path = tmp_path / "weights"
    path.write_bytes(content := rng.bytes(4 << 20))
    with path.open("rb") as file:
        assert measure.cached_share(file.fileno()) == 1
        if not measure.dropped(path):
            pytest.skip("this file system keeps files in memory")
        assert measure.cached_share(file.fileno()) <= measure.MOST_CACHED
    assert path.read_bytes() == content
    (tmp_path / "empty").touch()
    assert measure.dropped(tmp_path / "empty")


# ------------------------------------------------------------------------------ cores of a process


def grouped(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "100000 100000\n"}, 1),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        (
            "0::/a\n",
            {"sys/fs/cgroup/cpu.max": "300000 100000", "sys/fs/cgroup/a/cpu.max": "max 1"},
            3,
        ),
        (
            "4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n",
            {f"{V1}/cpu.cfs_quota_us": "200000", f"{V1}/cpu.cfs_period_us": "100000"},
            2,
        ),
        (
            "4:cpu,cpuacct:/x\n",
            {f"{V1}/x/cpu.cfs_quota_us": "-1", f"{V1}/x/cpu.cfs_period_us": "100000"},
            8,
        ),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        ("", {}, 8),
    ],
)
def test_a_cpu_quota_limits_the_cores(groups, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert machine.usable_cores(grouped(tmp_path, groups, files)) == expected


def test_cpu_affinity_limits_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    root = grouped(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "400000 100000"})
    assert machine.usable_cores(root) == 2
