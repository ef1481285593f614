"""A result: what one candidate did with a clip set on a device, as one JSON line.

Times are in seconds. A field of STAGES holds all samples in the order of measurement, in `rounds`
equal parts; `medians`, `intervals`, `outliers` and `unstable` have an entry for each of them:

    end_to_end_s: [0.051, 0.049, ...]   medians: {"end_to_end_s": 0.050, ...}
    intervals: {"end_to_end_s": [0.049, 0.052], ...}

`load_s` one a round; `end_to_end_s` one a clip, from WAV file to text; `cpu_s` the time of all
cores for the same, which other programs on the machine disturb less; `mel_s`, `encoder_s` and
`prompt_s` one a window; `per_token_s` one a decoder step after the prompt's. Where log-mel runs
inside the encoder graph, its time is the graph's times `mel_share`, the share of kernel time that
a separate profiled run gave its nodes; for a rival with a front end of its own `mel_share` is null.

Of Core ML a result may have `compute_units`; `compile_s`, what it took to compile the packages, and
`cold_load_s`, to load them for the first time, before any round: `load_s` is that of packages that
are compiled and were loaded before. On a Mac `peak_footprint_bytes` stands beside resident memory.

A rival's result has `checkpoint_wer`, the word error rate of the checkpoint itself on the same
clips: that of transformers in fp32. Where the rival's own differs by more than MOST_POINTS, its
texts are not the checkpoint's, and no speed ratio is formed with its times. `build` is what an
engine reports about how it was compiled.

A result of `python -m benchmarks.rivals` may have `forced_tokens`: every engine was made to decode
exactly so many tokens, and texts and error rates mean nothing.

What was seen beside the rounds; each is missing where nobody looked, and what a machine cannot tell
reads "unavailable":

    telemetry: {"interval_s": 1.0, "samples": [{"at_s": 0.02, "temperature_c": 48.3, ...}, ...],
                "energy_j": 7.1, "energy_j_per_audio_s": 0.3, "sampler_cores": 0.004}
    sustained: {"minutes": 10.0, "end_to_end_s": [...], "at_s": [...],
                "first_minute_s": 0.41, "last_minute_s": 0.55, "ratio": 1.34}
    memory_bytes_by_phase: {"imports": ..., "load": ..., "first": ..., "run": ...}

`at_s` counts from the beginning of the first round; the keys of a sample are those of
devices/runner/measure/telemetry.py; energy is that of the clips that were timed. A sustained
`ratio` above 1 says that it grew slower. `cold_load_s` has one a round, with the artifact's files
not in memory. `governor` and `pinned` are the clock's and the cores that were used,
`unstable_because` sentences why the times are in doubt, `notes` others.

Error rates are fractions; `wer_per_utterance_mean` is missing in older lines. `clip_errors` and
`clip_words` are the word counts of each clip, from which two results can be compared pairwise. What
is not known is null, never zero.
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
"""How far a rival's word error rate may be from the checkpoint's, in points."""

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
"""Fields that lines written before them, or by others, lack; readers take them with `get`."""

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
    """The fields `medians`, `intervals`, `outliers` and `unstable` of the stages that ran."""
    found = {stage: summarise(times, rounds) for stage, times in samples.items() if times}
    return {
        "medians": {stage: summary.median for stage, summary in found.items()},
        "intervals": {stage: list(summary.interval) for stage, summary in found.items()},
        "outliers": {stage: summary.outliers for stage, summary in found.items()},
        "unstable": {stage: summary.unstable for stage, summary in found.items()},
    }


def validate(result: Any, where: str = "result") -> dict[str, Any]:
    """The result itself; raises Problem for another format, a missing or a wrong field."""
    version = result.get("format") if isinstance(result, dict) else None
    if version != FORMAT:
        raise Problem(
            f"{where}: result format {version!r}; this version reads {FORMAT}",
            hint="bench again with this version, or read it with the one that wrote it",
        )
    known = {name: kind for name, kind in LATER.items() if name in result}
    for name, kind in (FIELDS | known).items():
        if name not in result or not isinstance(result[name], kind):
            found = type(result[name]).__name__ if name in result else "nothing"
            raise Problem(
                f"{where}: field `{name}` is {found}",
                hint="the line is damaged: bench again",
            )
    return result


def write(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Write results as JSON lines, whole or not at all; what stood in the file is replaced."""
    lines = [json.dumps(validate(result), ensure_ascii=False) for result in results]
    with new_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The results of a JSON-lines file. Raises Problem, with the number of the bad line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(
            f"the results {path} cannot be read ({error})",
            hint="name a file written by `edgewhisper bench --json`",
        ) from error
    results = [parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not results:
        raise Problem(f"{path} holds no results", hint="run `edgewhisper bench --json FILE`")
    return results


def parse(line: str, where: str) -> dict[str, Any]:
    """One line as a validated result."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise Problem(f"{where}: not JSON ({error.msg})", hint="bench again") from error
    return validate(found, where)


def other_texts(result: dict[str, Any]) -> str | None:
    """Say why no speed ratio is formed with a rival's times; None if one may be.

    An engine that writes less or more than the checkpoint also takes less or more time.
    """
    if "checkpoint_wer" not in result or result.get("forced_tokens"):
        return None
    own, checkpoint = 100 * result["wer"], 100 * result["checkpoint_wer"]
    if abs(own - checkpoint) <= MOST_POINTS + 1e-9:
        return None
    return f"WER {own:.1f} %, the checkpoint's {checkpoint:.1f} %: other texts, so no speed ratio"


def table_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows for a table: column title -> text, the same titles in every row.

    Emulated results print no milliseconds; `~` marks a time whose rounds disagree, and all times
    of a run that was disturbed; `!` marks the times of a rival that wrote other texts than its
    checkpoint. RATIO, where there are rivals whose texts were checked, is how many times as long as
    our first artifact on the device a rival takes.
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
    """For each result the text of its column RATIO: of a rival whose texts were checked the ratio,
    or "-" if there is none; of other results nothing."""
    ours: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["rival"] is None:
            ours.setdefault(result["device"]["name"], result)
    return [time_ratio(result, ours.get(result["device"]["name"])) for result in results]


def time_ratio(result: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """The total of a rival divided by ours, with `~` if one of them is in doubt."""
    if result["rival"] is None or ours is None or "checkpoint_wer" not in result:
        return ""
    totals = [one["medians"].get("end_to_end_s") for one in (result, ours)]
    if other_texts(result) or result["emulated"] or ours["emulated"] or not all(totals):
        return "-"
    doubt = any("~" in milliseconds(one, "end_to_end_s") for one in (result, ours))
    return f"{'~' if doubt else ''}{totals[0] / totals[1]:.2f}"


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
"""What fits a terminal and a README; the report has the rest."""


def brief_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """table_rows with the columns of BRIEF, and the device where there are several."""
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
    """The word error rate for a table; none where the tokens were forced."""
    return "-" if result.get("forced_tokens") else f"{100 * result['wer']:.1f}"


def wer_interval(result: dict[str, Any]) -> str:
    """Where it lies, likewise."""
    low, high = (100 * bound for bound in result["wer_interval"])
    return "-" if result.get("forced_tokens") else f"{low:.1f} to {high:.1f}"


def milliseconds(result: dict[str, Any], stage: str) -> str:
    """A stage's median for a table."""
    if result["emulated"] or stage not in result["medians"]:
        return "-"
    mark = "~" if result["unstable"][stage] or result.get("unstable_because") else ""
    mark += "!" if other_texts(result) else ""
    return mark + in_milliseconds(result["medians"][stage])


def remarks(results: Sequence[dict[str, Any]]) -> list[str]:
    """The lines below a table: why times are marked, notes, and how engines were compiled."""
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
    """Three digits, or all before the point."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def megabytes(count: int | str) -> str:
    """Bytes for a table; a device that cannot say reads "unavailable"."""
    return count if isinstance(count, str) else f"{count / 1e6:.0f}"


def millions(count: int | None) -> str:
    """A number of parameters for a table."""
    return "-" if count is None else f"{count / 1e6:.2f} M"
