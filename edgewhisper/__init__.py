"""EdgeWhisper: make a Whisper checkpoint small, export it, and measure it on the device.

import edgewhisper
model = edgewhisper.load("openai/whisper-tiny")
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    """`load` and `save` on first use: importing edgewhisper must not import torch."""
    if name in __all__:
        from edgewhisper import whisper

        return getattr(whisper, name)
    raise AttributeError(f"module 'edgewhisper' has no attribute {name!r}")
