"""Measure a device's latency table: time microbenchmarks there and fit the cost of each operator.

A microbenchmark is an ONNX graph of one operator and size (export/onnx/probes.py). For each kind of
operator,

    seconds = overhead + a * multiply-accumulates + b * bytes

is fitted by least squares of the relative errors, with all three coefficients at least zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.latency import GRAPHS, STAGES, Cost, Table, counted, known_precision
from devices.device import (
    RUNNER,
    Device,
    Place,
    clean,
    device_cores,
    load_profile,
    open_device,
    run_runner,
    thread_option,
)
from export.onnx.operators import EMPTY, KINDS, Operator, of_a_token, work
from export.problem import Problem

ROUNDS = 3
MAX_S, MAX_TIMES = 3600.0, 1000
"""The longest time, and the most times per microbenchmark, that are accepted as data."""
TIMEOUT_S = 1800.0
"""Time limit of one process."""

Operators = Mapping[str, tuple[Operator, str]]
"""Name of a microbenchmark -> its operator and precision."""


# --------------------------------------------------------------------------------------- measure


def calibrate(
    place: Place,
    precision: str | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    rounds: int = ROUNDS,
) -> Table:
    """Measure a device and return its latency table.

    By default the precision is the profile's and all cores are used. A round is one process that
    runs every microbenchmark.

    Raises Problem for an emulated device, a browser, an unknown precision or an invalid answer, and
    passes on the device's errors.
    """
    profile = load_profile(place.device)
    precision = known_precision(precision or profile.precision)
    if profile.kind == "browser":
        raise Problem(
            "a browser page runs whole artifacts, not single operators",
            hint="calibrate the phone over adb",
        )
    with open_device(*place, say=say) as device:
        machine = device.describe()
        if machine["emulated"]:
            raise Problem(
                f"{place} is emulated; times from an emulator do not apply to a real device",
                hint="calibrate a real device, or this machine with --device local",
            )
        threads = threads or device_cores(machine)
        operators = microbenchmarks(precision)
        where = f"in {precision} on {counted(threads, 'thread')}"
        say(f"{place}: {len(operators)} microbenchmarks {where}")
        send(device, operators)
        answers = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            answers.append(run_all(device, operators, threads))
    times = {
        operators[name][0]: median(t for answer in answers for t in answer["probes"][name])
        for name in operators
    }
    return Table(
        profile.name,
        precision,
        threads,
        fit(times, precision),
        clean(machine),
        answers[-1]["versions"],
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def microbenchmarks(precision: str) -> dict[str, tuple[Operator, str]]:
    """Return the microbenchmarks of a table. Each name begins with the graph it belongs to, whose
    memory settings it gets."""
    from export.onnx.probes import grid

    return {
        f"{GRAPHS[of_a_token(operator)]}-{number:03}": (operator, precision)
        for number, operator in enumerate(grid())
    }


def probe(device: Device, operators: Operators, threads: int | None) -> dict[str, list[float]]:
    """Return the seconds that a device takes for each microbenchmark."""
    send(device, operators)
    times: dict[str, list[float]] = run_all(device, operators, threads)["probes"]
    return times


def send(device: Device, operators: Operators) -> None:
    """Push the runner and a graph for every microbenchmark."""
    from export.onnx.probes import write

    device.push(RUNNER, "runner")
    with tempfile.TemporaryDirectory() as folder:
        for name, (operator, precision) in operators.items():
            write(Path(folder), name, operator, precision)
        device.push(Path(folder), "probes")


def run_all(device: Device, operators: Operators, threads: int | None) -> dict[str, Any]:
    """Run all microbenchmarks in one process; return their validated times and the versions."""
    words = ["probe", "probes", *thread_option(threads)]
    answer = run_runner(device, words, timeout_s=TIMEOUT_S)
    times, versions = answer.get("probes"), answer.get("versions")
    if not (
        isinstance(times, dict)
        and times.keys() == operators.keys()
        and all(are_times(values) for values in times.values())
        and isinstance(versions, dict)
        and all(isinstance(version, str) for version in versions.values())
    ):
        raise Problem(
            f"{device.name}: the runner's answer has no usable times of {len(operators)} "
            "microbenchmarks",
            hint="calibrate again; if the error stays, the answer comes from a program other than "
            "the runner",
        )
    return {"probes": times, "versions": clean(versions)}


def are_times(values: Any) -> bool:
    """Return whether a value is a non-empty list of positive times in seconds."""
    if not (isinstance(values, list) and 0 < len(values) <= MAX_TIMES):
        return False
    return all(isinstance(time, float) and 0 < time < MAX_S for time in values)


# ------------------------------------------------------------------------------------------- fit


def fit(times: Mapping[Operator, float], precision: str) -> dict[str, Cost]:
    """Return the cost of each kind of operator and of each stage's empty graph.

    `times` holds the seconds of a graph of each operator.
    """
    empty = {stage_of(o): seconds for o, seconds in times.items() if o.kind == EMPTY}
    kinds = {kind: [o for o in times if o.kind == kind] for kind in KINDS}
    costs = {
        kind: fit_kind(
            np.array([row(operator, precision) for operator in operators]),
            np.array([times[operator] for operator in operators]),
            np.array([empty[stage_of(operator)] for operator in operators]),
        )
        for kind, operators in kinds.items()
    }
    return {stage: Cost(empty[stage]) for stage in STAGES} | costs


def stage_of(operator: Operator) -> str:
    return STAGES[of_a_token(operator)]


def row(operator: Operator, precision: str) -> list[float]:
    """Return [copies of the operator in its graph, their multiply-accumulates, their bytes]."""
    from export.onnx.probes import copies

    count, done = copies(operator, precision), work(operator, precision)
    return [count, count * done.macs, count * done.bytes]


def fit_kind(rows: np.ndarray, seconds: np.ndarray, empty: np.ndarray) -> Cost:
    """Fit one kind of operator from rows (n, 3) and seconds (n,).

    `empty` (n,) holds the seconds of an empty graph, which are not part of the operator.
    """
    from scipy.optimize import nnls

    shares = rows / seconds[:, None]  # relative errors: 10 us count as much as 1 s
    sizes = np.linalg.norm(shares, axis=0)
    sizes[sizes == 0] = 1  # a kind without multiply-accumulates
    coefficients = nnls(shares / sizes, 1 - empty / seconds)[0] / sizes
    residuals = empty / seconds + shares @ coefficients - 1
    overhead, per_mac, per_byte = map(float, coefficients)
    return Cost(overhead, per_mac, per_byte, [round(float(share), 4) for share in residuals])
