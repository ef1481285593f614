"""Train the digits checkpoint from scratch for a given wall time, on CPU or an accelerator.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python -m benchmarks.study.digits.synthesise --out OUT/espeak.npz
    python -m benchmarks.study.digits.flite --out OUT/flite.npz
    python -m benchmarks.study.digits.train --fsdd free-spoken-digit-dataset/recordings \
        --synthetic OUT/espeak.npz OUT/flite.npz --out OUT --minutes 160

After an interruption, the same command with --resume continues from the last saved state. `--fsdd`
also accepts a JSONL manifest with audio, text, speaker and kind; its noises, words and sentences
teach the model to output nothing.

These choices make a small model learn fast:

    initialisation  by fan-in; with 0.02 the position table dominates a small model's input
    CTC head        on the encoder during training, dropped at the end
    windows         short ones first, at the first rows of the position table
    learning rate   a cosine over the wall time
    result          the moving average of the last weights (EMA)

The speaker lucas (and theo, if the recordings have him) is used neither for training nor here. The
dev set of the curve has held-out recordings of the training speakers and held-out voices, with full
augmentation.
"""

from __future__ import annotations

import os

# Both must be set before numpy is imported. Spinning OpenMP threads slow down other busy processes,
# and the products of composed batches are too small to share between threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.study.digits import WINDOW_S
from benchmarks.study.digits.augment import Pools
from benchmarks.study.digits.banks import prepare_banks
from benchmarks.study.digits.batches import Batch, Plan, Request, compose_batch, request_for
from benchmarks.study.digits.model import (
    Geometry,
    Tokens,
    build_model,
    build_processor,
    quiet_transformers,
)
from benchmarks.study.digits.spectra import Bank
from benchmarks.study.digits.trainer import (
    Averaged,
    Helper,
    Trainer,
    load_state,
    make_trainer,
    save_state,
    train_step,
)
from benchmarks.wer import count

# ---------------------------------------------------------------- reports


@torch.no_grad()
def transcribe_features(model: nn.Module, features: np.ndarray, tokens: Tokens) -> list[list[int]]:
    """Return the greedily decoded digits of features (n, 80, 600), without other tokens."""
    decoded = []
    device = next(model.parameters()).device
    for first in range(0, len(features), 32):
        part = torch.from_numpy(features[first : first + 32]).to(device)
        ids = model.generate(part, max_new_tokens=10, num_beams=1, do_sample=False)
        rows = ids.tolist()
        decoded += [[tokens.digits.index(i) for i in row if i in tokens.digits] for row in rows]
    return decoded


def dev_report(model: nn.Module, dev: Batch, tokens: Tokens) -> dict[str, float]:
    """Return the word error rate on the dev set, and the share of empty windows left empty."""
    decoded = transcribe_features(model, dev.features, tokens)
    pairs = list(zip(dev.digits, decoded, strict=True))
    errors = sum(sum(count(spell(digits), spell(out))[:3]) for digits, out in pairs if digits)
    words = sum(map(len, dev.digits))
    quiet = [not out for digits, out in pairs if not digits]
    return {"dev_wer": errors / words, "dev_quiet": sum(quiet) / max(1, len(quiet))}


def spell(digits: list[int]) -> str:
    """Return digits as a text of one word each."""
    return " ".join(map(str, digits))


def save_checkpoint(model: nn.Module, processor: Any, folder: Path) -> None:
    """Save model and processor as a Hugging Face folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(
        folder
    )  # older readers expect preprocessor_config.json


def report(trainer: Trainer, processor: Any, dev: Batch, out: Path, recent: list) -> None:
    """Evaluate, save checkpoint and state, and append a line to curve.jsonl."""
    started = time.monotonic()
    tokens = Tokens.of(processor.tokenizer)
    with Averaged(trainer) as model:
        scores = dev_report(model, dev, tokens)
        save_checkpoint(model, processor, out / "checkpoint")
    save_state(trainer, out / "state.pt")
    decoder, ctc = np.mean(recent, axis=0) if recent else (math.nan, math.nan)
    line = {"minutes": trainer.elapsed_s / 60, "step": trainer.step, "loss": decoder, "ctc": ctc}
    line = {k: round(float(v), 4) for k, v in (line | scores).items()}
    with (out / "curve.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, f"({time.monotonic() - started:.0f} s)", flush=True)


# ---------------------------------------------------------------- the run


def run(
    trainer: Trainer,
    plan: Plan,
    processor: Any,
    banks: tuple[Path, Path],
    out: Path,
    processes: int,
) -> None:
    """Train until the wall time is used up, with reports in between."""
    tokens = Tokens.of(processor.tokenizer)
    pools, dev_pools = (Pools(Bank.load(bank)) for bank in banks)
    dev = compose_batch(dev_pools, Request((123,), WINDOW_S, 128, 6, 1.0), mask=False)
    helpers = [Helper(trainer, plan, tokens, banks[0], part) for part in range(1, processes)]
    before, started, reported = trainer.elapsed_s, time.monotonic(), trainer.elapsed_s
    recent: deque = deque(maxlen=100)
    while trainer.elapsed_s < plan.minutes * 60:
        fraction = trainer.elapsed_s / (plan.minutes * 60)
        request = request_for(plan, trainer.step, fraction, processes)
        for helper in helpers:
            helper.compose(request)
        batch = compose_batch(pools, request)
        recent.append(train_step(trainer, plan, batch, tokens, fraction, helpers))
        trainer.elapsed_s = before + time.monotonic() - started
        if trainer.step % 50 == 0:
            shown = np.mean(list(recent)[-50:], axis=0).round(3)
            print(trainer.step, round(trainer.elapsed_s), "s", *shown, flush=True)
        if trainer.elapsed_s - reported > plan.report_every_s:
            report(trainer, processor, dev, out, list(recent))
            reported = trainer.elapsed_s = before + time.monotonic() - started
    report(trainer, processor, dev, out, list(recent))


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdd", type=Path, required=True, help="recordings, or a JSONL manifest")
    parser.add_argument(
        "--synthetic",
        type=Path,
        nargs="*",
        default=[],
        help="files (.npz) written by synthesise.py and flite.py",
    )
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--d-model", type=int, default=Geometry.d_model)
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="number of training processes; use 1 with an accelerator",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/state.pt")
    return parser.parse_args()


def main() -> None:
    """Prepare the missing banks, then train."""
    quiet_transformers()
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    banks = prepare_banks(options.fsdd, options.synthetic, options.out)
    plan = Plan(minutes=options.minutes, seed=options.seed)
    processor = build_processor()
    geometry = Geometry(d_model=options.d_model, heads=options.d_model // 32)
    trainer = make_trainer(plan, build_model(geometry, processor))
    if options.resume and (options.out / "state.pt").exists():
        load_state(trainer, options.out / "state.pt")
    if options.processes > 1:
        trainer.model.share_memory()
        trainer.ctc.share_memory()
    run(trainer, plan, processor, banks, options.out, options.processes)


if __name__ == "__main__":
    main()
