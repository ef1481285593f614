"""Description and state of an Android phone, and its fast cores.

Every tool and file may be missing or forbidden; its value is then "unavailable". Tests pass `base`,
a folder that stands for the root of a phone's file system. Standard library only.
"""

import os
import re
from pathlib import Path

from .host import UNAVAILABLE, load_average, number, read

MOST_OUTPUT = 1 << 20
TOOL_S = 5
PLUGS = {"AC": "mains", "USB": "usb", "Wireless": "wireless", "Dock": "dock"}
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Android's names of the thermal throttling levels."""
CPU_SENSOR = 0


def here(base: Path = Path("/")) -> bool:
    """Return whether this system is Android."""
    return (base / "system/bin/getprop").exists()


def describe(base: Path = Path("/")) -> dict:
    """Return the phone's model and state, with the keys of host.describe() and more."""
    props = properties(tool(base, "getprop"))
    battery, screen = tool(base, "dumpsys", "battery"), tool(base, "dumpsys", "power")
    release, sdk = (props.get(f"ro.build.version.{name}") for name in ("release", "sdk"))
    named = {
        "model": joined(props, "ro.product.manufacturer", "ro.product.model"),
        "cpu": joined(props, "ro.soc.manufacturer", "ro.soc.model"),
    }
    now, highest, cores = readings(base, battery), maxima(base), sorted(os.sched_getaffinity(0))
    return {
        **{key: value for key, value in named.items() if value != UNAVAILABLE},
        "abi": props.get("ro.product.cpu.abi", UNAVAILABLE),
        "os": f"Android {release} (SDK {sdk})" if release else UNAVAILABLE,
        "temperature_c": now["temperature_c"],
        "throttled": now["throttled"],
        "battery_share": now["battery_share"],
        "battery_temperature_c": now["battery_temperature_c"],
        "plugged": plugged(battery),
        "screen": screen_state(screen),
        "frequency_hz": fastest(clocks(base, "scaling_cur_freq"), cores),
        "frequency_max_hz": fastest(highest, cores),
        "core_frequencies_max_hz": [hz for _, hz in sorted(highest.items())] or UNAVAILABLE,
        "pinned_to": cores,
    }


