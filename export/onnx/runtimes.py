"""Which onnxruntime the graphs of a layout need: the one place that knows.

Found by loading and running every layout in every precision with onnxruntime 1.20 to 1.31. The
native layout's decoder keeps its caches in place, which GroupQueryAttention can since 1.22. In int8
and int4 the encoder's keys and values are int8 as well, which it can since 1.27; for an older one
they are float32.
"""

from __future__ import annotations

import re

from export.layouts import LAYOUTS, NATIVE, Layout
from export.problem import Problem

INT8_CACHE = "1.27"


def has_int8_cache(precision: str, runtime: str | None) -> bool:
    """Whether a native graph for this runtime, None for the newest, has int8 keys and values."""
    newest = runtime is None or _numbers(runtime) >= _numbers(INT8_CACHE)
    return precision in ("int8", "int4") and newest


def needed(layout: str, precision: str, runtime: str | None = None) -> str:
    """The oldest onnxruntime that runs an artifact which is made for `runtime`. Raises Problem
    where that is older than the layout can be made for, or is no version."""
    least = LAYOUTS[layout].onnxruntime
    if layout == NATIVE and has_int8_cache(precision, runtime):
        least = INT8_CACHE
    if runtime is not None and _numbers(runtime) < _numbers(least):
        raise Problem(
            f"--runtime {runtime}: the layout {layout!r} needs onnxruntime {least} or newer",
            hint=f"give {least}, or take another layout; single, sherpa and transformers need "
            f"{Layout.onnxruntime}",
        )
    return least


def _numbers(version: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", version)
    if not found:
        raise Problem(f"--runtime {version}: no version", hint="give one such as 1.23")
    return int(found[1]), int(found[2])
