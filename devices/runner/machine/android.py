"""What Android says about a phone, and which of its cores are fast.

Every tool and file may be missing or refused, and then reads "unavailable". `base` lets a test lay
out a phone of its own under a folder. Standard library only.
"""

import os
import re
from pathlib import Path

from .host import UNAVAILABLE, load_average, number, read

MOST_SAID = 1 << 20
TOOL_S = 5
PLUGS = {"AC": "mains", "USB": "usb", "Wireless": "wireless", "Dock": "dock"}
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Android's names for how much it slows a phone down for its heat."""
CPU_SENSOR = 0


def here(base: Path = Path("/")) -> bool:
    """Say whether this is Android."""
    return (base / "system/bin/getprop").exists()


def describe(base: Path = Path("/")) -> dict:
    """Return the phone's model and state, with machine.describe's names where there are some."""
    props = properties(tool(base, "getprop"))
    battery, screen = tool(base, "dumpsys", "battery"), tool(base, "dumpsys", "power")
    release, sdk = (props.get(f"ro.build.version.{name}") for name in ("release", "sdk"))
    named = {
        "model": joined(props, "ro.product.manufacturer", "ro.product.model"),
        "cpu": joined(props, "ro.soc.manufacturer", "ro.soc.model"),
    }
    seen, highest, kept = readings(base, battery), maxima(base), sorted(os.sched_getaffinity(0))
    return {
        **{key: value for key, value in named.items() if value != UNAVAILABLE},
        "abi": props.get("ro.product.cpu.abi", UNAVAILABLE),
        "os": f"Android {release} (SDK {sdk})" if release else UNAVAILABLE,
        "temperature_c": seen["temperature_c"],
        "throttled": seen["throttled"],
        "battery_share": seen["battery_share"],
        "battery_temperature_c": seen["battery_temperature_c"],
        "plugged": plugged(battery),
        "screen": screen_state(screen),
        "frequency_hz": fastest(clocks(base, "scaling_cur_freq"), kept),
        "frequency_max_hz": fastest(highest, kept),
        "core_frequencies_max_hz": [hz for _, hz in sorted(highest.items())] or UNAVAILABLE,
        "pinned_to": kept,
    }


def readings(base: Path = Path("/"), battery: str | None = None) -> dict:
    """Return one sample of what changes while a phone works."""
    battery = tool(base, "dumpsys", "battery") if battery is None else battery
    thermal = tool(base, "dumpsys", "thermalservice")
    return {
        "temperature_c": cpu_temperature(thermal),
        "frequency_hz": frequencies(base),
        "throttled": thermal_status(thermal),
        "battery_share": share(battery),
        "battery_temperature_c": number(entry(battery, "temperature"), 0.1),
        "charging": UNAVAILABLE if (plug := plugged(battery)) == UNAVAILABLE else plug != "battery",
        "power_w": power(base, battery),
        "load_average": load_average(read(base / "proc/loadavg")),
    }


