"""A result: the measurements of one candidate on a clip set and a device, as one JSON line.

Times are in seconds. A field of STAGES has all samples in the order of measurement, in `rounds`
equal parts. `medians`, `intervals`, `outliers` and `unstable` have an entry for each stage:

    end_to_end_s: [0.051, 0.049, ...]   medians: {"end_to_end_s": 0.050, ...}
    intervals: {"end_to_end_s": [0.049, 0.052], ...}

    load_s                      one per round
    mel_s, encoder_s, prompt_s  one per window
    per_token_s                 one per decoder step after the prompt
    end_to_end_s                one per clip, from WAV file to text
    cpu_s                       one per clip, CPU time of all cores; less affected by other programs

If log-mel runs inside the encoder graph, its time is the graph's time multiplied by `mel_share`:
the share of kernel time that a separate profiled run measured. `mel_share` is null for a rival with
a separate front end.

A Core ML result may have `compute_units`, `compile_s` (time to compile the packages) and
`cold_load_s` (time of the first load, before any round; `load_s` is measured after it). On a Mac,
`peak_footprint_bytes` is recorded in addition to resident memory.

A rival's result has `checkpoint_wer`, the word error rate of the checkpoint in transformers (fp32)
on the same clips. If the rival's own rate differs by more than MOST_POINTS, its texts are not the
checkpoint's, and no speed ratio is computed. `build` is the engine's report of how it was compiled.

A result of `python -m benchmarks.rivals` may have `forced_tokens`: every engine decoded exactly
this number of tokens, so texts and error rates have no meaning.

Telemetry of the run. A field is missing if it was not recorded, and "unavailable" if the machine
does not report it:

    telemetry: {"interval_s": 1.0, "samples": [{"at_s": 0.02, "temperature_c": 48.3, ...}, ...],
                "energy_j": 7.1, "energy_j_per_audio_s": 0.3, "sampler_cores": 0.004}
    sustained: {"minutes": 10.0, "end_to_end_s": [...], "at_s": [...],
                "first_minute_s": 0.41, "last_minute_s": 0.55, "ratio": 1.34}
    memory_bytes_by_phase: {"imports": ..., "load": ..., "first": ..., "run": ...}

`at_s` counts from the beginning of the first round. devices/runner/measure/telemetry.py defines the
keys of a sample. Energy covers the timed clips. A sustained `ratio` above 1 means that the run got
slower. `cold_load_s` has one time per round, measured with the artifact's files dropped from the
page cache. `governor` is the CPU frequency governor, `pinned` the cores in use. `unstable_because`
has sentences that explain why the times are unreliable, `notes` other remarks.

Error rates are fractions; `wer_per_utterance_mean` is missing in older lines. `clip_errors` and
`clip_words` are counts per clip, so that two results can be compared clip by clip. An unknown value
is null, never zero.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import summarise
from export.files import new_file
from export.problem import Problem

FORMAT = 1

MOST_POINTS = 1.0
"""The largest difference between the error rates of a rival and its checkpoint, in points."""

STAGES = ("load_s", "mel_s", "encoder_s", "prompt_s", "per_token_s", "end_to_end_s", "cpu_s")

ACCURACY: dict[str, type | tuple[type, ...]] = {
    "wer": (int, float),
    "cer": (int, float),
    "wer_interval": (list, tuple),
    "substitutions": int,
    "deletions": int,
    "insertions": int,
    "words": int,
    "utterances": int,
    "exact": int,
    "normalizer": str,
}

LATER: dict[str, type | tuple[type, ...]] = {
    "wer_per_utterance_mean": (int, float),
    "checkpoint_wer": (int, float),
    "build": str,
    "forced_tokens": (int, type(None)),
    "compute_units": str,
    "compile_s": list,
    "peak_footprint_bytes": (int, str),
    "telemetry": dict,
    "sustained": dict,
    "cold_load_s": (list, str),
    "memory_bytes_by_phase": dict,
    "governor": str,
    "pinned": list,
    "unstable_because": list,
    "notes": list,
}
"""Optional fields, which older lines or other programs do not have; read them with `get`."""

FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "name": str,
    "rival": (str, type(None)),
    "precision": (str, type(None)),
    "artifact_hash": str,
    "clips_hash": str,
    "rounds": int,
    "threads": int,
    **ACCURACY,
    "clip_errors": list,
    "clip_words": list,
    "texts": list,
    **dict.fromkeys(STAGES, list),
    "medians": dict,
    "intervals": dict,
    "outliers": dict,
    "unstable": dict,
    "mel_share": (float, type(None)),
    "audio_s": (int, float),
    "peak_rss_bytes": (int, str),
    "artifact_bytes": int,
    "parameters": (int, type(None)),
    "macs": (dict, type(None)),
    "device": dict,
    "emulated": bool,
    "versions": dict,
    "measured_at": str,
}


def summaries(samples: dict[str, list[float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the fields `medians`, `intervals`, `outliers` and `unstable` of measured stages."""
    by_stage = {stage: summarise(times, rounds) for stage, times in samples.items() if times}
    return {
        "medians": {stage: summary.median for stage, summary in by_stage.items()},
        "intervals": {stage: list(summary.interval) for stage, summary in by_stage.items()},
        "outliers": {stage: summary.outliers for stage, summary in by_stage.items()},
        "unstable": {stage: summary.unstable for stage, summary in by_stage.items()},
    }


