"""How long a model would take on a device, from the times that single operators take there.

A device runs one probe for each operator and size of export/onnx/probes.py, and of each kind of
operator

    seconds = overhead + a * multiply-accumulates + b * bytes

is fitted by least squares of the relative errors, none of the three below zero. The sum over the
operators of a model, as export/onnx/operators.py lists them, is its time: no export, no bench. What
the sum leaves out (caches that are colder, Python between the steps) is in the ratio of measured to
predicted times of artifacts that were benched there; with it the table is corrected.

A table holds for one device, precision and number of threads. It stands in the user's cache,
latency/DEVICE-PRECISION-THREADS.json.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.metadata import artifact_hash
from devices.device import (
    FAMILIES,
    RUNNER,
    Device,
    Place,
    clean,
    load_profile,
    open_device,
    run_runner,
)
from export import artifact
from export.files import cached, new_file
from export.onnx.operators import (
    EMPTY,
    KINDS,
    WEIGHT_BYTES,
    Operator,
    Shapes,
    encoder_operators,
    of_a_token,
    shapes_of,
    token_operators,
    work,
)
from export.problem import Problem

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
"""Of a table's file; another one where kinds of operators, or what is called their work, change."""
ROUNDS = 3
STAGES = ("encoder", "token")
"""What is predicted: one full window with its front end, and one token."""
GRAPHS = ("encoder", "decoder")
"""Of these stages; a probe has memory as the graph has whose name it begins with."""
MOST_S, MOST_TIMES, MOST_TABLE_BYTES = 3600.0, 1000, 1_000_000
"""Of what another machine says, and of a table's file."""
PROBING_S = 1800.0

Wanted = Mapping[str, tuple[Operator, str]]
"""Name of a probe -> its operator and precision."""


@dataclass(frozen=True)
class Cost:
    """What one kind of operator takes."""

    overhead_s: float
    s_per_mac: float = 0.0
    s_per_byte: float = 0.0
    residuals: list[float] = field(default_factory=list)
    """Of each probe, how far the fit is off it, as a share of what was measured."""

    def seconds(self, macs: float, moved_bytes: float) -> float:
        return self.overhead_s + self.s_per_mac * macs + self.s_per_byte * moved_bytes


@dataclass(frozen=True)
class Correction:
    """Measured times by predicted ones."""

    factor: float = 1.0
    results: int = 0
    """How many it is the median of."""


@dataclass(frozen=True)
class Table:
    device: str
    """The name of its profile."""
    precision: str
    threads: int
    operators: dict[str, Cost]
    machine: dict[str, Any]
    versions: dict[str, str]
    measured_at: str
    corrections: dict[str, Correction] = field(
        default_factory=lambda: dict.fromkeys(STAGES, Correction())
    )

    def __str__(self) -> str:
        return f"{self.device}, {self.precision}, {counted(self.threads, 'thread')}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --------------------------------------------------------------------------------------- measure


