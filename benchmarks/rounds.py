"""Run one process of one candidate on the device, check its answer, and merge the rounds.

An answer comes from another machine, so every field is validated before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import telemetry
from benchmarks.candidates import Candidate
from benchmarks.prepare import BenchOptions, Prepared
from benchmarks.program import OURS
from benchmarks.result import STAGES, summaries
from benchmarks.rivals.engines import CODE, RIVALS
from devices.device import Device, clean, run_runner, thread_option
from export.problem import Problem
from export.versions import version

PEAKS = ("peak_rss_bytes", "peak_footprint_bytes")
"""Peak memory of a process; macOS reports both."""
ROUND_S = 4 * 3600.0
"""Time limit of one process; long enough for hours of speech on a slow device."""
MAX_S = 1e9
"""The longest time that is accepted as data."""


# ------------------------------------------------------------------------------ one process


def first_load(
    ready: Prepared, index: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Compile and load a Core ML artifact for the first time.

    Returns the fields `compile_s` and `cold_load_s`, nothing for other artifacts. The rounds then
    load the compiled packages.
    """
    candidate, device = ready.candidates[index], ready.device
    if not candidate.is_coreml:
        return {}
    progress(f"{candidate.label}: compiling and loading for the first time")
    words = ["compile", f"artifacts/{index}", *unit_options(candidate)]
    answer = run_runner(device, words, timeout_s=ROUND_S)
    fields: dict[str, Any] = {name: answer.get(name) for name in ("compile_s", "cold_load_s")}
    if invalid := [name for name, times in fields.items() if not are_seconds(times)]:
        raise unusable(device, invalid)
    fields = {name: times for name, times in fields.items() if times}
    summary = ", ".join(f"{name} {sum(times):.2f}" for name, times in fields.items())
    progress(f"{candidate.label}: {summary}")
    return fields


def run_round(ready: Prepared, index: int) -> dict[str, Any]:
    """Run one process of one candidate, which transcribes every clip once; return its answer."""
    candidate, device = ready.candidates[index], ready.places[index]
    arguments = ["clips/clips.json", "--repeats", "1", *thread_option(ready.options.threads)]
    artifact = f"artifacts/{index}"
    if candidate.rival is None:
        arguments += [*unit_options(candidate), *runner_options(ready.options)]
        answer = run_runner(device, ["bench", artifact, *arguments], timeout_s=ROUND_S)
    else:
        kind = RIVALS[candidate.rival]
        model, env = artifact, OURS | {"PYTHONPATH": CODE} | kind.env
        if not kind.foreign:  # it runs in this environment
            model, env = str(Path(candidate.source).resolve()), OURS
        answer = run_runner(device, [model, *arguments], kind.program, env, ROUND_S)
    return checked(answer, device, len(ready.clips))


def sustain(ready: Prepared, index: int, progress: Callable[[str], None]) -> dict[str, Any] | None:
    """Run one more process of a candidate continuously for `options.minutes`, or return None."""
    options, label = ready.options, ready.candidates[index].label
    if options.minutes is None:
        return None
    progress(f"{label}: running continuously for {options.minutes:g} minutes")
    arguments = ["clips/clips.json", "--minutes", f"{options.minutes:g}"]
    arguments += [*thread_option(options.threads), *unit_options(ready.candidates[index])]
    arguments += runner_options(options)
    words = ["bench", f"artifacts/{index}", *arguments]
    answer = run_runner(ready.device, words, timeout_s=ROUND_S + 60 * options.minutes)
    fields, invalid = telemetry.valid_fields(answer)
    invalid += [] if "sustained" in fields or invalid else ["sustained"]
    if invalid:
        raise unusable(ready.device, invalid)
    return fields


def unit_options(candidate: Candidate) -> list[str]:
    return ["--compute-units", candidate.compute_units] if candidate.compute_units else []


def runner_options(options: BenchOptions) -> list[str]:
    """Return the arguments that the runner supports and rivals do not."""
    given = {"--governor": options.governor, "--pin": options.pin}
    return [word for name, value in given.items() if value is not None for word in (name, value)]


# ------------------------------------------------------------------------------- its answer


def checked(answer: dict[str, Any], device: Device, clips: int) -> dict[str, Any]:
    """Return a round's answer with its telemetry parsed. Raises Problem naming invalid fields."""
    times = {stage: answer.get(stage) for stage in STAGES}
    invalid = [stage for stage, samples in times.items() if not are_seconds(samples)]
    if "end_to_end_s" not in invalid and len(answer["end_to_end_s"]) != clips:
        invalid.append("end_to_end_s")
    texts, share = answer.get("texts"), answer.get("mel_share")
    if not (isinstance(texts, list) and len(texts) == clips and all_are(texts, str)):
        invalid.append("texts")
    peaks = {name: answer.get(name) for name in PEAKS if name in answer or name == PEAKS[0]}
    invalid += [
        n for n, peak in peaks.items() if not (isinstance(peak, int) or peak == "unavailable")
    ]
    if not (share is None or (isinstance(share, float) and 0 <= share <= 1)):
        invalid.append("mel_share")
    versions = answer.get("versions")
    if not (isinstance(versions, dict) and all_are(versions.values(), str)):
        invalid.append("versions")
    if not isinstance(answer.get("build", ""), str):
        invalid.append("build")
    fields, invalid_fields = telemetry.valid_fields(answer)
    if invalid + invalid_fields:
        raise unusable(device, invalid + invalid_fields)
    return answer | fields | {"versions": clean(versions)}


def unusable(device: Device, invalid: Sequence[str]) -> Problem:
    """Return the error for an answer with invalid fields."""
    return Problem(
        f"{device.name}: the runner's answer has no usable {', '.join(invalid)}",
        hint="bench again; if the error stays, the answer comes from a program other than the "
        "runner",
    )


def are_seconds(value: Any) -> bool:
    """Return whether a value is a list of times in seconds."""
    return isinstance(value, list) and all(
        isinstance(time, int | float) and 0 <= time < MAX_S for time in value
    )


def all_are(values: Iterable[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


# ------------------------------------------------------------------------------- all rounds


def merge(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the samples of all rounds, concatenated, with their summaries."""
    samples = {stage: [time for answer in rounds for time in answer[stage]] for stage in STAGES}
    peaks = {name: highest(rounds, name) for name in PEAKS if name in rounds[0]}
    shares = [answer["mel_share"] for answer in rounds if answer["mel_share"] is not None]
    last = rounds[-1]
    extra = {"parameters": last["parameters"]} if "parameters" in last else {}
    extra |= {"build": clean(last["build"])} if last.get("build") else {}
    return {
        **samples,
        **summaries(samples, len(rounds)),
        **extra,
        "mel_share": float(np.median(shares)) if shares else None,
        **peaks,
        "texts": last["texts"],
        "versions": {"edgewhisper": version("edgewhisper"), **last["versions"]},
    }


def highest(rounds: Sequence[dict[str, Any]], name: str) -> int | str:
    """Return the highest peak of the rounds, or "unavailable" if no round measured it."""
    peaks = [answer.get(name, "unavailable") for answer in rounds]
    return max((peak for peak in peaks if isinstance(peak, int)), default=peaks[0])
