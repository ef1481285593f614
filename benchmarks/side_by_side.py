"""Bench on several devices at once: first all devices are prepared, then all measure.

A device that fails does not stop the others. All copying ends before any device is timed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from benchmarks.bench import BenchOptions, Candidate, Prepared, checkpoint_wers, measure, prepare
from benchmarks.speech.clips import Clip
from devices.device import DeviceProblem, Place, open_device
from export.problem import Problem

Say = Callable[[str], None]
Failure = Problem | DeviceProblem


def bench_places(
    candidates: Sequence[Candidate],
    places: Sequence[Place],
    clips: Sequence[Clip],
    options: BenchOptions,
    say: Say,
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Return the results of the devices, in the order of `places`, and the errors of failed ones.

    Ctrl-C closes the devices, which ends the programs there.
    """

    names, lock, over = [place.device for place in places], threading.Lock(), threading.Event()

    def prepare_on(place: Place) -> tuple[Prepared, Say]:
        tell = say if len(places) == 1 else lambda text: say(f"{place}: {text}")
        device = open_device(*place, tell)
        with lock:
            opened.push(device)
            if over.is_set():  # Ctrl-C came while it was being opened
                opened.close()
                raise DeviceProblem(f"{place}: opened after Ctrl-C")
        if names.count(place.device) > 1:
            device.name = str(place)
        return prepare(candidates, device, clips, options), tell

    # the devices are closed before the threads are joined, because that ends the threads
    with ThreadPoolExecutor(max_workers=len(places)) as pool, ExitStack() as opened:
        try:
            ready, failed = gather([pool.submit(prepare_on, place) for place in places])
            checkpoints = checkpoint_wers(ready[0][0], say) if ready else {}
            groups, more = gather(
                [pool.submit(measure, place, tell, checkpoints) for place, tell in ready]
            )
        finally:
            with lock:
                over.set()
    return [result for results in groups for result in results], failed + more


def gather(futures: Iterable[Future[Any]]) -> tuple[list[Any], list[Failure]]:
    """Return the futures' results and their Problems and DeviceProblems; others are raised."""
    results, failures = [], []
    for future in futures:
        try:
            results.append(future.result())
        except (Problem, DeviceProblem) as error:
            failures.append(error)
    return results, failures
