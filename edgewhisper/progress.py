"""Show progress on stderr: a bar on a terminal, otherwise lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from edgewhisper.runs import main_process

LINE_S = 10.0
"""Seconds between two progress lines."""


@contextmanager
def progress_lines(steps: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Yield a function of (steps done, note) that prints a line to stderr every LINE_S seconds."""
    started = last = time.monotonic()

    def show(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_S or not done:
            return
        last, left = now, (now - started) / done * (steps - done)
        line = f"{label}: {done} of {steps}{', ' if note else ''}{note}, about {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    yield show


@contextmanager
def progress_bar(
    steps: int, label: str, main: bool | None = None
) -> Iterator[Callable[[int, str], None]]:
    """Yield a function of (steps done, note) that shows the progress on stderr.

    Only the `main` process shows progress. By default, main_process() says which one that is.
    """
    if not (main_process() if main is None else main):
        yield lambda done, note: None
        return
    if not sys.stderr.isatty():
        with progress_lines(steps, label) as show:
            yield show
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=steps, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


@contextmanager
def progress_steps(steps: int, label: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar; yield a function that advances it by one step."""
    counter = count(1)
    with progress_bar(steps, label) as show:
        yield lambda: show(next(counter), "")
