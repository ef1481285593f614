"""Compare results: is a difference real? With intervals, or an error for incomparable results."""

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


def compare(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare every result with the first one on its device, and the first result of each further
    device with the first of all.

    Returns {"base": name, "others": [{"name", "device", "base_device", "measures"}], "rows": rows
    of a table}; `measures` is what compare_pair returns. Raises Problem for fewer than two results,
    and as compare_pair does.
    """
    if len(results) < 2:
        raise Problem(
            f"{len(results)} result was given; at least two are needed",
            hint="name a file with several lines, or several files",
        )
    entries, bases = [], {device_of(results[0]): results[0]}
    for other in results[1:]:
        device = device_of(other)
        base = bases.get(device, results[0])
        other_place = device not in bases  # another device may have other versions
        entries.append(
            {
                "name": other["name"],
                "device": device,
                "base_device": device_of(base),
                "measures": compare_pair(base, other, across_versions=other_place),
            }
        )
        bases.setdefault(device, other)
    rows = [
        table_row(entry, measure, len(bases) > 1)
        for entry in entries
        for measure in entry["measures"]
    ]
    return {"base": results[0]["name"], "others": entries, "rows": rows}


def device_of(result: dict[str, Any]) -> str:
    return str(result["device"].get("name", "unavailable"))


def compare_pair(
    base: dict[str, Any], other: dict[str, Any], across_versions: bool = False
) -> list[dict[str, Any]]:
    """Return one entry per measure: {measure, base, other, ratio, interval, real, verdict}.

    `ratio` is other / base; the word error rate has `difference` in points instead. `real` is true
    if the 95 % interval excludes "no difference", null if there is no interval. A verdict ends in
    "unstable" if rounds disagreed: a busy machine does not slow all programs equally, and `cpu_s`
    is then more reliable. `ratio` is null for the times of a rival whose texts differ from its
    checkpoint's.

    Raises Problem if the results do not measure the same thing; `across_versions` allows different
    versions of the same library.
    """
    refuse_mismatch(base, other, across_versions)
    sizes = [size_row(name, base, other) for name in SIZES]
    stages = [] if base["emulated"] else [time_row(s, base, other) for s in COLUMNS.values()]
    accuracy = [] if base.get("forced_tokens") else [wer_row(base, other)]
    return accuracy + [row for row in stages + sizes if row is not None]


def refuse_mismatch(base: dict[str, Any], other: dict[str, Any], across_versions: bool) -> None:
    """Raise Problem for results that cannot be compared."""
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
            hint="bench both again with one installation",
        )


def short(value: Any) -> str:
    """Return a value for an error message; hashes are cut to 12 characters."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def time_row(stage: str, base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Return a stage's entry, or None if one of the results did not measure it."""
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
    """Return which results are of rivals with other texts than their checkpoint, or None."""
    reasons = [f"{result['name']}: {why}" for result in results if (why := other_texts(result))]
    return "; ".join(reasons) or None


def time_verdict(value: float, interval: tuple[float, float], real: bool | None) -> str:
    """Return the verdict on a time: how many times faster or slower, with the interval."""
    if real is None:
        return f"undecided: fewer than {ENOUGH_ROUNDS} rounds"
    if not real:
        return "no significant difference"
    low, high = interval
    if value < 1:
        return f"{1 / value:.2f} times faster ({1 / high:.2f} to {1 / low:.2f})"
    return f"{value:.2f} times slower ({low:.2f} to {high:.2f})"


def wer_row(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the word error rate, with a paired bootstrap interval over clips.

    Both systems are resampled on the same clips, so the difficulty of a clip cancels (Bisani and
    Ney, Bootstrap estimates for confidence intervals in ASR performance evaluation, 2004).
    """
    words = np.array(base["clip_words"])
    excess = np.array(other["clip_errors"]) - np.array(base["clip_errors"])  # (clips,)
    low, high = (100 * bound for bound in interval(excess, words))
    difference, real = 100 * (other["wer"] - base["wer"]), not low <= 0 <= high
    worse = "worse" if difference > 0 else "better"
    verdict = f"{abs(difference):.1f} points {worse}" if real else "no significant difference"
    return {
        "measure": "wer",
        "base": base["wer"],
        "other": other["wer"],
        "difference": difference,
        "interval": [low, high],
        "real": real,
        "verdict": f"{verdict} ({low:+.1f} to {high:+.1f} points)",
    }


def size_row(name: str, base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Return a size's entry, or None if one is unknown. Sizes are exact: any difference is real."""
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
    """Return an entry as texts in milliseconds, per cent and megabytes; with `places`, also the
    compared devices."""
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
    """Return a value as text in the unit of its title."""
    if kind == "wer":
        return f"{100 * value:.1f}"
    if kind.endswith("_bytes"):
        return f"{value / 1e6:.2f}"
    return f"{value:,}" if kind == "parameters" else in_milliseconds(value)
