"""The common protocol of the engines' programs: workload, clock and answer.

    python -m benchmarks.rivals.NAME MODEL CLIPS.json --threads 2 [--repeats 1] [--tokens 64]

A process runs one engine with one number of threads. It loads the engine, transcribes the first
clips to warm up, then all of them `repeats` times, each from its WAV file to text. The last line on
stdout is a JSON object with the fields of the runner's own answer
(devices/runner/measure/bench.py), or with an error and a hint.

With `--tokens N`, the end of text is suppressed and decoding stops after N tokens, so that every
engine runs the same number of decoder steps.

This module needs numpy and the engine, but neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from devices.runner.audio import read_wav
from devices.runner.decode.rules import Rules
from devices.runner.machine.host import peak_rss_bytes
from devices.runner.problem import RunnerProblem

WARM_UP_CLIPS = 3

RULES = "decoding.json"
"""File in a rival's model folder with the checkpoint's prompt, languages and special tokens, like
the entry `decoding` of an artifact's manifest."""


@dataclass
class Stopwatch:
    """Seconds of each stage, in the order of measurement."""

    mel_s: list[float] = field(default_factory=list)
    encoder_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@contextmanager
def noted(times: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Append the duration of the block in seconds to a list."""
    started = clock()
    yield
    times.append(clock() - started)


class Engine(ABC):
    """A loaded model that records the seconds of each stage in `watch`.

    Subclasses are created as Engine(model, threads, tokens), with the model in the engine's own
    format and the number of forced tokens or None.
    """

    imports: tuple[str, ...] = ()
    """Modules that are imported before the loading time is measured."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions the answer contains."""
    parameters: int | None = None
    mel_share: float | None = None
    build = ""
    """The engine's report of how it was compiled."""

    @abstractmethod
    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        self.watch = Stopwatch()

    @abstractmethod
    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        """Return the tokens, without prompt and end, and the text of a WAV file."""

    def between(self) -> None:  # noqa: B027 (most engines have nothing to do there)
        """Measure, after a clip and untimed, stages that could not be separated within it."""

    def finish(self) -> None:  # noqa: B027
        """Measure after all clips, when the memory peak has been read."""


def bench(
    engine_class: type[Engine],
    model: Path,
    clips: Path,
    threads: int,
    repeats: int = 1,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Run an engine on all clips and return the answer of the process."""
    from importlib import metadata

    names = json.loads(clips.read_text(encoding="utf-8"))
    inputs = list(
        zip([clips.parent / n for n in names], languages_of(clips, len(names)), strict=True)
    )
    for name in engine_class.imports:
        importlib.import_module(name)
    started = time.perf_counter()
    engine = engine_class(model, threads, tokens)
    load_s = time.perf_counter() - started
    for path, language in inputs[:WARM_UP_CLIPS]:
        engine.transcribe(path, language)
        engine.between()
    engine.watch = Stopwatch()
    done = [timed(engine, path, language) for _ in range(repeats) for path, language in inputs]
    peak = peak_rss_bytes()
    engine.finish()
    extra = {} if engine.parameters is None else {"parameters": engine.parameters}
    return {
        "load_s": [load_s],
        **vars(engine.watch),
        **extra,
        "mel_share": engine.mel_share,
        "peak_rss_bytes": peak,
        "tokens": [tokens for tokens, _ in done[-len(inputs) :]],
        "texts": [text for _, text in done[-len(inputs) :]],
        "versions": {name: metadata.version(name) for name in engine.packages},
        "build": engine.build,
    }


def timed(engine: Engine, path: Path, language: str | None) -> tuple[list[int], str]:
    """Return tokens and text of a WAV file; record the seconds from file to text."""
    with noted(engine.watch.end_to_end_s), noted(engine.watch.cpu_s, time.process_time):
        output = engine.transcribe(path, language)
    engine.between()
    return output


def languages_of(clips: Path, count: int) -> list[str | None]:
    """Return the language of each clip, None for all without languages.json."""
    place = clips.parent / "languages.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else [None] * count


def read_rules(model: Path) -> Rules:
    """Return the decoding rules of the checkpoint that a rival's model was converted from."""
    return Rules.from_manifest(json.loads((model / RULES).read_text(encoding="utf-8")))


def prompt_language(rules: Rules, spoken: str | None) -> str | None:
    """Return the language that prompts the model for a clip.

    It is the clip's language if the model has a token for it, otherwise the checkpoint's default.
    An English-only model returns None: its prompt has no language and no task.
    """
    return spoken if spoken in rules.languages else rules.language


def prompt_task(rules: Rules) -> str:
    """Return the task in the checkpoint's prompt, "transcribe" if there is none."""
    named = (task for task, number in rules.tasks.items() if number in rules.prompt)
    return next(named, "transcribe")


def forced(rules: Rules, tokens: int | None) -> Rules:
    """Return rules that decode exactly `tokens` tokens; None returns the same rules."""
    if tokens is None:
        return rules
    never = (*rules.suppress_tokens, rules.eos)
    return replace(rules, max_new_tokens=tokens, suppress_tokens=never)


def only_window(path: Path, samples: int) -> Any:
    """Return the samples of a WAV file. Raises RunnerProblem if they exceed the window."""
    pcm = read_wav(path)
    if len(pcm) > samples:
        raise RunnerProblem(
            f"{path.name}: {len(pcm)} samples, but this engine processes one window of {samples}",
            "give clips that fit the model's window",
        )
    return pcm


def main(engine_class: type[Engine], argv: list[str] | None = None) -> int:
    """Print the answer, or an error and a hint, as JSON on the last line."""
    parser = argparse.ArgumentParser(description="Time one engine; see protocol.py.")
    parser.add_argument("model", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int)
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    try:
        answer = bench(engine_class, **vars(given))
    except ModuleNotFoundError as error:
        message = f"this engine's environment has no module `{error.name}`"
        print(json.dumps({"error": message, "hint": "rebuild the environment: make rivals-env"}))
        return 1
    except (RunnerProblem, OSError, ValueError, RuntimeError) as error:
        print(json.dumps({"error": str(error), "hint": getattr(error, "hint", "")}))
        return 1
    print(json.dumps(answer, ensure_ascii=False))
    return 0
