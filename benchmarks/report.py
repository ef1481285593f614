"""Write results as one self-contained HTML page: plots, tables, telemetry and provenance."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plots import CAPTIONS, plots
from benchmarks.result import (
    COLUMNS,
    in_milliseconds,
    megabytes,
    milliseconds,
    remarks,
    table_rows,
)
from export.files import new_file
from export.problem import Problem

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } code { overflow-wrap: anywhere }
"""

PHASES = {"first": "first clip"}
"""Titles of phases whose name alone is unclear."""


def write_report(
    results: Sequence[dict[str, Any]], out: Path, plots_dir: Path | None = None
) -> None:
    """Write the page and, with `plots_dir`, its plots as NAME.png into that folder.

    Raises Problem for no results, and for results of different clip sets or normalizers.
    """
    if not results:
        raise Problem("there are no results to report", hint="run `edgewhisper bench` first")
    for field, what in (("clips_hash", "clip sets"), ("normalizer", "normalizers")):
        if len({result[field] for result in results}) > 1:
            raise Problem(
                f"the {len(results)} results were measured on different {what}",
                hint=f"write one report for each of the {what}",
            )
    drawn = plots(results)
    with new_file(out) as temporary:
        temporary.write_text(page(results, drawn), encoding="utf-8")
    if plots_dir is not None:
        write_plots(drawn, plots_dir)


def write_plots(drawn: dict[str, bytes], folder: Path) -> None:
    """Write each plot to a file."""
    for name, png in drawn.items():
        with new_file(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)


def page(results: Sequence[dict[str, Any]], drawn: dict[str, bytes]) -> str:
    """Return the HTML text, which loads nothing from outside."""
    first = results[0]
    facts = (
        f"{first['utterances']} clips, {first['words']} words, {first['audio_s']:.0f} s of speech; "
        f"normalizer {first['normalizer']}. Times are medians. A time marked ~ is unreliable: its "
        "rounds differ by more than 10 % or the run was unstable."
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><meta charset="utf-8"><title>EdgeWhisper results</title>',
            f"<style>{STYLE}</style>",
            f"<h1>EdgeWhisper results</h1><p>{html.escape(facts)}</p>",
            *pictures(drawn),
            table(table_rows(results)),
            *(f"<p>{html.escape(remark)}</p>" for remark in remarks(results)),
            "<h2>Time by stage</h2>",
            "<p>Milliseconds, median and 95 % interval. Log-mel runs inside the encoder graph; its "
            "time is a share of the graph's time, measured in a profiled run.</p>",
            table(stage_rows(results)),
            *telemetry_section(results),
            "<h2>What was measured</h2>",
            table(provenance_rows(results)),
            "</html>",
        ]
    )


def pictures(drawn: dict[str, bytes]) -> list[str]:
    """Return the plots as image elements."""
    return [
        f'<img alt="{CAPTIONS[name]}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<p>{CAPTIONS[name]}</p>"
        for name, png in drawn.items()
    ]


def stage_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row per result with the median and interval of each stage."""
    return [
        {"model": r["name"], "device": r["device"]["name"]}
        | {title: with_interval(r, s) for title, s in COLUMNS.items()}
        for r in results
    ]


def with_interval(result: dict[str, Any], stage: str) -> str:
    """Return a median and its interval, such as `4.1 (3.9 to 4.4)`."""
    text = milliseconds(result, stage)
    if text == "-":
        return text
    low, high = (1000 * bound for bound in result["intervals"][stage])
    return f"{text} ({low:.3g} to {high:.3g})"


def telemetry_section(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the section about telemetry; empty if no result has any."""
    cells_of = [telemetry_cells(result) for result in results]
    titles = list(dict.fromkeys(title for row in cells_of for title in row))
    if not titles:
        return []
    rows = [
        {"model": result["name"], "device": result["device"]["name"]}
        | {title: row.get(title, "-") for title in titles}
        for result, row in zip(results, cells_of, strict=True)
    ]
    return ["<h2>Telemetry</h2>", table(rows)]


def telemetry_cells(result: dict[str, Any]) -> dict[str, str]:
    """Return column title -> text of a result's telemetry."""
    row = {}
    for title, field in (("cold load ms", "cold_load_s"), ("compile ms", "compile_s")):
        if (times := result.get(field)) and not result["emulated"]:
            row[title] = times if isinstance(times, str) else in_milliseconds(median(times))
    for phase, count in result.get("memory_bytes_by_phase", {}).items():
        row[f"peak MB, {PHASES.get(phase, phase)}"] = megabytes(count)
    if "peak_footprint_bytes" in result:
        row["peak footprint MB"] = megabytes(result["peak_footprint_bytes"])
    energy = result.get("telemetry", {}).get("energy_j_per_audio_s")
    if energy is not None and not result["emulated"]:
        row["J per second of speech"] = energy if isinstance(energy, str) else f"{energy:.3g}"
    if "pinned" in result:
        row["cores"] = ", ".join(map(str, result["pinned"]))
    return row


def provenance_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row per result with hashes, machine and versions."""
    return [
        {
            "model": result["name"],
            "device": result["device"]["name"],
            "artifact": result["artifact_hash"][:12],
            "clips": result["clips_hash"][:12],
            "rounds": str(result["rounds"]),
            "threads": str(result["threads"]),
            "cpu": str(result["device"].get("cpu", "unavailable")),
            "governor": str(
                result.get("governor", result["device"].get("governor", "unavailable"))
            ),
            "temperature C": str(result["device"].get("temperature_c", "unavailable")),
            "load average": str(result["device"].get("load_average", "unavailable")),
            "emulated": "yes" if result["emulated"] else "no",
            "versions": ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
            "measured": result["measured_at"],
        }
        for result in results
    ]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows with equal titles as an HTML table with escaped texts."""
    body = (cells("td", row.values()) for row in rows)
    return "\n".join(["<table>", cells("th", rows[0]), *body, "</table>"])


def cells(kind: str, texts: Iterable[str]) -> str:
    """Return one row of an HTML table."""
    return "<tr>" + "".join(f"<{kind}>{html.escape(t)}</{kind}>" for t in texts) + "</tr>"
