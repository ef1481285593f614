"""Limits for --fail-if: `total>400ms` or `wer>5%` for a result, `total>1.1x` for a comparison.

An unknown value, such as a time on an emulated device, exceeds every limit: a build must not pass
because nothing was measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.result import COLUMNS
from export.problem import Problem

TIMES = {title.removesuffix(" ms"): stage for title, stage in COLUMNS.items()}
SIZES = {"size": "artifact_bytes", "peak": "peak_rss_bytes"}
RATES = {"wer": "wer", "cer": "cer"}
COUNTS = {"parameters": "parameters"}
NAMES = TIMES | SIZES | RATES | COUNTS
"""Name in a limit (as in table titles) -> field of a result."""
UNITS = (
    (TIMES, {"ms": 1e-3, "s": 1.0}),
    (SIZES, {"kB": 1e3, "MB": 1e6, "GB": 1e9}),
    (RATES, {"%": 1e-2}),
    (COUNTS, {"k": 1e3, "M": 1e6}),
)
FACTOR = {"x": 1.0}
LIMIT = re.compile(r"\s*([a-z-]+)\s*>\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]+)\s*")


@dataclass(frozen=True)
class Limit:
    """The largest allowed value of a field, or the largest allowed ratio."""

    text: str
    """The limit as the user wrote it."""
    field: str
    """Field of a result."""
    most: float
    """The largest allowed value, in `unit`."""
    unit: str
    scale: float
    """The unit in seconds, bytes, parameters or as a share; 1 for a ratio."""

    def broken_by(self, value: float | None) -> str | None:
        """Return the value as text if it exceeds the limit or is unknown, else None."""
        if value is None:
            return "unknown"
        broken = value > self.most * self.scale
        return f"{value / self.scale:.4g}{self.unit}" if broken else None


def parse(text: str, relative: bool = False) -> Limit:
    """Parse a limit; in a comparison (`relative`) it is a factor. Raises Problem if invalid."""
    name, most, unit = match.groups() if (match := LIMIT.fullmatch(text)) else ("", "", "")
    names = [known for known in NAMES if not (relative and known in RATES)]
    units = next((units for names, units in UNITS if name in names), {})
    units = FACTOR if relative else units
    if name not in names or unit not in units:
        example = "total>1.1x or peak>1x" if relative else "total>400ms, peak>125MB or wer>5%"
        raise Problem(
            f"--fail-if {text!r} is not a valid limit",
            hint=f"write {example}; the names are {', '.join(names)}",
        )
    return Limit(text.strip(), NAMES[name], float(most), unit, units[unit])


def broken(results: Sequence[dict[str, Any]], limits: Sequence[Limit]) -> list[str]:
    """Return a sentence for each limit that a result exceeds."""
    return [
        f"{result['name']} on {result['device']['name']} fails {limit.text}: it is {value}"
        for result in results
        for limit in limits
        if (value := limit.broken_by(value_of(result, limit.field))) is not None
    ]


def broken_pairs(compared: dict[str, Any], limits: Sequence[Limit]) -> list[str]:
    """Return a sentence for each limit that a comparison exceeds, except for insignificant
    differences; `compared` is what benchmarks.compare.compare returns."""
    sentences = []
    for other in compared["others"]:
        rows = {measure["measure"]: measure for measure in other["measures"]}
        for limit in limits:
            row = rows.get(limit.field, {"ratio": None, "real": None, "verdict": "not measured"})
            if (value := limit.broken_by(row["ratio"])) is not None and row["real"] is not False:
                who = f"{other['name']} on {other['device']}"
                sentences.append(f"{who} fails {limit.text}: it is {value} ({row['verdict']})")
    return sentences


def value_of(result: dict[str, Any], field: str) -> float | None:
    """Return a result's value for a limit, or None if it is unknown."""
    if field in TIMES.values():
        return None if result["emulated"] else result["medians"].get(field)
    if field in RATES.values() and result.get("forced_tokens"):
        return None
    value = result[field]
    return value if isinstance(value, int | float) else None


def refuse(sentences: Sequence[str]) -> None:
    """Raise Problem if there are sentences about exceeded limits."""
    if sentences:
        raise Problem(
            "; ".join(sentences), hint="the results are written; see them with `edgewhisper report`"
        )
