"""The demo: compress a model, export it to INT8, and bench it against the dense checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgewhisper import whisper
from edgewhisper.guard import AccuracyLoss
from edgewhisper.job import Request, Say
from edgewhisper.pipeline import BenchOutcome, bench_candidates, compress, export
from edgewhisper.shipped import DEFAULT_MODEL
from export.problem import Problem

DEMO_MODEL = "tiny.en"
EMBEDDED = "digits"
"""Selects the embedded model, like a size name selects a Whisper."""


def demo(model: str | None = None, say: Say = print) -> BenchOutcome:
    """Compress, export and bench `model`, next to the dense checkpoint in transformers.

    `model` is "digits" for the embedded model, or any model of `compress`. The default is OpenAI's
    tiny.en, or the embedded model if tiny.en cannot be downloaded.
    """
    from benchmarks.bench import BenchOptions, Candidate
    from devices.device import Place

    source = demo_source(model, say)
    embedded = source == str(DEFAULT_MODEL)
    name = EMBEDDED if embedded else Path(source).name
    checkpoint, label = demo_checkpoint(source, say)
    artifact = export(checkpoint, say=say)
    with tempfile.TemporaryDirectory() as folder:
        dense = whisper.as_directory(source, Path(folder))
        candidates = [
            Candidate(dense, rival="transformers", name=f"{name}: torch fp32"),
            Candidate(artifact, name=f"{name}{label}: ONNX int8"),
        ]
        if embedded:
            candidates.insert(1, Candidate(export(source, say=say), name=f"{name}: ONNX int8"))
        rounds = BenchOptions(repeats=3 if embedded else 2)  # a round of tiny.en takes a minute
        return bench_candidates(candidates, [Place()], None, rounds, say)


def demo_checkpoint(source: str, say: Say) -> tuple[str, str]:
    """Return the compressed checkpoint and its label.

    If compression loses too much, return the dense checkpoint and an empty label.
    """
    try:
        return str(compress(Request(source), say)), " compressed"
    except AccuracyLoss as lost:
        say(f"note: {lost}; the demo continues with the uncompressed model")
        return source, ""


def demo_source(model: str | None, say: Say) -> str:
    """Return the model of the demo: a path, a size name or a Hub ID."""
    from edgewhisper.checkpoints.fetch import hub_or_pinned

    if model == EMBEDDED:
        return str(DEFAULT_MODEL)
    if model is not None:
        return model
    try:
        return hub_or_pinned(DEMO_MODEL, say)
    except Problem as problem:
        say(f"note: Whisper {DEMO_MODEL} cannot be downloaded ({problem})")
        say("note: the demo continues with the embedded digits model, which needs no network")
        return str(DEFAULT_MODEL)
