"""What the machine goes through while something is timed: a sampler beside it, once a second.

Times are those of a monotonic clock: a wall clock that is set meanwhile changes nothing. What a
machine cannot tell reads "unavailable".
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
from ..machine.host import UNAVAILABLE, field, load_average, number, read, throttled, vcgencmd
from .helper_process import Beside, possible

INTERVAL_S = 1.0
LEAST_S = 0.2
"""A rate over less time than this is noise: the kernel counts processor time in 10 ms."""
LOWEST_C, HIGHEST_C = -40.0, 150.0
"""Zones that nothing is connected to tell other temperatures."""


class Sampler:
    """Samples of this process's machine from now on, until it is asked for them."""

    def __init__(self, root: Path = Path("/"), interval_s: float = INTERVAL_S) -> None:
        self.began_s, self.interval_s = time.monotonic(), interval_s
        watched = os.getpid()

        def work(asked: int) -> bytes:
            lower()
            watch = Watch(readings_of(root), root, watched)
            samples = sample_until(asked, watch, self.began_s, interval_s)
            return json.dumps({"samples": samples, "cpu_s": cpu_s()}).encode()

        self.beside = Beside(work) if possible() else None

    def finish(self) -> dict[str, Any]:
        """Return all samples; `cpu_s` is what taking them has cost.

        `began_s` is by the clock of the machine, which all its processes share.
        """
        said = self.beside.finish() if self.beside is not None else b""
        found = json.loads(said) if said else {"samples": [], "cpu_s": UNAVAILABLE}
        ended_s = time.monotonic() - self.began_s
        return {"began_s": self.began_s, "ended_s": ended_s, "interval_s": self.interval_s, **found}


def readings_of(root: Path) -> Callable[[], dict[str, Any]]:
    """Return what gives a sample of this system."""
    if android.here(root):
        return lambda: android.readings(root)
    if sys.platform == "darwin":
        from ..machine.mac import readings

        return readings
    return Linux(root).readings


def cpu_s() -> float:
    """Return the processor time of this process and of those that it has started."""
    import resource

    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def lower() -> None:
    """Step back behind the process that is watched, and from its cores where there are others."""
    os.nice(19)
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def sample_until(
    asked: int, watch: "Watch", began_s: float, interval_s: float
) -> list[dict[str, Any]]:
    """Take a sample at once, one every interval and one at the end, when `asked` is readable."""
    samples, tick, over = [], 0, False
    while True:
        at_s = time.monotonic() - began_s
        samples.append({"at_s": round(at_s, 4), **watch.sample()})
        if over:
            return samples
        # where this process was held up, the ticks that it missed are left out
        tick = max(tick + 1, int((time.monotonic() - began_s) / interval_s))
        left = began_s + tick * interval_s - time.monotonic()
        over = bool(select.select([asked], [], [], max(0, left))[0])


class Watch:
    """One machine's readings, with what only two of them together tell."""

    def __init__(self, readings: Callable[[], dict[str, Any]], root: Path, watched: int) -> None:
        self.readings, self.watched = readings, root / f"proc/{watched}"
        self.stat = root / "proc/stat"
        self.own = root / "proc/self"
        self.counters = energy_counters(root)
        self.others, self.energy = Rate(self.others_s()), Rate(self.energy_j())

    def sample(self) -> dict[str, Any]:
        """Return a sample: see Linux.readings; and two keys more.

        `others_cores` are the cores that all other programs kept busy since the last sample,
        `swapped_bytes` what of the watched one lies in swap.
        """
        found = self.readings()
        told, drawn = found.get("power_w", UNAVAILABLE), self.energy.since(self.energy_j())
        return {
            **found,
            "power_w": drawn if told == UNAVAILABLE else told,
            "others_cores": self.others.since(self.others_s()),
            "swapped_bytes": number(field(read(self.watched / "status"), "VmSwap"), 1024),
        }

    def others_s(self) -> float | str:
        """Return the processor time that went to others, hypervisor included, since some time."""
        busy = busy_ticks(read(self.stat))
        own = process_ticks(read(self.watched / "stat")), process_ticks(read(self.own / "stat"))
        if busy is None or None in own:
            return UNAVAILABLE
        return (busy - sum(ticks for ticks in own if ticks is not None)) / os.sysconf("SC_CLK_TCK")

    def energy_j(self) -> float | str:
        """Return what the processor's packages have drawn since some time."""
        found = [number(read(counter), 1e-6) for counter in self.counters]
        known = [value for value in found if not isinstance(value, str)]
        return sum(known) if known and len(known) == len(found) else UNAVAILABLE


