"""Engines x numbers of threads -> results, with interleaved rounds.

Every case runs in its own process, and all cases take turns: A, B, C, A, B, C. A machine that heats
up or gets busy slows all of them equally.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.bench import REFERENCE, accuracy, checkpoint_wer, merge
from benchmarks.compare import TITLES
from benchmarks.metadata import clips_hash, folder_bytes, folder_hash
from benchmarks.program import OURS
from benchmarks.result import (
    FORMAT,
    in_milliseconds,
    megabytes,
    milliseconds,
    other_texts,
    validate,
    wer,
)
from benchmarks.rivals.engines import ENGINES, count_parameters, refuse_missing, refuse_unknown
from benchmarks.rivals.prepare import Conversion
from benchmarks.rivals.transformers import refuse_slim
from benchmarks.speech.clips import Clip
from benchmarks.speech.wav import push_clips
from benchmarks.timing import ratio
from devices.device import Device, open_device, run_runner
from export.problem import Problem

T = TypeVar("T")


USUAL = ("ours", "faster-whisper", "whisper.cpp", "sherpa-onnx", "transformers")


@dataclass(frozen=True)
class Case:
    """One engine with one number of threads."""

    engine: str
    threads: int

    @property
    def label(self) -> str:
        return f"{self.engine}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Task:
    """The checkpoint, clips and options that every engine gets."""

    model: str
    """The checkpoint's name in tables."""
    checkpoint: Path
    clips: tuple[Clip, ...]
    tokens: int | None = None
    """Number of tokens that every engine decodes; None: up to the end of the text."""
    repeats: int = 1
    windows_s: tuple[float, ...] = ()
    """Shorter windows of our artifact, in addition to the full one."""


