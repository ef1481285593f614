"""Train the digits checkpoint from zero, by wall time, on CPU or an accelerator.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python -m benchmarks.study.digits.synthesise --out work/espeak.npz
    python -m benchmarks.study.digits.flite --out work/flite.npz
    python -m benchmarks.study.digits.train --fsdd free-spoken-digit-dataset/recordings \
        --synthetic work/espeak.npz work/flite.npz --out work --minutes 160

Interrupted? The same command with --resume goes on where the last state was saved. `--fsdd`
also takes a JSONL manifest with audio, text, speaker and kind, whose noises, words and
sentences then teach the model to keep quiet.

What made a small model learn fast: fan-in initialisation (0.02 drowns a small model's input
under its position table); a CTC head beside the decoder that is thrown away at the end; short
windows first, at the first rows of the position table; a cosine that follows the clock; and the
average of the last weights (EMA) as the result.

Speaker lucas (and theo, where the recordings have him) is never trained on and never looked at
here. The dev set that the curve shows is made of held-out recordings of the training speakers
and of held-out voices, all under full augmentation.
"""

from __future__ import annotations

import os

# Two OpenMP threads that spin lose far more to a third busy process than two that sleep, and
# the composer's products are too small to share out. Both must be set before numpy is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.digits import WINDOW_S
from benchmarks.study.digits.augment import Mix, Pools, compose
from benchmarks.study.digits.banks import prepare_banks
from benchmarks.study.digits.model import (
    Geometry,
    Tokens,
    build_model,
    build_processor,
    make_ctc_head,
    use_window,
)
from benchmarks.study.digits.spectra import Bank
from benchmarks.wer import count


@dataclass(frozen=True)
class Plan:
    """How to train. Fractions are of the wall time `minutes`."""

    minutes: float = 90.0
    learning_rate: float = 2e-3
    batch_s: float = 72.0
    """Seconds of windows in a batch: 24 windows of 3 s, 12 of 6 s."""
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    token_noise: float = 0.12
    """Share of digits fed to the decoder that are replaced: it must listen, not guess."""
    ema_start: float = 0.3
    ema_decay: float = 0.998
    report_every_s: float = 300.0
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """Until fraction `until`: windows with their shares, and the most digits in a 3 s window."""

    until: float
    windows: tuple[tuple[float, float], ...]
    most: int


STAGES = (
    Stage(0.04, ((1.5, 1.0),), 1),
    Stage(0.09, ((1.5, 1.0),), 2),
    Stage(0.16, ((3.0, 1.0),), 3),
    Stage(0.57, ((3.0, 0.8), (6.0, 0.2)), 4),
    Stage(9.99, ((3.0, 0.15), (6.0, 0.85)), 5),
)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Request:
    """Everything a batch depends on: the worker makes the same batch of the same request."""

    seed: tuple[int, ...]
    window_s: float
    count: int
    most: int
    hard: float


@dataclass(frozen=True)
class Batch:
    """Features (batch, 80, frames) float32 and the digits of each window."""

    window_s: float
    features: np.ndarray
    digits: list[list[int]]


def compose_batch(pools: Pools, request: Request, mask: bool = True) -> Batch:
    """Compose the windows of a request."""
    rng = np.random.default_rng(request.seed)
    mix = Mix(hard=request.hard)
    drawn = [
        compose(rng, pools, mix, request.window_s, request.most, mask) for _ in range(request.count)
    ]
    features = np.stack([utterance.features for utterance in drawn])
    return Batch(request.window_s, features, [utterance.digits for utterance in drawn])


def request_for(plan: Plan, step: int, fraction: float, parts: int = 1) -> Request:
    """The batch of `step` at `fraction` of the time, or the first of `parts` equal parts of it."""
    stage = next(stage for stage in STAGES if fraction < stage.until)
    rng = np.random.default_rng([plan.seed, step, 7])
    windows, shares = zip(*stage.windows, strict=True)
    window_s = float(rng.choice(windows, p=shares))
    most = 6 if window_s == WINDOW_S else stage.most
    hard = min(0.7, 0.2 + fraction)
    count = max(1, round(plan.batch_s / window_s / parts))
    return Request((plan.seed, step, 0), window_s, count, most, hard)


