"""Text normalizers by name. Results of different normalizers are never compared."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.normalizers.whisper_basic import whisper_basic
from export.problem import Problem

NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: " ".join(text.split()),
    "whisper-basic": whisper_basic,
}


def normalizer(name: str) -> Callable[[str], str]:
    """The normalizer of that name. Raises Problem for an unknown one, naming those there are."""
    if name not in NORMALIZERS:
        raise Problem(
            f"there is no normalizer {name!r}", hint=f"choose one of {', '.join(NORMALIZERS)}"
        )
    return NORMALIZERS[name]
