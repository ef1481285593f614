"""Put the tables of the stored results into the READMEs: python -m benchmarks.study.readme.

All that is needed stands in benchmarks/results:

    demo.jsonl             the file that a new `edgewhisper demo` names, copied
    tiny-en.jsonl          the file that `edgewhisper bench` beside rivals names, copied
    edge.jsonl             the file that `edgewhisper bench` of the recipe edge names, copied
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

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "README.md", HERE / "study" / "README.md", HERE / "rivals" / "README.md")
BLOCK = re.compile(r"(<!-- ([\w ]+?) table: .*? -->\n).*?(<!-- end -->)", flags=re.S)


def with_tables(text: str) -> str:
    """The text with its tables made anew."""
    return BLOCK.sub(lambda found: found[1] + block(found[2]) + found[3], text)


def block(name: str) -> str:
    """A table; where its results are not there, a line that says so."""
    try:
        return BLOCKS[name]()
    except FileNotFoundError as error:
        return f"Not measured yet: there is no {Path(error.filename).name}.\n"


def benched(name: str) -> str:
    results = read(RESULTS / name)
    first = results[0]
    told = (
        f"\n{first['utterances']} clips, {first['threads']} threads on "
        f"{first['device'].get('cpu', 'unavailable')}; medians of {first['rounds']} interleaved "
        f"rounds ({first['measured_at'][:10]}).\n"
    )
    return table(brief_rows(results)) + told


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
    told = (
        f"\n{first['parameters'] / 1e6:.1f} M parameters, {first['threads']} thread on "
        f"{first['device'].get('cpu', 'unavailable')} ({first['measured_at'][:10]}); weights, "
        f"gradients and moments alone are {first['least_bytes'] / 1e9:.2f} GB in float32.\n"
    )
    return table(training_cost.rows(lines)) + told


def instructions() -> str:
    rows = counts.read(RESULTS / "aarch64.jsonl")
    runtime = rows[0]["versions"]["onnxruntime"]
    told = f"\nonnxruntime {runtime}, one thread; other versions of it may count otherwise.\n"
    return table(counts.table_rows(rows)) + told


def rivals() -> str:
    """End to end and in memory, a row a work and a number of threads."""
    return table([row for work in works() for row in race.brief_rows(work)])


def rivals_in_full(rows: Callable[[list[dict[str, Any]]], list[dict[str, str]]]) -> str:
    """One table a work."""
    return "\n".join(f"**{race.work_told(work)}**\n\n{table(rows(work))}" for work in works())


def works() -> list[list[dict[str, Any]]]:
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
    "ratios": partial(rivals_in_full, lambda work: race.ratio_rows(race.ratios(work))),
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    tables.plot(stored("study.jsonl"))
