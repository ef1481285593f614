"""EdgeWhisper compresses a Whisper checkpoint, exports it and measures it on the device.

import edgewhisper
model = edgewhisper.load("openai/whisper-tiny")
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    """Import `load` and `save` on first use: importing edgewhisper must not import torch."""
    if name in __all__:
        from edgewhisper.checkpoints import store

        return getattr(store, name)
    raise AttributeError(f"module 'edgewhisper' has no attribute {name!r}")
