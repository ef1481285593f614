"""Run a checkpoint in fp32 PyTorch with transformers' generate(), as its documentation shows.

    python -m benchmarks.rivals.transformers CHECKPOINT CLIPS.json --repeats 1 --threads 2

The languages of the clips are read from languages.json in their folder, if it exists; they set the
prompt as in the checkpoint's training.

The answer has the fields of `python -m runner bench`. Hooks time the stages: `mel_s` is the feature
extractor's call, `encoder_s` the encoder's forward, `prompt_s` the first forward of the model and
`per_token_s` the later ones. The rest of generate() is in `end_to_end_s` only, as the runner's own
loop is. The cross keys and values are computed in the prompt's forward. The checkpoint must be
dense, because transformers' own classes load it.
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
from export.prompt import prompt_language, task_of


class Rival(Engine):
    """Model and processor, with hooks that time each stage."""

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
        """Return the options that end decoding, after `tokens` tokens unless that is None."""
        if tokens is None:
            return {"max_new_tokens": self.model.config.max_target_positions - 4}
        never = [*(self.model.generation_config.suppress_tokens or []), self.end]
        return {"max_new_tokens": tokens, "suppress_tokens": never}

    @property
    def end(self) -> int:
        return int(self.model.config.eos_token_id)

    def hook(self, module: Any, times: Callable[[], list[float]]) -> None:
        """Append the seconds of a module's forward to the list that `times()` returns."""
        begun: list[float] = []
        module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: times().append(time.perf_counter() - begun.pop()))

    def step_list(self) -> list[float]:
        """Return the list for the time of the next decoder step."""
        self.first, prompt = False, self.first
        return self.watch.prompt_s if prompt else self.watch.per_token_s

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        """Return tokens and text of a WAV file, split into windows like in the runner."""
        pcm = read_wav(path)
        pieces = split(pcm, self.processor.feature_extractor.n_samples)
        tokens = [self.window(pcm[piece], language) for piece in pieces]
        decode = self.processor.tokenizer.decode
        texts = [decode(window, skip_special_tokens=True).strip() for window in tokens]
        return [token for window in tokens for token in window], join(texts)

    def window(self, pcm: Pcm, language: str | None = None) -> list[int]:
        """Return the greedy tokens of one window, without prompt and end token."""
        import torch

        self.first = True
        with noted(self.watch.mel_s):
            features = self.processor(pcm, sampling_rate=16_000, return_tensors="pt").input_features
        config = self.model.generation_config
        code = prompt_language(config, language)
        prompt = {} if code is None else {"language": code, "task": task_of(config)}
        with torch.no_grad():
            output = self.model.generate(
                features, do_sample=False, num_beams=1, **self.limits, **prompt
            )[0].tolist()
        return output[: output.index(self.end)] if self.end in output else output


def refuse_slim(checkpoint: Path) -> None:
    """Raise RunnerProblem for a compressed checkpoint.

    transformers' own classes would build dense layers with random weights.
    """
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunnerProblem(f"{checkpoint}: no readable config.json ({error})") from None
    if config.get("edgewhisper"):
        raise RunnerProblem(
            f"{checkpoint}: its layers have individual shapes; "
            "transformers loads dense layers only",
            "bench the dense checkpoint that it was made from",
        )


if __name__ == "__main__":
    sys.exit(main(Rival))
