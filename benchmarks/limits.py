"""Limits that a result must keep: `total>400ms`, `wer>5%`; in a comparison `total>1.1x`.

What cannot be known, such as a time on an emulated device, breaks the limit: a build that is green
because nothing was measured says nothing.
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
"""What a limit may be set to: how tables call it -> the field of a result."""
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
    text: str
    """As it was asked for."""
    field: str
    """Of a result."""
    most: float
    """In its unit."""
    unit: str
    scale: float
    """The unit in seconds, bytes, parameters or as a share; 1 of a factor."""

    def broken_by(self, value: float | None) -> str | None:
        """The value in the limit's unit, where it is above it or not known; else None."""
        if value is None:
            return "not known"
        broken = value > self.most * self.scale
        return f"{value / self.scale:.4g}{self.unit}" if broken else None


def parse(text: str, relative: bool = False) -> Limit:
    """A limit as a user writes it; one of a comparison is a factor. Raises Problem for others."""
    name, most, unit = found.groups() if (found := LIMIT.fullmatch(text)) else ("", "", "")
    names = [known for known in NAMES if not (relative and known in RATES)]
    units = next((units for names, units in UNITS if name in names), {})
    units = FACTOR if relative else units
    if name not in names or unit not in units:
        example = "total>1.1x or peak>1x" if relative else "total>400ms, peak>125MB or wer>5%"
        raise Problem(
            f"--fail-if {text!r} is no limit",
            hint=f"write {example}; limits can be set to {', '.join(names)}",
        )
    return Limit(text.strip(), NAMES[name], float(most), unit, units[unit])


def broken(results: Sequence[dict[str, Any]], limits: Sequence[Limit]) -> list[str]:
    """A sentence for each limit that a result does not keep."""
    return [
        f"{result['name']} on {result['device']['name']} breaks {limit.text}: it is {found}"
        for result in results
        for limit in limits
        if (found := limit.broken_by(value_of(result, limit.field))) is not None
    ]


def broken_pairs(compared: dict[str, Any], limits: Sequence[Limit]) -> list[str]:
    """Likewise of benchmarks.compare.compare; a difference that may be noise breaks no limit."""
    sentences = []
    for other in compared["others"]:
        rows = {measure["measure"]: measure for measure in other["measures"]}
        for limit in limits:
            row = rows.get(limit.field, {"ratio": None, "real": None, "verdict": "not measured"})
            if (found := limit.broken_by(row["ratio"])) is not None and row["real"] is not False:
                who = f"{other['name']} on {other['device']}"
                sentences.append(f"{who} breaks {limit.text}: it is {found} ({row['verdict']})")
    return sentences


def value_of(result: dict[str, Any], field: str) -> float | None:
    """A result's value for a limit, or None where nobody knows it."""
    if field in TIMES.values():
        return None if result["emulated"] else result["medians"].get(field)
    if field in RATES.values() and result.get("forced_tokens"):
        return None
    found = result[field]
    return found if isinstance(found, int | float) else None


def refuse(sentences: Sequence[str]) -> None:
    """Raise the letter about limits that are broken, if any are."""
    if sentences:
        raise Problem(
            "; ".join(sentences), hint="the results are written; see them with `edgewhisper report`"
        )
