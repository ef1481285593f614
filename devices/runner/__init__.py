"""What runs on the device: numpy and onnxruntime only, no torch, no tokenizer library.

The folder is copied to the device as `runner/` and started there:

    python -m runner transcribe ARTIFACT WAV...
    python -m runner bench ARTIFACT CLIPS.json --repeats 1 --threads 2
    python -m runner check ARTIFACT CLIPS.json
    python -m runner profile ARTIFACT --seconds 5
    python -m runner describe

The last line on stdout is one JSON object. A failure is `{"error": ..., "hint": ...}` with exit
code 1, and the same letter in words on stderr.
"""

import os

# onnxruntime 1.29 and later report usage unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