def decoder_rows(digits: list[list[int]], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the decoder: two (batch, length) int64, targets -100 when padded."""
    rows = [[*tokens.prompt, *(tokens.digits[d] for d in row), tokens.end] for row in digits]
    length = max(map(len, rows))
    full = torch.tensor([row + [tokens.end] * (length - len(row)) for row in rows])
    targets = full[:, 1:].clone()
    for target, row in zip(targets, rows, strict=True):
        target[len(row) - 1 :] = -100
    return full[:, :-1], targets


def replace_tokens(inputs: Tensor, tokens: Tokens, share: float) -> Tensor:
    """Replace a share of the digits by random digits."""
    choice = torch.tensor(tokens.digits)
    is_digit = torch.isin(inputs, choice)
    hit = is_digit & (torch.rand(inputs.shape) < share)
    return torch.where(hit, choice[torch.randint(len(choice), inputs.shape)], inputs)


# ---------------------------------------------------------------- state


@dataclass
class Trainer:
    """All that an interruption must not lose."""

    model: nn.Module
    ctc: nn.Linear
    optimizer: torch.optim.Optimizer
    table: Tensor
    """The full position table (rows, d_model); the model holds a part of it while training."""
    average: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    elapsed_s: float = 0.0


def make_trainer(plan: Plan, model: nn.Module) -> Trainer:
    """Model on its device, CTC head and AdamW."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ctc = make_ctc_head(model.config.d_model).to(device)
    model.to(device).train()
    table = model.model.encoder.embed_positions.weight.data.clone()
    parameters = trained_parameters(model) + list(ctc.parameters())
    optimizer = torch.optim.AdamW(
        parameters, plan.learning_rate, (0.9, 0.98), weight_decay=plan.weight_decay, fused=True
    )
    return Trainer(model, ctc, optimizer, table)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but the encoder's position table, which is fixed and changes size with the window."""
    return [p for name, p in model.named_parameters() if "encoder.embed_positions" not in name]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name, without the encoder's position table."""
    return {k: v for k, v in model.state_dict().items() if "encoder.embed_positions" not in k}


def save_state(trainer: Trainer, path: Path) -> None:
    """Write everything to `path` in one atomic step."""
    state = {
        "model": weights(trainer.model),
        "ctc": trainer.ctc.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "average": trainer.average,
        "step": trainer.step,
        "elapsed_s": trainer.elapsed_s,
        "random": torch.get_rng_state(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(trainer: Trainer, path: Path) -> None:
    """Bring `trainer` to what `save_state` wrote."""
    state = torch.load(path, weights_only=True, map_location=trainer.table.device)
    trainer.model.load_state_dict(state["model"], strict=False)
    trainer.ctc.load_state_dict(state["ctc"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.average = state["average"]
    trainer.step, trainer.elapsed_s = state["step"], state["elapsed_s"]
    torch.set_rng_state(state["random"].cpu())


# ---------------------------------------------------------------- one step


def learning_rate(plan: Plan, step: int, fraction: float) -> float:
    """Warm up over 300 steps, stay until a quarter of the time, then a cosine to one percent."""
    warm = min(1.0, (step + 1) / 300)
    if fraction < 0.25:
        return plan.learning_rate * warm
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - 0.25) / 0.75)))
    return plan.learning_rate * warm * (0.01 + 0.99 * fall)


def losses(
    model: nn.Module, head: nn.Module, plan: Plan, batch: Batch, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the decoder and CTC loss of the encoder, two scalars."""
    device = head.weight.device
    inputs, targets = decoder_rows(batch.digits, tokens)
    inputs = replace_tokens(inputs, tokens, plan.token_noise)
    output = model(
        input_features=torch.from_numpy(batch.features).to(device),
        decoder_input_ids=inputs.to(device),
    )
    # The first three targets are the prompt, always right: they would only dilute the mean.
    logits = output.logits[:, len(tokens.prompt) - 1 :]
    wanted = targets[:, len(tokens.prompt) - 1 :].to(device)
    decoder = F.cross_entropy(
        logits.transpose(1, 2), wanted, ignore_index=-100, label_smoothing=plan.label_smoothing
    )
    frames = F.log_softmax(head(output.encoder_last_hidden_state), -1).transpose(0, 1)
    lengths = torch.tensor([len(row) for row in batch.digits])
    flat = torch.tensor([digit + 1 for row in batch.digits for digit in row], dtype=torch.long)
    ctc = F.ctc_loss(
        frames, flat.to(device), torch.full((len(lengths),), len(frames)), lengths,
        zero_infinity=True,
    )  # fmt: skip
    return decoder, ctc


def backward(
    model: nn.Module, head: nn.Module, plan: Plan, batch: Batch, tokens: Tokens, fraction: float
) -> tuple[float, float]:
    """Leave the gradients of one batch in the parameters; the two losses."""
    decoder, ctc = losses(model, head, plan, batch, tokens)
    model.zero_grad(set_to_none=True)
    head.zero_grad(set_to_none=True)
    (decoder + (0.7 if fraction < 0.6 else 0.3) * ctc).backward()
    return float(decoder.detach()), float(ctc.detach())


def update(trainer: Trainer, plan: Plan, fraction: float) -> None:
    """Apply the gradients that lie in the parameters."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(plan, trainer.step, fraction)
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    trainer.optimizer.step()
    trainer.step += 1
    if fraction > plan.ema_start:
        update_average(trainer, plan.ema_decay)


def train_step(
    trainer: Trainer,
    plan: Plan,
    batch: Batch,
    tokens: Tokens,
    fraction: float,
    helpers: list[Helper] | None = None,
) -> tuple[float, float]:
    """One update on `batch` and on what the helpers have been asked for; the mean losses."""
    use_window(trainer.model, trainer.table, batch.window_s)
    for helper in helpers or ():
        helper.start(fraction)
    found = [backward(trainer.model, trainer.ctc, plan, batch, tokens, fraction)]
    parameters = trained_parameters(trainer.model) + list(trainer.ctc.parameters())
    found += [helper.add_gradients(parameters) for helper in helpers or ()]
    for parameter in parameters:
        parameter.grad.div_(len(found))
    update(trainer, plan, fraction)
    decoder, ctc = np.mean(found, axis=0)
    return float(decoder), float(ctc)


@torch.no_grad()
def update_average(trainer: Trainer, decay: float) -> None:
    """Exponential moving average of the weights."""
    current = weights(trainer.model)
    if not trainer.average:
        trainer.average = {name: tensor.clone() for name, tensor in current.items()}
    for name, tensor in current.items():
        trainer.average[name].lerp_(tensor, 1 - decay)


# ---------------------------------------------------------------- a second process


class Helper:
    """A process that computes gradients on batches of its own, with the trainer's weights.

    On two cores, two processes of one thread each beat one of two threads: small layers leave
    the second thread waiting half of the time. Weights live in shared memory, so the helper sees
    every update; its gradients come back through one shared flat tensor.
    """

    def __init__(self, trainer: Trainer, plan: Plan, tokens: Tokens, bank: Path, part: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.part = part
        self.pipe, theirs = context.Pipe()
        parameters = trained_parameters(trainer.model) + list(trainer.ctc.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in parameters)).share_memory_()
        work = (trainer.model, trainer.ctc, trainer.table, self.flat, plan, tokens, bank, theirs)
        self.process = context.Process(target=help_out, args=work, daemon=True)
        self.process.start()

    def compose(self, request: Request) -> None:
        """Have the helper compose its own batch like `request`, with another seed."""
        self.pipe.send(replace(request, seed=(*request.seed[:-1], self.part)))

    def start(self, fraction: float) -> None:
        """Have the helper compute gradients on the batch it composed."""
        self.pipe.send(fraction)

    def add_gradients(self, parameters: list[nn.Parameter]) -> tuple[float, float]:
        """Wait for the helper, add its gradients; its losses."""
        found = self.pipe.recv()
        first = 0
        for parameter in parameters:
            part = self.flat[first : first + parameter.numel()]
            parameter.grad.add_(part.view_as(parameter))
            first += parameter.numel()
        return found


def help_out(
    model: nn.Module, head: nn.Module, table: Tensor, flat: Tensor, plan: Plan, tokens: Tokens,
    bank: Path, pipe: Any,
) -> None:  # fmt: skip
    """The helper's loop: a request to compose, then the fraction of the time to train at."""
    torch.set_num_threads(1)
    pools = Pools(Bank.load(bank))
    parameters = trained_parameters(model) + list(head.parameters())
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        batch = compose_batch(pools, request)
        torch.manual_seed(sum(request.seed))
        fraction = pipe.recv()
        use_window(model, table, batch.window_s)
        found = backward(model, head, plan, batch, tokens, fraction)
        torch.cat([p.grad.flatten() for p in parameters], out=flat)
        pipe.send(found)


# ---------------------------------------------------------------- reports


class Averaged:
    """Within the block the model holds the averaged weights and its full window."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> nn.Module:
        trainer = self.trainer
        self.own = {name: tensor.clone() for name, tensor in weights(trainer.model).items()}
        use_window(trainer.model, trainer.table, WINDOW_S)
        trainer.model.load_state_dict(trainer.average or self.own, strict=False)
        return trainer.model.eval()

    def __exit__(self, *_: object) -> None:
        self.trainer.model.load_state_dict(self.own, strict=False)
        self.trainer.model.train()


@torch.no_grad()
def transcribe_features(model: nn.Module, features: np.ndarray, tokens: Tokens) -> list[list[int]]:
    """Greedy digits of features (n, 80, 600); what is not a digit token is left out."""
    said = []
    device = next(model.parameters()).device
    for first in range(0, len(features), 32):
        part = torch.from_numpy(features[first : first + 32]).to(device)
        ids = model.generate(part, max_new_tokens=10, num_beams=1, do_sample=False)
        rows = ids.tolist()
        said += [[tokens.digits.index(i) for i in row if i in tokens.digits] for row in rows]
    return said


def spell(digits: list[int]) -> str:
    """Digits as a text whose words can be counted."""
    return " ".join(map(str, digits))


def dev_report(model: nn.Module, dev: Batch, tokens: Tokens) -> dict[str, float]:
    """Word error rate on the dev set, and the share of empty windows that stay empty."""
    said = transcribe_features(model, dev.features, tokens)
    spelled = [
        (" ".join(map(str, w)), " ".join(map(str, s)))
        for w, s in zip(dev.digits, said, strict=True)
    ]
    errors = sum(sum(count(wanted, heard)[:3]) for wanted, heard in spelled if wanted)
    words = sum(map(len, dev.digits))
    quiet = [not s for w, s in zip(dev.digits, said, strict=True) if not w]
    return {"dev_wer": errors / words, "dev_quiet": sum(quiet) / max(1, len(quiet))}


def save_checkpoint(model: nn.Module, processor: Any, folder: Path) -> None:
    """The model as a Hugging Face folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)  # older readers want its own file


def report(trainer: Trainer, processor: Any, dev: Batch, out: Path, recent: list) -> None:
    """Evaluate, save checkpoint and state, append a line to the curve."""
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
    """Train until the wall time is used, reporting on the way."""
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
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdd", type=Path, required=True, help="recordings, or a JSONL manifest")
    parser.add_argument(
        "--synthetic", type=Path, nargs="*", default=[], help="caches (.npz) of speech"
    )
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--d-model", type=int, default=Geometry.d_model)
    parser.add_argument("--processes", type=int, default=2, help="1 with an accelerator")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    return parser.parse_args()


def quiet_transformers() -> None:
    """No progress bars, no notes: generate() repeats the same harmless ones at every call."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Command line: prepare what is missing, then train."""
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
