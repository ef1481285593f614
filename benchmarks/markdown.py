"""Markdown tables for the documentation."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows with equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
