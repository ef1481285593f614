"""Rows as Markdown, for the README."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