def race(
    task: Task,
    engines: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    models: Path,
    python: Path,
    normalizer: str = "whisper-basic",
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure all cases and return their results.

    `models` is the folder for the engines' converted models, which are reused if they exist;
    `python` is the interpreter of the rivals' environment.

    Raises Problem for an unknown or missing engine, a checkpoint that an engine cannot run and a
    wrong number of forced tokens, and passes on the engines' errors.
    """
    refuse_unknown(engines)
    own = [name for name, kind in ENGINES.items() if not kind.foreign]
    refuse_slim(task.checkpoint)
    refuse_missing(engines, python, f"leave them out: --engines {' '.join(own)}")
    conversion = Conversion(task.checkpoint, models, python, task.windows_s, task.tokens)
    places = {}
    for engine in engines:
        say(f"{engine}: converting the model")
        places[engine] = ENGINES[engine].prepare(conversion)
    cases = [Case(engine, count) for count in threads for engine in engines]
    with open_device("local") as device:
        audio_s = push_clips(task.clips, device)
        before = device.describe()

        def run(case: Case, turn: int) -> dict[str, Any]:
            say(f"{case.label}: round {turn + 1} of {rounds}")
            return run_case(case, task, places[case.engine], device, python)

        answers = by_turns(cases, rounds, run)
        after = device.describe().get("temperature_c", "unavailable")
    common = {
        "format": FORMAT,
        "clips_hash": clips_hash(task.clips),
        "rounds": rounds,
        "audio_s": audio_s,
        "forced_tokens": task.tokens,
        "device": {**before, "name": "local", "temperature_after_c": after},
        "emulated": before["emulated"],
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    has_rivals = any(ENGINES[engine].rival for engine in engines)
    references = reference(task, answers, normalizer) if has_rivals else {}
    return [
        validate(
            common
            | identify(case, task, places[case.engine])
            | merge(answers[case])
            | accuracy(task.clips, answers[case][-1]["texts"], normalizer)
            | (references if ENGINES[case.engine].rival else {})
        )
        for case in cases
    ]


def reference(
    task: Task, answers: Mapping[Case, Sequence[Mapping[str, Any]]], normalizer: str
) -> dict[str, float]:
    """Return the field `checkpoint_wer`; nothing if tokens are forced, because texts then mean
    nothing."""
    if task.tokens is not None:
        return {}
    own = [rounds[-1]["texts"] for case, rounds in answers.items() if case.engine == REFERENCE]
    if own:
        return {"checkpoint_wer": accuracy(task.clips, own[0], normalizer)["wer"]}
    return {"checkpoint_wer": checkpoint_wer(task.checkpoint, task.clips, normalizer)}


def by_turns(
    cases: Sequence[Case], rounds: int, run: Callable[[Case, int], T]
) -> dict[Case, list[T]]:
    """Run all cases once per round; return the answers of each case, round by round."""
    answers: dict[Case, list[T]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in cases:
            answers[case].append(run(case, turn))
    return answers


def run_case(case: Case, task: Task, place: Path, device: Device, python: Path) -> dict[str, Any]:
    """Run one process and return its answer. Raises Problem for a wrong number of forced tokens."""
    kind = ENGINES[case.engine]
    arguments = [str(place), "clips/clips.json", "--threads", str(case.threads)]
    arguments += ["--repeats", str(task.repeats)]
    if task.tokens is not None:
        arguments += ["--tokens", str(task.tokens)]
    answer = run_runner(
        device,
        arguments,
        kind.program,
        OURS | kind.env,
        python=str(python) if kind.foreign else sys.executable,
    )
    counts = {len(tokens) for tokens in answer["tokens"]}
    if task.tokens is not None and counts != {task.tokens}:
        raise Problem(
            f"{case.label}: {task.tokens} tokens were forced, but {sorted(counts)} were decoded",
            hint="use fewer --tokens or longer clips: sherpa-onnx decodes 6 tokens per second",
        )
    return answer


def identify(case: Case, task: Task, place: Path) -> dict[str, Any]:
    """Return the fields of a result that are known before anything runs."""
    kind = ENGINES[case.engine]
    manifest = {} if kind.rival else json.loads((place / "manifest.json").read_text("utf-8"))
    return {
        "name": f"{task.model}, {case.label}",
        "rival": case.engine if kind.rival else None,
        "engine": case.engine,
        "threads": case.threads,
        "precision": kind.precision,
        "artifact_hash": folder_hash(place),
        "artifact_bytes": folder_bytes(place),
        "parameters": count_parameters(task.checkpoint),
        "macs": manifest.get("macs"),
    }


# ----------------------------------------------------------------------------------------- tables

STAGES = ("mel_s", "encoder_s", "prompt_s", "per_token_s", "end_to_end_s", "cpu_s")
COMPARED = ("mel_s", "encoder_s", "per_token_s", "end_to_end_s", "peak_rss_bytes", "artifact_bytes")


def rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a row of medians for each case."""
    return [
        {
            "engine": result["engine"],
            "precision": str(result["precision"]),
            "threads": str(result["threads"]),
            **{TITLES[stage]: milliseconds(dict(result), stage) for stage in STAGES},
            "peak MB": megabytes(result["peak_rss_bytes"]),
            "size MB": f"{result['artifact_bytes'] / 1e6:.1f}",
            "WER %": wer(dict(result)),
        }
        for result in results
    ]


def ratios(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each of our results with the best rival, for each measure.

    The best rival is chosen twice: over all its numbers of threads ("at its best"), and with the
    same number as ours ("same threads"). Returns {ours, measure, against, rival, value, best,
    ratio, interval}, where ratio is best / value and `interval` is null for sizes. Rivals with
    other texts than the checkpoint are left out.
    """
    rivals = [r for r in results if r["rival"] is not None and not other_texts(dict(r))]
    rows = []
    for ours in (result for result in results if result["rival"] is None):
        same = [rival for rival in rivals if rival["threads"] == ours["threads"]]
        for measure in COMPARED:
            for against, those in (("at its best", rivals), ("same threads", same)):
                row = against_best(ours, those, measure)
                if row is not None:
                    rows.append({**row, "against": against})
    return rows


def against_best(
    ours: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], measure: str
) -> dict[str, Any] | None:
    """Return one measure of ours and of the rival with the smallest value; None if unmeasured."""
    known = [rival for rival in rivals if middle(rival, measure) is not None]
    value = middle(ours, measure)
    if value is None or not known:
        return None
    best = min(known, key=lambda rival: middle(rival, measure) or 0.0)
    least = middle(best, measure)
    assert least is not None
    times, interval = least / value, None
    if measure.endswith("_s"):
        times, interval = ratio(best[measure], ours[measure], best["rounds"], ours["rounds"])
    ours_label, label = (Case(one["engine"], one["threads"]).label for one in (ours, best))
    named = {"ours": ours_label, "rival": label, "measure": measure}
    return {**named, "value": value, "best": least, "ratio": times, "interval": interval}


def middle(result: Mapping[str, Any], measure: str) -> float | None:
    """Return the median of a stage, or a size; None if it is unknown."""
    value = result["medians"].get(measure) if measure.endswith("_s") else result[measure]
    return float(value) if isinstance(value, int | float) else None


def ratio_rows(ratios: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return what `ratios` returns as rows of a table."""
    return [
        {
            "ours": row["ours"],
            "measure": TITLES[row["measure"]],
            "value": in_unit(row["measure"], row["value"]),
            "best rival's value": in_unit(row["measure"], row["best"]),
            "best rival": f"{row['rival']} ({row['against']})",
            "best rival / ours": f"{row['ratio']:.2f}",
            "95 %": "{:.2f} to {:.2f}".format(*row["interval"]) if row["interval"] else "",
        }
        for row in ratios
    ]


def in_unit(measure: str, value: float) -> str:
    """Return a value as text in milliseconds or megabytes."""
    return in_milliseconds(value) if measure.endswith("_s") else f"{value / 1e6:.1f}"


def describe_task(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the model, duration and tokens of stored results as text."""
    first = results[0]
    model, _, _ = str(first["name"]).partition(",")
    forced = first["forced_tokens"]
    ended = "to the end of the text" if forced is None else f"{forced} tokens"
    return f"{model}, {first['audio_s']:g} s, {ended}"


def brief_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return rows that compare our total time with the fastest rival and our peak memory with the
    smallest one, each at its best number of threads."""
    best = [row for row in ratios(results) if row["against"] == "at its best"]
    by_ours = {
        ours: {row["measure"]: row for row in best if row["ours"] == ours}
        for ours in dict.fromkeys(row["ours"] for row in best)
    }
    return [
        {"workload": describe_task(results), "": ours}
        | {"total ms": in_unit("end_to_end_s", rows["end_to_end_s"]["value"])}
        | compared("end_to_end_s", "fastest rival", rows["end_to_end_s"])
        | {"peak MB": in_unit("peak_rss_bytes", rows["peak_rss_bytes"]["value"])}
        | compared("peak_rss_bytes", "smallest rival", rows["peak_rss_bytes"])
        for ours, rows in by_ours.items()
    ]


def compared(measure: str, title: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Return the best rival's value, and that value divided by ours."""
    return {
        title: f"{row['rival']}: {in_unit(measure, row['best'])}",
        f"{title} / ours": f"{row['ratio']:.2f}",
    }
