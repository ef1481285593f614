"""What one optimiser step of the training loop costs at the dimensions of whisper-small.

    python -m benchmarks.study.training_cost [--steps 4] [--out FILE]

Each case runs in a process of its own, whose peak memory is the operating system's figure. The
weights are random, the clips those that come with the embedded model, padded to 30 s as Whisper
pads them; the loop is edgewhisper.training.train, as every method uses it, without a teacher (one
more takes its weights, and a forward pass a step). The first step, which allocates, is left out.
Seconds are the processor's, summed over threads: a busy machine does not lengthen them much.

Least memory in float32: weights, gradients and AdamW's two moments, 16 bytes a parameter, 3.9 GB.
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
    """Thrown out of the loop, so that no state of some gigabytes is saved at its end."""


def measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train for `steps` + 1 steps in this process; CPU seconds of each, and the peak until then."""
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
    """Whisper-small without training, that reads the embedded model's tokens in 30 s windows."""
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
    command = [sys.executable, "-m", "benchmarks.study.training_cost", "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--case", json.dumps(case)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(stored: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "precision": {"no": "fp32"}.get(line["precision"], line["precision"]),
            "clips a step": str(line["batch_size"]),
            "in passes": str(line["accumulate"]),
            "CPU s a step": f"{line['median_step_cpu_s']:.1f}",
            "peak GB": f"{line['peak_rss_bytes'] / 1e9:.2f}",
        }
        for line in stored
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="that are timed, after a first one")
    parser.add_argument("--case", type=json.loads, help="measure this one, in this process")
    parser.add_argument("--out", type=Path, default=STORED)
    given = parser.parse_args()
    if given.case:
        return print(json.dumps(measure(given.case, given.steps)))
    from export.versions import versions

    about: dict[str, Any] = {"device": machine(), "versions": versions()}
    about["measured_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = [in_own_process(case, given.steps) | about for case in CASES]
    given.out.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    for row in rows(found):
        print("  ".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
