"""`edgewhisper compare`: which differences between results are significant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from edgewhisper.cli.options import FailIf, Json
from edgewhisper.cli.output import emit, print_table


def compare_cli(
    results: Annotated[list[Path], Argument(help="files written by `edgewhisper bench`")],
    fail_if: FailIf = None,
    json_file: Json = None,
) -> None:
    """Show which differences between results are significant.

    On each device, all results are compared with the first one. LIMIT of --fail-if is a condition
    on the ratio to the first result, such as total>1.1x. Differences that are not
    significant never meet it.
    """
    from benchmarks import limits
    from benchmarks.compare import compare
    from benchmarks.result import read

    parsed = [limits.parse(text, relative=True) for text in fail_if or []]
    comparison = compare([result for path in results for result in read(path)])
    emit(comparison, json_file)
    if json_file != "-":
        print_table(comparison["rows"])
    limits.refuse(limits.broken_pairs(comparison, parsed))
