"""Put the tables of the stored results into the README: python -m benchmarks.readme.

The results are those that `edgewhisper demo` wrote, kept in benchmarks/results/demo.jsonl: to renew
the table, copy the file that a new demo names there and run this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.result import brief_rows, read

STORED = Path(__file__).parent / "results" / "demo.jsonl"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- demo table: .*? -->\n).*?(<!-- end -->)", flags=re.S)


def with_tables(text: str) -> str:
    """The text with its table made anew."""
    results = read(STORED)
    first = results[0]
    told = (
        f"\n{first['utterances']} clips, {first['threads']} threads on "
        f"{first['device'].get('cpu', 'unavailable')}; medians of {first['rounds']} interleaved "
        f"rounds ({first['measured_at'][:10]}).\n"
    )
    table = markdown(brief_rows(results)) + told
    return BLOCK.sub(lambda found: found[1] + table + found[2], text)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
