"""Which tests need int8 products without saturation."""

from __future__ import annotations

import pytest

from edgewhisper.pipeline import saturates


def needs_exact_int8(precision: str = "int8") -> None:
    """Skip a test of exact int8 products where onnxruntime adds pairs of them in 16 bits."""
    if precision in ("int8", "int4") and saturates():
        pytest.skip("onnxruntime's int8 products saturate on x86 without VNNI")
