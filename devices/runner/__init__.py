"""Runs exported artifacts on a device. Needs only numpy and onnxruntime, or for Core ML artifacts
numpy and coremltools.

The folder is copied to the device as the package `runner` and started there:

    python -m runner transcribe ARTIFACT WAV...
    python -m runner bench ARTIFACT CLIPS.json --repeats 1 --threads 2
    python -m runner compile ARTIFACT --compute-units cpu-ane
    python -m runner check ARTIFACT CLIPS.json
    python -m runner profile ARTIFACT --seconds 5
    python -m runner describe

In Python:

    from runner import Recognizer

    print(Recognizer("ARTIFACT").transcribe("clip.wav").text)

The last line on stdout is one JSON object. On failure it is `{"error": ..., "hint": ...}`, the exit
code is 1 and stderr has the same message as text.
"""

import os
from typing import Any

# onnxruntime 1.29 and later report usage unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Options", "Recognizer", "RunnerProblem", "Segment", "Transcript"]


def __getattr__(name: str) -> Any:
    """Return a public name; numpy and onnxruntime are imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import recognizer

    return getattr(recognizer, name)
