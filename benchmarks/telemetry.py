"""Telemetry of a run: check what the device reports, merge it, and judge whether the run is stable.

The sampler (devices/runner/measure/telemetry.py) runs on the device. Its answer comes from another
machine, so every value is validated here before it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.timing import ENOUGH_ROUNDS, UNSTABLE_SPREAD, by_round, median_interval
from devices.device import clean

UNAVAILABLE = "unavailable"
MAX_NUMBER = 1e12
"""The largest number that is accepted where no other range is given."""
MAX_SAMPLES = 20_000
"""The most telemetry samples of one process; 60 minutes have 3600."""
MAX_CLIPS = 500_000
MIN_CLIP_S = 1e-9
MAX_CORES = 4096
MAX_TEXT_CHARS = 200
PHASES = ("imports", "load", "first", "run")

READINGS = {
    "temperature_c": (-100, 1000),
    "battery_temperature_c": (-100, 1000),
    "battery_share": (0, 1),
    "power_w": (0, 1e5),
    "load_average": (0, 1e6),
    "others_cores": (0, MAX_CORES),
    "swapped_bytes": (0, 1e15),
}
"""The numeric readings of a sample, each with its accepted range."""

BUSY_CORES = 0.25
"""CPU use of other programs, in cores, above which a run is unstable."""
SPARE_LOAD = 0.5
"""Allowed excess of the load average over the number of cores, which a run on all cores reaches."""
WARMER_C, SLOWER = 3.0, 0.95
"""A run is thermally throttled if it gets this much warmer and the clock falls to this share."""
MIN_SAMPLES = 12
"""Enough for three samples at the beginning and three at the end."""
MIN_BATTERY = 0.2
MAX_SAMPLER_CORES = 0.01
"""CPU use of the sampler, in cores, above which a note is added."""
EDGE_S = 60.0
"""Length of the beginning and the end of a sustained run that are compared."""
FIRMWARE = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Raspberry Pi's get_throttled; bits 16 to 19 hold the same states since boot."""
SLOWED = ("moderate", "severe", "critical", "emergency", "shutdown")
"""Android's names of the thermal states in which it slows a phone down."""

# -------------------------------------------------------------------------------- validation