def tool(base: Path, name: str, *words: str) -> str:
    """Return what one of Android's programs says, or "unavailable"."""
    import subprocess  # large, and on the phones only

    argv = [str(base / "system/bin" / name), *words]
    none = subprocess.DEVNULL
    try:
        done = subprocess.run(
            argv, stdin=none, stdout=subprocess.PIPE, stderr=none, timeout=TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNAVAILABLE
    said = done.stdout[:MOST_SAID].decode("utf-8", "replace")
    return said if done.returncode == 0 and said.strip() else UNAVAILABLE


def properties(said: str) -> dict[str, str]:
    """Return getprop's list: a line is `[name]: [value]`; empty values are left out."""
    return dict(re.findall(r"^\[([^\]\n]+)\]: \[([^\n]+)\]$", said, re.MULTILINE))


def joined(props: dict[str, str], maker: str, model: str) -> str:
    """Return "Google Pixel 8", where the maker is not in the model's name anyway."""
    if model not in props:
        return UNAVAILABLE
    name, by = props[model], props.get(maker, "")
    return name if name.lower().startswith(by.lower()) else f"{by} {name}"


def entry(said: str, name: str) -> str:
    """Return the value of an indented `name: value` line."""
    found = re.search(rf"^\s+{re.escape(name)}: *(\S.*)$", said, re.MULTILINE)
    return found[1].strip() if found else UNAVAILABLE


def share(battery: str) -> float | str:
    """Return how full the battery is, 0 to 1."""
    level, scale = (number(entry(battery, name), 1) for name in ("level", "scale"))
    if isinstance(level, str) or isinstance(scale, str) or scale <= 0:
        return UNAVAILABLE
    return level / scale


def plugged(battery: str) -> str:
    """Return where its power comes from: mains, usb, wireless, dock or battery."""
    states = {plug: entry(battery, f"{plug} powered") for plug in PLUGS}
    if set(states.values()) == {UNAVAILABLE}:
        return UNAVAILABLE
    return next((PLUGS[plug] for plug, state in states.items() if state == "true"), "battery")


def screen_state(said: str) -> str:
    """Return the screen's state, such as on, off or doze."""
    for pattern in (r"Display Power: state=(\w+)", r"mWakefulness=(\w+)"):
        if found := re.search(pattern, said):
            return {"awake": "on", "asleep": "off"}.get(found[1].lower(), found[1].lower())
    return UNAVAILABLE


def thermal_status(said: str) -> str:
    """Return how much the system holds the phone back for its heat, by Android's own name."""
    found = re.search(r"^\s*Thermal Status: (\d+)", said, re.MULTILINE)
    if found is None:
        return UNAVAILABLE
    return THERMAL[int(found[1])] if int(found[1]) < len(THERMAL) else found[1]


def cpu_temperature(said: str) -> float | str:
    """Return the hottest of the CPU's sensors; those read just now go before those kept."""
    _, now, rest = said.partition("Current temperatures from HAL:")
    pattern = rf"Temperature\{{mValue=(-?[\d.]+), mType={CPU_SENSOR},"
    for text in (rest.partition("cooling devices")[0] if now else "", said):
        values = [number_of(value) for value in re.findall(pattern, text)]
        if known := [value for value in values if value is not None]:
            return max(known)
    return UNAVAILABLE


def number_of(text: str) -> float | None:
    """Return a number; some phones give NaN or -273 for a sensor that sleeps."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if -50 < value < 200 else None


def power(base: Path, battery: str) -> float | str:
    """Return what is drawn from the battery, where that is all there is to draw from."""
    supply = base / "sys/class/power_supply/battery"
    current, voltage = (
        number(read(supply / name), 1e-6) for name in ("current_now", "voltage_now")
    )
    if isinstance(voltage, str):
        voltage = number(entry(battery, "voltage"), 1e-3)
    if isinstance(current, str) or isinstance(voltage, str) or plugged(battery) != "battery":
        return UNAVAILABLE
    return abs(current) * voltage  # phones do not agree on the sign


# -------------------------------------------------------------------------------------- the cores


def clocks(base: Path, name: str) -> dict[int, float]:
    """Return a clock file of every core that has it, in Hz."""
    found = {}
    for path in (base / "sys/devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}"):
        if not isinstance(hertz := number(read(path), 1000), str):  # kHz there
            found[int(path.parent.parent.name[len("cpu") :])] = hertz
    return found


def maxima(base: Path) -> dict[int, float]:
    """Return the highest frequency of every core, in Hz."""
    return clocks(base, "cpuinfo_max_freq")


def fastest(hertz: dict[int, float], cores: list[int]) -> float | str:
    """Return the highest of some cores' frequencies."""
    return max((hertz[core] for core in cores if core in hertz), default=UNAVAILABLE)


def frequencies(base: Path) -> list[float] | str:
    """Return what every core runs at now."""
    return [hertz for _, hertz in sorted(clocks(base, "scaling_cur_freq").items())] or UNAVAILABLE


def big_cores(base: Path = Path("/")) -> list[int]:
    """Return the cores that are not of the slowest kind; all where there is one kind."""
    highest = maxima(base)
    fast = [core for core, hertz in highest.items() if hertz > min(highest.values())]
    return sorted(fast or highest)


def take_fast_cores(threads: int | None, base: Path = Path("/")) -> None:
    """Keep this process, and what it starts, on the fastest cores: as many as it has threads, or
    all big ones. The system may allow fewer; where it says nothing of its cores, all are kept."""
    highest, allowed = maxima(base), os.sched_getaffinity(0)
    usable = sorted(highest.keys() & allowed, key=lambda core: (-highest[core], core))
    wanted = set(usable[:threads]) if threads else {*big_cores(base)} & allowed
    if wanted:
        os.sched_setaffinity(0, wanted)
