"""Shorter audio context: fine-tunes Whisper for windows that end where the speech ends.

Published recipe: whisper-acft (FUTO 2024, https://github.com/futo-org/whisper-acft). It makes the
option `--audio-ctx` of whisper.cpp usable.

Whisper processes 30 s however short the clip is, so its encoder spends half of its time or more on
silence. With a shorter input it falls into repetitions, because it was never trained on one. Here
the student processes only the first n encoder positions. It is trained to reproduce, in its
decoder, the hidden states of a frozen copy that processes the full window.

    recipe           here              shape
    n_ctx            n                 ()              encoder positions of the student
    m                reach             ()              largest distance of n from the clip's end
    hidden states    states            (clips, tokens, d_model) each: the embedding, every layer

    n = clip(50 * seconds + u, 1, N),  u uniform in [-m, m),  m = min(64, n / 3)                 (1)
    L = mean over states, tokens and features of (student(n) - teacher(N))^2                     (2)

The mel frames are cut to 2 n, and the table of positions to its first n rows. Both decoders read
the same text. The optimiser is Adam with learning rate 1e-6, one clip per step, eight epochs. At
n = N, student and teacher are equal and (2) is zero.

The defaults are the published values. Differences and additions:

- All clips of a step share one n, that of the longest clip. Each clip counts in (2) by its tokens.
- 50 * seconds is rounded up, not to nearest. The text is not lowercased, and the end-of-text token
  is not an input. Clips up to the full window are used, not up to 29 s.
- An exported model has a fixed set of windows instead of any n: `windows_s`. With
  `lengths = "windows"` (ours), the student is trained on these only, each batch in the window that
  decoding chooses for its longest clip. Speech is then never cut; (1) cuts up to a third of a clip.
- `margin`, `full_share`, `kl`, `ce` (ours, off by default).
- The checkpoint records its windows. Training, calibration, decoding and export then use, for
  every clip, the shortest window that holds it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from devices.runner.audio import shortest
from edgewhisper import whisper
from edgewhisper.alignment import position_s
from edgewhisper.compress.context import Context
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.teacher import Teacher, divergence, frozen_copy, mean_by_tokens
from edgewhisper.examples import IGNORED, Batch
from edgewhisper.recipe import Range
from edgewhisper.training import LossTerm, Training, cross_entropy
from export.cost import macs_by_window
from export.problem import Problem

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]
REMOVES = ("windows_s",)


@dataclass(frozen=True)
class Options:
    windows_s: tuple[float, ...] = ()
    """Window lengths in seconds, ascending; the full window is always added. Empty: one third and
    two thirds of the full window (ours)."""
    lengths: Literal["jitter", "windows"] = "jitter"
    """How long the student's window is in a step. jitter: (1), as published. windows (ours): the
    window that decoding chooses for the longest clip, the shortest one that holds it."""
    reach: Annotated[int, Range(0)] = 64
    """Upper limit of m in (1), in encoder positions."""
    margin: Annotated[int, Range(0)] = 0
    """Ours: encoder positions of silence after the longest clip, added to 50 * seconds in (1). Not
    used with lengths = "windows"."""
    full_share: Annotated[float, Range(0, 1)] = 0.0
    """Ours: share of the steps that use the full window, so that the student does not forget it."""
    kl: Weight = 0.0
    """Ours: weight of the KL divergence between the teacher's and the student's next tokens."""
    ce: Weight = 0.0
    """Ours: weight of the cross entropy with the text."""

    training: Training = field(
        default_factory=lambda: Training(
            epochs=8.0,
            batch_size=1,
            learning_rate=1e-6,
            schedule="constant",
            warmup=0.0,
            clip_norm=inf,
        )
    )
    """With steps = 0 and epochs = 0, the windows are recorded and nothing is trained."""


def allowed_after_quantisation(options: Options) -> bool:
    """Without training, the step only records the windows."""
    return options.training.steps == 0 and options.training.epochs == 0


# --------------------------------------------------------------------- length of a window, (1)


def drawn_length(needed: int, reach: int, full: int, rng: np.random.Generator) -> int:
    """Draw n by (1), where `needed` is 50 * seconds and `full` is N, both in encoder positions."""
    m = min(reach, needed // 3)
    u = int(rng.integers(-m, m)) if m else 0
    return min(max(1, needed + u), full)


@dataclass(frozen=True)
class Lengths:
    """Chooses the window of each training step.

    The choice depends only on the seed, the step and the clips, so it is the same on every process
    and in a resumed run.
    """

    options: Options
    windows: tuple[int, ...]
    seed: int

    def __call__(self, step: int, needed: int) -> int:
        """Return the window of a step whose longest clip fills `needed` encoder positions."""
        full = self.windows[-1]
        rng = np.random.default_rng([self.seed, 3, step])
        if rng.random() < self.options.full_share:
            return full
        if self.options.lengths == "windows":
            return shortest(self.windows, needed)
        return drawn_length(needed + self.options.margin, self.options.reach, full, rng)


def windows_for(
    seconds: Sequence[float], full: int, step_s: float, method: str = "short"
) -> list[int]:
    """Return the windows in encoder positions, each `step_s` seconds long, with the full window.

    Raises Problem if they are not ascending, or not within the full window. `method` is written
    before the error.
    """
    if not seconds:
        return sorted({max(1, round(full / 3)), max(1, round(2 * full / 3)), full})
    windows = [round(s / step_s) if 0 < s < inf else 0 for s in seconds]
    if windows != sorted(set(windows)) or windows[0] < 1 or windows[-1] > full:
        raise Problem(
            f"{method}: windows_s is {list(seconds)}; windows must be ascending and between "
            f"{step_s:g} and the model's {full * step_s:g} s",
            hint="list the lengths of most of your clips, for example "
            f"windows_s = [{full * step_s / 3:g}, {2 * full * step_s / 3:g}]",
        )
    return windows if windows[-1] == full else [*windows, full]


# ------------------------------------------------------------------------------------ the loss, (2)


def state_distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """(2) per token: hidden states (clips, tokens, d_model) of both -> (clips, tokens)."""
    pairs = zip(teacher, student, strict=True)
    errors = [(new.float() - old.float()).square().mean(dim=-1) for old, new in pairs]
    return torch.stack(errors).mean(dim=0)


def distillation(teacher: nn.Module, options: Options) -> LossTerm:
    """Return the loss term: (2), `kl`, and (ce - 1) times the cross entropy.

    The training loop adds the cross entropy with weight 1.
    """
    cached = Teacher(teacher, options.training.cache_encoder)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        target = full_outputs(cached, batch)
        distances = state_distance(target.decoder_hidden_states, outputs.decoder_hidden_states)
        loss = mean_by_tokens(distances, batch.labels)
        if options.kl:
            labelled = batch.labels != IGNORED  # (clips, tokens)
            kl = divergence(target.logits[labelled], outputs.logits[labelled])
            loss = loss + options.kl * kl
        return loss + (options.ce - 1) * cross_entropy(outputs.logits, batch.labels)

    return term


def full_outputs(teacher: Teacher, batch: Batch) -> Any:
    """Return the teacher's outputs for the full window, with its hidden states."""
    assert batch.whole_features is not None
    return teacher(batch, batch.whole_features, output_hidden_states=True)


@contextmanager
def with_hidden_states(model: nn.Module) -> Iterator[None]:
    """Make the model return its hidden states, which the training loop does not request."""
    before = model.config.output_hidden_states
    model.config.output_hidden_states = True
    try:
        yield
    finally:
        model.config.output_hidden_states = before


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Record the windows in the model's config, and train the model on them.

    `context.record["short"]` has the windows and the model's multiply-accumulates in each. Raises
    Problem for invalid windows, and what training.train raises.
    """
    refuse_quantised(model, "short", options)
    step_s, full = position_s(context.processor), model.config.max_source_positions
    windows = windows_for(options.windows_s, full, step_s)
    teacher = frozen_copy(model)
    whisper.set_windows(model.config, windows)
    with with_hidden_states(model):
        training = context.trained(
            model,
            options.training,
            "short-training",
            identity=repr(options),
            loss_term=distillation(teacher, options),
            window=Lengths(options, tuple(windows), context.seed),
            label="short: training",
        )
    context.record["short"] = {
        "windows": windows,
        "windows_s": [n * step_s for n in windows],
        "macs": macs_by_window(model),
        "training": training,
    }
    return model