def valid_fields(answer: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the known fields of an answer that are valid, and the names of the invalid ones."""
    fields, invalid = {}, []
    for name, reader in READERS.items():
        if name in answer:
            try:
                fields[name] = reader(answer[name])
            except (ValueError, TypeError, KeyError, OverflowError):
                invalid.append(name)
    return fields, invalid


def require_number(value: Any, low: float = 0, high: float = MAX_NUMBER) -> float:
    """Return the number. Raises ValueError for another type or a number outside the range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError
    return value


def number_or_unavailable(value: Any, low: float = 0, high: float = MAX_NUMBER) -> float | str:
    """Return the number or "unavailable". Raises ValueError for anything else."""
    return UNAVAILABLE if value == UNAVAILABLE else require_number(value, low, high)


def require_list(value: Any, max_length: int) -> list[Any]:
    """Return the list. Raises ValueError for another type or a longer list."""
    if not isinstance(value, list) or len(value) > max_length:
        raise ValueError
    return value


def require_count(value: Any, low: int, high: int) -> int:
    """Return the integer. Raises ValueError for another type or outside the range."""
    if not isinstance(value, int):
        raise ValueError
    return int(require_number(value, low, high))


def require_text(value: Any) -> str:
    """Return the text, cut and without control characters. Raises ValueError for other types."""
    if not isinstance(value, str):
        raise ValueError
    text: str = clean(value[:MAX_TEXT_CHARS])
    return text


def require_span(value: Any) -> list[float]:
    """Return [began_s, ended_s]. Raises ValueError if it is not a pair of increasing times."""
    began, ended = map(require_number, require_list(value, 2))
    if ended < began:
        raise ValueError
    return [began, ended]


def require_memory(value: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory in bytes of each phase."""
    return {
        phase: UNAVAILABLE if value[phase] == UNAVAILABLE else require_count(value[phase], 0, 2**60)
        for phase in PHASES
    }


def require_telemetry(value: dict[str, Any]) -> dict[str, Any]:
    """Return {began_s, ended_s, interval_s, samples, cpu_s}.

    began_s is a time of the device's clock; all other times count from it.
    """
    samples = [require_sample(one) for one in require_list(value["samples"], MAX_SAMPLES)]
    times = [one["at_s"] for one in samples]
    if times != sorted(times):
        raise ValueError
    numbers = {name: require_number(value[name]) for name in ("began_s", "ended_s", "interval_s")}
    return {**numbers, "samples": samples, "cpu_s": number_or_unavailable(value["cpu_s"])}


def require_sample(value: dict[str, Any]) -> dict[str, Any]:
    """Return a telemetry sample with every reading; missing ones are "unavailable"."""
    sample: dict[str, Any] = {"at_s": require_number(value["at_s"])}
    for name, (low, high) in READINGS.items():
        sample[name] = number_or_unavailable(value.get(name, UNAVAILABLE), low, high)
    clocks = value.get("frequency_hz", UNAVAILABLE)
    if clocks != UNAVAILABLE:
        clocks = [number_or_unavailable(hz, 0, 1e12) for hz in require_list(clocks, MAX_CORES)]
    charging = value.get("charging", UNAVAILABLE)
    if not (isinstance(charging, bool) or charging == UNAVAILABLE):
        raise ValueError
    throttled = require_text(value.get("throttled", UNAVAILABLE))
    return {**sample, "frequency_hz": clocks, "throttled": throttled, "charging": charging}


def require_sustained(value: dict[str, Any]) -> dict[str, list[float]]:
    """Return the start (`at_s`) and duration (`end_to_end_s`) of each clip of a sustained run."""
    starts = [require_number(one) for one in require_list(value["at_s"], MAX_CLIPS)]
    durations = [
        require_number(one, MIN_CLIP_S) for one in require_list(value["end_to_end_s"], MAX_CLIPS)
    ]
    if not starts or len(starts) != len(durations) or starts != sorted(starts):
        raise ValueError
    return {"end_to_end_s": durations, "at_s": starts}


READERS: dict[str, Callable[[Any], Any]] = {
    "threads": lambda value: require_count(value, 1, MAX_CORES),
    "pinned": lambda value: [
        require_count(core, 0, MAX_CORES) for core in require_list(value, MAX_CORES)
    ],
    "governor": require_text,
    "cold_load_s": number_or_unavailable,
    "memory_bytes_by_phase": require_memory,
    "debug": lambda value: [require_text(sign) for sign in require_list(value, 9)],
    "timed_s": require_span,
    "telemetry": require_telemetry,
    "sustained": require_sustained,
}

# ----------------------------------------------------------------------------- result fields


def interval_is_within(times: Sequence[float], rounds: int, share: float) -> bool:
    """Return whether the 95 % interval of the rounds' median is at most `share` of it."""
    return rounds >= ENOUGH_ROUNDS and relative_interval(times, rounds) <= share


def relative_interval(times: Sequence[float], rounds: int) -> float:
    """Return the width of the 95 % interval of the median, as a share of the median.

    It is computed from the medians of the rounds. Every round has the same clips, so differences
    between clips do not widen it.
    """
    medians = np.median(by_round(np.asarray(times, float), rounds), axis=1)
    low, high = median_interval(medians)
    median = float(np.median(medians))
    return (high - low) / median if median > 0 else math.inf


def result_fields(
    rounds: Sequence[dict[str, Any]], last: dict[str, Any] | None, audio_s: float, clips: int
) -> dict[str, Any]:
    """Return the fields of a result that come from telemetry, as far as it is available.

    `last` is the answer of the sustained run. Times count from the beginning of the first round.
    """
    fields: dict[str, Any] = {}
    sampled = [answer for answer in [*rounds, last] if answer and "telemetry" in answer]
    if sampled:
        fields["telemetry"] = merge_telemetry(sampled, audio_s, clips)
    if last is not None:
        origin = sampled[0]["telemetry"]["began_s"] if sampled else last["sustained"]["at_s"][0]
        times = [time for answer in rounds for time in answer["end_to_end_s"]]
        fields["sustained"] = summarise_sustained(last["sustained"], origin, times, clips)
    if all("cold_load_s" in answer for answer in rounds):
        cold = [answer["cold_load_s"] for answer in rounds]
        fields["cold_load_s"] = UNAVAILABLE if UNAVAILABLE in cold else cold
    if all("memory_bytes_by_phase" in answer for answer in rounds):
        phases = [answer["memory_bytes_by_phase"] for answer in rounds]
        fields["memory_bytes_by_phase"] = {
            phase: max((p[phase] for p in phases if p[phase] != UNAVAILABLE), default=UNAVAILABLE)
            for phase in PHASES
        }
    final = rounds[-1]
    return fields | {n: final[n] for n in ("pinned", "governor", "threads") if n in final}


def merge_telemetry(
    answers: Sequence[dict[str, Any]], audio_s: float, clips: int
) -> dict[str, Any]:
    """Return the field `telemetry`: the samples of all processes on one time axis.

    Energy covers the timed clips, without loading.
    """
    records = [answer["telemetry"] for answer in answers]
    origin = records[0]["began_s"]
    spans = [timed_span(answer, audio_s, clips) for answer in answers]
    joules = [energy_j(one, *span[:2]) for one, span in zip(records, spans, strict=True)]
    known = [energy for energy in joules if energy is not None]
    total = sum(known) if known and len(known) == len(joules) else None
    transcribed_s = sum(audio for _, _, audio in spans)
    cpu_times = [one["cpu_s"] for one in records if one["cpu_s"] != UNAVAILABLE]
    duration_s = sum(one["ended_s"] for one in records)
    has_cpu = len(cpu_times) == len(records) and duration_s > 0
    per_second = total / transcribed_s if total is not None and transcribed_s else UNAVAILABLE
    return {
        "interval_s": records[0]["interval_s"],
        "samples": [
            {**sample, "at_s": round(one["began_s"] - origin + sample["at_s"], 4)}
            for one in records
            for sample in one["samples"]
        ],
        "energy_j": UNAVAILABLE if total is None else total,
        "energy_j_per_audio_s": per_second,
        "sampler_cores": sum(cpu_times) / duration_s if has_cpu else UNAVAILABLE,
    }


def timed_span(answer: dict[str, Any], audio_s: float, clips: int) -> tuple[float, float, float]:
    """Return (start, end, audio) of the timed clips in seconds; start and end count from the
    sampler's start. In a sustained run they cover whole passes over the clips, if there is one."""
    began = answer["telemetry"]["began_s"]
    if "sustained" not in answer:
        start, end = answer.get("timed_s", (began, began))
        return start - began, end - began, audio_s
    starts, durations = answer["sustained"]["at_s"], answer["sustained"]["end_to_end_s"]
    passes = len(starts) // clips
    if not passes:
        return starts[0] - began, starts[-1] + durations[-1] - began, audio_s * len(starts) / clips
    last = passes * clips - 1
    return starts[0] - began, starts[last] + durations[last] - began, audio_s * passes


def energy_j(record: dict[str, Any], start_s: float, end_s: float) -> float | None:
    """Return the energy drawn between two times by the trapezoidal rule; None without power."""
    known = [s for s in record["samples"] if s["power_w"] != UNAVAILABLE]
    if not known or end_s <= start_s:
        return None
    times, power = (np.array([s[name] for s in known]) for name in ("at_s", "power_w"))
    inside = times[(times > start_s) & (times < end_s)]
    at = np.concatenate([[start_s], inside, [end_s]])
    return float(np.trapezoid(np.interp(at, times, power), at))


def summarise_sustained(
    run: dict[str, list[float]], origin: float, rounds_s: Sequence[float], clips: int
) -> dict[str, Any]:
    """Return the field `sustained`.

    `ratio` compares the last minute with the first (the halves, below two minutes). Each clip's
    time is divided by its median in the rounds, so that the minutes may have different clips.
    """
    times, at = np.array(run["end_to_end_s"]), np.array(run["at_s"])
    usual = np.median(np.reshape(rounds_s, (-1, clips)), axis=0).clip(MIN_CLIP_S)  # (clips,)
    relative = times / usual[np.arange(len(times)) % clips]
    edge = min(EDGE_S, (at[-1] - at[0]) / 2)
    first, last = at <= at[0] + edge, at >= at[-1] - edge
    return {
        "minutes": float(at[-1] + times[-1] - at[0]) / 60,
        "end_to_end_s": run["end_to_end_s"],
        "at_s": [round(one, 3) for one in (at - origin).tolist()],
        "first_minute_s": float(np.median(times[first])),
        "last_minute_s": float(np.median(times[last])),
        "ratio": float(np.median(relative[last]) / np.median(relative[first])),
    }


# --------------------------------------------------------------------------------- stability


def unstable_because(
    result: dict[str, Any], samples: Sequence[dict[str, Any]], debug: Iterable[str]
) -> list[str]:
    """Return the reasons why the times are unreliable, as sentences with numbers.

    The list is empty for a stable run, and for an emulator, whose times are never reported.
    """
    if result["emulated"]:
        return []
    # a phone's load average covers all cores, also those that the run is not pinned to
    cores = None if "pinned_to" in result["device"] else result["device"].get("cores")
    reasons = [
        round_disagreement(result["end_to_end_s"], result["rounds"]),
        thermal_slowdown(samples),
        throttling(samples),
        high_load(samples, cores if isinstance(cores, int) else None),
        other_programs(samples),
        low_battery(samples),
        swapping(samples),
        *(f"{sign}, which is slower" for sign in dict.fromkeys(debug)),
    ]
    return [sentence for sentence in reasons if sentence is not None]


def readings_of(samples: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """Return the available values of a reading."""
    return [sample[name] for sample in samples if sample[name] != UNAVAILABLE]


def round_disagreement(times: Sequence[float], rounds: int) -> str | None:
    medians = np.median(by_round(np.asarray(times, float), rounds), axis=1)
    spread = float(np.ptp(medians) / np.median(medians)) if np.median(medians) > 0 else 0.0
    if spread <= UNSTABLE_SPREAD:
        return None
    return f"the medians of the {rounds} rounds differ by {spread:.0%}"


def thermal_slowdown(samples: Sequence[dict[str, Any]]) -> str | None:
    """Report a machine that got warmer while its clock fell."""
    known = [
        (sample["temperature_c"], max(clocks))
        for sample in samples
        if sample["temperature_c"] != UNAVAILABLE
        and sample["frequency_hz"] != UNAVAILABLE
        and (clocks := [clock for clock in sample["frequency_hz"] if clock != UNAVAILABLE])
    ]
    if len(known) < MIN_SAMPLES:
        return None
    quarter = len(known) // 4  # long enough to outweigh one moment of turbo on a single core
    (cold, fast), (warm, slow) = np.median([known[:quarter], known[-quarter:]], axis=1)
    if warm < cold + WARMER_C or slow >= SLOWER * fast:
        return None
    return (
        f"the temperature rose from {cold:.0f} to {warm:.0f} °C and the clock fell from "
        f"{fast / 1e6:.0f} to {slow / 1e6:.0f} MHz"
    )


def throttling(samples: Sequence[dict[str, Any]]) -> str | None:
    """Report throttling by the system itself, in bits on a Raspberry Pi, otherwise in words."""
    reported = readings_of(samples, "throttled")
    bits = [int(text, 16) for text in reported if re.fullmatch(r"0x[0-9a-fA-F]{1,8}", text)]
    if len(bits) < len(reported):
        states = list(dict.fromkeys(reported))
        if slowed := [state for state in states if state in SLOWED]:
            return f"the system reported throttling: {', '.join(slowed)}"
        if len(states) < 2:
            return None
        return f"the system's thermal state changed: {' -> '.join(states[:4])}"
    now = 0
    for state in bits:
        # a since-boot bit that was not set at the first sample was raised between two samples
        now |= state & 0xF | (state & ~bits[0]) >> 16 & 0xF
    if not now:
        return None
    names = [name for place, name in enumerate(FIRMWARE) if now >> place & 1]
    return f"the firmware reported {', '.join(names)} (0x{max(bits):x})"


def high_load(samples: Sequence[dict[str, Any]], cores: int | None) -> str | None:
    load = max(readings_of(samples, "load_average"), default=0)
    if cores is None or load <= cores + SPARE_LOAD:
        return None
    return f"the load average was {load:.1f} on {cores} cores"


def other_programs(samples: Sequence[dict[str, Any]]) -> str | None:
    known = readings_of(samples, "others_cores")
    if not known or np.mean(known) <= BUSY_CORES:
        return None
    return f"other programs used {np.mean(known):.2f} cores"


def low_battery(samples: Sequence[dict[str, Any]]) -> str | None:
    low = [
        share
        for sample in samples
        if (share := sample["battery_share"]) != UNAVAILABLE
        and share < MIN_BATTERY
        and sample["charging"] is not True
    ]
    return f"the battery was down to {min(low):.0%}" if low else None


def swapping(samples: Sequence[dict[str, Any]]) -> str | None:
    swapped = max(readings_of(samples, "swapped_bytes"), default=0)
    return f"{swapped / 1e6:.1f} MB of the program were in swap" if swapped else None


def notes(result: dict[str, Any], last: Sequence[dict[str, Any]], share: float | None) -> list[str]:
    """Return remarks that do not make a result unstable.

    `last` holds the samples of the sustained run, which shows the effect of heat on purpose.
    """
    remarks = []
    governor = result.get("governor", UNAVAILABLE)
    if governor not in ("performance", UNAVAILABLE):
        remarks.append(f"the CPU frequency governor was {governor}")
    cost = result.get("telemetry", {}).get("sampler_cores", UNAVAILABLE)
    if cost != UNAVAILABLE and cost > MAX_SAMPLER_CORES:
        remarks.append(f"telemetry used {cost:.1%} of a core")
    reached = relative_interval(result["end_to_end_s"], result["rounds"])
    if share is not None and reached > share:
        remarks.append(
            f"the 95 % interval of the median is {reached:.1%} of it after {result['rounds']} "
            f"rounds; {share:.1%} was requested"
        )
    if "sustained" in result and not result["emulated"]:
        minutes, ratio = (result["sustained"][name] for name in ("minutes", "ratio"))
        causes = [s for s in (thermal_slowdown(last), throttling(last)) if s is not None]
        change = f"after {minutes:.2g} minutes a clip took {ratio:.2f} times as long"
        remarks.append("; ".join([change, *causes]))
    return remarks
