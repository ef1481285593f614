"""A mark for tests that run the other engines."""

from __future__ import annotations

import pytest

from benchmarks.rivals.engines import interpreter

needs_rivals = pytest.mark.skipif(
    not interpreter().is_file(),
    reason="there is no environment of the rivals; `make rivals-env` creates it",
)
