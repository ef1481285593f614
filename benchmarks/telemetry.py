"""What was seen beside the rounds: is it data, what does it say together, was the run disturbed?

The sampler (devices/runner/measure/telemetry.py) runs on the device; all that it says is checked
here.
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
MOST = 1e12
"""Of any number; seconds, for one."""
MOST_SAMPLES = 20_000
"""Of one process's telemetry; 60 minutes have 3600."""
MOST_CLIPS = 500_000
LEAST_S = 1e-9
"""That a clip may take."""
MOST_CORES = 4096
MOST_WORDS = 200
PHASES = ("imports", "load", "first", "run")

READINGS = {
    "temperature_c": (-100, 1000),
    "battery_temperature_c": (-100, 1000),
    "battery_share": (0, 1),
    "power_w": (0, 1e5),
    "load_average": (0, 1e6),
    "others_cores": (0, MOST_CORES),
    "swapped_bytes": (0, 1e15),
}
"""The numbers of a sample, and between what they are believed."""

BUSY_CORES = 0.25
"""What others may take of a core before a run counts as disturbed."""
SPARE_LOAD = 0.5
"""That the load average may be above the cores: a run that uses all of them has one of so many."""
WARMER_C, SLOWER = 3.0, 0.95
"""That a machine has to grow warmer, and the share to which its clock has to fall."""
LEAST_SAMPLES = 12
"""For a beginning and an end of three samples each."""
LEAST_BATTERY = 0.2
DEAR_CORES = 0.01
"""What the sampler may take."""
EDGE_S = 60.0
"""The beginning and the end of a sustained run."""
FIRMWARE = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Raspberry Pi's get_throttled; 16 to 19 say that it has been so since boot."""
SLOWED = ("moderate", "severe", "critical", "emergency", "shutdown")
"""What Android calls a phone that it holds back for its heat."""

# -------------------------------------------------------------------------------------- is it data?


