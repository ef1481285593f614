"""`edgewhisper report`: one page about results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.output import say


def report_cli(
    results: Annotated[
        list[Path] | None,
        Argument(
            help="files written by `edgewhisper bench`; default: the newest one",
            metavar="RESULTS",
        ),
    ] = None,
    out: Annotated[Path, Option(help="HTML file to write")] = Path("report.html"),
    plots: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="also write the plots as PNG files into this folder"),
    ] = None,
) -> None:
    """Write an HTML page about results of bench.

    The page is one file. It shows a plot of error rate against latency, the time of each stage, and
    the devices.
    """
    from edgewhisper import pipeline

    pipeline.report(results or [], out, plots)
    say(f"wrote {out}")
