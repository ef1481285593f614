"""Latency tables: predict a model's time on a device, and correct the table with bench results.

A table holds the cost of each kind of operator on one device, precision and number of threads
(calibrate_latency.py measures it). A model's time is the sum over its operators
(export/onnx/operators.py), so no export and no bench is needed.

The sum leaves out colder caches and the Python code between the steps. Where artifacts were benched
on the device, the median ratio of measured to predicted times corrects the table.

Tables are stored in the user's cache as latency/DEVICE-PRECISION-THREADS.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.metadata import artifact_hash
from devices.device import FAMILIES, load_profile
from export import artifact
from export.files import cached, new_file
from export.onnx.operators import (
    KINDS,
    WEIGHT_BYTES,
    Operator,
    Shapes,
    encoder_operators,
    shapes_of,
    token_operators,
    work,
)
from export.problem import Problem

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
"""Format of a table's file; it changes with the kinds of operators and the definition of their
work."""
STAGES = ("encoder", "token")
"""The predicted stages: one full window with its front end, and one token."""
GRAPHS = ("encoder", "decoder")
"""The graph of each stage."""
MAX_TABLE_BYTES = 1_000_000


@dataclass(frozen=True)
class Cost:
    """The cost of one kind of operator."""

    overhead_s: float
    s_per_mac: float = 0.0
    s_per_byte: float = 0.0
    residuals: list[float] = field(default_factory=list)
    """The fit's error for each microbenchmark, as a share of the measured time."""

    def seconds(self, macs: float, moved_bytes: float) -> float:
        return self.overhead_s + self.s_per_mac * macs + self.s_per_byte * moved_bytes


@dataclass(frozen=True)
class Correction:
    """The ratio of measured to predicted times of a stage."""

    factor: float = 1.0
    results: int = 0
    """Number of results whose median ratio the factor is."""


@dataclass(frozen=True)
class Table:
    """The latency table of one device, precision and number of threads."""

    device: str
    """The name of the device's profile."""
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
    """Return "1 thread" or "2 threads"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def known_precision(name: str) -> str:
    """Return the name. Raises Problem if ONNX graphs have no such precision."""
    if name not in WEIGHT_BYTES:
        raise Problem(
            f"unknown ONNX precision {name!r}",
            hint=f"choose one of: {', '.join(WEIGHT_BYTES)}",
        )
    return name


# --------------------------------------------------------------------------------------- predict


def predict(table: Table, model: nn.Module, tokens: int = 32) -> float:
    """Return the predicted seconds of a model for one full window and `tokens` tokens."""
    return predict_shapes(table, shapes_of(model), tokens)


def predict_shapes(table: Table, shapes: Shapes, tokens: int = 32) -> float:
    """Return the predicted seconds of a model with these shapes, as `predict`."""
    seconds = stages(table, shapes)
    return seconds["encoder"] + tokens * seconds["token"]


def stages(table: Table, shapes: Shapes) -> dict[str, float]:
    """Return the predicted seconds of each stage, corrected by bench results."""
    return {
        stage: table.corrections[stage].factor * seconds
        for stage, seconds in uncorrected(table, shapes).items()
    }


def uncorrected(table: Table, shapes: Shapes) -> dict[str, float]:
    """Return the sum over the operators of each stage, plus the cost of an empty graph."""
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
    """Return the table corrected by the results of its device, precision and threads.

    `artifacts` maps artifact hashes to shapes. A stage's factor is the median ratio of measured to
    predicted times. Results of unknown artifacts and of artifacts with several windows are skipped.
    Without any result left, the same table is returned.
    """
    pairs = [
        (measured(result), uncorrected(table, artifacts[result["artifact_hash"]]))
        for result in results
        if matches(result, table)
        and len(artifacts.get(result["artifact_hash"], UNKNOWN).windows) == 1
    ]
    if not pairs:
        return table
    factors = {
        stage: median(times[stage] / sums[stage] for times, sums in pairs) for stage in STAGES
    }
    corrections = {stage: Correction(factor, len(pairs)) for stage, factor in factors.items()}
    return replace(table, corrections=corrections)


UNKNOWN = Shapes({"windows": []}, 0, 0, 0, 0)
"""Shapes of an unknown artifact."""


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the measured seconds of each stage in a result."""
    medians = result["medians"]
    return {
        "encoder": medians["mel_s"] + medians["encoder_s"],
        "token": medians["per_token_s"],
    }


def matches(result: Mapping[str, Any], table: Table) -> bool:
    """Return whether a result was measured on the table's machine with the same options."""
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
    """Return the shapes of the native artifacts directly below these folders, by artifact hash."""
    shapes = {}
    for path in (path for folder in folders for path in folder.glob(f"*/{artifact.MANIFEST}")):
        try:
            manifest = artifact.read_manifest(path.parent)
            if manifest.get("layout") == "native":
                shapes[artifact_hash(manifest)] = shapes_in(path.parent, manifest)
        except (Problem, OSError, ValueError, KeyError, TypeError):
            continue  # not an artifact of this project, or damaged
    return shapes


