"""A checkpoint in fp32 PyTorch through transformers' generate(), as its documentation shows it.

    python -m benchmarks.rivals.transformers CHECKPOINT CLIPS.json --repeats 1 --threads 2

The languages of the clips stand in languages.json beside them, where they are known: each is
prompted as in the checkpoint's training.

Answers as `python -m runner bench` does, in the same fields. Stages are timed by hooks: the
feature extractor's call is `mel_s`, the encoder's forward `encoder_s`, the model's forward
`prompt_s` the first time and `per_token_s` afterwards; what generate() does between them is in
`end_to_end_s` only, as the runner's own loop is. Dense checkpoints only: it loads with stock
transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devices.runner.audio import Pcm, read_wav, split
from devices.runner.machine import peak_rss_bytes
from devices.runner.problem import RunnerProblem
from devices.runner.text import join
from export.prompt import language_for, task_of

WARM_UP_CLIPS = 3


@dataclass
class Stopwatch:
    """Seconds of each stage, in the order in which they were measured."""

    mel_s: list[float] = field(default_factory=list)
    encoder_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def bench(checkpoint: Path, clips: Path, repeats: int = 1, threads: int = 1) -> dict[str, Any]:
    """The runner's answer, by transformers."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = json.loads(clips.read_text(encoding="utf-8"))
    paths = [clips.parent / name for name in names]
    spoken = languages_of(clips, len(paths))
    classes = transformers.WhisperForConditionalGeneration, transformers.WhisperProcessor
    started = time.perf_counter()  # the names above are imported on first use
    rival = Rival(checkpoint, *classes)
    load_s = time.perf_counter() - started
    work = list(zip(paths, spoken, strict=True))
    for path, language in work[:WARM_UP_CLIPS]:
        rival.transcribe(path, language)
    rival.clear()
    answers = [rival.timed(*each) for _ in range(repeats) for each in work][-len(work) :]
    return {
        "load_s": [load_s],
        **vars(rival.watch),
        "mel_share": None,
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": rival.parameters,
        "tokens": [tokens for tokens, _ in answers],
        "texts": [text for _, text in answers],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


class Rival:
    """Model and processor, with hooks that note the time of each stage."""

    def __init__(self, checkpoint: Path, model_class: Any, processor_class: Any) -> None:
        refuse_slim(checkpoint)
        self.model = model_class.from_pretrained(
            checkpoint, dtype="float32", use_safetensors=True
        ).eval()
        self.processor = processor_class.from_pretrained(checkpoint)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.watch = Stopwatch()
        self.first = True
        self.started = 0.0
        self.hook(self.model.model.encoder, lambda: self.watch.encoder_s)
        self.hook(self.model, self.step_list)

    def hook(self, module: Any, times: Callable[[], list[float]]) -> None:
        """Let a module's forward note its seconds in the list that `times()` returns."""
        begun: list[float] = []
        module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: times().append(time.perf_counter() - begun.pop()))

    def step_list(self) -> list[float]:
        """The list that the next decoder step belongs to."""
        self.first, prompt = False, self.first
        return self.watch.prompt_s if prompt else self.watch.per_token_s

    def clear(self) -> None:
        """Forget what was measured."""
        self.watch = Stopwatch()

    def timed(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        """Tokens and text of a WAV file; notes the seconds from file to text."""
        with noted(self.watch.end_to_end_s), noted(self.watch.cpu_s, time.process_time):
            return self.transcribe(path, language)

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
                features,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.model.config.max_target_positions - 4,
                **told,
            )[0].tolist()
        return found[: found.index(config.eos_token_id)] if config.eos_token_id in found else found


def languages_of(clips: Path, count: int) -> list[str | None]:
    """What is spoken in each clip; None where the list does not say."""
    place = clips.parent / "languages.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else [None] * count


@contextmanager
def noted(times: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Append the block's seconds to a list."""
    started = clock()
    yield
    times.append(clock() - started)


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


def main(argv: list[str] | None = None) -> int:
    """Print the answer, or a letter, as JSON on the last line."""
    parser = argparse.ArgumentParser(prog="rivals.transformers", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    try:
        answer = bench(**vars(arguments))
    except (RunnerProblem, OSError, ValueError) as error:
        print(json.dumps({"error": str(error), "hint": getattr(error, "hint", "")}))
        return 1
    print(json.dumps(answer, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
