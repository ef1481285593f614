"""`edgewhisper inspect`: layers, sizes, costs and times of a checkpoint or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from edgewhisper.cli.options import Json, Source, Threads
from edgewhisper.cli.output import emit, print_table, say


def inspect_cli(
    source: Source,
    seconds: Annotated[
        float | None,
        Option(
            "--time",
            min=0.01,
            help="also measure the time of an artifact's graphs for this many seconds of audio; "
            "without a number: 5",
        ),
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Show the layers, sizes and computational cost of a model."""
    from edgewhisper import inspect

    report = inspect.inspect(source)
    if seconds is not None:
        report["time"] = inspect.time_artifact(Path(source), seconds, threads)
    emit(report, json_file)
    if json_file != "-":
        say(f"{report['kind']}, {report['precision']}, {report['parameters']:,} parameters")
        for rows in (inspect.layer_rows, inspect.size_rows, inspect.cost_rows):
            print_table(rows(report))
        if "packages" in report:
            print_table(inspect.package_rows(report))
        if "time" in report:
            print_table(inspect.time_rows(report["time"]))
            print_table(inspect.floor_rows(report["time"]))
