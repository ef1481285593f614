"""A checkpoint in each engine's own form, by the tool that the engine's users have, or ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.files import new_directory
from export.problem import Problem

Prepare = Callable[[Path, Path, Sequence[float], Path], Path]
"""Checkpoint, where models are written, windows of our artifact in seconds, the rivals' interpreter
-> where the model is. What was written by a former call is taken as it is, save our artifact."""

POSITIONS_A_SECOND = 50
PROJECT = Path(__file__).resolve().parent.parent.parent


def as_it_is(checkpoint: Path, models: Path, windows_s: Sequence[float], python: Path) -> Path:
    return checkpoint


def artifact(precision: str) -> Prepare:
    """Our export; without a gate, for a model of random weights says nothing."""

    def write(checkpoint: Path, models: Path, windows_s: Sequence[float], python: Path) -> Path:
        import shutil

        import transformers

        from export.to_onnx import export_onnx

        place = models / f"{checkpoint.name}-ours-{precision}"
        shutil.rmtree(place, ignore_errors=True)  # the exporter is what is being worked on
        model = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint)
        processor = transformers.WhisperProcessor.from_pretrained(checkpoint)
        set_windows(model.config, windows_s)
        with new_directory(place) as folder:
            export_onnx(model, processor, folder, precision)
        return place

    return write


def set_windows(config: Any, windows_s: Sequence[float]) -> None:
    """Record windows beside the full one, as the method `short` does."""
    from export.shrink import FORMAT

    full = config.max_source_positions
    windows = {round(POSITIONS_A_SECOND * seconds) for seconds in windows_s}
    if shorter := sorted(n for n in windows if n < full):
        config.edgewhisper = {"format": FORMAT, "windows": [*shorter, full]}


def ggml(kind: str) -> Prepare:
    """whisper.cpp's model file, by our own writer."""

    def write(checkpoint: Path, models: Path, windows_s: Sequence[float], python: Path) -> Path:
        from benchmarks.rivals.ggml import convert

        place = models / f"{checkpoint.name}-ggml-{kind}"
        if not place.exists():
            convert(checkpoint, place, kind)
        return place

    return write


def ctranslate2(checkpoint: Path, models: Path, windows_s: Sequence[float], python: Path) -> Path:
    """CTranslate2's int8, by its own converter; see to_ctranslate2.py."""
    place = models / f"{checkpoint.name}-ctranslate2"
    if not place.exists():
        module = "benchmarks.rivals.to_ctranslate2"
        with new_directory(place) as folder:
            folder.rmdir()  # the converter wants to make it
            run([sys.executable, "-m", module, str(checkpoint), str(folder), packages(python)])
    return place


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
