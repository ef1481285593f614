"""A checkpoint by sherpa-onnx: its loop and its front end, over graphs in its layout.

    python -m benchmarks.rivals.sherpa_onnx MODEL CLIPS.json --threads 2 --tokens 64

MODEL is a folder that export/onnx/layouts/sherpa.py wrote. The graphs are thus our operators where
its own exporter traces and quantises PyTorch's; they hear the whole window whatever the clip. What
is measured is the engine: its log-mel, its caches that are copied from step to step, its loop.

Each clip is transcribed in its own language. sherpa-onnx reads it from the recognizer's
configuration, which is changed between clips (microseconds, nothing is loaded again). For an
English-only model sherpa-onnx itself leaves language and task out of the prompt.

The Python package has one call for encoder and decoder, so:

    mel_s        accept_waveform(), which computes all frames
    encoder_s    decode_stream() of a tenth of a second, after the clip and outside `end_to_end_s`:
                 sherpa-onnx allows 6 tokens a second, so there the loop ends before its first. It
                 is encoder, cross keys and values, and the prompt; `prompt_s` stays empty
    per_token_s  what decode_stream() of the clip takes longer, divided by the tokens: the loop runs
                 the decoder after every one of them. Only where tokens are forced: those of a few
                 words take less than the encoder's time differs from run to run

Tokens cannot be forced by its options. prepare.sherpa() therefore writes a model that has room for
twice as many positions as tokens are wanted (the loop stops at half of them), and whose graph
suppresses the end of text; per_token_s gains, as less is copied. The package tells no ids, so
`tokens` are texts; of that model, the ids written out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.protocol import Engine, main, noted, prompt_language, prompt_task, read_rules
from devices.runner.audio import SAMPLING_RATE, read_wav

TOO_SHORT = np.zeros(SAMPLING_RATE // 10, np.float32)
TAIL_FRAMES = 1
"""Padding behind the clip; 0 would stand for ten seconds. The graphs fill the window themselves."""


class SherpaOnnx(Engine):
    imports = ("sherpa_onnx",)
    packages = ("sherpa-onnx",)

    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        from sherpa_onnx import OfflineRecognizer

        super().__init__(model, threads, tokens)
        self.rules = read_rules(model)
        self.language = self.rules.language
        self.recognizer = OfflineRecognizer.from_whisper(
            encoder=str(only(model, "*-encoder*.onnx")),
            decoder=str(only(model, "*-decoder*.onnx")),
            tokens=str(only(model, "*-tokens.txt")),
            language=self.language or "en",  # an English-only model's is not read
            task=prompt_task(self.rules),
            num_threads=threads,
            tail_paddings=TAIL_FRAMES,
        )
        self.decode_s, self.tokens = 0.0, tokens

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[Any], str]:
        self.set_language(prompt_language(self.rules, language))
        pcm = read_wav(path)
        with noted(self.watch.mel_s):
            stream = self.heard(pcm)
        started = time.perf_counter()
        self.recognizer.decode_stream(stream)
        self.decode_s = time.perf_counter() - started
        found = list(stream.result.tokens)
        return found, str(stream.result.text).strip()

    def set_language(self, code: str | None) -> None:
        """Let the recognizer transcribe in another language than before."""
        if code == self.language:
            return
        config = self.recognizer.config
        config.model_config.whisper.language = self.language = code
        self.recognizer.recognizer.set_config(config)

    def heard(self, pcm: Any) -> Any:
        stream = self.recognizer.create_stream()
        stream.accept_waveform(SAMPLING_RATE, pcm)
        return stream

    def between(self) -> None:
        """The time without any token."""
        stream = self.heard(TOO_SHORT)
        started = time.perf_counter()
        self.recognizer.decode_stream(stream)
        silent_s = time.perf_counter() - started
        self.watch.encoder_s.append(silent_s)
        if self.tokens:
            self.watch.per_token_s.append((self.decode_s - silent_s) / self.tokens)


def only(folder: Path, pattern: str) -> Path:
    """The one file of that name."""
    (found,) = folder.glob(pattern)
    return found


if __name__ == "__main__":
    sys.exit(main(SherpaOnnx))
