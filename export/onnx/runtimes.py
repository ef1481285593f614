"""Which onnxruntime version the graphs of a layout need.

Determined by loading and running every layout in every precision with onnxruntime 1.20 to 1.31. In
int4 the graphs multiply integers of 8 bits, which onnxruntime supports since 1.21. The native
decoder keeps its caches in place, which GroupQueryAttention supports since 1.22. In int8 and int4
the encoder's keys and values are int8 as well, which it supports since 1.27. For an older version
they are float32.
"""

from __future__ import annotations

import re

from export.layouts import LAYOUTS, NATIVE, Layout
from export.problem import Problem

INT8_CACHE = "1.27"


def has_int8_cache(precision: str, runtime: str | None) -> bool:
    """Return whether a native graph for this onnxruntime (None: the newest) has int8 keys and
    values."""
    newest = runtime is None or _numbers(runtime) >= _numbers(INT8_CACHE)
    return precision in ("int8", "int4") and newest


def needed(layout: str, precision: str, runtime: str | None = None) -> str:
    """Return the oldest onnxruntime that runs an artifact made for `runtime`. Raises Problem if
    `runtime` is no version, or older than the layout can be made for."""
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
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", version)
    if not match:
        raise Problem(f"--runtime {version}: no version", hint="give one such as 1.23")
    return int(match[1]), int(match[2])
