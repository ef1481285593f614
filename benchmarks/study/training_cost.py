"""Measure the cost of an optimiser step of the training loop at whisper-small's dimensions.

    python -m benchmarks.study.training_cost [--steps 4] [--out FILE]

Each case runs in its own process, whose peak memory the operating system reports. The weights are
random; the clips are the embedded model's, padded to 30 s as Whisper does. The loop is
edgewhisper.training.train, as every method uses it, without a teacher (which adds its weights and a
forward pass per step). The first step, which allocates memory, is left out. Seconds are CPU time,
summed over threads, which a busy machine hardly changes.

The minimum memory in float32 is 3.9 GB: 16 bytes per parameter for weights, gradients and AdamW's
two moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.sizes import SIZES
from benchmarks.study.accounting import build_config

STORED = Path(__file__).parent.parent / "results" / "training_cost.jsonl"
MODEL = "small"
CASES = (
    {"batch_size": 1, "accumulate": 1, "precision": "no"},
    {"batch_size": 2, "accumulate": 2, "precision": "no"},
    {"batch_size": 1, "accumulate": 1, "precision": "bf16"},
)


class Enough(Exception):
    """Raised to leave the loop before it saves a state of several gigabytes."""


def measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train for `steps` + 1 steps in this process; return CPU seconds per step and peak memory."""
    import torch

    from benchmarks.speech.clips import read_manifest
    from benchmarks.study.calibration_memory import peak_bytes
    from edgewhisper.shipped import SPEECH
    from edgewhisper.training import Training, train

    model, processor = random_model()
    ends: list[float] = []
    peaks: list[int] = []

    def hook(model: Any, step: int, rate: float) -> None:
        ends.append(time.process_time())
        peaks.append(peak_bytes())
        if step == steps:
            raise Enough

    options = Training(steps=steps + 2, checkpoint_steps=10**6, checkpoint_s=1e9, **case)
    clips = read_manifest(SPEECH / "test.jsonl")
    with tempfile.TemporaryDirectory() as place, suppress(Enough):
        train(model, processor, clips, options, run_dir=Path(place), after_step=hook)
    seconds = [end - start for start, end in pairwise(ends)]
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": MODEL,
        **case,
        "parameters": count,
        "steps": len(seconds),
        "step_cpu_s": seconds,
        "median_step_cpu_s": statistics.median(seconds),
        "peak_rss_bytes": peaks[-1],
        "least_bytes": 16 * count,
        "threads": torch.get_num_threads(),
    }


def random_model() -> tuple[Any, Any]:
    """Return a random whisper-small with the embedded model's tokens and 30 s windows, and its
    processor."""
    from transformers import WhisperFeatureExtractor

    from edgewhisper import whisper
    from edgewhisper.shipped import DEFAULT_MODEL

    digits, processor = whisper.load(DEFAULT_MODEL), whisper.load_processor(DEFAULT_MODEL)
    config = build_config(MODEL)
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(digits.config, name))
    model = whisper.WhisperForConditionalGeneration(config)
    model.generation_config = digits.generation_config
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=SIZES[MODEL].mels)
    return model, processor


def machine() -> dict[str, Any]:
    from devices.device import open_device

    with open_device("local") as here:
        return here.describe()


def in_own_process(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run `measure` in a new process and return its result."""
    command = [sys.executable, "-m", "benchmarks.study.training_cost", "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--case", json.dumps(case)], check=True, stdout=subprocess.PIPE, text=True
    )
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def rows(stored: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "precision": {"no": "fp32"}.get(line["precision"], line["precision"]),
            "clips per step": str(line["batch_size"]),
            "passes per step": str(line["accumulate"]),
            "CPU s per step": f"{line['median_step_cpu_s']:.1f}",
            "peak GB": f"{line['peak_rss_bytes'] / 1e9:.2f}",
        }
        for line in stored
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=4, help="number of timed steps, after a first one"
    )
    parser.add_argument("--case", type=json.loads, help="measure this case in this process")
    parser.add_argument("--out", type=Path, default=STORED)
    given = parser.parse_args()
    if given.case:
        return print(json.dumps(measure(given.case, given.steps)))
    from export.versions import versions

    about: dict[str, Any] = {"device": machine(), "versions": versions()}
    about["measured_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [in_own_process(case, given.steps) | about for case in CASES]
    given.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for row in rows(lines):
        print("  ".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
