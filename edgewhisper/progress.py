"""Progress of long work on stderr: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_S = 10.0
"""Without a terminal, progress is a line this often."""


@contextmanager
def progress_lines(steps: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """A function of (steps done, a note) that prints a line on stderr every LINE_S seconds."""
    started = last = time.monotonic()

    def show(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_S or not done:
            return
        last, left = now, (now - started) / done * (steps - done)
        told = f"{label}: {done} of {steps}{', ' if note else ''}{note}, about {left:.0f} s left"
        print(told, file=sys.stderr, flush=True)

    yield show


@contextmanager
def progress_bar(
    steps: int, wanted: bool | None, main: bool, label: str
) -> Iterator[Callable[[int, str], None]]:
    """A function of (steps done, a note) that draws a bar on stderr; where that is no terminal, it
    prints a line every ten seconds. `wanted`: False shows nothing, True always a bar."""
    if wanted is False or not main:
        yield lambda done, note: None
        return
    if not (wanted or sys.stderr.isatty()):
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
