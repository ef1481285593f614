"""Bench: artifacts x device x clips -> results.

Every candidate runs in processes of its own that import nothing else. The candidates take turns,
round by round, so that a machine that heats up or gets busy slows all of them equally.

Options and checks are in prepare.py, a single process and its answer in rounds.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import telemetry
from benchmarks.candidates import Candidate
from benchmarks.prepare import DEFAULT, BenchOptions, Prepared, prepare
from benchmarks.program import OURS
from benchmarks.result import validate
from benchmarks.rivals.engines import RIVALS
from benchmarks.rounds import ROUND_S, first_load, merge, run_round, sustain
from benchmarks.speech.clips import Clip
from benchmarks.speech.wav import push_clips
from benchmarks.wer import score, word_errors
from devices.device import Device, device_cores, open_device, run_runner

REFERENCE = "transformers"
"""The rival whose texts count as those of the checkpoint itself."""
MAX_ROUNDS = 50
"""The most rounds that `BenchOptions.interval` may add up to."""


def bench(
    artifact: Path, device: Device, clips: Sequence[Clip], options: BenchOptions = DEFAULT
) -> dict[str, Any]:
    """Return the result of one artifact; see bench_all."""
    return bench_all([Candidate(artifact)], device, clips, options)[0]


def bench_all(
    candidates: Sequence[Candidate],
    device: Device,
    clips: Sequence[Clip],
    options: BenchOptions = DEFAULT,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return the results of several candidates on the same clips, in the candidates' order.

    `progress` is called with a line of text before each process starts.

    Raises Problem for no clips, a damaged artifact, a rival that cannot run there or a Core ML
    artifact on a system without Core ML, and passes on the errors of the device and the runner.
    """
    ready = prepare(candidates, device, clips, options)
    return measure(ready, progress, checkpoint_wers(ready, progress))


def measure(
    ready: Prepared,
    progress: Callable[[str], None] = lambda _: None,
    checkpoints: Mapping[Path, float] | None = None,
) -> list[dict]:
    """Return the results of a prepared device's candidates, which take turns.

    `checkpoints` holds the word error rates returned by checkpoint_wers.
    """
    first_loads = [first_load(ready, index, progress) for index in range(len(ready.candidates))]
    all_rounds = take_turns(ready, progress)
    sustained = [sustain(ready, index, progress) for index in range(len(all_rounds))]
    after = ready.device.describe().get("temperature_c", "unavailable")
    results = []
    for known, first, rounds, last in zip(
        ready.known, first_loads, all_rounds, sustained, strict=True
    ):
        machine = {"device": {**known["device"], "temperature_after_c": after}}
        words = accuracy(ready.clips, rounds[-1]["texts"], str(ready.options.normalizer))
        merged = merged_fields(ready, rounds, last, known["audio_s"])
        result = known | machine | merged | first | words
        results.append(result | stability(result, ready.options, rounds, last))
    add_checkpoint_wers(ready.candidates, results, checkpoints or {})
    return [validate(result) for result in results]


def take_turns(ready: Prepared, progress: Callable[[str], None]) -> list[list[dict[str, Any]]]:
    """Run the rounds of all candidates; return each candidate's answers."""
    options = ready.options
    answers: list[list[dict[str, Any]]] = [[] for _ in ready.candidates]
    turn = 0
    while turn < options.repeats or (
        turn < MAX_ROUNDS and not all(is_precise(rounds, options.interval) for rounds in answers)
    ):
        for index, candidate in enumerate(ready.candidates):
            total = f"up to {MAX_ROUNDS}" if options.interval else options.repeats
            progress(f"{candidate.label}: round {turn + 1} of {total}")
            answers[index].append(run_round(ready, index))
        turn += 1
    return answers


def is_precise(rounds: Sequence[dict[str, Any]], share: float | None) -> bool:
    """Return whether the interval of the median is at most `share` of it, or no share is given."""
    times = [time for answer in rounds for time in answer["end_to_end_s"]]
    return share is None or telemetry.interval_is_within(times, len(rounds), share)


def merged_fields(
    ready: Prepared, rounds: list[dict[str, Any]], last: dict[str, Any] | None, audio_s: float
) -> dict[str, Any]:
    """Return the fields that a candidate's processes give together; `last` is the sustained run."""
    return {
        "rounds": len(rounds),
        "threads": ready.options.threads,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **merge(rounds),
        **telemetry.result_fields(rounds, last, audio_s, len(ready.clips)),
    }


def stability(
    result: dict[str, Any],
    options: BenchOptions,
    rounds: Sequence[dict[str, Any]],
    last: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the fields `unstable_because` and `notes`.

    The sustained run `last` only adds notes: it is expected to get slower.
    """
    samples = [sample for answer in rounds for sample in samples_of(answer)]
    debug = [sign for answer in rounds for sign in answer.get("debug", [])]
    return {
        "unstable_because": telemetry.unstable_because(result, samples, debug),
        "notes": telemetry.notes(result, samples_of(last or {}), options.interval),
    }


def samples_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = answer.get("telemetry", {}).get("samples", [])
    return samples


# ------------------------------------------------------------------------------- accuracy


def accuracy(clips: Sequence[Clip], texts: Sequence[str], normalizer: str) -> dict[str, Any]:
    """Return the error rates against the labels, and the word counts of each clip."""
    given = [clip.text for clip in clips], texts, normalizer, [clip.lang for clip in clips]
    counts = word_errors(*given)
    return {
        **score(*given).as_dict(),
        "clip_errors": [errors for errors, _ in counts],
        "clip_words": [words for _, words in counts],
    }


def checkpoint_wers(
    ready: Prepared, progress: Callable[[str], None] = lambda _: None
) -> dict[Path, float]:
    """Return the word error rate of each rival's checkpoint in transformers (fp32, untimed).

    A checkpoint that transformers runs as a candidate is left out.
    """
    rivals = [candidate for candidate in ready.candidates if candidate.rival is not None]
    measured = {candidate.source for candidate in rivals if candidate.rival == REFERENCE}
    rates = {}
    for source in dict.fromkeys(candidate.source for candidate in rivals):
        if source not in measured:
            progress(f"{source.name}: reference texts of the checkpoint, by {REFERENCE}")
            rates[source] = checkpoint_wer(source, ready.clips, str(ready.options.normalizer))
    return rates


def checkpoint_wer(checkpoint: Path, clips: Sequence[Clip], normalizer: str) -> float:
    """Return a checkpoint's word error rate in transformers, each clip in its own language."""
    with open_device("local") as device:
        push_clips(clips, device)
        words = [str(checkpoint.resolve()), "clips/clips.json"]
        words += ["--threads", str(device_cores(device.describe()))]
        program = RIVALS[REFERENCE].program
        answer = run_runner(device, words, program, OURS, ROUND_S, python=sys.executable)
    return float(accuracy(clips, answer["texts"], normalizer)["wer"])


def add_checkpoint_wers(
    candidates: Sequence[Candidate], results: Sequence[dict], checkpoints: Mapping[Path, float]
) -> None:
    """Set `checkpoint_wer` of each rival's result where the rate is known."""
    pairs = list(zip(candidates, results, strict=True))
    own = {one.source: result["wer"] for one, result in pairs if one.rival == REFERENCE}
    known = {**checkpoints, **own}
    for candidate, result in pairs:
        if candidate.rival is not None and candidate.source in known:
            result["checkpoint_wer"] = known[candidate.source]
