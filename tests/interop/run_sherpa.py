"""An artifact of layout `sherpa` in the sherpa-onnx package.

Usage: run_sherpa.py ARTIFACT TAIL_FRAMES WAV... (16 kHz mono, 16 bits). Needs nothing of
EdgeWhisper's. The last line of stdout is JSON: the runtime's versions, and a text for each file.
"""

import json
import sys
import wave
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sherpa_onnx


def read(path):
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def main(artifact, tail, *paths):
    (encoder,) = Path(artifact).glob("*-encoder*.onnx")
    (decoder,) = Path(artifact).glob("*-decoder*.onnx")
    (tokens,) = Path(artifact).glob("*-tokens.txt")
    recognizer = sherpa_onnx.OfflineRecognizer.from_whisper(
        encoder=str(encoder),
        decoder=str(decoder),
        tokens=str(tokens),
        language="en",
        task="transcribe",
        tail_paddings=int(tail),
    )
    texts = []
    for path in paths:
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, read(path))
        recognizer.decode_stream(stream)
        texts += [stream.result.text.strip()]
    print(json.dumps({"runtime": f"sherpa-onnx {version('sherpa-onnx')}", "texts": texts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
