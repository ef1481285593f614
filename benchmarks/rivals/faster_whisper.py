"""A checkpoint by faster-whisper: CTranslate2 in int8.

    python -m benchmarks.rivals.faster_whisper MODEL CLIPS.json --threads 2 --tokens 64

MODEL is a folder that CTranslate2's own converter wrote (to_ctranslate2.py). The calls are those of
WhisperModel.transcribe() on one window: feature_extractor (`mel_s`), pad_or_trim and encode()
(`encoder_s`), CTranslate2's generate() with beam_size 1. What transcribe() does around them
(segments, compression ratio, fallback) is left out, to the engine's favour.

generate() runs prompt and all steps in C++. With forced tokens, a second call after the clip, on
the same encoder output, stops after one token: its time is `prompt_s` (it computes the encoder's
keys and values, feeds the prompt and takes one token), and what the whole call takes longer,
divided by the further tokens, is `per_token_s`. It stands outside `end_to_end_s`. Without forced
tokens the two are not told apart: both lists stay empty.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import Engine, main, noted, only_window
from devices.runner.problem import RunnerProblem


class FasterWhisper(Engine):
    imports = ("faster_whisper",)
    packages = ("faster-whisper", "ctranslate2")

    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        from faster_whisper import WhisperModel

        super().__init__(model, threads, tokens)
        self.tokens, self.threads = tokens, threads
        self.whisper = WhisperModel(
            str(model), device="cpu", compute_type="int8", cpu_threads=threads
        )
        self.ids = self.whisper.hf_tokenizer.token_to_id
        self.encoded: Any = None
        self.prompt: list[int] = []
        self.decode_s = 0.0

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        extractor = self.whisper.feature_extractor
        pcm = only_window(path, extractor.n_samples)
        with noted(self.watch.mel_s):
            features = self.features(pcm)
        with noted(self.watch.encoder_s):
            self.encoded = self.whisper.encode(features)
        self.prompt = self.prompt_for(language)
        started = time.perf_counter()
        found = self.generate(self.tokens)
        self.decode_s = time.perf_counter() - started
        return found, self.whisper.hf_tokenizer.decode(found).strip()

    def features(self, pcm: Any) -> Any:
        """As transcribe() makes them: log-mel, then one window of frames."""
        from faster_whisper.audio import pad_or_trim

        extractor = self.whisper.feature_extractor
        return pad_or_trim(extractor(pcm)[..., : extractor.nb_max_frames], extractor.nb_max_frames)

    def prompt_for(self, language: str | None) -> list[int]:
        """Start, the clip's language where the model has it or else English, task, no stamps."""
        code = language if self.ids(f"<|{language}|>") is not None else "en"
        names = ("startoftranscript", code, "transcribe", "notimestamps")
        found = [self.ids(f"<|{name}|>") for name in names]
        return [number for number in found if number is not None]

    def generate(self, tokens: int | None) -> list[int]:
        """Greedy tokens; exactly so many where they are forced."""
        result = self.whisper.model.generate(
            self.encoded,
            [self.prompt],
            beam_size=1,
            suppress_blank=False,
            **({} if tokens is None else self.limits(tokens)),
        )[0]
        found: list[int] = [int(number) for number in result.sequences_ids[0]]
        if tokens is not None and len(found) != tokens:
            raise RunnerProblem(f"{tokens} tokens were forced, {len(found)} came")
        return found

    def limits(self, tokens: int) -> dict[str, Any]:
        """CTranslate2 counts all of the prompt but its first token in `max_length`, and writes no
        more than half of that."""
        length = max(tokens + len(self.prompt) - 1, 2 * tokens)
        return {"max_length": length, "suppress_tokens": [self.ids("<|endoftext|>")]}

    def between(self) -> None:
        """Where tokens are forced, the time of the first one alone."""
        if self.tokens is None or self.tokens < 2:
            return
        started = time.perf_counter()
        self.generate(1)
        first_s = time.perf_counter() - started
        self.watch.prompt_s.append(first_s)
        self.watch.per_token_s.append((self.decode_s - first_s) / (self.tokens - 1))


if __name__ == "__main__":
    sys.exit(main(FasterWhisper))
