"""What the engines' programs have in common: the work, the clock, and the answer.

    python -m benchmarks.rivals.NAME MODEL CLIPS.json --threads 2 [--repeats 1] [--tokens 64]

One process, one engine, one number of threads. The engine is loaded, transcribes the first clips to
warm up, then all of them `repeats` times, each from its WAV file to text. The last line on stdout
is one JSON object with the fields of the runner's own answer (devices/runner/measure/bench.py), or
a letter.

With `--tokens N` the end of text is forbidden and decoding stops after N tokens: every engine then
does the same number of decoder steps, whatever its weights say.

Needs numpy and the engine; no torch, no transformers.
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
"""File in a rival's form of the checkpoint: the checkpoint's prompt, languages and special tokens,
like the entry `decoding` of an artifact's manifest."""


@dataclass
class Stopwatch:
    """Seconds of each stage, in the order in which they were measured."""

    mel_s: list[float] = field(default_factory=list)
    encoder_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@contextmanager
def noted(times: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Append the block's seconds to a list."""
    started = clock()
    yield
    times.append(clock() - started)


class Engine(ABC):
    """A loaded model that notes the seconds of each stage in `watch`.

    Subclasses are built as Engine(model, threads, tokens): the model in the engine's own form,
    and how many tokens are forced, or None.
    """

    imports: tuple[str, ...] = ()
    """Modules that are imported before the clock of loading starts."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions the answer names."""
    parameters: int | None = None
    mel_share: float | None = None
    build = ""
    """What the engine says of how it was compiled."""

    @abstractmethod
    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        self.watch = Stopwatch()

    @abstractmethod
    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        """Tokens, without prompt and end, and text of a WAV file."""

    def between(self) -> None:  # noqa: B027 (most engines have nothing to do there)
        """Measure, after a clip, what could not be told apart within it; nobody's clock runs."""

    def finish(self) -> None:  # noqa: B027
        """The same after all clips, when the peak of memory has been read."""


def bench(
    engine_class: type[Engine],
    model: Path,
    clips: Path,
    threads: int,
    repeats: int = 1,
    tokens: int | None = None,
) -> dict[str, Any]:
    """The answer of one process."""
    from importlib import metadata

    names = json.loads(clips.read_text(encoding="utf-8"))
    work = list(
        zip([clips.parent / n for n in names], languages_of(clips, len(names)), strict=True)
    )
    for name in engine_class.imports:
        importlib.import_module(name)
    started = time.perf_counter()
    engine = engine_class(model, threads, tokens)
    load_s = time.perf_counter() - started
    for path, language in work[:WARM_UP_CLIPS]:
        engine.transcribe(path, language)
        engine.between()
    engine.watch = Stopwatch()
    done = [timed(engine, path, language) for _ in range(repeats) for path, language in work]
    peak = peak_rss_bytes()
    engine.finish()
    extra = {} if engine.parameters is None else {"parameters": engine.parameters}
    return {
        "load_s": [load_s],
        **vars(engine.watch),
        **extra,
        "mel_share": engine.mel_share,
        "peak_rss_bytes": peak,
        "tokens": [found for found, _ in done[-len(work) :]],
        "texts": [text for _, text in done[-len(work) :]],
        "versions": {name: metadata.version(name) for name in engine.packages},
        "build": engine.build,
    }


def timed(engine: Engine, path: Path, language: str | None) -> tuple[list[int], str]:
    """Tokens and text of a WAV file; notes the seconds from file to text."""
    with noted(engine.watch.end_to_end_s), noted(engine.watch.cpu_s, time.process_time):
        found = engine.transcribe(path, language)
    engine.between()
    return found


def languages_of(clips: Path, count: int) -> list[str | None]:
    """What is spoken in each clip; None where the list does not say."""
    place = clips.parent / "languages.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else [None] * count


def read_rules(model: Path) -> Rules:
    """Return the decoding rules of the checkpoint that a rival's form was made from."""
    return Rules.from_manifest(json.loads((model / RULES).read_text(encoding="utf-8")))


def prompt_language(rules: Rules, spoken: str | None) -> str | None:
    """Return the language that prompts the model for a clip.

    It is the clip's own if the model has a token for it, otherwise the checkpoint's default. An
    English-only model has none: its prompt names no language and no task.
    """
    return spoken if spoken in rules.languages else rules.language


def prompt_task(rules: Rules) -> str:
    """Return the task that the checkpoint's prompt names, "transcribe" if it names none."""
    named = (task for task, number in rules.tasks.items() if number in rules.prompt)
    return next(named, "transcribe")


def forced(rules: Rules, tokens: int | None) -> Rules:
    """Rules under which exactly so many tokens are decoded; None leaves them as they are."""
    if tokens is None:
        return rules
    never = (*rules.suppress_tokens, rules.eos)
    return replace(rules, max_new_tokens=tokens, suppress_tokens=never)


def only_window(path: Path, samples: int) -> Any:
    """The samples of a WAV file that fits a window of so many."""
    pcm = read_wav(path)
    if len(pcm) > samples:
        raise RunnerProblem(
            f"{path.name}: {len(pcm)} samples, and this engine hears one window of {samples}",
            "give clips that fit the model's window",
        )
    return pcm


def main(engine_class: type[Engine], argv: list[str] | None = None) -> int:
    """Print the answer, or a letter, as JSON on the last line."""
    parser = argparse.ArgumentParser(description="one engine, timed; see protocol.py")
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
        said = f"there is no module `{error.name}` in this engine's environment"
        print(json.dumps({"error": said, "hint": "make the environment anew: make rivals-env"}))
        return 1
    except (RunnerProblem, OSError, ValueError, RuntimeError) as error:
        print(json.dumps({"error": str(error), "hint": getattr(error, "hint", "")}))
        return 1
    print(json.dumps(answer, ensure_ascii=False))
    return 0