def shapes_in(folder: Path, manifest: Mapping[str, Any]) -> Shapes:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stages = manifest.get("logits")
    return Shapes(
        manifest["layers"],
        config["d_model"],
        config["num_mel_bins"],
        config["vocab_size"],
        config["max_source_positions"],
        None if stages is None else (stages["rank"], stages["candidates"]),
    )


# ------------------------------------------------------------------------------------- storage


def path_of(device: str, precision: str, threads: int | str) -> Path:
    """Return where the table of a device, precision and number of threads is stored."""
    return cached("latency") / f"{device}-{precision}-{threads}.json"


def write(table: Table) -> Path:
    """Store a table where find_table reads it; return the path."""
    path = path_of(table.device, table.precision, table.threads)
    with new_file(path) as temporary:
        text = json.dumps({"format": FORMAT, **asdict(table)}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def table_paths() -> list[Path]:
    """Return the paths of all tables in the user's cache."""
    return sorted(path_of("", "", "").parent.glob("*.json"))


def learn(results: Sequence[Mapping[str, Any]], folders: Iterable[Path]) -> list[Table]:
    """Correct the stored tables with results of artifacts in these folders.

    Returns the tables that changed. Damaged tables are skipped here; find_table reports them.
    """
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
    """Return the stored table of a device.

    By default the precision is the profile's, and the newest table of any number of threads is
    returned. Raises Problem if there is none or it is damaged.
    """
    profile = load_profile(device)
    precision = known_precision(precision or profile.precision)
    pattern = path_of(profile.name, precision, threads or "*")
    tables = [read(path) for path in pattern.parent.glob(pattern.name)]
    if not tables:
        options = " --host USER@HOST" if profile.kind == "ssh" else ""
        options += f" --precision {precision}" if precision != profile.precision else ""
        options += f" --threads {threads}" if threads else ""
        raise Problem(
            f"there is no latency table of {profile.name} in {precision}",
            hint=f"measure it: edgewhisper devices calibrate --device {profile.name}{options}",
        )
    return max(tables, key=lambda table: table.measured_at)


def read(path: Path) -> Table:
    """Read and validate a table. Raises Problem."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        return parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Problem(
            f"{path} is not a latency table of format {FORMAT} ({error})",
            hint="remove it and measure again: edgewhisper devices calibrate",
        ) from error


def parsed(record: dict[str, Any]) -> Table:
    """Return the table of a stored record. Raises KeyError, TypeError or ValueError if it is
    invalid."""
    require(record["format"] == FORMAT, "format")
    require(set(record) == {"format", *Table.__dataclass_fields__}, "fields")
    for name in ("device", "precision", "measured_at"):
        require(isinstance(record[name], str), name)
    require(record["precision"] in WEIGHT_BYTES, "precision")
    require(type(record["threads"]) is int and record["threads"] > 0, "threads")
    require(
        isinstance(record["machine"], dict) and record["machine"]["emulated"] is False, "machine"
    )
    require(isinstance(record["versions"], dict), "versions")
    operators = {kind: Cost(**cost) for kind, cost in record["operators"].items()}
    require(operators.keys() == {*STAGES, *KINDS}, "operators")
    for kind, cost in operators.items():
        for number in (cost.overhead_s, cost.s_per_mac, cost.s_per_byte):
            require(is_number(number) and number >= 0, kind)
        require(isinstance(cost.residuals, list) and all(map(is_number, cost.residuals)), kind)
    corrections = {stage: Correction(**each) for stage, each in record["corrections"].items()}
    require(corrections.keys() == set(STAGES), "corrections")
    for stage, each in corrections.items():
        require(is_number(each.factor) and each.factor > 0 and type(each.results) is int, stage)
    record = {name: value for name, value in record.items() if name != "format"}
    return Table(**record | {"operators": operators, "corrections": corrections})


def require(condition: bool, field: str) -> None:
    """Raise ValueError with the field's name unless the condition holds."""
    if not condition:
        raise ValueError(field)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# --------------------------------------------------------------------------------------- printing


def rows_of(table: Table) -> list[dict[str, str]]:
    """Return the printed rows: the costs of each kind of operator and the errors of its fit."""
    return [
        {
            "operator": kind,
            "overhead us": f"{1e6 * cost.overhead_s:.2f}",
            "GMAC/s": per_nanosecond(cost.s_per_mac),
            "GB/s": per_nanosecond(cost.s_per_byte),
            "median fit error %": median_percent(cost.residuals),
            "max": f"{100 * max(map(abs, cost.residuals), default=0):.0f}",
        }
        for kind, cost in table.operators.items()
    ]


def summary(table: Table) -> str:
    """Return a sentence with the table's name and its corrections."""
    factors = [f"{stage} times {each.factor:.2f}" for stage, each in table.corrections.items()]
    results = table.corrections[STAGES[0]].results
    by = f"corrected by {counted(results, 'result')} ({', '.join(factors)})"
    return f"{table}: {by if results else 'not corrected by bench results'}"


def per_nanosecond(seconds: float) -> str:
    """Return 10^9 times per second as text; "-" for a cost of zero."""
    return f"{1e-9 / seconds:.1f}" if seconds else "-"


def median_percent(residuals: Sequence[float]) -> str:
    return f"{100 * median(map(abs, residuals)):.0f}" if residuals else "-"
