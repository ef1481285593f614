"""An artifact of layout `single` in onnxruntime alone.

Usage: run_single.py ARTIFACT WAV... (16 kHz mono, 16 bits). Needs nothing of EdgeWhisper's. The
last line of stdout is JSON: the runtime's versions, and a text for each file.
"""

import base64
import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime


def read(path):
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def main(artifact, *paths):
    rules = json.loads((Path(artifact) / "manifest.json").read_text())["decoding"]
    table = json.loads((Path(artifact) / "tokens.json").read_text())["bytes"]
    session = onnxruntime.InferenceSession(Path(artifact) / "whisper.onnx")
    texts = []
    for path in paths:
        feed = {
            "pcm": read(path)[None],
            "prompt": np.array([rules["prompt"]]),
            "max_new_tokens": np.array(rules["max_new_tokens"]),
        }
        (tokens,) = session.run(None, feed)
        texts += [b"".join(base64.b64decode(table[i] or "") for i in tokens).decode().strip()]
    print(json.dumps({"runtime": f"onnxruntime {onnxruntime.__version__}", "texts": texts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