def readings(base: Path = Path("/"), battery: str | None = None) -> dict:
    """Return one telemetry sample of a phone."""
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
    """Return the output of an Android program, or "unavailable"."""
    import subprocess  # large; imported on phones only

    argv = [str(base / "system/bin" / name), *words]
    none = subprocess.DEVNULL
    try:
        done = subprocess.run(
            argv, stdin=none, stdout=subprocess.PIPE, stderr=none, timeout=TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNAVAILABLE
    output = done.stdout[:MOST_OUTPUT].decode("utf-8", "replace")
    return output if done.returncode == 0 and output.strip() else UNAVAILABLE


def properties(output: str) -> dict[str, str]:
    """Parse getprop's lines, `[name]: [value]`; empty values are left out."""
    return dict(re.findall(r"^\[([^\]\n]+)\]: \[([^\n]+)\]$", output, re.MULTILINE))


def joined(props: dict[str, str], maker: str, model: str) -> str:
    """Return maker and model, such as "Google Pixel 8"; the maker is not repeated."""
    if model not in props:
        return UNAVAILABLE
    name, by = props[model], props.get(maker, "")
    return name if name.lower().startswith(by.lower()) else f"{by} {name}"


def entry(output: str, name: str) -> str:
    """Return the value of an indented `name: value` line."""
    match = re.search(rf"^\s+{re.escape(name)}: *(\S.*)$", output, re.MULTILINE)
    return match[1].strip() if match else UNAVAILABLE


def share(battery: str) -> float | str:
    """Return the battery's charge, 0 to 1."""
    level, scale = (number(entry(battery, name), 1) for name in ("level", "scale"))
    if isinstance(level, str) or isinstance(scale, str) or scale <= 0:
        return UNAVAILABLE
    return level / scale


def plugged(battery: str) -> str:
    """Return the power source: mains, usb, wireless, dock or battery."""
    states = {plug: entry(battery, f"{plug} powered") for plug in PLUGS}
    if set(states.values()) == {UNAVAILABLE}:
        return UNAVAILABLE
    return next((PLUGS[plug] for plug, state in states.items() if state == "true"), "battery")


def screen_state(output: str) -> str:
    """Return the screen's state, such as on, off or doze."""
    for pattern in (r"Display Power: state=(\w+)", r"mWakefulness=(\w+)"):
        if match := re.search(pattern, output):
            return {"awake": "on", "asleep": "off"}.get(match[1].lower(), match[1].lower())
    return UNAVAILABLE


def thermal_status(output: str) -> str:
    """Return Android's name of the current thermal throttling level."""
    match = re.search(r"^\s*Thermal Status: (\d+)", output, re.MULTILINE)
    if match is None:
        return UNAVAILABLE
    return THERMAL[int(match[1])] if int(match[1]) < len(THERMAL) else match[1]


def cpu_temperature(output: str) -> float | str:
    """Return the hottest CPU sensor; current readings are preferred to cached ones."""
    _, now, rest = output.partition("Current temperatures from HAL:")
    pattern = rf"Temperature\{{mValue=(-?[\d.]+), mType={CPU_SENSOR},"
    for text in (rest.partition("cooling devices")[0] if now else "", output):
        values = [number_of(value) for value in re.findall(pattern, text)]
        if known := [value for value in values if value is not None]:
            return max(known)
    return UNAVAILABLE


def number_of(text: str) -> float | None:
    """Return a temperature; None for values such as NaN or -273 that idle sensors report."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if -50 < value < 200 else None


def power(base: Path, battery: str) -> float | str:
    """Return the power drawn from the battery in W; "unavailable" while it is plugged in."""
    supply = base / "sys/class/power_supply/battery"
    current, voltage = (
        number(read(supply / name), 1e-6) for name in ("current_now", "voltage_now")
    )
    if isinstance(voltage, str):
        voltage = number(entry(battery, "voltage"), 1e-3)
    if isinstance(current, str) or isinstance(voltage, str) or plugged(battery) != "battery":
        return UNAVAILABLE
    return abs(current) * voltage  # phones do not agree on the sign


# ------------------------------------------------------------------------------------------- cores


def clocks(base: Path, name: str) -> dict[int, float]:
    """Return the value of a cpufreq file by core, in Hz."""
    values = {}
    for path in (base / "sys/devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}"):
        if not isinstance(hertz := number(read(path), 1000), str):  # kHz there
            values[int(path.parent.parent.name[len("cpu") :])] = hertz
    return values


def maxima(base: Path) -> dict[int, float]:
    """Return the maximum frequency of every core, in Hz."""
    return clocks(base, "cpuinfo_max_freq")


def fastest(hertz: dict[int, float], cores: list[int]) -> float | str:
    """Return the highest frequency among the given cores, in Hz."""
    return max((hertz[core] for core in cores if core in hertz), default=UNAVAILABLE)


def frequencies(base: Path) -> list[float] | str:
    """Return the current frequency of every core, in Hz."""
    return [hertz for _, hertz in sorted(clocks(base, "scaling_cur_freq").items())] or UNAVAILABLE


def big_cores(base: Path = Path("/")) -> list[int]:
    """Return the cores that are faster than the slowest kind; all cores if all are alike."""
    highest = maxima(base)
    fast = [core for core, hertz in highest.items() if hertz > min(highest.values())]
    return sorted(fast or highest)


def take_fast_cores(threads: int | None, base: Path = Path("/")) -> None:
    """Pin this process and its children to the `threads` fastest cores, by default to all big ones.
    The system may allow fewer. Nothing changes if frequencies are unknown."""
    highest, allowed = maxima(base), os.sched_getaffinity(0)
    usable = sorted(highest.keys() & allowed, key=lambda core: (-highest[core], core))
    chosen = set(usable[:threads]) if threads else {*big_cores(base)} & allowed
    if chosen:
        os.sched_setaffinity(0, chosen)
