"""Telemetry of a run: temperature, frequency, power and load, sampled once a second.

A helper process takes the samples. Times are those of the monotonic clock, so setting the wall
clock changes nothing. Values that a machine does not provide read "unavailable".
"""

import json
import os
import re
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..machine import android
from ..machine.helper_process import HelperProcess, can_fork
from ..machine.host import UNAVAILABLE, field, load_average, number, read, throttled, vcgencmd

INTERVAL_S = 1.0
LEAST_S = 0.2
"""Rates over a shorter time are noise: the kernel counts CPU time in steps of 10 ms."""
LOWEST_C, HIGHEST_C = -40.0, 150.0
"""Thermal zones without a sensor report temperatures outside this range."""


class Sampler:
    """Samples telemetry of this machine from its creation until `finish()`."""

    def __init__(self, root: Path = Path("/"), interval_s: float = INTERVAL_S) -> None:
        self.began_s, self.interval_s = time.monotonic(), interval_s
        measured = os.getpid()

        def task(stop: int) -> bytes:
            lower_priority()
            watch = Watch(readings_of(root), root, measured)
            samples = sample_until(stop, watch, self.began_s, interval_s)
            return json.dumps({"samples": samples, "cpu_s": cpu_s()}).encode()

        self.helper = HelperProcess(task) if can_fork() else None

    def finish(self) -> dict[str, Any]:
        """Return all samples, and in `cpu_s` the CPU time that the sampler itself took. `began_s`
        is on the machine's monotonic clock, which all processes share."""
        output = self.helper.finish() if self.helper is not None else b""
        record = json.loads(output) if output else {"samples": [], "cpu_s": UNAVAILABLE}
        ended_s = time.monotonic() - self.began_s
        return {
            "began_s": self.began_s,
            "ended_s": ended_s,
            "interval_s": self.interval_s,
            **record,
        }


def readings_of(root: Path) -> Callable[[], dict[str, Any]]:
    """Return the function that takes one sample on this system."""
    if android.here(root):
        return lambda: android.readings(root)
    if sys.platform == "darwin":
        from ..machine.mac import readings

        return readings
    return Linux(root).readings


def cpu_s() -> float:
    """Return the CPU time of this process and its children, in seconds."""
    import resource

    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def lower_priority() -> None:
    """Lower this process's priority, and let it run on all cores, not just the measured ones."""
    os.nice(19)
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def sample_until(
    stop: int, watch: "Watch", began_s: float, interval_s: float
) -> list[dict[str, Any]]:
    """Take a sample now, one every interval, and a last one once `stop` is readable."""
    samples, tick, over = [], 0, False
    while True:
        at_s = time.monotonic() - began_s
        samples.append({"at_s": round(at_s, 4), **watch.sample()})
        if over:
            return samples
        # if this process was delayed, the missed ticks are skipped
        tick = max(tick + 1, int((time.monotonic() - began_s) / interval_s))
        left = began_s + tick * interval_s - time.monotonic()
        over = bool(select.select([stop], [], [], max(0, left))[0])


class Watch:
    """A machine's readings, and the rates between successive readings."""

    def __init__(self, readings: Callable[[], dict[str, Any]], root: Path, measured: int) -> None:
        self.readings, self.measured = readings, root / f"proc/{measured}"
        self.stat = root / "proc/stat"
        self.own = root / "proc/self"
        self.counters = energy_counters(root)
        self.others, self.energy = Rate(self.others_s()), Rate(self.energy_j())

    def sample(self) -> dict[str, Any]:
        """Return a sample: the keys of Linux.readings, and two more.

        `others_cores` is how many cores all other programs kept busy since the last sample,
        `swapped_bytes` how much of the measured process is in swap.
        """
        sample = self.readings()
        power, counted = sample.get("power_w", UNAVAILABLE), self.energy.since(self.energy_j())
        return {
            **sample,
            "power_w": counted if power == UNAVAILABLE else power,
            "others_cores": self.others.since(self.others_s()),
            "swapped_bytes": number(field(read(self.measured / "status"), "VmSwap"), 1024),
        }

    def others_s(self) -> float | str:
        """Return the CPU time of all other programs, hypervisor included, as a running total."""
        busy = busy_ticks(read(self.stat))
        own = process_ticks(read(self.measured / "stat")), process_ticks(read(self.own / "stat"))
        if busy is None or None in own:
            return UNAVAILABLE
        return (busy - sum(ticks for ticks in own if ticks is not None)) / os.sysconf("SC_CLK_TCK")

    def energy_j(self) -> float | str:
        """Return the energy counter of the processor's packages in J, as a running total."""
        readings = [number(read(counter), 1e-6) for counter in self.counters]
        known = [value for value in readings if not isinstance(value, str)]
        return sum(known) if known and len(known) == len(readings) else UNAVAILABLE


