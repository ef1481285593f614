"""A made-up result for tests of what is done with results."""

from __future__ import annotations

from typing import Any

from benchmarks.result import STAGES, summaries, validate


def make_result(**changes: Any) -> dict[str, Any]:
    """Ten clips of three words, three wrong words, 50 ms each, in three rounds."""
    samples = {stage: changes.pop(stage, [0.05] * 30) for stage in STAGES}
    rounds = changes.get("rounds", 3)
    result = {
        "format": 1,
        "name": "made",
        "rival": None,
        "precision": "int8",
        "artifact_hash": "a" * 64,
        "clips_hash": "a" * 64,
        "rounds": rounds,
        "threads": 2,
        "wer": 0.1,
        "cer": 0.05,
        "wer_interval": [0.0, 0.3],
        "substitutions": 2,
        "deletions": 1,
        "insertions": 0,
        "words": 30,
        "utterances": 10,
        "exact": 8,
        "normalizer": "whisper-basic",
        "clip_errors": [2, 1] + [0] * 8,
        "clip_words": [3] * 10,
        "texts": ["one two three"] * 10,
        **samples,
        **summaries(samples, rounds),
        "mel_share": 0.2,
        "audio_s": 25.0,
        "peak_rss_bytes": 72_000_000,
        "artifact_bytes": 1_740_000,
        "parameters": 1_350_000,
        "macs": {"encoder": 1, "cross": 2, "decoder_per_token": 3},
        "device": {"name": "local", "cpu": "a CPU", "emulated": False},
        "emulated": False,
        "versions": {"onnxruntime": "1.31.1"},
        "measured_at": "2026-01-02T03:04:05+00:00",
    }
    return validate(result | changes)
