"""`edgewhisper bench`: measure artifacts on devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.options import DEFAULT, SPEECH, FailIf, Json, Normalizer, Threads
from edgewhisper.cli.output import print_error, print_results, say_for
from export.problem import Problem

Artifacts = Annotated[
    list[Path] | None,
    Argument(
        help=f"directories written by `edgewhisper export`; default: {DEFAULT}",
        metavar="ARTIFACT",
    ),
]
Device = Annotated[
    list[str] | None,
    Option(
        help="name of a device (see `edgewhisper devices`); may be repeated, to measure in "
        "parallel; default: local"
    ),
]
Host = Annotated[
    list[str] | None,
    Option(metavar="USER@HOST", help="SSH address of a device; repeat it in the order of --device"),
]
Serial = Annotated[
    list[str] | None,
    Option(help="serial number of a phone (see `adb devices`); default: the only connected phone"),
]
Browser = Annotated[
    bool, Option("--browser", help="measure in a phone's browser; this machine serves the page")
]
Listen = Annotated[
    str | None,
    Option(
        metavar="ADDRESS[:PORT]",
        help="address that serves the page of --browser; default: this machine's local address",
    ),
]
Speech = Annotated[
    Path | None,
    Option(help=f"clips to transcribe: {SPEECH}; default: clips included with EdgeWhisper"),
]
Baseline = Annotated[
    str | None,
    Option(
        help="also measure this uncompressed model, in any form that compress accepts; it runs in "
        "transformers or in each --rival"
    ),
]
Rival = Annotated[
    list[str] | None,
    Option(
        help="also measure the model of --baseline in this engine: faster-whisper, whisper.cpp, "
        "whisper.cpp-wheel, whisper.cpp-f16, sherpa-onnx or transformers; may be repeated; without "
        "--baseline: the embedded digits model, if the artifacts are made from it"
    ),
]
Repeats = Annotated[
    int, Option(min=1, help="number of rounds; each round measures everything once")
]
ComputeUnits = Annotated[
    list[str] | None,
    Option(
        help="Core ML compute units on a Mac: all, cpu, cpu-ane or cpu-gpu; may be repeated; "
        "each: measure all four; default: all"
    ),
]
Minutes = Annotated[
    float | None, Option(help="after the rounds, run continuously for this many minutes (max. 60)")
]
Interval = Annotated[
    str | None,
    Option(
        metavar="SHARE",
        help="add rounds, up to 50, until the 95 % interval of the median latency is at most "
        "this share of the median, such as 2%",
    ),
]
Governor = Annotated[
    str | None, Option(help="CPU frequency governor during the run, such as performance")
]
Pin = Annotated[
    str | None, Option(metavar="CORES", help="cores to run on: big, all, or numbers such as 0,1")
]


def bench_cli(
    artifacts: Artifacts = None,
    device: Device = None,
    host: Host = None,
    serial: Serial = None,
    browser: Browser = False,
    listen: Listen = None,
    speech: Speech = None,
    baseline: Baseline = None,
    rival: Rival = None,
    repeats: Repeats = 5,
    threads: Threads = None,
    compute_units: ComputeUnits = None,
    minutes: Minutes = None,
    interval: Interval = None,
    governor: Governor = None,
    pin: Pin = None,
    normalizer: Normalizer = None,
    fail_if: FailIf = None,
    json_file: Json = None,
) -> None:
    """Measure latency, memory and error rate on devices.

    LIMIT of --fail-if is a condition such as total>400ms, wer>5% or peak>125MB. A value that was
    not measured meets every condition.
    """
    from benchmarks import limits
    from benchmarks.bench import BenchOptions
    from devices.device import in_browser, places
    from edgewhisper import pipeline

    parsed = [limits.parse(text) for text in fail_if or []]
    units = tuple(compute_units or ())
    share = None if interval is None else share_of("--interval", interval)
    options = BenchOptions(repeats, threads, normalizer, units, minutes, share, governor, pin)
    names = device or ["local"]
    names = in_browser(names) if browser else names
    where = places(names, host or [], serial or [], [listen] if listen else [])
    say = say_for(json_file)
    outcome = pipeline.bench(artifacts or [], where, speech, baseline, options, say, rival or ())
    print_results(outcome.results, json_file)
    say(f"wrote {outcome.path}")
    for error in outcome.failed[:-1]:
        print_error(error)
    if outcome.failed:
        raise outcome.failed[-1]
    limits.refuse(limits.broken(outcome.results, parsed))


def share_of(option: str, text: str) -> float:
    """Return the share in a text like "2%" or "0.02". Raises Problem."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise Problem(f"{option} {text} is not a valid share", hint="write 2% or 0.02") from None
