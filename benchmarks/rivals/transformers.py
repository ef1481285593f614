"""A checkpoint in fp32 PyTorch through transformers' generate(), as its documentation shows it.

    python -m benchmarks.rivals.transformers CHECKPOINT CLIPS.json --repeats 1 --threads 2

The languages of the clips stand in languages.json beside them, where they are known: each is
prompted as in the checkpoint's training.

Answers as `python -m runner bench` does, in the same fields. Stages are timed by hooks: the
feature extractor's call is `mel_s`, the encoder's forward `encoder_s`, the model's forward
`prompt_s` the first time and `per_token_s` afterwards; what generate() does between them is in
`end_to_end_s` only, as the runner's own loop is. The encoder's keys and values are computed in the
prompt's forward. Dense checkpoints only: it loads with stock transformers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import Engine, main, noted
from devices.runner.audio import Pcm, read_wav, split
from devices.runner.decode.text import join
from devices.runner.problem import RunnerProblem
from export.prompt import language_for, task_of


class Rival(Engine):
    """Model and processor, with hooks that note the time of each stage."""

    imports = (
        "transformers.models.whisper.modeling_whisper",
        "transformers.models.whisper.processing_whisper",
    )
    packages = ("torch", "transformers")

    def __init__(self, model: Path, threads: int, tokens: int | None = None) -> None:
        import torch
        import transformers

        super().__init__(model, threads, tokens)
        refuse_slim(model)
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.WhisperForConditionalGeneration.from_pretrained(
            model, dtype="float32", use_safetensors=True
        ).eval()
        self.processor = transformers.WhisperProcessor.from_pretrained(model)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.limits = self.generate_options(tokens)
        self.first = True
        self.hook(self.model.model.encoder, lambda: self.watch.encoder_s)
        self.hook(self.model, self.step_list)

    def generate_options(self, tokens: int | None) -> dict[str, Any]:
        """When decoding ends; what is suppressed where an end is forced."""
        if tokens is None:
            return {"max_new_tokens": self.model.config.max_target_positions - 4}
        never = [*(self.model.generation_config.suppress_tokens or []), self.end]
        return {"max_new_tokens": tokens, "suppress_tokens": never}

    @property
    def end(self) -> int:
        return int(self.model.config.eos_token_id)

    def hook(self, module: Any, times: Callable[[], list[float]]) -> None:
        """Let a module's forward note its seconds in the list that `times()` returns."""
        begun: list[float] = []
        module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: times().append(time.perf_counter() - begun.pop()))

    def step_list(self) -> list[float]:
        """The list that the next decoder step belongs to."""
        self.first, prompt = False, self.first
        return self.watch.prompt_s if prompt else self.watch.per_token_s

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        """Tokens and text of a WAV file of any length, cut as the runner cuts it."""
        pcm = read_wav(path)
        pieces = split(pcm, self.processor.feature_extractor.n_samples)
        tokens = [self.window(pcm[piece], language) for piece in pieces]
        decode = self.processor.tokenizer.decode
        texts = [decode(found, skip_special_tokens=True).strip() for found in tokens]
        return [token for window in tokens for token in window], join(texts)

    def window(self, pcm: Pcm, language: str | None = None) -> list[int]:
        """Greedy tokens of one window, without prompt and end token."""
        import torch

        self.first = True
        with noted(self.watch.mel_s):
            features = self.processor(pcm, sampling_rate=16_000, return_tensors="pt").input_features
        config = self.model.generation_config
        code = language_for(config, language)
        told = {} if code is None else {"language": code, "task": task_of(config)}
        with torch.no_grad():
            found = self.model.generate(
                features, do_sample=False, num_beams=1, **self.limits, **told
            )[0].tolist()
        return found[: found.index(self.end)] if self.end in found else found


def refuse_slim(checkpoint: Path) -> None:
    """Stock transformers would build dense layers and fill them at random."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunnerProblem(f"{checkpoint}: no readable config.json ({error})") from None
    if config.get("edgewhisper"):
        raise RunnerProblem(
            f"{checkpoint}: its layers have shapes of their own; transformers loads dense ones",
            "bench the dense checkpoint it was made from",
        )


if __name__ == "__main__":
    sys.exit(main(Rival))
