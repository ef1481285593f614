"""Run a checkpoint in faster-whisper: CTranslate2 in int8.

    python -m benchmarks.rivals.faster_whisper MODEL CLIPS.json --threads 2 --tokens 64

MODEL is a folder written by CTranslate2's own converter (to_ctranslate2.py). The calls are those of
WhisperModel.transcribe() on one window: feature_extractor (`mel_s`), pad_or_trim and encode()
(`encoder_s`), and CTranslate2's generate() with beam_size 1. Prompt and suppressed tokens are
faster-whisper's defaults without timestamps: language and task for a multilingual model only, the
non-speech tokens, and no blank at the beginning. The other work of transcribe() (segments,
compression ratio, fallback) is left out, which favours the engine.

generate() runs the prompt and all steps in C++. With forced tokens, a second call after each clip
stops after one token. Its time is `prompt_s`; it computes the cross keys and values, processes the
prompt and chooses one token. The additional time of the first call, divided by the number of
further tokens, is `per_token_s`. The second call is not part of `end_to_end_s`. Without forced
tokens, the two times cannot be separated and both lists are empty.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import (
    Engine,
    main,
    noted,
    only_window,
    prompt_language,
    prompt_task,
    read_rules,
)
from devices.runner.problem import RunnerProblem


class FasterWhisper(Engine):
    """faster-whisper's WhisperModel."""

    imports = ("faster_whisper",)
    packages = ("faster-whisper", "ctranslate2")

    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        from faster_whisper import WhisperModel

        super().__init__(model, threads, tokens)
        self.tokens, self.rules = tokens, read_rules(model)
        self.whisper = WhisperModel(
            str(model), device="cpu", compute_type="int8", cpu_threads=threads
        )
        self.encoded: Any = None
        self.tokenizer = self.tokenizer_for(None)
        self.decode_s = 0.0

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        extractor = self.whisper.feature_extractor
        pcm = only_window(path, extractor.n_samples)
        with noted(self.watch.mel_s):
            features = self.features(pcm)
        with noted(self.watch.encoder_s):
            self.encoded = self.whisper.encode(features)
        self.tokenizer = self.tokenizer_for(language)
        started = time.perf_counter()
        tokens = self.generate(self.tokens)
        self.decode_s = time.perf_counter() - started
        return tokens, self.tokenizer.decode(tokens).strip()

    def features(self, pcm: Any) -> Any:
        """Return the features of transcribe(): log-mel without its last frame, in one window."""
        from faster_whisper.audio import pad_or_trim

        frames = self.whisper.feature_extractor.nb_max_frames
        return pad_or_trim(self.whisper.feature_extractor(pcm)[..., :-1][..., :frames], frames)

    def tokenizer_for(self, language: str | None) -> Any:
        """Return faster-whisper's tokenizer, which defines the prompt and suppressed tokens."""
        from faster_whisper.tokenizer import Tokenizer

        code, task = prompt_language(self.rules, language), prompt_task(self.rules)
        return Tokenizer(self.whisper.hf_tokenizer, code is not None, task, code)

    def generate(self, tokens: int | None) -> list[int]:
        """Return greedy tokens; exactly `tokens` of them unless that is None."""
        from faster_whisper.transcribe import get_suppressed_tokens

        prompt = self.whisper.get_prompt(self.tokenizer, [], without_timestamps=True)
        suppressed = list(get_suppressed_tokens(self.tokenizer, [-1]) or ())
        length: dict[str, int] = {}
        if tokens is not None:
            suppressed.append(self.tokenizer.eot)
            # CTranslate2 counts the prompt without its first token, generates half of max_length
            length["max_length"] = max(tokens + len(prompt) - 1, 2 * tokens)
        result = self.whisper.model.generate(
            self.encoded,
            [prompt],
            beam_size=1,
            suppress_blank=True,
            suppress_tokens=suppressed,
            **length,
        )[0]
        output: list[int] = [int(number) for number in result.sequences_ids[0]]
        if tokens is not None and len(output) != tokens:
            raise RunnerProblem(f"{tokens} tokens were forced, but {len(output)} were decoded")
        return output

    def between(self) -> None:
        """If tokens are forced, measure the time of the first one alone."""
        if self.tokens is None or self.tokens < 2:
            return
        started = time.perf_counter()
        self.generate(1)
        first_s = time.perf_counter() - started
        self.watch.prompt_s.append(first_s)
        self.watch.per_token_s.append((self.decode_s - first_s) / (self.tokens - 1))


if __name__ == "__main__":
    sys.exit(main(FasterWhisper))
