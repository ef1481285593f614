"""A checkpoint in each engine's own form, by the tool that the engine's users have, or ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.program import PROJECT
from benchmarks.rivals.protocol import RULES
from export.files import new_directory
from export.problem import Problem

POSITIONS_A_SECOND = 50
PROMPT = 4


@dataclass(frozen=True)
class Order:
    """What a form is made of, and where. Forms of a former call are taken as they are, save those
    that our exporter writes: it is what is being worked on."""

    checkpoint: Path
    models: Path
    """The folder for all forms."""
    python: Path
    """The interpreter of the rivals' environment."""
    windows_s: tuple[float, ...] = ()
    """Shorter windows of our artifact, in seconds."""
    tokens: int | None = None
    """How many are forced."""

    def place(self, form: str) -> Path:
        return self.models / f"{self.checkpoint.name}-{form}"


Prepare = Callable[[Order], Path]
"""Writes the form and says where it is."""


def as_it_is(order: Order) -> Path:
    return order.checkpoint


# ---------------------------------------------------------------------------------- our exporter


def artifact(precision: str) -> Prepare:
    """Our artifact; without a gate, for a model of random weights says nothing."""

    def write(order: Order) -> Path:
        model, processor = load(order.checkpoint)
        set_windows(model.config, order.windows_s)
        return export(model, processor, order.place(f"ours-{precision}"), precision, "native")

    return write


def sherpa(precision: str) -> Prepare:
    """The layout of sherpa-onnx, which decodes half as many tokens as the model has positions."""

    def write(order: Order) -> Path:
        model, processor = load(order.checkpoint)
        if order.tokens is not None:
            force(model, order.tokens)
        place = export(model, processor, order.place(f"sherpa-{precision}"), precision, "sherpa")
        write_rules(order.checkpoint, place)
        if order.tokens is not None:
            name_by_number(place)
        return place

    return write


def load(checkpoint: Path) -> tuple[Any, Any]:
    """A dense checkpoint's model and processor, by transformers itself."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint)
    return model, transformers.WhisperProcessor.from_pretrained(checkpoint)


def export(model: Any, processor: Any, place: Path, precision: str, layout: str) -> Path:
    from export.onnx.to_onnx import export_onnx

    shutil.rmtree(place, ignore_errors=True)
    with new_directory(place) as folder:
        export_onnx(model, processor, folder, precision, layout=layout)
    return place


def set_windows(config: Any, windows_s: Sequence[float]) -> None:
    """Record windows beside the full one, as the method `short` does."""
    from export.shrink import FORMAT

    full = config.max_source_positions
    windows = {round(POSITIONS_A_SECOND * seconds) for seconds in windows_s}
    if shorter := sorted(n for n in windows if n < full):
        config.edgewhisper = {"format": FORMAT, "windows": [*shorter, full]}


def force(model: Any, tokens: int) -> None:
    """Leave room for twice as many tokens, and only ordinary ones to say."""
    from torch import nn

    config, generation, table = model.config, model.generation_config, model.model.decoder
    fewest, most = PROMPT + 1, config.max_target_positions // 2
    if not fewest <= tokens <= most:
        raise Problem(
            f"{tokens} tokens are to be forced; sherpa-onnx decodes half as many as the model has "
            f"positions, of which the prompt takes {PROMPT}",
            hint=f"force from {fewest} to {most} --tokens, or leave sherpa-onnx out",
        )
    positions = table.embed_positions.weight.detach()[: 2 * tokens].clone()
    config.max_target_positions = 2 * tokens
    table.max_target_positions = 2 * tokens
    table.embed_positions.num_embeddings = 2 * tokens
    table.embed_positions.weight = nn.Parameter(positions)
    generation.suppress_tokens = list(range(generation.eos_token_id, config.vocab_size))


def name_by_number(place: Path) -> None:
    """Let every token be called by its id: sherpa-onnx's Python package tells tokens as texts, and
    cannot tell those that are half a letter, of which random weights say many."""
    (tokens,) = place.glob("*-tokens.txt")
    ids = [line.split()[1] for line in tokens.read_text(encoding="ascii").splitlines()]
    lines = [f"{b64encode(f' {number}'.encode()).decode()} {number}\n" for number in ids]
    tokens.write_text("".join(lines), encoding="ascii")
    (place / "manifest.json").unlink()  # it has the file's hash, and sherpa-onnx does not read it


# ------------------------------------------------------------------------------------- the others


def ggml(kind: str) -> Prepare:
    """whisper.cpp's model file, by our own writer."""

    def write(order: Order) -> Path:
        from benchmarks.rivals.ggml import convert

        place = order.place(f"ggml-{kind}")
        if not is_written(place):
            convert(order.checkpoint, place, kind)
        return place

    return write


def ctranslate2(order: Order) -> Path:
    """CTranslate2's int8, by its own converter; see to_ctranslate2.py."""
    place = order.place("ctranslate2-int8")
    if not is_written(place):
        if not order.python.is_file():
            raise Problem(
                "faster-whisper: CTranslate2's converter writes its model, and it is in the "
                f"rivals' environment, which is unavailable: there is no {order.python}",
                hint="make it with `make rivals-env`, or leave faster-whisper out",
            )
        module, checkpoint = "benchmarks.rivals.to_ctranslate2", str(order.checkpoint)
        with new_directory(place) as folder:
            folder.rmdir()  # the converter wants to make it
            behind = packages(order.python)
            run([sys.executable, "-m", module, checkpoint, str(folder), behind])
            write_rules(order.checkpoint, folder)
    return place


def is_written(place: Path) -> bool:
    """Whether the form is there; one of an older version, without decoding rules, is removed."""
    if place.is_dir() and not (place / RULES).is_file():
        shutil.rmtree(place)
    return place.is_dir()


def write_rules(checkpoint: Path, place: Path) -> None:
    """Write the checkpoint's decoding rules into a rival's form."""
    from benchmarks.rivals.ggml import decoding_rules_of

    (place / RULES).write_text(json.dumps(decoding_rules_of(checkpoint)) + "\n", encoding="utf-8")


def packages(python: Path) -> str:
    """Where the environment of an interpreter keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    return run([str(python), "-c", code]).strip()


def run(argv: Sequence[str]) -> str:
    """What a program prints; raises the letter with the last line of its complaint."""
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Problem(
            f"{' '.join(argv[:3])} ended with exit code {done.returncode} ({said})",
            hint="make the rivals' environment anew: make rivals-env",
        )
    return done.stdout
