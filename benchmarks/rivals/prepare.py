"""Convert a checkpoint into each engine's own model format, with its own tool or ours."""

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
class Conversion:
    """The checkpoint to convert, and where to put the models.

    Existing models are reused, except those of our exporter, which may have changed.
    """

    checkpoint: Path
    models: Path
    """The folder for all converted models."""
    python: Path
    """The Python interpreter of the rivals' environment."""
    windows_s: tuple[float, ...] = ()
    """Additional shorter windows of our artifact, in seconds."""
    tokens: int | None = None
    """The number of forced tokens, if tokens are forced."""

    def place(self, form: str) -> Path:
        """Return the folder of a model in a format."""
        return self.models / f"{self.checkpoint.name}-{form}"


Prepare = Callable[[Conversion], Path]
"""Function that converts the checkpoint and returns the model's folder."""


def as_it_is(conversion: Conversion) -> Path:
    """Return the checkpoint itself."""
    return conversion.checkpoint


# ---------------------------------------------------------------------------------- our exporter


def artifact(precision: str) -> Prepare:
    """Return a converter to our artifact, without a gate: random weights cannot pass one."""

    def write(conversion: Conversion) -> Path:
        model, processor = load(conversion.checkpoint)
        set_windows(model.config, conversion.windows_s)
        return export(model, processor, conversion.place(f"ours-{precision}"), precision, "native")

    return write


def sherpa(precision: str) -> Prepare:
    """Return a converter to sherpa-onnx's layout. It decodes half as many tokens as there are
    positions."""

    def write(conversion: Conversion) -> Path:
        model, processor = load(conversion.checkpoint)
        if conversion.tokens is not None:
            force(model, conversion.tokens)
        place = export(
            model, processor, conversion.place(f"sherpa-{precision}"), precision, "sherpa"
        )
        write_rules(conversion.checkpoint, place)
        if conversion.tokens is not None:
            name_by_number(place)
        return place

    return write


def load(checkpoint: Path) -> tuple[Any, Any]:
    """Load model and processor of a dense checkpoint with transformers."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint)
    return model, transformers.WhisperProcessor.from_pretrained(checkpoint)


def export(model: Any, processor: Any, place: Path, precision: str, layout: str) -> Path:
    """Export an artifact into a folder, which is replaced; return the folder."""
    from export.onnx.silence import default_stride
    from export.onnx.to_onnx import export_onnx

    shutil.rmtree(place, ignore_errors=True)
    stride = default_stride(model, precision, layout)
    with new_directory(place) as folder:
        export_onnx(model, processor, folder, precision, layout=layout, silence_stride=stride)
    return place


def set_windows(config: Any, windows_s: Sequence[float]) -> None:
    """Add shorter windows to the full one in the config, as the method `short` does."""
    from export.shrink import FORMAT

    full = config.max_source_positions
    windows = {round(POSITIONS_A_SECOND * seconds) for seconds in windows_s}
    if shorter := sorted(n for n in windows if n < full):
        config.edgewhisper = {"format": FORMAT, "windows": [*shorter, full]}


def force(model: Any, tokens: int) -> None:
    """Reduce the positions to twice the number of tokens, and suppress all but ordinary tokens."""
    from torch import nn

    config, generation, table = model.config, model.generation_config, model.model.decoder
    fewest, most = PROMPT + 1, config.max_target_positions // 2
    if not fewest <= tokens <= most:
        raise Problem(
            f"{tokens} tokens cannot be forced: sherpa-onnx decodes half as many as the model has "
            f"positions, {PROMPT} of them for the prompt",
            hint=f"force from {fewest} to {most} --tokens, or leave sherpa-onnx out",
        )
    positions = table.embed_positions.weight.detach()[: 2 * tokens].clone()
    config.max_target_positions = 2 * tokens
    table.max_target_positions = 2 * tokens
    table.embed_positions.num_embeddings = 2 * tokens
    table.embed_positions.weight = nn.Parameter(positions)
    generation.suppress_tokens = list(range(generation.eos_token_id, config.vocab_size))


def name_by_number(place: Path) -> None:
    """Replace the text of every token by its id.

    sherpa-onnx's Python package returns tokens as texts and cannot return incomplete characters,
    which random weights often produce.
    """
    (tokens,) = place.glob("*-tokens.txt")
    ids = [line.split()[1] for line in tokens.read_text(encoding="ascii").splitlines()]
    lines = [f"{b64encode(f' {number}'.encode()).decode()} {number}\n" for number in ids]
    tokens.write_text("".join(lines), encoding="ascii")
    (place / "manifest.json").unlink()  # it has the file's old hash; sherpa-onnx does not need it


# --------------------------------------------------------------------------- other formats


def ggml(kind: str) -> Prepare:
    """Return a converter to whisper.cpp's model file, written by ggml.py."""

    def write(conversion: Conversion) -> Path:
        from benchmarks.rivals.ggml import convert

        place = conversion.place(f"ggml-{kind}")
        if not is_written(place):
            convert(conversion.checkpoint, place, kind)
        return place

    return write


def ctranslate2(conversion: Conversion) -> Path:
    """Convert to CTranslate2's int8 with its own converter; see to_ctranslate2.py."""
    place = conversion.place("ctranslate2-int8")
    if not is_written(place):
        if not conversion.python.is_file():
            raise Problem(
                "faster-whisper: its model is written by CTranslate2's converter in the rivals' "
                f"environment, which is missing: there is no {conversion.python}",
                hint="make it with `make rivals-env`, or leave faster-whisper out",
            )
        module, checkpoint = "benchmarks.rivals.to_ctranslate2", str(conversion.checkpoint)
        with new_directory(place) as folder:
            folder.rmdir()  # the converter creates it
            site_packages = packages(conversion.python)
            run([sys.executable, "-m", module, checkpoint, str(folder), site_packages])
            write_rules(conversion.checkpoint, folder)
    return place


def is_written(place: Path) -> bool:
    """Return whether the model exists; one of an older version, without rules, is deleted."""
    if place.is_dir() and not (place / RULES).is_file():
        shutil.rmtree(place)
    return place.is_dir()


def write_rules(checkpoint: Path, place: Path) -> None:
    """Write the checkpoint's decoding rules into a rival's model folder."""
    from benchmarks.rivals.ggml import decoding_rules_of

    (place / RULES).write_text(json.dumps(decoding_rules_of(checkpoint)) + "\n", encoding="utf-8")


def packages(python: Path) -> str:
    """Return the site-packages folder of an interpreter's environment."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    return run([str(python), "-c", code]).strip()


def run(argv: Sequence[str]) -> str:
    """Run a program and return its stdout. Raises Problem with the last line of its stderr."""
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Problem(
            f"{' '.join(argv[:3])} ended with exit code {done.returncode} ({message})",
            hint="rebuild the rivals' environment: make rivals-env",
        )
    return done.stdout
