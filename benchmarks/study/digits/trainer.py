"""The training state of the digits checkpoint, one optimiser step, and helper processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.digits import WINDOW_S
from benchmarks.study.digits.augment import Pools
from benchmarks.study.digits.batches import (
    Batch,
    Plan,
    Request,
    compose_batch,
    decoder_rows,
    replace_tokens,
)
from benchmarks.study.digits.model import Tokens, make_ctc_head, use_window
from benchmarks.study.digits.spectra import Bank


@dataclass
class Trainer:
    """The training state, which is saved and resumed."""

    model: nn.Module
    ctc: nn.Linear
    optimizer: torch.optim.Optimizer
    table: Tensor
    """The full position table (rows, d_model); during training the model has its first rows."""
    average: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    elapsed_s: float = 0.0


def make_trainer(plan: Plan, model: nn.Module) -> Trainer:
    """Return a trainer: the model on its device, a CTC head and AdamW."""
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
    """Return all parameters except the encoder's position table.

    The table is fixed, and its size changes with the window.
    """
    return [p for name, p in model.named_parameters() if "encoder.embed_positions" not in name]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by name, without the encoder's position table."""
    return {k: v for k, v in model.state_dict().items() if "encoder.embed_positions" not in k}


def save_state(trainer: Trainer, path: Path) -> None:
    """Write the training state to a file atomically."""
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
    """Restore the state that `save_state` wrote."""
    state = torch.load(path, weights_only=True, map_location=trainer.table.device)
    trainer.model.load_state_dict(state["model"], strict=False)
    trainer.ctc.load_state_dict(state["ctc"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.average = state["average"]
    trainer.step, trainer.elapsed_s = state["step"], state["elapsed_s"]
    torch.set_rng_state(state["random"].cpu())


class Averaged:
    """Context manager in which the model has the averaged weights and its full window."""

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


# ---------------------------------------------------------------- one step


def learning_rate(plan: Plan, step: int, fraction: float) -> float:
    """Return the learning rate: 300 steps of warm-up, constant until a quarter of the time, then a
    cosine down to one percent."""
    warm = min(1.0, (step + 1) / 300)
    if fraction < 0.25:
        return plan.learning_rate * warm
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - 0.25) / 0.75)))
    return plan.learning_rate * warm * (0.01 + 0.99 * fall)


def losses_of(
    model: nn.Module, head: nn.Module, plan: Plan, batch: Batch, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Return the decoder's cross entropy and the encoder's CTC loss, two scalars."""
    device = head.weight.device
    inputs, targets = decoder_rows(batch.digits, tokens)
    inputs = replace_tokens(inputs, tokens, plan.token_noise)
    output = model(
        input_features=torch.from_numpy(batch.features).to(device),
        decoder_input_ids=inputs.to(device),
    )
    # The first three targets are the fixed prompt and would only dilute the mean.
    logits = output.logits[:, len(tokens.prompt) - 1 :]
    expected = targets[:, len(tokens.prompt) - 1 :].to(device)
    decoder = F.cross_entropy(
        logits.transpose(1, 2), expected, ignore_index=-100, label_smoothing=plan.label_smoothing
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
    """Compute the gradients of one batch in the parameters; return the two losses."""
    decoder, ctc = losses_of(model, head, plan, batch, tokens)
    model.zero_grad(set_to_none=True)
    head.zero_grad(set_to_none=True)
    (decoder + (0.7 if fraction < 0.6 else 0.3) * ctc).backward()
    return float(decoder.detach()), float(ctc.detach())


def update(trainer: Trainer, plan: Plan, fraction: float) -> None:
    """Apply the gradients in the parameters."""
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
    helpers: Sequence[Helper] = (),
) -> tuple[float, float]:
    """Update once, on `batch` and the helpers' batches; return the mean losses."""
    use_window(trainer.model, trainer.table, batch.window_s)
    for helper in helpers:
        helper.start(fraction)
    all_losses = [backward(trainer.model, trainer.ctc, plan, batch, tokens, fraction)]
    parameters = trained_parameters(trainer.model) + list(trainer.ctc.parameters())
    all_losses += [helper.add_gradients(parameters) for helper in helpers]
    for parameter in parameters:
        parameter.grad.div_(len(all_losses))
    update(trainer, plan, fraction)
    decoder, ctc = np.mean(all_losses, axis=0)
    return float(decoder), float(ctc)


@torch.no_grad()
def update_average(trainer: Trainer, decay: float) -> None:
    """Update the exponential moving average of the weights."""
    current = weights(trainer.model)
    if not trainer.average:
        trainer.average = {name: tensor.clone() for name, tensor in current.items()}
    for name, tensor in current.items():
        trainer.average[name].lerp_(tensor, 1 - decay)


# ---------------------------------------------------------------- helper processes


class Helper:
    """A process that computes gradients on its own batches with the trainer's weights.

    On two cores, two processes of one thread are faster than one process of two threads, because
    small layers keep the second thread waiting half of the time. The weights are in shared memory;
    the gradients come back in one flat shared tensor.
    """

    def __init__(self, trainer: Trainer, plan: Plan, tokens: Tokens, bank: Path, part: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.part = part
        self.pipe, theirs = context.Pipe()
        parameters = trained_parameters(trainer.model) + list(trainer.ctc.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in parameters)).share_memory_()
        arguments = (
            *(trainer.model, trainer.ctc, trainer.table, self.flat),
            *(plan, tokens, bank, theirs),
        )
        self.process = context.Process(target=help_out, args=arguments, daemon=True)
        self.process.start()

    def compose(self, request: Request) -> None:
        """Let the helper compose a batch like `request` with another seed."""
        self.pipe.send(replace(request, seed=(*request.seed[:-1], self.part)))

    def start(self, fraction: float) -> None:
        """Let the helper compute the gradients of the batch it composed."""
        self.pipe.send(fraction)

    def add_gradients(self, parameters: list[nn.Parameter]) -> tuple[float, float]:
        """Wait for the helper and add its gradients; return its two losses."""
        losses = self.pipe.recv()
        first = 0
        for parameter in parameters:
            part = self.flat[first : first + parameter.numel()]
            parameter.grad.add_(part.view_as(parameter))
            first += parameter.numel()
        return losses


def help_out(
    model: nn.Module, head: nn.Module, table: Tensor, flat: Tensor, plan: Plan, tokens: Tokens,
    bank: Path, pipe: Any,
) -> None:  # fmt: skip
    """Run the helper's loop: receive a request, then the fraction of the time to train at."""
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
        losses = backward(model, head, plan, batch, tokens, fraction)
        torch.cat([p.grad.flatten() for p in parameters], out=flat)
        pipe.send(losses)
