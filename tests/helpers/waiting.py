"""Wait for a condition that another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], most_s: float = 60) -> None:
    """Return once the condition holds. Raises AssertionError if it does not within `most_s`."""
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {most_s} s"
        time.sleep(0.02)
