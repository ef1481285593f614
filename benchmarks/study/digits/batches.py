"""Training batches: the schedule of windows and digits, and composed batches of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.digits import WINDOW_S
from benchmarks.study.digits.augment import Mix, Pools, compose
from benchmarks.study.digits.model import Tokens


@dataclass(frozen=True)
class Plan:
    """Training options. Fractions refer to the wall time `minutes`."""

    minutes: float = 90.0
    learning_rate: float = 2e-3
    batch_s: float = 72.0
    """Seconds of windows in a batch: 24 windows of 3 s, 12 of 6 s."""
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    token_noise: float = 0.12
    """Share of the decoder's input digits that are replaced, so that it relies on the audio."""
    ema_start: float = 0.3
    ema_decay: float = 0.998
    report_every_s: float = 300.0
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """A stage of the schedule, which lasts until the fraction `until` of the wall time."""

    until: float
    windows: tuple[tuple[float, float], ...]
    """Window lengths in seconds, each with its share of the batches."""
    most: int
    """The most digits in a 3 s window."""


STAGES = (
    Stage(0.04, ((1.5, 1.0),), 1),
    Stage(0.09, ((1.5, 1.0),), 2),
    Stage(0.16, ((3.0, 1.0),), 3),
    Stage(0.57, ((3.0, 0.8), (6.0, 0.2)), 4),
    Stage(9.99, ((3.0, 0.15), (6.0, 0.85)), 5),
)


@dataclass(frozen=True)
class Request:
    """Everything a batch depends on; equal requests give equal batches."""

    seed: tuple[int, ...]
    window_s: float
    count: int
    most: int
    hard: float


@dataclass(frozen=True)
class Batch:
    """A batch: features (batch, 80, frames) float32 and the digits of each window."""

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
    """Return the request for a step at a fraction of the time, or for the first of `parts` equal
    parts of its batch."""
    stage = next(stage for stage in STAGES if fraction < stage.until)
    rng = np.random.default_rng([plan.seed, step, 7])
    windows, shares = zip(*stage.windows, strict=True)
    window_s = float(rng.choice(windows, p=shares))
    most = 6 if window_s == WINDOW_S else stage.most
    hard = min(0.7, 0.2 + fraction)
    count = max(1, round(plan.batch_s / window_s / parts))
    return Request((plan.seed, step, 0), window_s, count, most, hard)


def decoder_rows(digits: list[list[int]], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return the decoder's inputs and targets, (batch, length) int64; padded targets are -100."""
    rows = [[*tokens.prompt, *(tokens.digits[d] for d in row), tokens.end] for row in digits]
    length = max(map(len, rows))
    full = torch.tensor([row + [tokens.end] * (length - len(row)) for row in rows])
    targets = full[:, 1:].clone()
    for target, row in zip(targets, rows, strict=True):
        target[len(row) - 1 :] = -100
    return full[:, :-1], targets


def replace_tokens(inputs: Tensor, tokens: Tokens, share: float) -> Tensor:
    """Return the inputs with a share of the digits replaced by random digits."""
    choice = torch.tensor(tokens.digits)
    is_digit = torch.isin(inputs, choice)
    hit = is_digit & (torch.rand(inputs.shape) < share)
    return torch.where(hit, choice[torch.randint(len(choice), inputs.shape)], inputs)