class Rate:
    """How fast something grows, from one reading to the next."""

    def __init__(self, value: float | str) -> None:
        self.value, self.at_s = value, time.monotonic()

    def since(self, value: float | str) -> float | str:
        """Return the growth a second; none over too short a time, or where a counter fell."""
        now = time.monotonic()
        before, passed = self.value, now - self.at_s
        if passed < LEAST_S:
            return UNAVAILABLE
        self.value, self.at_s = value, now
        if isinstance(value, str) or isinstance(before, str):
            return UNAVAILABLE
        # processor time is counted in steps, and not at the same moment for all
        grown = value - before
        if grown < -1:
            return UNAVAILABLE
        return round(max(grown, 0.0) / passed, 4)


def busy_ticks(stat: str) -> int | None:
    """Return all cores' ticks in /proc/stat that were neither idle nor waiting, stolen included."""
    found = re.match(r"cpu((?: +\d+){8})", stat)
    if not found:
        return None
    user, nice, system, _, _, interrupt, soft, stolen = map(int, found[1].split())
    return user + nice + system + interrupt + soft + stolen


def process_ticks(stat: str) -> int | None:
    """Return the ticks of a process and its ended children; its name may hold anything."""
    words = stat.rpartition(")")[2].split()
    return sum(map(int, words[11:15])) if len(words) > 14 else None


def energy_counters(root: Path) -> list[Path]:
    """Return RAPL's counters of whole packages; most systems let only root read them. What else
    stands beside them, as that of the platform, counts the packages again."""
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:?"))
    return [zone / "energy_uj" for zone in zones if read(zone / "name").startswith("package")]


def is_battery(supply: Path) -> bool:
    """Say whether it is the machine's own: a mouse has one, too."""
    return read(supply / "type") == "Battery" and read(supply / "scope") != "Device"


class Linux:
    """Where this machine's readings are, looked up once."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.load = root / "proc/loadavg"
        self.zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
        cores = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        self.clocks = sorted(cores, key=lambda path: int(path.parent.parent.name[3:]))
        supplies = sorted((root / "sys/class/power_supply").glob("*"))
        self.battery = next(filter(is_battery, supplies), None)
        self.mute: set[str] = set()
        """Questions that the firmware has not understood."""

    def readings(self) -> dict[str, Any]:
        """Return a sample of temperature_c (of the hottest zone), frequency_hz (a list, one a
        core), throttled (the firmware's bits), battery_share, battery_temperature_c, charging,
        power_w (drawn now) and load_average."""
        return {
            "temperature_c": self.temperature(),
            "frequency_hz": [number(read(clock), 1000) for clock in self.clocks] or UNAVAILABLE,
            "throttled": self.ask("get_throttled", throttled),
            **self.battery_readings(),
            "power_w": self.power(),
            "load_average": load_average(read(self.load)),
        }

    def temperature(self) -> float | str:
        found = (number(read(zone), 0.001) for zone in self.zones)
        known = [c for c in found if not isinstance(c, str) and LOWEST_C < c < HIGHEST_C]
        return max(known, default=UNAVAILABLE)

    def ask(self, question: str, asking: Any) -> Any:
        """Ask the firmware, unless it did not know the answer before."""
        if question in self.mute:
            return UNAVAILABLE
        found = asking()
        if found == UNAVAILABLE:
            self.mute.add(question)
        return found

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
        """Return what is drawn: by the Pi 5's power controller, else from a battery."""
        rails = self.ask("pmic_read_adc", lambda: rails_power(vcgencmd("pmic_read_adc")))
        return self.battery_power() if rails == UNAVAILABLE else rails

    def battery_power(self) -> float | str:
        """Return what a battery gives; one that is being charged does not tell what is drawn."""
        if self.battery is None or read(self.battery / "status") != "Discharging":
            return UNAVAILABLE
        power = number(read(self.battery / "power_now"), 1e-6)
        current = number(read(self.battery / "current_now"), 1e-6)
        voltage = number(read(self.battery / "voltage_now"), 1e-6)
        if isinstance(power, str) and not isinstance(current, str) and not isinstance(voltage, str):
            power = current * voltage
        return power if isinstance(power, str) else round(abs(power), 6)


def rails_power(said: str) -> float | str:
    """Return the watts of all rails whose current and voltage the Pi 5's controller measures; what
    hangs on USB and is lost in its converters is not among them."""
    found = re.findall(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=(-?[\d.]+)[AV]", said)
    amperes, volts = (
        {rail: float(value) for rail, unit, value in found if unit == wanted} for wanted in "AV"
    )
    known = [amperes[rail] * volts[rail] for rail in amperes.keys() & volts.keys()]
    return round(sum(known), 6) if known else UNAVAILABLE
