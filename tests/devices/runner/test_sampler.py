"""The sampler of a run's telemetry: simulated machines in a folder, and this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from simulated_machine import make
from waiting import wait_until

from benchmarks import telemetry as run_telemetry
from devices.runner.machine.helper_process import HelperProcess
from devices.runner.machine.host import UNAVAILABLE
from devices.runner.measure import telemetry as sampler_module
from devices.runner.measure.telemetry import Linux, Sampler, Watch

PROJECT = Path(__file__).parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")

BATTERY = {
    "type": "Battery\n",
    "capacity": "17\n",
    "temp": "314\n",
    "status": "Discharging\n",
    "current_now": "-500000\n",
    "voltage_now": "4000000\n",
}
PMIC = """ 3V7_WL_SW_A current(0)=0.10000000A
   VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   VDD_CORE_V volt(15)=0.90000000V
    EXT5V_V volt(24)=5.10498000V
"""


@pytest.fixture
def firmware(tmp_path, monkeypatch):
    """A vcgencmd that gives fixed answers and records its arguments."""

    def put(**answers: str) -> Path:
        folder, asked = tmp_path / "bin", tmp_path / "asked"
        for question, answer in answers.items():
            make(folder, {question: answer})
        script = f'#!/bin/sh\necho "$1" >> "{asked}"\n[ -f "{folder}/$1" ] && cat "{folder}/$1"\n'
        make(folder, {"vcgencmd": script})
        (folder / "vcgencmd").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        asked.touch()
        return asked

    return put


# -------------------------------------------------------------------------- simulated machines


def test_all_readings_of_a_raspberry_pi_5(pi, firmware):
    firmware(get_throttled="throttled=0x50005\n", pmic_read_adc=PMIC)
    assert Linux(pi).readings() == {
        "temperature_c": 48.312,
        "frequency_hz": [1.5e9, 1.500001e9, 1.500002e9, 1.500003e9],
        "throttled": "0x50005",
        "battery_share": UNAVAILABLE,
        "battery_temperature_c": UNAVAILABLE,
        "charging": UNAVAILABLE,
        "power_w": pytest.approx(0.1 * 3.7 + 2 * 0.9),
        "load_average": 0.42,
    }


def test_an_unknown_firmware_command_is_tried_once(pi, firmware):
    asked = firmware(get_throttled="throttled=0x0\n")
    sensors = Linux(pi)
    found = [sensors.readings() for _ in range(3)]
    assert [(one["throttled"], one["power_w"]) for one in found] == [("0x0", UNAVAILABLE)] * 3
    assert asked.read_text().split().count("pmic_read_adc") == 1
    assert asked.read_text().split().count("get_throttled") == 3


def test_missing_sources_are_unavailable_and_not_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Watch(Linux(tmp_path).readings, tmp_path, os.getpid()).sample()
    assert len(found) == 10
    assert set(found.values()) == {UNAVAILABLE}


def test_a_battery_reports_power_unless_it_is_charging(pi):
    make(pi / "sys/class/power_supply/BAT0", BATTERY)
    found = Linux(pi).readings()
    assert (found["battery_share"], found["battery_temperature_c"]) == (0.17, 31.4)
    assert (found["power_w"], found["charging"]) == (2.0, False)
    make(pi / "sys/class/power_supply/BAT0", {"status": "Charging\n"})
    found = Linux(pi).readings()
    assert (found["power_w"], found["charging"]) == (UNAVAILABLE, True)


def test_the_battery_of_a_mouse_is_ignored(pi):
    make(pi / "sys/class/power_supply/hidpp_battery_0", BATTERY | {"scope": "Device\n"})
    assert Linux(pi).readings()["battery_share"] == UNAVAILABLE


def test_rates_are_computed_from_two_samples(tmp_path, rng, monkeypatch):
    """Other programs use 0.5 s, the measured process and its children 2 s; RAPL reports 3 J."""
    ticks = os.sysconf("SC_CLK_TCK")
    name = "a) 1 2 (b"

    def state(busy_s: float, own_s: float, joules: float) -> dict[str, str]:
        user, own = round(busy_s * ticks), round(own_s * ticks)
        process = f"7 ({name}) R " + "0 " * 10 + f"{own - 1} 0 1 0 " + "0 " * 30
        return {
            "proc/stat": f"cpu  {user} 0 0 999 99 0 0 0 0 0\ncpu0 1 1 1\n",
            "proc/7/stat": process,
            "proc/self/stat": process.replace(str(own - 1), "0").replace(" 1 0 ", " 0 0 "),
            "proc/7/status": "VmSwap:\t 2048 kB\n",
            "sys/class/powercap/intel-rapl:0/name": "package-0",
            "sys/class/powercap/intel-rapl:0/energy_uj": str(round(joules * 1e6)),
            "sys/class/powercap/intel-rapl:1/name": "psys",
            "sys/class/powercap/intel-rapl:1/energy_uj": str(round(3e6 * joules)),
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "1",
        }

    start = float(rng.integers(10, 1000))
    make(tmp_path, state(start, 5, 70))
    now = [1000.0]
    monkeypatch.setattr(sampler_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = Watch(dict, tmp_path, 7)
    now[0] += 0.1
    assert watch.sample()["others_cores"] == UNAVAILABLE  # too early for a rate
    now[0] += 0.3
    make(tmp_path, state(start + 2.5, 7, 73))
    found = watch.sample()
    assert found["others_cores"] == pytest.approx(0.5 / 0.4, rel=0.01)
    assert found["power_w"] == pytest.approx(3 / 0.4, rel=0.01)
    assert found["swapped_bytes"] == 2048 * 1024
    now[0] += 0.3
    make(tmp_path, state(start, 7, 0))  # the counters were reset
    again = watch.sample()
    assert (again["others_cores"], again["power_w"]) == (UNAVAILABLE, UNAVAILABLE)


# ------------------------------------------------------------------------------- a real sampler


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@linux
def test_the_sampler_samples_this_machine_at_its_interval():
    sampler = Sampler(interval_s=0.2)
    time.sleep(1.5)
    found = sampler.finish()
    times = [sample["at_s"] for sample in found["samples"]]
    assert times == sorted(times)
    assert 3 <= len(times) <= 10  # a busy machine may skip samples
    assert times[-1] <= found["ended_s"]
    assert all(isinstance(sample["load_average"], float) for sample in found["samples"])
    assert found["cpu_s"] > 0
    assert run_telemetry.valid_fields({"telemetry": found})[1] == []
    wait_until(lambda: ended(sampler.helper.pid))


@linux
def test_a_jump_of_the_wall_clock_changes_no_time(monkeypatch, rng):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + float(rng.normal(0, 1e6)))
    sampler = Sampler(interval_s=0.1)
    time.sleep(0.6)
    found = sampler.finish()
    times = [sample["at_s"] for sample in found["samples"]]
    assert all(0 <= time <= found["ended_s"] < 60 for time in times)
    assert times == sorted(times)


@linux
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_parent_leaves_no_sampler(end):
    code = (
        "import time; from devices.runner.measure.telemetry import Sampler; "
        "print(Sampler().helper.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=-1, stderr=-3, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        parent.send_signal(end)
        assert parent.stdout.read() == ""  # the sampler does not keep the pipe open
    wait_until(lambda: ended(pid))


@linux
def test_a_sampler_that_was_killed_leaves_a_run_without_samples():
    sampler = Sampler()
    os.kill(sampler.helper.pid, signal.SIGKILL)
    found = sampler.finish()
    assert (found["samples"], found["cpu_s"]) == ([], UNAVAILABLE)
    assert run_telemetry.valid_fields({"telemetry": found})[1] == []


@linux
def test_an_answer_larger_than_a_pipe_is_complete(rng):
    content = rng.bytes(3 << 20)
    assert HelperProcess(lambda stop: content).finish() == content
    assert HelperProcess(lambda stop: time.sleep(600)).finish(patience_s=0.1) == b""