def checked(answer: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those of an answer's fields that are known here, and the names of those that are not what
    they should be: they come from another machine."""
    found, wrong = {}, []
    for name, reader in READERS.items():
        if name in answer:
            try:
                found[name] = reader(answer[name])
            except (ValueError, TypeError, KeyError, OverflowError):
                wrong.append(name)
    return found, wrong


def is_number(value: Any, low: float = 0, high: float = MOST) -> float:
    """The number itself, if it is one between these."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError
    return value


def is_known(value: Any, low: float = 0, high: float = MOST) -> float | str:
    """Likewise, or "unavailable"."""
    return UNAVAILABLE if value == UNAVAILABLE else is_number(value, low, high)


def is_list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError
    return value


def is_count(value: Any, low: int, high: int) -> int:
    if not isinstance(value, int):
        raise ValueError
    return int(is_number(value, low, high))


def is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    text: str = clean(value[:MOST_WORDS])
    return text


def is_span(value: Any) -> list[float]:
    began, ended = map(is_number, is_list(value, 2))
    if ended < began:
        raise ValueError
    return [began, ended]


def is_memory(value: dict[str, Any]) -> dict[str, Any]:
    return {
        phase: UNAVAILABLE if value[phase] == UNAVAILABLE else is_count(value[phase], 0, 2**60)
        for phase in PHASES
    }


def is_telemetry(value: dict[str, Any]) -> dict[str, Any]:
    """{began_s, ended_s, interval_s, samples, cpu_s}: began_s by the device's clock, the rest since
    then."""
    samples = [is_sample(one) for one in is_list(value["samples"], MOST_SAMPLES)]
    times = [one["at_s"] for one in samples]
    if times != sorted(times):
        raise ValueError
    numbers = {name: is_number(value[name]) for name in ("began_s", "ended_s", "interval_s")}
    return {**numbers, "samples": samples, "cpu_s": is_known(value["cpu_s"])}


def is_sample(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"at_s": is_number(value["at_s"])}
    for name, (low, high) in READINGS.items():
        found[name] = is_known(value.get(name, UNAVAILABLE), low, high)
    clocks = value.get("frequency_hz", UNAVAILABLE)
    if clocks != UNAVAILABLE:
        clocks = [is_known(clock, 0, 1e12) for clock in is_list(clocks, MOST_CORES)]
    charging = value.get("charging", UNAVAILABLE)
    if not (isinstance(charging, bool) or charging == UNAVAILABLE):
        raise ValueError
    throttled = is_text(value.get("throttled", UNAVAILABLE))
    return {**found, "frequency_hz": clocks, "throttled": throttled, "charging": charging}


def is_sustained(value: dict[str, Any]) -> dict[str, list[float]]:
    times = [is_number(one) for one in is_list(value["at_s"], MOST_CLIPS)]
    work = [is_number(one, LEAST_S) for one in is_list(value["end_to_end_s"], MOST_CLIPS)]
    if not times or len(times) != len(work) or times != sorted(times):
        raise ValueError
    return {"end_to_end_s": work, "at_s": times}


READERS: dict[str, Callable[[Any], Any]] = {
    "threads": lambda value: is_count(value, 1, MOST_CORES),
    "pinned": lambda value: [is_count(core, 0, MOST_CORES) for core in is_list(value, MOST_CORES)],
    "governor": is_text,
    "cold_load_s": is_known,
    "memory_bytes_by_phase": is_memory,
    "debug": lambda value: [is_text(sign) for sign in is_list(value, 9)],
    "timed_s": is_span,
    "telemetry": is_telemetry,
    "sustained": is_sustained,
}

# ---------------------------------------------------------------------------- what it says together


def narrow(times: Sequence[float], rounds: int, share: float) -> bool:
    """Whether the 95 % interval of the rounds' median is at most this share of it."""
    return rounds >= ENOUGH_ROUNDS and relative_interval(times, rounds) <= share


def relative_interval(times: Sequence[float], rounds: int) -> float:
    """Of the medians of rounds, each over the same clips: how much clips differ is no noise."""
    middles = np.median(by_round(np.asarray(times, float), rounds), axis=1)
    low, high = median_interval(middles)
    middle = float(np.median(middles))
    return (high - low) / middle if middle > 0 else math.inf


def fields(
    rounds: Sequence[dict[str, Any]],
    lasting: dict[str, Any] | None,
    audio_s: float,
    clips: int,
) -> dict[str, Any]:
    """The fields of a result that come from beside the rounds, as far as there is any of them.

    `lasting` is the answer of the sustained run; times count from the first round's beginning.
    """
    found: dict[str, Any] = {}
    watched = [answer for answer in [*rounds, lasting] if answer and "telemetry" in answer]
    if watched:
        found["telemetry"] = telemetry(watched, audio_s, clips)
    if lasting is not None:
        origin = watched[0]["telemetry"]["began_s"] if watched else lasting["sustained"]["at_s"][0]
        times = [time for answer in rounds for time in answer["end_to_end_s"]]
        found["sustained"] = sustained(lasting["sustained"], origin, times, clips)
    if all("cold_load_s" in answer for answer in rounds):
        cold = [answer["cold_load_s"] for answer in rounds]
        found["cold_load_s"] = UNAVAILABLE if UNAVAILABLE in cold else cold
    if all("memory_bytes_by_phase" in answer for answer in rounds):
        phases = [answer["memory_bytes_by_phase"] for answer in rounds]
        found["memory_bytes_by_phase"] = {
            phase: max((p[phase] for p in phases if p[phase] != UNAVAILABLE), default=UNAVAILABLE)
            for phase in PHASES
        }
    last = rounds[-1]
    return found | {name: last[name] for name in ("pinned", "governor", "threads") if name in last}


def telemetry(watched: Sequence[dict[str, Any]], audio_s: float, clips: int) -> dict[str, Any]:
    """All samples on one axis; energy is that of the clips that were timed, without loading."""
    seen = [answer["telemetry"] for answer in watched]
    origin = seen[0]["began_s"]
    spans = [span_and_audio(answer, audio_s, clips) for answer in watched]
    drawn = [energy_j(one, *span[:2]) for one, span in zip(seen, spans, strict=True)]
    known = [joules for joules in drawn if joules is not None]
    energy = sum(known) if known and len(known) == len(drawn) else None
    heard = sum(audio for _, _, audio in spans)
    costs = [one["cpu_s"] for one in seen if one["cpu_s"] != UNAVAILABLE]
    lasted = sum(one["ended_s"] for one in seen)
    told = len(costs) == len(seen) and lasted > 0
    return {
        "interval_s": seen[0]["interval_s"],
        "samples": [
            {**sample, "at_s": round(one["began_s"] - origin + sample["at_s"], 4)}
            for one in seen
            for sample in one["samples"]
        ],
        "energy_j": UNAVAILABLE if energy is None else energy,
        "energy_j_per_audio_s": energy / heard if energy is not None and heard else UNAVAILABLE,
        "sampler_cores": sum(costs) / lasted if told else UNAVAILABLE,
    }


def span_and_audio(
    answer: dict[str, Any], audio_s: float, clips: int
) -> tuple[float, float, float]:
    """From when to when clips were transcribed, since the sampler began, and how much sound that
    was; of a sustained run the whole passes, if there is one."""
    began = answer["telemetry"]["began_s"]
    if "sustained" not in answer:
        start, end = answer.get("timed_s", (began, began))
        return start - began, end - began, audio_s
    times, work = answer["sustained"]["at_s"], answer["sustained"]["end_to_end_s"]
    passes = len(times) // clips
    if not passes:
        return times[0] - began, times[-1] + work[-1] - began, audio_s * len(times) / clips
    last = passes * clips - 1
    return times[0] - began, times[last] + work[last] - began, audio_s * passes


def energy_j(seen: dict[str, Any], start_s: float, end_s: float) -> float | None:
    """The energy drawn in between, by the trapezoidal rule; None where no power is known."""
    known = [s for s in seen["samples"] if s["power_w"] != UNAVAILABLE]
    if not known or end_s <= start_s:
        return None
    times, power = (np.array([s[name] for s in known]) for name in ("at_s", "power_w"))
    inside = times[(times > start_s) & (times < end_s)]
    at = np.concatenate([[start_s], inside, [end_s]])
    return float(np.trapezoid(np.interp(at, times, power), at))


def sustained(
    found: dict[str, list[float]], origin: float, rounds_s: Sequence[float], clips: int
) -> dict[str, Any]:
    """The field `sustained`. `ratio` is the last minute against the first (of less than two
    minutes, the halves), with each clip's time as a multiple of its median in the rounds: the same
    clips need not be in both."""
    times, at = np.array(found["end_to_end_s"]), np.array(found["at_s"])
    usual = np.median(np.reshape(rounds_s, (-1, clips)), axis=0).clip(LEAST_S)  # (clips,)
    relative = times / usual[np.arange(len(times)) % clips]
    edge = min(EDGE_S, (at[-1] - at[0]) / 2)
    first, last = at <= at[0] + edge, at >= at[-1] - edge
    return {
        "minutes": float(at[-1] + times[-1] - at[0]) / 60,
        "end_to_end_s": found["end_to_end_s"],
        "at_s": [round(one, 3) for one in (at - origin).tolist()],
        "first_minute_s": float(np.median(times[first])),
        "last_minute_s": float(np.median(times[last])),
        "ratio": float(np.median(relative[last]) / np.median(relative[first])),
    }


# --------------------------------------------------------------------------- was the run disturbed?


def unstable_because(
    result: dict[str, Any], samples: Sequence[dict[str, Any]], debug: Iterable[str]
) -> list[str]:
    """Why the times should not be trusted, in sentences with numbers; nothing where they can be, or
    where there are none: an emulator's are not told anyway."""
    if result["emulated"]:
        return []
    # a phone's load is that of all its cores, and of those that the run keeps to
    cores = None if "pinned_to" in result["device"] else result["device"].get("cores")
    found = [
        disagreement(result["end_to_end_s"], result["rounds"]),
        heat(samples),
        throttling(samples),
        crowding(samples, cores if isinstance(cores, int) else None),
        background(samples),
        battery(samples),
        swapping(samples),
        *(f"{sign}, which is slower" for sign in dict.fromkeys(debug)),
    ]
    return [sentence for sentence in found if sentence is not None]


def values(samples: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """What is known of a reading."""
    return [sample[name] for sample in samples if sample[name] != UNAVAILABLE]


def disagreement(times: Sequence[float], rounds: int) -> str | None:
    middles = np.median(by_round(np.asarray(times, float), rounds), axis=1)
    spread = float(np.ptp(middles) / np.median(middles)) if np.median(middles) > 0 else 0.0
    if spread <= UNSTABLE_SPREAD:
        return None
    return f"the medians of the {rounds} rounds lie {spread:.0%} apart"


def heat(samples: Sequence[dict[str, Any]]) -> str | None:
    """A clock that was higher before, on a machine that has grown warmer."""
    known = [
        (sample["temperature_c"], max(clocks))
        for sample in samples
        if sample["temperature_c"] != UNAVAILABLE
        and sample["frequency_hz"] != UNAVAILABLE
        and (clocks := [clock for clock in sample["frequency_hz"] if clock != UNAVAILABLE])
    ]
    if len(known) < LEAST_SAMPLES:
        return None
    quarter = len(known) // 4  # of which one moment, such as a core alone at its turbo, is little
    (cold, fast), (warm, slow) = np.median([known[:quarter], known[-quarter:]], axis=1)
    if warm < cold + WARMER_C or slow >= SLOWER * fast:
        return None
    return (
        f"the temperature rose from {cold:.0f} to {warm:.0f} °C and the clock fell from "
        f"{fast / 1e6:.0f} to {slow / 1e6:.0f} MHz"
    )


def throttling(samples: Sequence[dict[str, Any]]) -> str | None:
    """What the system itself says: a Raspberry Pi in bits, others in words."""
    told = values(samples, "throttled")
    bits = [int(text, 16) for text in told if re.fullmatch(r"0x[0-9a-fA-F]{1,8}", text)]
    if len(bits) < len(told):
        words = list(dict.fromkeys(told))
        if slowed := [word for word in words if word in SLOWED]:
            return f"the system said of throttling: {', '.join(slowed)}"
        if len(words) < 2:
            return None
        return f"what the system says of throttling changed: {' -> '.join(words[:4])}"
    now = 0
    for state in bits:
        # a bit of the past that was not set when the run began came up between two samples
        now |= state & 0xF | (state & ~bits[0]) >> 16 & 0xF
    if not now:
        return None
    names = [name for place, name in enumerate(FIRMWARE) if now >> place & 1]
    return f"the firmware reported {', '.join(names)} (0x{max(bits):x})"


def crowding(samples: Sequence[dict[str, Any]], cores: int | None) -> str | None:
    load = max(values(samples, "load_average"), default=0)
    if cores is None or load <= cores + SPARE_LOAD:
        return None
    return f"the load average was {load:.1f} on {cores} cores"


def background(samples: Sequence[dict[str, Any]]) -> str | None:
    known = values(samples, "others_cores")
    if not known or np.mean(known) <= BUSY_CORES:
        return None
    return f"other programs took {np.mean(known):.2f} of a core"


def battery(samples: Sequence[dict[str, Any]]) -> str | None:
    low = [
        share
        for sample in samples
        if (share := sample["battery_share"]) != UNAVAILABLE
        and share < LEAST_BATTERY
        and sample["charging"] is not True
    ]
    return f"the battery was down to {min(low):.0%}" if low else None


def swapping(samples: Sequence[dict[str, Any]]) -> str | None:
    most = max(values(samples, "swapped_bytes"), default=0)
    return f"{most / 1e6:.1f} MB of the program lay in swap" if most else None


def notes(
    result: dict[str, Any], lasting: Sequence[dict[str, Any]], share: float | None
) -> list[str]:
    """What is worth knowing and makes no result unstable; `lasting` are the samples of the
    sustained run, which is there to show what warmth does."""
    found = []
    governor = result.get("governor", UNAVAILABLE)
    if governor not in ("performance", UNAVAILABLE):
        found.append(f"the clock's governor was {governor}")
    cost = result.get("telemetry", {}).get("sampler_cores", UNAVAILABLE)
    if cost != UNAVAILABLE and cost > DEAR_CORES:
        found.append(f"watching took {cost:.1%} of a core")
    reached = relative_interval(result["end_to_end_s"], result["rounds"])
    if share is not None and reached > share:
        found.append(
            f"the 95 % interval of the median is {reached:.1%} of it after {result['rounds']} "
            f"rounds; {share:.1%} was asked for"
        )
    if "sustained" in result and not result["emulated"]:
        minutes, ratio = (result["sustained"][name] for name in ("minutes", "ratio"))
        heard = [s for s in (heat(lasting), throttling(lasting)) if s is not None]
        found.append(
            "; ".join([f"{ratio:.2f} times the time at the end of {minutes:.2g} minutes", *heard])
        )
    return found
