"""Prepare a bench: check candidates and options, and copy to the device what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.candidates import (
    Candidate,
    by_units,
    check_target,
    identify,
    oldest_runtime,
    place_for,
)
from benchmarks.metadata import clips_hash
from benchmarks.normalizers import name_for
from benchmarks.normalizers import normalizer as normalizer_named
from benchmarks.result import FORMAT
from benchmarks.rivals.engines import RIVALS, send_program
from benchmarks.speech.clips import Clip
from benchmarks.speech.wav import push_clips
from devices.device import RUNNER, Device, device_cores
from export.problem import Problem

MAX_MINUTES = 60


@dataclass(frozen=True)
class BenchOptions:
    """Options of a bench."""

    repeats: int = 5
    """Number of rounds. A round starts one process per candidate, which warms up and then
    transcribes every clip once."""
    threads: int | None = None
    """Default: all cores that the device lets a process use."""
    normalizer: str | None = None
    """Default: the normalizer of the clips' language."""
    compute_units: tuple[str, ...] = ()
    """Core ML compute units, one result for each; EACH means all of them."""
    minutes: float | None = None
    """After the rounds, run continuously for this many minutes."""
    interval: float | None = None
    """Add rounds, up to MAX_ROUNDS, until the 95 % interval of the median end_to_end_s is at most
    this share of the median."""
    governor: str | None = None
    """CPU frequency governor of the device during the run."""
    pin: str | None = None
    """Cores to run on: big, all, or numbers such as 0,1."""


DEFAULT = BenchOptions()


@dataclass(frozen=True)
class Prepared:
    """A device that has everything the candidates need."""

    candidates: Sequence[Candidate]
    device: Device
    places: Sequence[Device]
    """For each candidate, the device with the packages of its program."""
    clips: Sequence[Clip]
    options: BenchOptions
    """The options, with the normalizer and (unless cores are pinned) the threads filled in."""
    known: Sequence[dict[str, Any]]
    """For each candidate, the fields of its result that are known before anything runs."""


def prepare(
    candidates: Sequence[Candidate], device: Device, clips: Sequence[Clip], options: BenchOptions
) -> Prepared:
    """Check everything that can be checked, then copy what the device lacks.

    Raises Problem as bench_all does.
    """
    candidates = by_units(candidates, options.compute_units)
    if not clips:
        raise Problem("there are no clips to bench on", hint="give a speech manifest")
    normalizer = options.normalizer or name_for(clips)
    normalizer_named(normalizer)  # refuse an unknown name before the measurement
    check_options(candidates, device, options)
    identities = [identify(candidate) for candidate in candidates]
    if any(candidate.is_coreml for candidate in candidates):
        device.libraries = ("coremltools",)
    device.oldest_runtime = oldest_runtime(candidates)
    machine = device.describe()
    for candidate in candidates:
        check_target(candidate, machine, device.name)
    places = [place_for(candidate, device) for candidate in candidates]
    common = {
        "format": FORMAT,
        "clips_hash": clips_hash(clips),
        "audio_s": send(candidates, device, clips),
        "device": {**machine, "name": device.name},
        "emulated": machine["emulated"],
    }
    # with pinned cores, the runner uses as many threads as there are cores
    threads = options.threads or (None if options.pin else device_cores(machine))
    options = replace(options, threads=threads, normalizer=normalizer)
    known = [common | identity for identity in identities]
    return Prepared(candidates, device, places, clips, options, known)


def check_options(candidates: Sequence[Candidate], device: Device, options: BenchOptions) -> None:
    """Raise Problem for options that the device or a candidate does not support."""
    for name in device.lacks:
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise Problem(f"{option} is not supported on {device.name}", hint=f"leave {option} out")
    for candidate in candidates:
        if "compute_units" in device.lacks and candidate.is_coreml:
            raise Problem(
                f"{candidate.source} is a Core ML artifact, which {device.name} cannot run",
                hint="export it with `--target onnx`",
            )
    if options.minutes is not None and not 0 < options.minutes <= MAX_MINUTES:
        raise Problem(
            f"--minutes {options.minutes:g} is not between 0 and {MAX_MINUTES}",
            hint="ten minutes are enough for a board to reach its final temperature",
        )
    if options.interval is not None and not 0 < options.interval < 1:
        raise Problem(
            f"--interval {options.interval:g} is not a valid share of the median",
            hint="write 2% or 0.02",
        )
    given = {"--minutes": options.minutes, "--governor": options.governor, "--pin": options.pin}
    names = [name for name, value in given.items() if value is not None]
    rivals = [candidate.label for candidate in candidates if candidate.rival is not None]
    if names and rivals:
        raise Problem(
            f"{' and '.join(names)} can be used with artifacts only; {rivals[0]} is a rival",
            hint=f"bench the rival in a separate call, or leave {' and '.join(names)} out",
        )


def send(candidates: Sequence[Candidate], device: Device, clips: Sequence[Clip]) -> float:
    """Push runner, artifacts, rivals and clips; return the clips' duration in seconds."""
    device.push(RUNNER, "runner")
    for index, candidate in enumerate(candidates):
        if candidate.rival is None:
            device.push(Path(candidate.source), f"artifacts/{index}")
        elif RIVALS[candidate.rival].foreign:
            send_program(RIVALS[candidate.rival], device)
            device.push(candidate.form or Path(candidate.source), f"artifacts/{index}")
    return push_clips(clips, device)
