"""The Pareto front of a search's trials, the choice among them, pareto.json and its plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.latency import Table
from benchmarks.plots import figure, wer_against_size
from benchmarks.result import in_milliseconds
from edgewhisper.guard import exceeds, points_lost
from edgewhisper.search import Point, Trial
from edgewhisper.targets import Targets
from export.cost import window_macs

if TYPE_CHECKING:
    from edgewhisper.job import Job

FORMAT = 1
PARETO = "pareto.json"
PLOT = "front.png"
KEYS = {"latency": "latency_s", "bytes": "predicted_bytes"}
"""Axis -> its key in pareto.json, if that is another name."""
PLOTTED = {
    "parameters": (1e-6, "parameters, millions"),
    "macs": (1e-9, "multiply-accumulates of one window and 32 tokens, billions"),
    "latency": (1e3, "predicted latency of one window and 32 tokens, ms"),
    "bytes": (1e-6, "predicted size of the artifact, MB"),
}
"""Axis -> factor and title in the plot."""


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other trial dominates; of equal ones the first."""
    good = [trial for trial in trials if succeeded(trial)]
    return [
        trial
        for number, trial in enumerate(good)
        if not any(dominates(other, trial) for other in good)
        and trial.values not in [earlier.values for earlier in good[:number]]
    ]


def succeeded(trial: Trial) -> bool:
    """Return whether the recipe could run with the trial's values."""
    return trial.record.get("refused") is None


def dominates(one: Trial, other: Trial) -> bool:
    """Return whether `one` is at most as large on every axis, and smaller on one."""
    return one.values != other.values and all(
        a <= b for a, b in zip(one.values, other.values, strict=True)
    )


def choose(trials: Sequence[Trial], limits: Mapping[str, float]) -> Trial | None:
    """Return the smallest trial within all limits, or None.

    If only sizes are limited, return the most accurate trial.
    """
    good = [trial for trial in front(trials) if excess(trial.values, limits) == 0]
    if not good:
        return None
    if limits["wer"] == math.inf:
        return min(good, key=lambda trial: (trial.values[-1], trial.values))
    return min(good, key=lambda trial: trial.values)


def excess(values: Sequence[float], limits: Mapping[str, float]) -> float:
    """Return how far values exceed the limits; 0 if they are within all limits.

    The excess of a size is a share of its limit, that of WER an absolute difference.
    """
    total = 0.0
    for value, (axis, limit) in zip(values, limits.items(), strict=True):
        over = max(0.0, value - limit - 1e-9)
        total += over if axis == "wer" else over / limit
    return total


# ------------------------------------------------------------------------------- pareto.json


def trial_records(trials: Sequence[Trial], chosen: Trial, job: Job) -> list[dict[str, Any]]:
    """Return the entries of pareto.json, one for each trial.

    "checkpoint" is the folder of a trial on the front: "." for the chosen one.
    """
    on_front = front(trials)
    records = []
    for number, trial in enumerate(trials, start=1):
        kept = any(other is trial for other in on_front)
        folder = "." if trial is chosen else f"front/{number:02d}"
        records.append(
            {
                "trial": number,
                "values": trial.point,
                **measured_record(trial),
                **loss_record(trial, job),
                "front": kept,
                "chosen": trial is chosen,
                "checkpoint": folder if kept else None,
            }
        )
    return records


def measured_record(trial: Trial) -> dict[str, Any]:
    """Return the measurements of a trial, or the reason why its values could not be used."""
    if not succeeded(trial):
        return {"refused": trial.record["refused"]}
    measured = trial.record["measured"]
    return {
        "parameters": measured["parameters"]["total"],
        "macs": window_macs(measured["macs"]),
        **{name: measured[name] for name in ("latency_s", "predicted_bytes") if name in measured},
        "dev_wer": measured["dev"]["wer"],
        "dev_wer_interval": list(measured["dev"]["wer_interval"]),
    }


def loss_record(trial: Trial, job: Job) -> dict[str, Any]:
    """Return the points of dev WER that a trial lost, and whether the recipe allows this loss."""
    if not succeeded(trial):
        return {}
    points = points_lost(job.before["dev"]["wer"], trial.record["measured"]["dev"]["wer"])
    exceeded = exceeds(points, job.recipe.max_wer_loss)
    return {"wer_loss_points": points, "exceeded": exceeded}


def write_pareto(
    folder: Path,
    job: Job,
    targets: Targets,
    limits: Mapping[str, float],
    records: Sequence[dict[str, Any]],
    table: Table | None,
) -> None:
    """Write pareto.json and front.png into `folder`."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "recipe": job.recipe.name,
        "searched": {knob.field: asdict(knob.dimension) for knob in job.recipe.knobs},
        "asked": asdict(targets),
        "limits": {axis: limit for axis, limit in limits.items() if limit < math.inf},
        "max_wer_loss": job.recipe.max_wer_loss,
        "macs_are": "of one full window and 32 tokens",
        **({} if table is None else {"latency_is": f"of the same, predicted for {table}"}),
        "before": measured_record(Trial({}, (), {"measured": job.before})),
        "trials": list(records),
    }
    (folder / PARETO).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    axis = next(axis for axis in limits if axis != "wer")
    (folder / PLOT).write_bytes(plot(axis, [content["before"], *records]))


def plot(axis: str, records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of dev WER against the size on an axis, of the dense model and all trials."""
    scale, unit = PLOTTED[axis]
    points = [
        (scale * record[KEYS.get(axis, axis)], record["dev_wer"], record["dev_wer_interval"])
        for record in records
        if "refused" not in record
    ]
    return figure(lambda axes: wer_against_size(axes, points, unit))


# --------------------------------------------------------------------------- the printed table


def table_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return all trials as rows of a table, smallest first. Losses above the limit have a "!"."""
    times = any("latency_s" in record for record in records)
    ordered = sorted(records, key=lambda r: (r.get("parameters", math.inf), r["trial"]))
    return [
        {
            "trial": str(record["trial"]),
            **{name: value_text(value) for name, value in record["values"].items()},
            **size_cells(record, times),
            "front": "yes" if record["front"] else "",
            "checkpoint": "chosen" if record["chosen"] else record["checkpoint"] or "",
        }
        for record in ordered
    ]


def size_cells(record: Mapping[str, Any], times: bool) -> dict[str, str]:
    """Return the cells of the measurements; "-" for values that could not be used."""
    if "refused" in record:
        times_title = ["predicted ms"] if times else []
        titles = (
            "parameters",
            "MMAC",
            "predicted MB",
            *times_title,
            "dev WER %",
            "95 %",
            "points lost",
        )
        return dict.fromkeys(titles, "-")
    low, high = record["dev_wer_interval"]
    return {
        "parameters": f"{record['parameters']:,}",
        "MMAC": f"{record['macs'] / 1e6:,.1f}",
        "predicted MB": f"{record['predicted_bytes'] / 1e6:.1f}",
        **({"predicted ms": in_milliseconds(record["latency_s"])} if times else {}),
        "dev WER %": f"{100 * record['dev_wer']:.2f}",
        "95 %": f"{100 * low:.1f} to {100 * high:.1f}",
        "points lost": ("!" if record["exceeded"] else "") + f"{record['wer_loss_points']:.1f}",
    }


def point_text(point: Point) -> str:
    """Return the values of a trial like "step.1.rank = 32"."""
    return ", ".join(f"{name} = {value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """Return a value with at most four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
