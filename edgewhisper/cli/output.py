"""What commands print: lines, tables, JSON and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

TABLE_WIDTH = 100


def say(text: str) -> None:
    """Print one line, in the first process only."""
    from edgewhisper.runs import main_process

    if main_process():
        typer.echo(text)


def say_for(json_file: str | None) -> Callable[[str], None]:
    """Return a function like `say` that prints to stderr if stdout is for JSON."""
    return say if json_file != "-" else lambda text: typer.echo(text, err=True)


def emit(value: Any, json_file: str | None) -> None:
    """Write a value as JSON to a file, to stdout ("-") or nowhere (None)."""
    text = json.dumps(value, ensure_ascii=False)
    if json_file == "-":
        typer.echo(text)
    elif json_file is not None:
        write_text(Path(json_file), text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a new file, whole or not at all."""
    from export.files import new_file

    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def print_results(results: list[dict[str, Any]], json_file: str | None) -> None:
    """Print results of bench as a table with remarks, or write them as JSON."""
    from benchmarks.result import brief_rows, remarks

    emit(results, json_file)
    if json_file != "-":
        print_table(brief_rows(results))
        for line in remarks(results):
            say(line)


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows with equal keys as a table, in the first process only. Keys are the columns."""
    from rich.console import Console
    from rich.table import Table

    from edgewhisper.runs import main_process

    if not main_process():
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*row.values())
    # a narrow terminal wraps lines; columns squeezed to fit it would not be readable
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


def print_error(error: Any) -> None:
    """Print an error and its hint to stderr."""
    typer.echo(f"error: {error}", err=True)
    if error.hint:
        typer.echo(f"try:   {error.hint}", err=True)
