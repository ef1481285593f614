"""Results as one self-contained HTML page: a plot, the table, where the time goes, what ran."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import COLUMNS, milliseconds, table_rows
from export.files import new_file
from export.problem import Problem

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } code { overflow-wrap: anywhere }
"""

LARGEST_MARK = 2500
"""Area of the largest artifact's disc in the plot, in square points."""


def write_report(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the page. Raises Problem for no results or results of different clip sets."""
    if not results:
        raise Problem("there are no results to report", hint="run `edgewhisper bench` first")
    for field, what in (("clips_hash", "clip sets"), ("normalizer", "normalizers")):
        if len({result[field] for result in results}) > 1:
            raise Problem(
                f"the {len(results)} results were measured on different {what}",
                hint="write one report for each of them",
            )
    with new_file(out) as temporary:
        temporary.write_text(page(results), encoding="utf-8")


def page(results: Sequence[dict[str, Any]]) -> str:
    """The HTML text; it refers to nothing outside itself."""
    first = results[0]
    facts = (
        f"{first['utterances']} clips, {first['words']} words, {first['audio_s']:.0f} s of speech; "
        f"normalizer {first['normalizer']}; median of {first['rounds']} rounds on "
        f"{first['threads']} threads. A time marked ~ was unstable: its rounds differ by more "
        "than a tenth."
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><meta charset="utf-8"><title>EdgeWhisper results</title>',
            f"<style>{STYLE}</style>",
            f"<h1>EdgeWhisper results</h1><p>{html.escape(facts)}</p>",
            *plot_section(results),
            table(table_rows(results)),
            "<h2>Where the time goes</h2>",
            "<p>Milliseconds, median and 95 % interval. Log-mel runs inside the encoder graph: its "
            "time is the share of the graph that a profiled run gave it.</p>",
            table(stage_rows(results)),
            "<h2>What was measured</h2>",
            table(provenance_rows(results)),
            "</html>",
        ]
    )


def plot_section(results: Sequence[dict[str, Any]]) -> list[str]:
    """The plot as an image element; emulated results have no latency to plot."""
    timed = [r for r in results if not r["emulated"] and "end_to_end_s" in r["medians"]]
    if not timed:
        return []
    picture = base64.b64encode(plot(timed)).decode()
    caption = "Word error rate against end-to-end time; the area of a disc is the size on disk."
    return [f'<img alt="{caption}" src="data:image/png;base64,{picture}"><p>{caption}</p>']


def plot(results: Sequence[dict[str, Any]]) -> bytes:
    """WER against latency with both intervals, artifact size as area, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    largest = max(result["artifact_bytes"] for result in results)
    for result in results:
        x, y = 1000 * result["medians"]["end_to_end_s"], 100 * result["wer"]
        area = LARGEST_MARK * result["artifact_bytes"] / largest
        label = f"{result['name']}, {result['artifact_bytes'] / 1e6:.1f} MB"
        dots = axes.scatter(x, y, s=area, alpha=0.5)
        low, high = (1000 * bound for bound in result["intervals"]["end_to_end_s"])
        bottom, top = (100 * bound for bound in result["wer_interval"])
        color = dots.get_facecolor()
        axes.hlines(y, low, high, color=color, label=label)
        axes.vlines(x, bottom, top, color=color)
    axes.set_xlabel("end-to-end time per clip, ms")
    axes.set_ylabel("word error rate, %")
    figure.legend(loc="outside upper center")
    axes.set_xlim(left=0, right=1.25 * axes.get_xlim()[1])
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def stage_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Median and interval of each stage."""
    return [
        {"model": r["name"]} | {title: with_interval(r, s) for title, s in COLUMNS.items()}
        for r in results
    ]


def with_interval(result: dict[str, Any], stage: str) -> str:
    """`4.1 (3.9 to 4.4)`."""
    text = milliseconds(result, stage)
    if text == "-":
        return text
    low, high = (1000 * bound for bound in result["intervals"][stage])
    return f"{text} ({low:.3g} to {high:.3g})"


def provenance_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Hashes, machine and versions of each result."""
    return [
        {
            "model": result["name"],
            "artifact": result["artifact_hash"][:12],
            "clips": result["clips_hash"][:12],
            "cpu": str(result["device"].get("cpu", "unavailable")),
            "governor": str(result["device"].get("governor", "unavailable")),
            "temperature C": str(result["device"].get("temperature_c", "unavailable")),
            "load average": str(result["device"].get("load_average", "unavailable")),
            "emulated": "yes" if result["emulated"] else "no",
            "versions": ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
            "measured": result["measured_at"],
        }
        for result in results
    ]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of the same titles as an HTML table; every text is escaped."""
    body = (cells("td", row.values()) for row in rows)
    return "\n".join(["<table>", cells("th", rows[0]), *body, "</table>"])


def cells(kind: str, texts: Iterable[str]) -> str:
    """One row."""
    return "<tr>" + "".join(f"<{kind}>{html.escape(t)}</{kind}>" for t in texts) + "</tr>"