class Rate:
    """The rate of growth of a counter between two readings."""

    def __init__(self, value: float | str) -> None:
        self.value, self.at_s = value, time.monotonic()

    def since(self, value: float | str) -> float | str:
        """Return the growth per second; "unavailable" if the time is too short or it fell."""
        now = time.monotonic()
        before, passed = self.value, now - self.at_s
        if passed < LEAST_S:
            return UNAVAILABLE
        self.value, self.at_s = value, now
        if isinstance(value, str) or isinstance(before, str):
            return UNAVAILABLE
        # CPU times are counted in steps, and not at the same moment for all processes
        grown = value - before
        if grown < -1:
            return UNAVAILABLE
        return round(max(grown, 0.0) / passed, 4)


def busy_ticks(stat: str) -> int | None:
    """Return the busy ticks of all cores in /proc/stat, including time stolen by a hypervisor."""
    match = re.match(r"cpu((?: +\d+){8})", stat)
    if not match:
        return None
    user, nice, system, _, _, interrupt, soft, stolen = map(int, match[1].split())
    return user + nice + system + interrupt + soft + stolen


def process_ticks(stat: str) -> int | None:
    """Return the ticks of a process and its ended children; its name may hold any character."""
    words = stat.rpartition(")")[2].split()
    return sum(map(int, words[11:15])) if len(words) > 14 else None


def energy_counters(root: Path) -> list[Path]:
    """Return RAPL's counters of whole packages; on most systems only root may read them. Other
    zones, such as the platform's, count the packages again and are left out."""
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:?"))
    return [zone / "energy_uj" for zone in zones if read(zone / "name").startswith("package")]


def is_battery(supply: Path) -> bool:
    """Return whether a power supply is the machine's battery and not, say, a mouse's."""
    return read(supply / "type") == "Battery" and read(supply / "scope") != "Device"


class Linux:
    """The files that hold this machine's readings, looked up once."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.load = root / "proc/loadavg"
        self.zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
        cores = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        self.clocks = sorted(cores, key=lambda path: int(path.parent.parent.name[3:]))
        supplies = sorted((root / "sys/class/power_supply").glob("*"))
        self.battery = next(filter(is_battery, supplies), None)
        self.unsupported: set[str] = set()
        """Firmware queries that failed once."""

    def readings(self) -> dict[str, Any]:
        """Return a sample of temperature_c (hottest zone), frequency_hz (a list, one per core),
        throttled (the firmware's bits), battery_share, battery_temperature_c, charging, power_w and
        load_average."""
        return {
            "temperature_c": self.temperature(),
            "frequency_hz": [number(read(clock), 1000) for clock in self.clocks] or UNAVAILABLE,
            "throttled": self.ask("get_throttled", throttled),
            **self.battery_readings(),
            "power_w": self.power(),
            "load_average": load_average(read(self.load)),
        }

    def temperature(self) -> float | str:
        readings = (number(read(zone), 0.001) for zone in self.zones)
        known = [c for c in readings if not isinstance(c, str) and LOWEST_C < c < HIGHEST_C]
        return max(known, default=UNAVAILABLE)

    def ask(self, name: str, query: Callable[[], Any]) -> Any:
        """Query the firmware, unless the same query failed before."""
        if name in self.unsupported:
            return UNAVAILABLE
        value = query()
        if value == UNAVAILABLE:
            self.unsupported.add(name)
        return value

    def battery_readings(self) -> dict[str, Any]:
        names = ("battery_share", "battery_temperature_c", "charging")
        if self.battery is None:
            return dict.fromkeys(names, UNAVAILABLE)
        status = read(self.battery / "status")
        return {
            "battery_share": number(read(self.battery / "capacity"), 0.01),
            "battery_temperature_c": number(read(self.battery / "temp"), 0.1),
            "charging": UNAVAILABLE if status == UNAVAILABLE else status != "Discharging",
        }

    def power(self) -> float | str:
        """Return the power drawn in W, from the Pi 5's power controller or a battery."""
        rails = self.ask("pmic_read_adc", lambda: rails_power(vcgencmd("pmic_read_adc")))
        return self.battery_power() if rails == UNAVAILABLE else rails

    def battery_power(self) -> float | str:
        """Return the power drawn from the battery in W; "unavailable" while it is charged."""
        if self.battery is None or read(self.battery / "status") != "Discharging":
            return UNAVAILABLE
        power = number(read(self.battery / "power_now"), 1e-6)
        current = number(read(self.battery / "current_now"), 1e-6)
        voltage = number(read(self.battery / "voltage_now"), 1e-6)
        if isinstance(power, str) and not isinstance(current, str) and not isinstance(voltage, str):
            power = current * voltage
        return power if isinstance(power, str) else round(abs(power), 6)


def rails_power(output: str) -> float | str:
    """Return the sum over the rails that the Pi 5's power controller measures, in W. USB devices
    and losses in the converters are not included."""
    readings = re.findall(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=(-?[\d.]+)[AV]", output)
    amperes, volts = (
        {rail: float(value) for rail, unit, value in readings if unit == kind} for kind in "AV"
    )
    known = [amperes[rail] * volts[rail] for rail in amperes.keys() & volts.keys()]
    return round(sum(known), 6) if known else UNAVAILABLE
