"""Is the difference between two results real? With intervals, or a letter why nobody can say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.result import COLUMNS, in_milliseconds, other_texts
from benchmarks.timing import ENOUGH_ROUNDS, ratio
from benchmarks.wer import interval
from export.problem import Problem

SIZES = ("artifact_bytes", "peak_rss_bytes", "parameters")

MUST_MATCH = {
    "format": "result formats",
    "clips_hash": "clip sets",
    "normalizer": "normalizers",
    "emulated": "kinds of machine (emulated and real)",
    "forced_tokens": "numbers of forced tokens",
}


def compare(results: Sequence[dict[str, Any]], across_versions: bool = False) -> dict[str, Any]:
    """Every further result against the first on its device; those against the first of all.

    {"base": name, "others": [{"name", "device", "base_device", "measures": [...]}], "rows": a
    table's rows}; the measures are compare_pair's. Raises Problem for fewer than two results, and
    as compare_pair does.
    """
    if len(results) < 2:
        raise Problem(
            f"{len(results)} result was given; two are needed",
            hint="name a file with several lines, or several files",
        )
    found, bases = [], {device_of(results[0]): results[0]}
    for other in results[1:]:
        device = device_of(other)
        base = bases.get(device, results[0])
        other_place = device not in bases  # whose python and runtime need not be the same
        found.append(
            {
                "name": other["name"],
                "device": device,
                "base_device": device_of(base),
                "measures": compare_pair(base, other, across_versions or other_place),
            }
        )
        bases.setdefault(device, other)
    rows = [
        table_row(entry, measure, len(bases) > 1)
        for entry in found
        for measure in entry["measures"]
    ]
    return {"base": results[0]["name"], "others": found, "rows": rows}


def device_of(result: dict[str, Any]) -> str:
    return str(result["device"].get("name", "unavailable"))


def compare_pair(
    base: dict[str, Any], other: dict[str, Any], across_versions: bool = False
) -> list[dict[str, Any]]:
    """One entry a measure: {measure, base, other, ratio, interval, real, verdict}.

    `ratio` is other / base; for the word error rate `difference` in points stands in its place.
    `real` is true where the 95 % interval excludes no difference, null where none is known. A
    verdict ends in "unstable" where rounds disagreed: the machine was busy, and a busy machine does
    not slow all programs by the same factor; `cpu_s` is then the better witness. `ratio` is null
    for the times of a rival that wrote other texts than its checkpoint; the verdict says so.
    Raises Problem where the results do not measure the same thing; `across_versions` allows
    different versions of the same library.
    """
    refuse_mismatch(base, other, across_versions)
    sizes = [size_row(name, base, other) for name in SIZES]
    stages = [] if base["emulated"] else [time_row(s, base, other) for s in COLUMNS.values()]
    accuracy = [] if base.get("forced_tokens") else [wer_row(base, other)]
    return accuracy + [row for row in stages + sizes if row is not None]


def refuse_mismatch(base: dict[str, Any], other: dict[str, Any], across_versions: bool) -> None:
    """Raise the letter for results that must not be set side by side."""
    for field, what in MUST_MATCH.items():
        if base.get(field) != other.get(field):
            raise Problem(
                f"{base['name']} and {other['name']} were measured on different {what}: "
                f"{short(base.get(field))} and {short(other.get(field))}",
                hint="bench both in one call, on the same clips and with the same normalizer",
            )
    common = base["versions"].keys() & other["versions"].keys()
    changed = [n for n in sorted(common) if base["versions"][n] != other["versions"][n]]
    if changed and not across_versions:
        pairs = (f"{n} {base['versions'][n]} and {other['versions'][n]}" for n in changed)
        raise Problem(
            f"{base['name']} and {other['name']} were measured with different versions: "
            f"{', '.join(pairs)}",
            hint="bench both again with one installation, or say that versions may differ",
        )


def short(value: Any) -> str:
    """A value for a letter; of a hash the beginning is enough."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def time_row(stage: str, base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """A stage's row, or None where one of the two has no such stage."""
    if not (base[stage] and other[stage]):
        return None
    medians = {"base": base["medians"][stage], "other": other["medians"][stage]}
    if why := no_ratio(base, other):
        return {"measure": stage, **medians, **NO_RATIO, "verdict": why}
    value, interval = ratio(other[stage], base[stage], other["rounds"], base["rounds"])
    enough = min(base["rounds"], other["rounds"]) >= ENOUGH_ROUNDS
    real = not interval[0] <= 1 <= interval[1] if enough else None
    noise = "; unstable" if base["unstable"][stage] or other["unstable"][stage] else ""
    return {
        "measure": stage,
        **medians,
        "ratio": value,
        "interval": list(interval),
        "real": real,
        "verdict": time_verdict(value, interval, real) + noise,
    }


NO_RATIO = {"ratio": None, "interval": None, "real": None}


def no_ratio(*results: dict[str, Any]) -> str | None:
    """Say which of the results is a rival's with other texts than its checkpoint's, and which."""
    reasons = [f"{result['name']}: {why}" for result in results if (why := other_texts(result))]
    return "; ".join(reasons) or None


def time_verdict(value: float, interval: tuple[float, float], real: bool | None) -> str:
    """A row in words."""
    if real is None:
        return f"fewer than {ENOUGH_ROUNDS} rounds: cannot be said"
    if not real:
        return "no difference shown"
    low, high = interval
    if value < 1:
        return f"{1 / value:.2f} times faster ({1 / high:.2f} to {1 / low:.2f})"
    return f"{value:.2f} times slower ({low:.2f} to {high:.2f})"


def wer_row(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The difference of word error rates, by bootstrap over the clips, pair by pair.

    Bisani and Ney, Bootstrap estimates for confidence intervals in ASR performance evaluation,
    2004: both systems are drawn on the same clips, so what makes a clip hard cancels.
    """
    words = np.array(base["clip_words"])
    excess = np.array(other["clip_errors"]) - np.array(base["clip_errors"])  # (clips,)
    low, high = (100 * bound for bound in interval(excess, words))
    difference, real = 100 * (other["wer"] - base["wer"]), not low <= 0 <= high
    worse = "worse" if difference > 0 else "better"
    said = f"{abs(difference):.1f} points {worse}" if real else "no difference shown"
    return {
        "measure": "wer",
        "base": base["wer"],
        "other": other["wer"],
        "difference": difference,
        "interval": [low, high],
        "real": real,
        "verdict": f"{said} ({low:+.1f} to {high:+.1f} points)",
    }


def size_row(name: str, base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """A size's row; sizes are counted, so every difference is real. None where one is unknown."""
    before, after = base[name], other[name]
    if not (isinstance(before, int) and isinstance(after, int)):
        return None
    value = after / before
    word = "equal" if value == 1 else f"{value:.2f} times as large"
    return {
        "measure": name,
        "base": before,
        "other": after,
        "ratio": value,
        "interval": None,
        "real": value != 1,
        "verdict": word,
    }


def table_row(entry: dict[str, Any], measure: dict[str, Any], places: bool) -> dict[str, str]:
    """A measure as texts for a table, in milliseconds, per cent and megabytes; with `places`, it
    says which device is set against which."""
    kind = measure["measure"]
    pair = dict.fromkeys([entry["device"], entry["base_device"]])
    return {
        "model": entry["name"],
        **({"device": " : ".join(pair)} if places else {}),
        "measure": TITLES.get(kind, kind),
        "base": number(kind, measure["base"]),
        "this": number(kind, measure["other"]),
        "verdict": measure["verdict"],
    }


TITLES = {stage: title for title, stage in COLUMNS.items()} | {
    "wer": "WER %",
    "artifact_bytes": "size MB",
    "peak_rss_bytes": "peak MB",
}


def number(kind: str, value: float) -> str:
    """A measured value in the unit of its title."""
    if kind == "wer":
        return f"{100 * value:.1f}"
    if kind.endswith("_bytes"):
        return f"{value / 1e6:.2f}"
    return f"{value:,}" if kind == "parameters" else in_milliseconds(value)
