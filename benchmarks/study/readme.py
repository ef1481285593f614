"""Write the tables and pictures of the documentation from stored results.

    python -m benchmarks.study.readme

A table is between two comments of a page, `<!-- NAME table: python -m benchmarks.study.readme -->`
and `<!-- end -->`. The pages are README.md, docs/*.md, and the README.md of the study and of the
rivals. The results are in benchmarks/results:

    demo.jsonl             a copy of the file that `edgewhisper demo` wrote
    tiny-en.jsonl          a copy of the file that `edgewhisper bench --rival ...` wrote; drawn as
                           tiny-en.svg
    edge.jsonl             a copy of the file that `edgewhisper bench` of the recipe edge wrote
    one_shot.jsonl         python -m benchmarks.study.one_shot build/models/tiny.en --out FILE
    real.jsonl             python -m benchmarks.study.real build/models/tiny.en --out FILE
    study.jsonl            python -m benchmarks.study.run; drawn as study.png
    accounting.jsonl       python -m benchmarks.study.accounting
    training_cost.jsonl    python -m benchmarks.study.training_cost
    aarch64.jsonl          python -m benchmarks.aarch64 --keep
    rivals/*.jsonl         python -m benchmarks.rivals ... --out FILE
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.aarch64 import counts
from benchmarks.markdown import table
from benchmarks.result import brief_rows, other_texts, read
from benchmarks.rivals import race
from benchmarks.study import accounting, one_shot, real, tables, training_cost

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "study" / "README.md",
    ROOT / "benchmarks" / "rivals" / "README.md",
)
"""The pages that have tables."""
BLOCK = re.compile(r"(<!-- ([\w. ]+?) table: .*? -->\n).*?(<!-- end -->)", flags=re.S)
OURS, OTHERS = "#d9480f", "#868e96"
"""Colours of the bars in tiny-en.svg."""


def with_tables(text: str) -> str:
    """Return a page's text with its tables generated again."""
    return BLOCK.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def block(name: str) -> str:
    """Return a table, or a line that says which results are missing."""
    try:
        return BLOCKS[name]()
    except FileNotFoundError as error:
        return f"Not measured yet: there is no {Path(error.filename).name}.\n"


def bench_table(name: str) -> str:
    """Return the table of a file of results."""
    results = read(RESULTS / name)
    return table(brief_rows(results)) + conditions(results[0])


def conditions(first: dict[str, Any]) -> str:
    """Return the line below a table: clips, threads, processor, rounds and date."""
    return (
        f"\n{first['utterances']} clips, {first['threads']} threads on "
        f"{first['device'].get('cpu', 'unavailable')}; medians of {first['rounds']} interleaved "
        f"rounds ({first['measured_at'][:10]}).\n"
    )


def engines_table() -> str:
    """Return the table of tiny.en in several engines, a row for each engine."""
    results = read(RESULTS / "tiny-en.jsonl")
    rows = brief_rows(results)
    dropped = ("model", "parameters")
    named = [
        {"engine": engine(result)} | {key: row[key] for key in row if key not in dropped}
        for result, row in zip(results, rows, strict=True)
    ]
    return table(named) + conditions(results[0])


def engine(result: dict[str, Any]) -> str:
    built = ", built from source" if "source" in str(result.get("build")) else ""
    return f"{result['rival'] or 'EdgeWhisper'}, {result['precision']}{built}"


def engines_picture(results: list[dict[str, Any]]) -> str:
    """Return an SVG with the time of a clip and the peak memory of each engine."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = (
        ("time of a clip, ms (median)", [1000 * r["medians"]["end_to_end_s"] for r in results]),
        ("peak memory, MB", [r["peak_rss_bytes"] / 1e6 for r in results]),
    )
    drawn = Figure(figsize=(9, 2.6), layout="constrained")
    colours = [OTHERS if result["rival"] else OURS for result in results]
    labels = [engine(result).partition(", built")[0] for result in results]
    marks = ["!" if other_texts(result) else "" for result in results]
    axes = drawn.subplots(1, 2, sharey=True)
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, values, color=colours)
        timed = marks if "time" in title else [""] * len(values)
        texts = [f"{mark}{value:.0f}" for mark, value in zip(timed, values, strict=True)]
        axis.bar_label(bars, texts, padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
    axes[0].invert_yaxis()
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgewhisper"}):
        FigureCanvasSVG(drawn).print_svg(text, metadata={"Date": None})
    return text.getvalue()


def recipes() -> str:
    """Return the table of the recipes on real models."""
    lines = stored("real.jsonl")
    days = sorted({line["measured_at"][:10] for line in lines})
    when = " to ".join(sorted({days[0], days[-1]}))
    note = (
        f"\n{lines[0]['threads']} thread on a busy machine, so minutes are upper bounds; "
        f"the normalizer of dev is whisper-english ({when}).\n"
    )
    return table([real.row(line) for line in lines]) + note


def one_shot_arms() -> str:
    """Return the table of methods that train nothing."""
    return table([one_shot.row(line) for line in stored("one_shot.jsonl")])


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
        f"gradients and moments alone are {first['least_bytes'] / 1e9:.2f} GB in float32.\n"
    )
    return table(training_cost.rows(lines)) + note


def instructions() -> str:
    rows = counts.read(RESULTS / "aarch64.jsonl")
    runtime = rows[0]["versions"]["onnxruntime"]
    note = f"\nonnxruntime {runtime}, one thread; counts may differ in other versions.\n"
    return table(counts.table_rows(rows)) + note


def rivals() -> str:
    """Return total time and memory, a row for each model, length and number of threads."""
    return table([row for results in races() for row in race.brief_rows(results)])


def rivals_in_full(rows: Callable[[list[dict[str, Any]]], list[dict[str, str]]]) -> str:
    """Return a table for each model and length of audio."""
    return "\n".join(
        f"**{race.describe_task(results)}**\n\n{table(rows(results))}" for results in races()
    )


def races() -> list[list[dict[str, Any]]]:
    return [read(path) for path in sorted((RESULTS / "rivals").glob("*.jsonl"))]


def stored(name: str) -> list[dict[str, Any]]:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": partial(bench_table, "demo.jsonl"),
    "tiny.en": engines_table,
    "edge": partial(bench_table, "edge.jsonl"),
    "recipes": recipes,
    "one shot": one_shot_arms,
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
    picture = engines_picture(read(RESULTS / "tiny-en.jsonl"))
    (RESULTS / "tiny-en.svg").write_text(picture, encoding="utf-8")
