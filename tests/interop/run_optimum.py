"""An artifact of layout `transformers` in optimum's ORTModelForSpeechSeq2Seq.

Usage: run_optimum.py ARTIFACT merged|unmerged WAV... (16 kHz mono, 16 bits). Needs nothing of
EdgeWhisper's. The last line of stdout is JSON: the runtime's versions, and a text for each file.
"""

import json
import sys
import wave
from importlib.metadata import version

import numpy as np
from optimum.onnxruntime import ORTModelForSpeechSeq2Seq
from transformers import WhisperProcessor


def read(path):
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def main(artifact, decoder, *paths):
    model = ORTModelForSpeechSeq2Seq.from_pretrained(artifact, use_merged=decoder == "merged")
    processor = WhisperProcessor.from_pretrained(artifact)
    texts = []
    for path in paths:
        features = processor(read(path), sampling_rate=16000, return_tensors="pt").input_features
        tokens = model.generate(features, num_beams=1, do_sample=False)
        texts += [processor.decode(tokens[0], skip_special_tokens=True).strip()]
    names = ("optimum-onnx", "optimum", "transformers", "onnxruntime")
    runtime = ", ".join(f"{name} {version(name)}" for name in names)
    print(json.dumps({"runtime": runtime, "texts": texts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