def validate(result: Any, where: str = "result") -> dict[str, Any]:
    """Return the result. Raises Problem for another format and for missing or invalid fields."""
    version = result.get("format") if isinstance(result, dict) else None
    if version != FORMAT:
        raise Problem(
            f"{where}: result format {version!r}; this version reads {FORMAT}",
            hint="bench again with this version, or read it with the version that wrote it",
        )
    known = {name: kind for name, kind in LATER.items() if name in result}
    for name, kind in (FIELDS | known).items():
        if name not in result or not isinstance(result[name], kind):
            kind_of = type(result[name]).__name__ if name in result else None
            actual = f"has type {kind_of}" if kind_of else "is missing"
            raise Problem(
                f"{where}: field `{name}` {actual}",
                hint="the line is damaged: bench again",
            )
    return result


def write(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Write results as JSON lines, atomically; an existing file is replaced."""
    lines = [json.dumps(validate(result), ensure_ascii=False) for result in results]
    with new_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the results of a JSON-lines file. Raises Problem with an invalid line's number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Problem(
            f"the results {path} cannot be read: {reason}",
            hint="name a file that `edgewhisper bench` wrote, such as "
            "edgewhisper-runs/result-DATE.jsonl",
        ) from error
    results = [parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not results:
        raise Problem(f"{path} has no results", hint="run `edgewhisper bench --json FILE`")
    return results


def parse(line: str, where: str) -> dict[str, Any]:
    """Parse and validate one line."""
    try:
        result = json.loads(line)
    except json.JSONDecodeError as error:
        raise Problem(
            f"{where}: not JSON ({error.msg})",
            hint="name a file that `edgewhisper bench` wrote; if this is one, bench again",
        ) from error
    return validate(result, where)


def other_texts(result: dict[str, Any]) -> str | None:
    """Return why no speed ratio is computed with a rival's times, or None.

    An engine that outputs other texts than the checkpoint does a different amount of work.
    """
    if "checkpoint_wer" not in result or result.get("forced_tokens"):
        return None
    own, checkpoint = 100 * result["wer"], 100 * result["checkpoint_wer"]
    if abs(own - checkpoint) <= MOST_POINTS + 1e-9:
        return None
    return f"WER {own:.1f} %, the checkpoint's {checkpoint:.1f} %: other texts, so no speed ratio"


def table_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of a table: column title -> text, with equal titles in all rows.

    Emulated results have no milliseconds. `~` marks a time whose rounds disagree, and all times of
    an unstable run. `!` marks the times of a rival whose texts differ from its checkpoint's. If the
    texts of rivals were checked, the column RATIO has their total time divided by that of our first
    artifact on the same device.
    """
    ratios = time_ratios(results)
    return [
        {
            "model": result["name"],
            "device": result["device"]["name"],
            "parameters": millions(result["parameters"]),
            "size MB": f"{result['artifact_bytes'] / 1e6:.2f}",
            "peak MB": megabytes(result["peak_rss_bytes"]),
            "WER %": wer(result),
            "95 %": wer_interval(result),
            **{title: milliseconds(result, stage) for title, stage in COLUMNS.items()},
            **({RATIO: ratio} if any(ratios) else {}),
        }
        for result, ratio in zip(results, ratios, strict=True)
    ]


RATIO = "total / ours"


def time_ratios(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the column RATIO: for a rival with checked texts the ratio, or "-" if it has none;
    "" for other results."""
    ours: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["rival"] is None:
            ours.setdefault(result["device"]["name"], result)
    return [time_ratio(result, ours.get(result["device"]["name"])) for result in results]


def time_ratio(result: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """Return a rival's total time divided by ours, with `~` if one of them is unstable."""
    if result["rival"] is None or ours is None or "checkpoint_wer" not in result:
        return ""
    totals = [one["medians"].get("end_to_end_s") for one in (result, ours)]
    if other_texts(result) or result["emulated"] or ours["emulated"] or not all(totals):
        return "-"
    unstable = any("~" in milliseconds(one, "end_to_end_s") for one in (result, ours))
    return f"{'~' if unstable else ''}{totals[0] / totals[1]:.2f}"


BRIEF = (
    "model",
    "parameters",
    "size MB",
    "peak MB",
    "WER %",
    "95 %",
    "encoder ms",
    "token ms",
    "total ms",
)
"""The columns that fit a terminal and the documentation; the report has all."""


def brief_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return table_rows with the columns of BRIEF, and the device if there are several."""
    rows = table_rows(results)
    several = len({row["device"] for row in rows}) > 1
    titles = [BRIEF[0], *(["device"] if several else []), *BRIEF[1:], RATIO]
    return [{title: row[title] for title in titles if title in row} for row in rows]


COLUMNS = {
    "load ms": "load_s",
    "mel ms": "mel_s",
    "encoder ms": "encoder_s",
    "prompt ms": "prompt_s",
    "token ms": "per_token_s",
    "total ms": "end_to_end_s",
    "cpu ms": "cpu_s",
}


def wer(result: dict[str, Any]) -> str:
    """Return the word error rate for a table; "-" if the tokens were forced."""
    return "-" if result.get("forced_tokens") else f"{100 * result['wer']:.1f}"


def wer_interval(result: dict[str, Any]) -> str:
    """Return the interval of the word error rate for a table; "-" if the tokens were forced."""
    low, high = (100 * bound for bound in result["wer_interval"])
    return "-" if result.get("forced_tokens") else f"{low:.1f} to {high:.1f}"


def milliseconds(result: dict[str, Any], stage: str) -> str:
    """Return a stage's median for a table."""
    if result["emulated"] or stage not in result["medians"]:
        return "-"
    mark = "~" if result["unstable"][stage] or result.get("unstable_because") else ""
    mark += "!" if other_texts(result) else ""
    return mark + in_milliseconds(result["medians"][stage])


def remarks(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines below a table: why times are marked, notes, and builds of engines."""
    lines = [
        (mark, result, "; ".join(result[field]))
        for mark, field in (("~", "unstable_because"), ("note:", "notes"))
        for result in results
        if result.get(field)
    ]
    lines += [("!", result, why) for result in results if (why := other_texts(result))]
    lines += [("note:", result, build) for result in results if (build := result.get("build"))]
    return [f"{mark} {one['name']} on {one['device']['name']}: {text}" for mark, one, text in lines]


def in_milliseconds(seconds: float) -> str:
    """Return milliseconds with three significant digits, or as an integer from 1000 on."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def megabytes(count: int | str) -> str:
    """Return bytes in megabytes for a table, or "unavailable"."""
    return count if isinstance(count, str) else f"{count / 1e6:.0f}"


def millions(count: int | None) -> str:
    """Return a number of parameters in millions for a table."""
    return "-" if count is None else f"{count / 1e6:.2f} M"
