"""Several devices at once: all of them get what they need, and then all of them measure.

A device that fails does not stop the others, and copying to one is over before another is timed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from benchmarks.bench import Candidate, Measuring, Prepared, checkpoint_wers, measure, prepare
from benchmarks.speech.clips import Clip
from devices.device import DeviceProblem, Place, open_device
from export.problem import Problem

Say = Callable[[str], None]
Letter = Problem | DeviceProblem


def bench_places(
    candidates: Sequence[Candidate],
    places: Sequence[Place],
    clips: Sequence[Clip],
    how: Measuring,
    say: Say,
) -> tuple[list[dict[str, Any]], list[Letter]]:
    """The results of each device, in the order of `places`; and the letters of those that failed.

    Ctrl-C closes the devices, which ends what runs there.
    """

    names, lock, over = [place.device for place in places], threading.Lock(), threading.Event()

    def equip(place: Place) -> tuple[Prepared, Say]:
        tell = say if len(places) == 1 else lambda text: say(f"{place}: {text}")
        device = open_device(*place, tell)
        with lock:
            opened.push(device)
            if over.is_set():  # Ctrl-C came while it was being opened
                opened.close()
                raise DeviceProblem(f"{place}: it was opened too late")
        if names.count(place.device) > 1:
            device.name = str(place)
        return prepare(candidates, device, clips, how), tell

    # the devices are closed before the threads are waited for, which end by that
    with ThreadPoolExecutor(max_workers=len(places)) as pool, ExitStack() as opened:
        try:
            ready, failed = gather([pool.submit(equip, place) for place in places])
            checkpoints = checkpoint_wers(ready[0][0], say) if ready else {}
            found, more = gather(
                [pool.submit(measure, place, tell, checkpoints) for place, tell in ready]
            )
        finally:
            with lock:
                over.set()
    return [result for results in found for result in results], failed + more


def gather(futures: Iterable[Future[Any]]) -> tuple[list[Any], list[Letter]]:
    """What they return, and the letters that they raise; any other error is raised."""
    found, letters = [], []
    for future in futures:
        try:
            found.append(future.result())
        except (Problem, DeviceProblem) as letter:
            letters.append(letter)
    return found, letters
