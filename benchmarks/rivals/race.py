"""Engines x numbers of threads -> results, by turns.

Every case runs in a process of its own, and all of them take turns: A, B, C, A, B, C. A machine
that grows warm or busy slows all alike.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.bench import REFERENCE, accuracy, checkpoint_wer, merge
from benchmarks.metadata import clips_hash, folder_bytes, folder_hash
from benchmarks.program import PROJECT
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
from benchmarks.rivals.prepare import Order
from benchmarks.rivals.transformers import refuse_slim
from benchmarks.speech.clips import Clip
from benchmarks.speech.wav import write_clips
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
class Work:
    """What every engine is to do."""

    model: str
    """How tables call the checkpoint."""
    checkpoint: Path
    clips: tuple[Clip, ...]
    tokens: int | None = None
    """How many tokens every engine decodes; None: to the end of the text."""
    repeats: int = 1
    windows_s: tuple[float, ...] = ()
    """Shorter windows that our artifact gets beside the full one."""


def race(
    work: Work,
    engines: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    models: Path,
    python: Path,
    normalizer: str = "whisper-basic",
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The results of all cases. `models` is where the engines' own forms of the checkpoint are
    written, or found from a former call; `python` the interpreter of the rivals' environment.

    Raises Problem: an unknown or missing engine, a checkpoint that it cannot have, another number
    of tokens than was forced; and the engines' own letters.
    """
    refuse_unknown(engines)
    own = [name for name, kind in ENGINES.items() if not kind.foreign]
    instead = f"leave them out: --engines {' '.join(own)}"
    refuse_slim(work.checkpoint)
    refuse_missing(engines, python, instead)
    order = Order(work.checkpoint, models, python, work.windows_s, work.tokens)
    places = {}
    for engine in engines:
        say(f"{engine}: its model")
        places[engine] = ENGINES[engine].prepare(order)
    cases = [Case(engine, count) for count in threads for engine in engines]
    with open_device("local") as device:
        audio_s = send_clips(work.clips, device)
        before = device.describe()

        def run(case: Case, turn: int) -> dict[str, Any]:
            say(f"{case.label}: round {turn + 1} of {rounds}")
            return run_case(case, work, places[case.engine], device, python)

        answers = by_turns(cases, rounds, run)
        after = device.describe().get("temperature_c", "unavailable")
    common = {
        "format": FORMAT,
        "clips_hash": clips_hash(work.clips),
        "rounds": rounds,
        "audio_s": audio_s,
        "forced_tokens": work.tokens,
        "device": {**before, "name": "local", "temperature_after_c": after},
        "emulated": before["emulated"],
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    has_rivals = any(ENGINES[engine].rival for engine in engines)
    references = reference(work, answers, normalizer) if has_rivals else {}
    return [
        validate(
            common
            | identify(case, work, places[case.engine])
            | merge(answers[case])
            | accuracy(work.clips, answers[case][-1]["texts"], normalizer)
            | (references if ENGINES[case.engine].rival else {})
        )
        for case in cases
    ]


def reference(
    work: Work, answers: Mapping[Case, Sequence[Mapping[str, Any]]], normalizer: str
) -> dict[str, float]:
    """The field `checkpoint_wer`; nothing where the tokens are forced, and the texts no texts."""
    if work.tokens is not None:
        return {}
    own = [rounds[-1]["texts"] for case, rounds in answers.items() if case.engine == REFERENCE]
    if own:
        return {"checkpoint_wer": accuracy(work.clips, own[0], normalizer)["wer"]}
    return {"checkpoint_wer": checkpoint_wer(work.checkpoint, work.clips, normalizer)}


def by_turns(
    cases: Sequence[Case], rounds: int, run: Callable[[Case, int], T]
) -> dict[Case, list[T]]:
    """Run all cases once, then all of them again: what each answered, round by round."""
    answers: dict[Case, list[T]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in cases:
            answers[case].append(run(case, turn))
    return answers


def run_case(case: Case, work: Work, place: Path, device: Device, python: Path) -> dict[str, Any]:
    """One process: its answer, in which every clip has the tokens that were asked for."""
    kind = ENGINES[case.engine]
    arguments = [str(place), "clips/clips.json", "--threads", str(case.threads)]
    arguments += ["--repeats", str(work.repeats)]
    if work.tokens is not None:
        arguments += ["--tokens", str(work.tokens)]
    answer = run_runner(
        device,
        arguments,
        kind.program,
        {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", **kind.env},
        python=str(python) if kind.foreign else sys.executable,
    )
    counts = {len(tokens) for tokens in answer["tokens"]}
    if work.tokens is not None and counts != {work.tokens}:
        raise Problem(
            f"{case.label}: {work.tokens} tokens were forced on every clip, {sorted(counts)} came",
            hint="ask for fewer --tokens, or for longer clips: sherpa-onnx decodes 6 a second",
        )
    return answer


def identify(case: Case, work: Work, place: Path) -> dict[str, Any]:
    """The fields of a result that are known before anything runs."""
    kind = ENGINES[case.engine]
    manifest = {} if kind.rival else json.loads((place / "manifest.json").read_text("utf-8"))
    return {
        "name": f"{work.model}, {case.label}",
        "rival": case.engine if kind.rival else None,
        "engine": case.engine,
        "threads": case.threads,
        "precision": kind.precision,
        "artifact_hash": folder_hash(place),
        "artifact_bytes": folder_bytes(place),
        "parameters": count_parameters(work.checkpoint),
        "macs": manifest.get("macs"),
    }


def send_clips(clips: Sequence[Clip], device: Device) -> float:
    """Write the clips where the engines find them; return their seconds of sound."""
    with tempfile.TemporaryDirectory() as folder:
        audio_s = write_clips(clips, Path(folder))
        device.push(Path(folder), "clips")
    return audio_s


# ----------------------------------------------------------------------------------------- tables

STAGES = ("mel_s", "encoder_s", "prompt_s", "per_token_s", "end_to_end_s", "cpu_s")
TITLES = {
    "mel_s": "mel ms",
    "encoder_s": "encoder ms",
    "prompt_s": "prompt ms",
    "per_token_s": "token ms",
    "end_to_end_s": "total ms",
    "cpu_s": "cpu ms",
    "peak_rss_bytes": "peak MB",
    "artifact_bytes": "size MB",
}
COMPARED = ("mel_s", "encoder_s", "per_token_s", "end_to_end_s", "peak_rss_bytes", "artifact_bytes")


def rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The medians, a row a case."""
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
    """For each of our results and each measure, how many times as much the best rival needs: the
    one that is best at any of its numbers of threads, and the one that is best at ours.

    {ours, measure, against, rival, value, best, ratio, interval}; `interval` is null for sizes. A
    rival that wrote other texts than the checkpoint is left out.
    """
    rivals = [r for r in results if r["rival"] is not None and not other_texts(dict(r))]
    found = []
    for ours in (result for result in results if result["rival"] is None):
        same = [rival for rival in rivals if rival["threads"] == ours["threads"]]
        for measure in COMPARED:
            for against, those in (("at its best", rivals), ("same threads", same)):
                row = against_best(ours, those, measure)
                if row is not None:
                    found.append({**row, "against": against})
    return found


def against_best(
    ours: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], measure: str
) -> dict[str, Any] | None:
    """One measure against the rival that needs least; None where it was not measured."""
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
    """The median of a stage, or a size; None where it is not known."""
    found = result["medians"].get(measure) if measure.endswith("_s") else result[measure]
    return float(found) if isinstance(found, int | float) else None


def ratio_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """`ratios` as texts."""
    return [
        {
            "ours": row["ours"],
            "measure": TITLES[row["measure"]],
            "this": in_unit(row["measure"], row["value"]),
            "least of the rivals": in_unit(row["measure"], row["best"]),
            "by": f"{row['rival']} ({row['against']})",
            "times": f"{row['ratio']:.2f}",
            "95 %": "{:.2f} to {:.2f}".format(*row["interval"]) if row["interval"] else "",
        }
        for row in found
    ]


def in_unit(measure: str, value: float) -> str:
    """Milliseconds or megabytes."""
    return in_milliseconds(value) if measure.endswith("_s") else f"{value / 1e6:.1f}"


def work_told(results: Sequence[Mapping[str, Any]]) -> str:
    """What was done, of stored results."""
    first = results[0]
    model, _, _ = str(first["name"]).partition(",")
    forced = first["forced_tokens"]
    ended = "to the end of the text" if forced is None else f"{forced} tokens"
    return f"{model}, {first['audio_s']:g} s, {ended}"


def brief_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """End to end against the rival that is fastest at its own best number of threads, and memory
    against the one that takes least."""
    found = [row for row in ratios(results) if row["against"] == "at its best"]
    by_ours = {
        ours: {row["measure"]: row for row in found if row["ours"] == ours}
        for ours in dict.fromkeys(row["ours"] for row in found)
    }
    return [
        {"work": work_told(results), "": ours}
        | {"total ms": in_unit("end_to_end_s", rows["end_to_end_s"]["value"])}
        | compared("end_to_end_s", "fastest rival", rows["end_to_end_s"])
        | {"peak MB": in_unit("peak_rss_bytes", rows["peak_rss_bytes"]["value"])}
        | compared("peak_rss_bytes", "smallest rival", rows["peak_rss_bytes"])
        for ours, rows in by_ours.items()
    ]


def compared(measure: str, title: str, row: Mapping[str, Any]) -> dict[str, str]:
    """The best rival's figure, and how many times ours it is."""
    return {
        title: f"{row['rival']}: {in_unit(measure, row['best'])}",
        f"{title} / ours": f"{row['ratio']:.2f}",
    }