def calibrate(
    place: Place,
    precision: str | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    rounds: int = ROUNDS,
) -> Table:
    """Measure a device and fit its table; by default in the precision that pays there, on all
    cores. A round is one process that runs every probe.

    Raises the letters of the device, and Problem: an emulated device, a precision that ONNX graphs
    do not have, an answer that is none.
    """
    profile = load_profile(place.device)
    precision = known_precision(precision or profile.precision)
    if profile.kind == "browser":
        raise Problem(
            "a page runs artifacts, and no single operators", hint="calibrate the phone over adb"
        )
    with open_device(*place, say=say) as device:
        machine = device.describe()
        if machine["emulated"]:
            raise Problem(
                f"{place} is emulated, and the times of an emulator say nothing of a device",
                hint="calibrate a real one, or this machine with --device local",
            )
        cores = machine.get("cores")
        threads = threads or (cores if isinstance(cores, int) else 1)
        wanted = probes_in(precision)
        say(f"{place}: {len(wanted)} probes in {precision} on {counted(threads, 'thread')}")
        send(device, wanted)
        answers = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            answers.append(ask(device, wanted, threads))
    times = {name: [t for answer in answers for t in answer["probes"][name]] for name in wanted}
    return Table(
        profile.name,
        precision,
        threads,
        fit({wanted[name][0]: median(found) for name, found in times.items()}, precision),
        clean(machine),
        answers[-1]["versions"],
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def known_precision(name: str) -> str:
    """The name itself, if ONNX graphs have such a precision; else Problem is raised."""
    if name not in WEIGHT_BYTES:
        raise Problem(
            f"there is no precision {name!r} for ONNX",
            hint=f"choose one of: {', '.join(WEIGHT_BYTES)}",
        )
    return name


def probes_in(precision: str) -> dict[str, tuple[Operator, str]]:
    from export.onnx.probes import grid

    return {
        f"{GRAPHS[of_a_token(operator)]}-{number:03}": (operator, precision)
        for number, operator in enumerate(grid())
    }


def probe(device: Device, wanted: Wanted, threads: int | None) -> dict[str, list[float]]:
    """The seconds that a device takes for graphs of these operators."""
    send(device, wanted)
    times: dict[str, list[float]] = ask(device, wanted, threads)["probes"]
    return times


def send(device: Device, wanted: Wanted) -> None:
    """Push the runner, and a graph for every probe."""
    from export.onnx.probes import write

    device.push(RUNNER, "runner")
    with tempfile.TemporaryDirectory() as folder:
        for name, (operator, precision) in wanted.items():
            write(Path(folder), name, operator, precision)
        device.push(Path(folder), "probes")


def ask(device: Device, wanted: Wanted, threads: int | None) -> dict[str, Any]:
    """The times of one process; what another machine says is data, and checked."""
    words = ["probe", "probes", *(["--threads", str(threads)] if threads else [])]
    answer = run_runner(device, words, timeout_s=PROBING_S)
    times, versions = answer.get("probes"), answer.get("versions")
    if not (
        isinstance(times, dict)
        and times.keys() == wanted.keys()
        and all(are_times(found) for found in times.values())
        and isinstance(versions, dict)
        and all(isinstance(version, str) for version in versions.values())
    ):
        raise Problem(
            f"{device.name}: the runner's answer has no usable times of {len(wanted)} probes",
            hint="calibrate again; if it stays so, something else answers there than the runner",
        )
    return {"probes": times, "versions": clean(versions)}


def are_times(found: Any) -> bool:
    if not (isinstance(found, list) and 0 < len(found) <= MOST_TIMES):
        return False
    return all(isinstance(time, float) and 0 < time < MOST_S for time in found)


# ------------------------------------------------------------------------------------------- fit


def fit(times: Mapping[Operator, float], precision: str) -> dict[str, Cost]:
    """Kind -> its cost, from the seconds that a graph of each operator takes."""
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
    """How often an operator stands in its probe, with its work all together."""
    from export.onnx.probes import copies

    count, done = copies(operator, precision), work(operator, precision)
    return [count, count * done.macs, count * done.bytes]


def fit_kind(rows: np.ndarray, seconds: np.ndarray, empty: np.ndarray) -> Cost:
    """rows (probes, 3), seconds (probes,); what an empty graph takes is not the operator's."""
    from scipy.optimize import nnls

    shares = rows / seconds[:, None]  # relative errors count alike, of 10 us as of 1 s
    sizes = np.linalg.norm(shares, axis=0)
    sizes[sizes == 0] = 1  # a kind without products
    found = nnls(shares / sizes, 1 - empty / seconds)[0] / sizes
    residuals = empty / seconds + shares @ found - 1
    overhead, a_mac, a_byte = map(float, found)
    return Cost(overhead, a_mac, a_byte, [round(float(share), 4) for share in residuals])


# --------------------------------------------------------------------------------------- predict


def predict(table: Table, model: nn.Module, tokens: int = 32) -> float:
    """Seconds that the model as it stands takes for one full window and so many tokens."""
    found = stages(table, shapes_of(model))
    return found["encoder"] + tokens * found["token"]


def stages(table: Table, shapes: Shapes) -> dict[str, float]:
    """Seconds of each of STAGES, corrected by what was measured."""
    return {
        stage: table.corrections[stage].factor * seconds
        for stage, seconds in uncorrected(table, shapes).items()
    }


def uncorrected(table: Table, shapes: Shapes) -> dict[str, float]:
    """The sums over the operators, and of each graph what it takes to run any."""
    parts = (encoder_operators(shapes), token_operators(shapes))
    return {
        stage: table.operators[stage].overhead_s + sum(cost_of(table, each) for each in operators)
        for stage, operators in zip(STAGES, parts, strict=True)
    }


def cost_of(table: Table, operator: Operator) -> float:
    return table.operators[operator.kind].seconds(*work(operator, table.precision))


# --------------------------------------------------------------------------------------- correct


def correct(
    table: Table, results: Iterable[Mapping[str, Any]], artifacts: Mapping[str, Shapes]
) -> Table:
    """The table with factors of the results that are of its device, precision and threads.

    `artifacts` has the shapes of what was benched, by the hash. A stage's factor is the median of
    measured by predicted times; results of artifacts that are not there, or have several windows,
    say nothing. Where none is left the table stays as it is.
    """
    pairs = [
        (measured(result), uncorrected(table, artifacts[result["artifact_hash"]]))
        for result in results
        if is_of(result, table) and len(artifacts.get(result["artifact_hash"], NONE).windows) == 1
    ]
    if not pairs:
        return table
    factors = {
        stage: median(times[stage] / sums[stage] for times, sums in pairs) for stage in STAGES
    }
    corrections = {stage: Correction(factor, len(pairs)) for stage, factor in factors.items()}
    return replace(table, corrections=corrections)


NONE = Shapes({"windows": []}, 0, 0, 0, 0)
"""Of an artifact that is not there."""


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each of STAGES in a result."""
    medians = result["medians"]
    return {
        "encoder": medians["mel_s"] + medians["encoder_s"],
        "token": medians["per_token_s"],
    }


def is_of(result: Mapping[str, Any], table: Table) -> bool:
    """Whether a result was measured where the table was, in the same way."""
    machine = result["device"]
    times = [result["medians"].get(stage) for stage in ("mel_s", "encoder_s", "per_token_s")]
    name = machine.get("name")
    return (
        result["rival"] is None
        and not result["emulated"]
        and not result.get("unstable_because")
        and all(is_number(time) and time > 0 for time in times)
        and (result["precision"], result["threads"]) == (table.precision, table.threads)
        and FAMILIES.get(name, name) == table.device
        and machine.get("cpu") == table.machine.get("cpu")
    )


def artifacts_in(folders: Iterable[Path]) -> dict[str, Shapes]:
    """The shapes of the native artifacts that lie in these folders, by their hash."""
    found = {}
    for path in (path for folder in folders for path in folder.glob(f"*/{artifact.MANIFEST}")):
        try:
            told = artifact.read_manifest(path.parent)
            if told.get("layout") == "native":
                found[artifact_hash(told)] = shapes_in(path.parent, told)
        except (Problem, OSError, ValueError, KeyError, TypeError):
            continue  # not ours, or damaged: nothing can be learnt from it
    return found


def shapes_in(folder: Path, manifest: Mapping[str, Any]) -> Shapes:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("d_model", "num_mel_bins", "vocab_size", "max_source_positions")
    return Shapes(manifest["layers"], *(config[name] for name in names))


# ------------------------------------------------------------------------------------- the table


def path_of(device: str, precision: str, threads: int | str) -> Path:
    return cached("latency") / f"{device}-{precision}-{threads}.json"


def write(table: Table) -> Path:
    """Put a table where `find_table` looks for it."""
    path = path_of(table.device, table.precision, table.threads)
    with new_file(path) as temporary:
        text = json.dumps({"format": FORMAT, **asdict(table)}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def table_paths() -> list[Path]:
    """All tables in the user's cache."""
    return sorted(path_of("", "", "").parent.glob("*.json"))


def learn(results: Sequence[Mapping[str, Any]], folders: Iterable[Path]) -> list[Table]:
    """Correct the tables in the cache by results whose artifacts lie in these folders; return those
    that have changed. One that is damaged is left for who uses it."""
    changed, artifacts = [], artifacts_in(folders)
    for path in table_paths():
        with suppress(Problem):
            table = read(path)
            corrected = correct(table, results, artifacts)
            if corrected.corrections != table.corrections:
                write(corrected)
                changed.append(corrected)
    return changed


def find_table(device: str, precision: str | None = None, threads: int | None = None) -> Table:
    """The table of a device, by default in the precision that pays there, and the newest of all
    numbers of threads. Raises Problem where there is none, or it is damaged."""
    profile = load_profile(device)
    precision = known_precision(precision or profile.precision)
    wanted = path_of(profile.name, precision, threads or "*")
    tables = [read(path) for path in wanted.parent.glob(wanted.name)]
    if not tables:
        more = " --host USER@HOST" if profile.kind == "ssh" else ""
        more += f" --precision {precision}" if precision != profile.precision else ""
        more += f" --threads {threads}" if threads else ""
        raise Problem(
            f"there is no latency table of {profile.name} in {precision}",
            hint=f"measure it: edgewhisper devices calibrate --device {profile.name}{more}",
        )
    return max(tables, key=lambda table: table.measured_at)


def read(path: Path) -> Table:
    """A table, after all of it was checked. Raises Problem."""
    try:
        if path.stat().st_size > MOST_TABLE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        return parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Problem(
            f"{path} is no latency table of format {FORMAT} ({error})",
            hint="remove it, and measure again: edgewhisper devices calibrate",
        ) from error


def parsed(told: dict[str, Any]) -> Table:
    """Raises KeyError, TypeError or ValueError where it is not what `write` wrote."""
    need(told["format"] == FORMAT, "format")
    need(set(told) == {"format", *Table.__dataclass_fields__}, "fields")
    for name in ("device", "precision", "measured_at"):
        need(isinstance(told[name], str), name)
    need(told["precision"] in WEIGHT_BYTES, "precision")
    need(type(told["threads"]) is int and told["threads"] > 0, "threads")
    need(isinstance(told["machine"], dict) and told["machine"]["emulated"] is False, "machine")
    need(isinstance(told["versions"], dict), "versions")
    operators = {kind: Cost(**cost) for kind, cost in told["operators"].items()}
    need(operators.keys() == {*STAGES, *KINDS}, "operators")
    for kind, cost in operators.items():
        for number in (cost.overhead_s, cost.s_per_mac, cost.s_per_byte):
            need(is_number(number) and number >= 0, kind)
        need(isinstance(cost.residuals, list) and all(map(is_number, cost.residuals)), kind)
    corrections = {stage: Correction(**each) for stage, each in told["corrections"].items()}
    need(corrections.keys() == set(STAGES), "corrections")
    for stage, each in corrections.items():
        need(is_number(each.factor) and each.factor > 0 and type(each.results) is int, stage)
    told = {name: value for name, value in told.items() if name != "format"}
    return Table(**told | {"operators": operators, "corrections": corrections})


def need(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def is_number(found: Any) -> bool:
    return type(found) in (int, float) and math.isfinite(found)


def rows_of(table: Table) -> list[dict[str, str]]:
    """The table as it is printed: a row a kind of operator, and how well it is fitted."""
    return [
        {
            "operator": kind,
            "overhead us": f"{1e6 * cost.overhead_s:.2f}",
            "GMAC/s": rate(cost.s_per_mac),
            "GB/s": rate(cost.s_per_byte),
            "probes off by %": middle(cost.residuals),
            "most": f"{100 * max(map(abs, cost.residuals), default=0):.0f}",
        }
        for kind, cost in table.operators.items()
    ]


def told(table: Table) -> str:
    """One sentence: what it is of, and how it was corrected."""
    factors = [f"{stage} times {each.factor:.2f}" for stage, each in table.corrections.items()]
    results = table.corrections[STAGES[0]].results
    by = f"corrected by {counted(results, 'result')} ({', '.join(factors)})"
    return f"{table}: {by if results else 'no result of bench corrects it'}"


def rate(seconds: float) -> str:
    return f"{1e-9 / seconds:.1f}" if seconds else "-"


def middle(residuals: Sequence[float]) -> str:
    return f"{100 * median(map(abs, residuals)):.0f}" if residuals else "-"
