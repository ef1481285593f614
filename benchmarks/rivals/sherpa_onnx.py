"""Run a checkpoint in sherpa-onnx: its front end and decoding loop with graphs in its layout.

    python -m benchmarks.rivals.sherpa_onnx MODEL CLIPS.json --threads 2 --tokens 64

MODEL is a folder written by export/onnx/layouts/sherpa.py. Its graphs have our operators, while
sherpa-onnx's own exporter traces and quantises PyTorch's. They always process the full window. The
measurement covers the engine: its log-mel, its caches, which are copied from step to step, and its
loop.

Each clip is transcribed in its own language. sherpa-onnx reads it from the recognizer's
configuration, which is changed between clips (microseconds, nothing is loaded again). For an
English-only model, sherpa-onnx itself leaves language and task out of the prompt.

The Python package has a single call for encoder and decoder, so:

    mel_s        accept_waveform(), which computes all frames
    encoder_s    decode_stream() of 0.1 s of silence, after the clip and outside `end_to_end_s`.
                 sherpa-onnx allows 6 tokens per second, so the loop ends before the first token.
                 The time covers the encoder, cross keys and values, and the prompt; `prompt_s` is
                 empty
    per_token_s  the additional time of decode_stream() for the clip, divided by the tokens. Only
                 measured if tokens are forced: a few words take less time than the encoder's
                 variation from run to run

The engine has no option to force tokens. prepare.sherpa() therefore writes a model with twice as
many positions as forced tokens (the loop stops at half of them) whose graph suppresses the end of
text. Its caches are smaller, which favours per_token_s. The package does not return ids: `tokens`
are texts, for this model the ids as text.
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
"""Padding after the clip; 0 means ten seconds. The graphs pad to the full window themselves."""


class SherpaOnnx(Engine):
    """sherpa-onnx's OfflineRecognizer."""

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
            language=self.language or "en",  # ignored for an English-only model
            task=prompt_task(self.rules),
            num_threads=threads,
            tail_paddings=TAIL_FRAMES,
        )
        self.decode_s, self.tokens = 0.0, tokens

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[Any], str]:
        self.set_language(prompt_language(self.rules, language))
        pcm = read_wav(path)
        with noted(self.watch.mel_s):
            stream = self.stream_of(pcm)
        started = time.perf_counter()
        self.recognizer.decode_stream(stream)
        self.decode_s = time.perf_counter() - started
        tokens = list(stream.result.tokens)
        return tokens, str(stream.result.text).strip()

    def set_language(self, code: str | None) -> None:
        """Set the language that the recognizer transcribes."""
        if code == self.language:
            return
        config = self.recognizer.config
        config.model_config.whisper.language = self.language = code
        self.recognizer.recognizer.set_config(config)

    def stream_of(self, pcm: Any) -> Any:
        """Return a stream with the samples' features computed."""
        stream = self.recognizer.create_stream()
        stream.accept_waveform(SAMPLING_RATE, pcm)
        return stream

    def between(self) -> None:
        """Measure the time without any token."""
        stream = self.stream_of(TOO_SHORT)
        started = time.perf_counter()
        self.recognizer.decode_stream(stream)
        silent_s = time.perf_counter() - started
        self.watch.encoder_s.append(silent_s)
        if self.tokens:
            self.watch.per_token_s.append((self.decode_s - silent_s) / self.tokens)


def only(folder: Path, pattern: str) -> Path:
    """Return the only file that matches a pattern."""
    (path,) = folder.glob(pattern)
    return path


if __name__ == "__main__":
    sys.exit(main(SherpaOnnx))
