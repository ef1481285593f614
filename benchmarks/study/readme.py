"""Write the tables of the stored results into the documentation: python -m benchmarks.study.readme.

The results are in benchmarks/results:

    demo.jsonl             copy of the result file of `edgewhisper demo`
    tiny-en.jsonl          copy of the result file of `edgewhisper bench` with rivals
    edge.jsonl             copy of the result file of `edgewhisper bench` of the recipe edge
    study.jsonl            python -m benchmarks.study.run; study.png is drawn from it here
    accounting.jsonl       python -m benchmarks.study.accounting
    training_cost.jsonl    python -m benchmarks.study.training_cost
    aarch64.jsonl          python -m benchmarks.aarch64 --keep
    rivals/*.jsonl         python -m benchmarks.rivals ... --out FILE
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.aarch64 import counts
from benchmarks.markdown import table
from benchmarks.result import brief_rows, read
from benchmarks.rivals import race
from benchmarks.study import accounting, tables, training_cost

HERE = Path(__file__).parent.parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "README.md", HERE / "study" / "README.md", HERE / "rivals" / "README.md")
BLOCK = re.compile(r"(<!-- ([\w ]+?) table: .*? -->\n).*?(<!-- end -->)", flags=re.S)


def with_tables(text: str) -> str:
    """Return a page with its tables regenerated."""
    return BLOCK.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def block(name: str) -> str:
    """Return a table, or a sentence if its results are missing."""
    try:
        return BLOCKS[name]()
    except FileNotFoundError as error:
        return f"Not measured yet: there is no {Path(error.filename).name}.\n"


def benched(name: str) -> str:
    """Return the table of a result file, with a line about the measurement."""
    results = read(RESULTS / name)
    first = results[0]
    note = (
        f"\n{first['utterances']} clips, {first['threads']} threads on "
        f"{first['device'].get('cpu', 'unavailable')}; medians of {first['rounds']} interleaved "
        f"rounds ({first['measured_at'][:10]}).\n"
    )
    return table(brief_rows(results)) + note


def verdicts() -> str:
    lines = stored("study.jsonl")
    return tables.summary(lines) + "\n" + table(tables.verdict_rows(lines))


def study() -> str:
    return tables.markdown(stored("study.jsonl"))


def sizes() -> str:
    return table(accounting.rows(stored("accounting.jsonl")))


def training() -> str:
    lines = stored("training_cost.jsonl")
    first = lines[0]
    note = (
        f"\n{first['parameters'] / 1e6:.1f} M parameters, {first['threads']} thread on "
        f"{first['device'].get('cpu', 'unavailable')} ({first['measured_at'][:10]}); weights, "
        f"gradients and moments alone take {first['least_bytes'] / 1e9:.2f} GB in float32.\n"
    )
    return table(training_cost.rows(lines)) + note


def instructions() -> str:
    rows = counts.read(RESULTS / "aarch64.jsonl")
    runtime = rows[0]["versions"]["onnxruntime"]
    note = f"\nonnxruntime {runtime}, one thread; counts differ between its versions.\n"
    return table(counts.table_rows(rows)) + note


def rivals() -> str:
    """Return times and memory, a row per workload and number of threads."""
    return table([row for results in workloads() for row in race.brief_rows(results)])


def rivals_in_full(rows: Callable[[list[dict[str, Any]]], list[dict[str, str]]]) -> str:
    """Return one table per workload."""
    return "\n".join(
        f"**{race.describe_work(results)}**\n\n{table(rows(results))}" for results in workloads()
    )


def workloads() -> list[list[dict[str, Any]]]:
    return [read(path) for path in sorted((RESULTS / "rivals").glob("*.jsonl"))]


def stored(name: str) -> list[dict[str, Any]]:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": partial(benched, "demo.jsonl"),
    "edge": partial(benched, "edge.jsonl"),
    "verdicts": verdicts,
    "study": study,
    "accounting": sizes,
    "training cost": training,
    "aarch64": instructions,
    "rivals": rivals,
    "engines": partial(rivals_in_full, race.rows),
    "ratios": partial(rivals_in_full, lambda results: race.ratio_rows(race.ratios(results))),
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    tables.plot(stored("study.jsonl"))
