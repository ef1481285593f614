"""The targets of `compress`: sizes, a predicted latency and an error rate, and the limits they set.

A target is compared along an axis: "parameters", "macs" or "latency", and always "wer".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.latency import Table, find_table
from benchmarks.result import in_milliseconds
from export.cost import STORED_BYTES, window_macs
from export.problem import Problem

UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s)\s*")
SIZES = ("parameters", "macs", "latency", "bytes")
NAMES = {
    "parameters": "parameters",
    "macs": "MACs",
    "latency": "ms of predicted latency",
    "bytes": "predicted bytes",
    "wer": "dev WER",
}
"""Axis -> its name in messages."""


@dataclass(frozen=True)
class Amount:
    """A count, or a share of the model's count before compression."""

    number: float
    share: bool = False

    def of(self, whole: int) -> int:
        """Return the amount as a count, for a model that has `whole`."""
        return math.floor(self.number * whole) if self.share else round(self.number)


@dataclass(frozen=True)
class Targets:
    """What the compressed model must meet. None: not asked for."""

    parameters: Amount | None = None
    macs: Amount | None = None
    """Multiply-accumulates of one full window and 32 tokens."""
    latency_s: float | None = None
    """Predicted seconds for one full window and 32 tokens on a device."""
    wer_loss: float | None = None
    """Points of dev WER that may be lost: 1.0 is one word in a hundred."""
    bytes: Amount | None = None
    """Predicted bytes of the artifact's graphs and weights in `precision`."""
    precision: str = "int8"
    front: str | None = None
    """Size over which the trials of a front are spread."""

    def axes(self) -> list[str]:
        """Return the axes of the search: the sizes that have a target, and "wer"."""
        amounts = (self.parameters, self.macs, self.latency_s, self.bytes)
        sizes = [name for name, amount in zip(SIZES, amounts, strict=True) if amount is not None]
        return [*(sizes or [self.front or "parameters"]), "wer"]


def parse(
    params: str | None,
    macs: str | None,
    max_wer_loss: float | None,
    latency: str | None = None,
    size: str | None = None,
    precision: str | None = None,
) -> Targets:
    """Return the targets given on the command line. Raises Problem for invalid values."""
    if precision is not None and precision not in STORED_BYTES:
        raise Problem(
            f"unknown --precision {precision!r}", hint=f"choose one of {', '.join(STORED_BYTES)}"
        )
    if precision is not None and size is None:
        raise Problem(
            f"--precision {precision} is for --target-bytes, which is not given",
            hint="add --target-bytes 30M, or leave --precision out",
        )
    if max_wer_loss is not None and not 0 <= max_wer_loss <= 100:
        raise Problem(
            f"--max-wer-loss {max_wer_loss:g} is not between 0 and 100 points",
            hint="1.0 is one point: from 5 % to 6 % of the words",
        )
    return Targets(
        None if params is None else parse_amount("--target-params", params),
        None if macs is None else parse_amount("--target-macs", macs),
        None if latency is None else parse_time("--target-latency", latency),
        max_wer_loss,
        None if size is None else parse_amount("--target-bytes", size.strip().removesuffix("B")),
        precision or Targets.precision,
    )


def parse_amount(option: str, text: str) -> Amount:
    """Return the amount in a text like "900000", "0.9M" or "60%". Raises Problem."""
    bare, share = text.strip().removesuffix("%"), text.strip().endswith("%")
    unit = 1.0
    if not share and bare[-1:].lower() in UNITS:
        unit, bare = UNITS[bare[-1].lower()], bare[:-1]
    try:
        number = float(bare) * unit / (100 if share else 1)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or (not share and number < 1):
        raise Problem(
            f"{option} {text} is neither a count nor a share",
            hint="write 900000, 0.9M or 60% (of the model before compression)",
        )
    return Amount(number, share)


def parse_time(option: str, text: str) -> float:
    """Return the seconds in a text like "400ms" or "0.4s". Raises Problem."""
    match = TIME.fullmatch(text)
    seconds = float(match[1]) * (1e-3 if match[2] == "ms" else 1) if match else 0.0
    if not 0 < seconds < math.inf:
        raise Problem(f"{option} {text} is not a valid time", hint="write 400ms or 0.4s")
    return seconds


def table_of(latency: str | None, device: str | None, front: bool = False) -> Table | None:
    """Return the latency table of the device if a latency is a target, or the size of a front.

    Raises Problem if only one of the two options is given, or if there is no table.
    """
    if latency is None and device is None:
        return None
    if device is None:
        raise Problem(
            f"--target-latency {latency} needs a device",
            hint="add --device: `edgewhisper devices` lists the known ones",
        )
    if latency is None and not front:
        raise Problem(
            f"--device {device} has no effect without --target-latency or --front",
            hint="add --target-latency 400ms, or leave --device out: it is for `export` and "
            "`bench`",
        )
    return find_table(device)


def limits_of(targets: Targets, before: Mapping[str, Any]) -> dict[str, float]:
    """Return axis -> largest allowed value, infinite without a target.

    `before` are the measurements of the dense model. Raises Problem if that model meets a size or
    latency target already.
    """
    dense = position(before)
    limits = dict.fromkeys(targets.axes(), math.inf)
    for axis in limits.keys() & {"parameters", "macs", "bytes"}:
        amount = getattr(targets, axis)
        limits[axis] = math.inf if amount is None else amount.of(int(dense[axis]))
    if targets.latency_s is not None:
        limits["latency"] = targets.latency_s
    for axis in SIZES:
        if dense.get(axis, math.inf) <= limits.get(axis, math.inf) < math.inf:
            raise Problem(
                f"the target of {with_unit(axis, limits[axis])} is met already: the model has "
                f"{amount_text(axis, dense[axis])} before compression",
                hint="set a lower target, or leave this one out",
            )
    if targets.wer_loss is not None:
        limits["wer"] = dense["wer"] + targets.wer_loss / 100
    return limits


def position(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return axis -> value of the measurements of a model, see job.measure."""
    return {
        "parameters": measured["parameters"]["total"],
        "macs": window_macs(measured["macs"]),
        **({"latency": measured["latency_s"]} if "latency_s" in measured else {}),
        "bytes": measured.get("predicted_bytes", math.inf),
        "wer": measured["dev"]["wer"],
    }


def listed(values: Mapping[str, float]) -> str:
    """Return values like "774,336 parameters and 5.20 % dev WER"."""
    return " and ".join(with_unit(axis, value) for axis, value in values.items())


def with_unit(axis: str, value: float) -> str:
    """Return a value with the name of its axis, such as "774,336 parameters"."""
    return f"{amount_text(axis, value)} {NAMES[axis]}"


def amount_text(axis: str, value: float) -> str:
    """Return a value in the unit of NAMES."""
    if axis == "latency":
        return in_milliseconds(value)
    return f"{100 * value:.2f} %" if axis == "wer" else f"{value:,.0f}"
