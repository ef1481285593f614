"""Shorter audio context: fine-tuning for windows that end where the speech ends (whisper-acft, FUTO
2024, https://github.com/futo-org/whisper-acft; the switch that it made usable is `--audio-ctx` of
whisper.cpp).

Whisper hears 30 s however short the clip, and half of its encoder's work, or far more, is spent on
silence. Given less, it falls into repetitions, for it never saw an end of its audio before. So a
student that hears only the first n positions is taught to hold, in its decoder, the hidden states
of a frozen copy that hears the full window.

    recipe           here              shape
    n_ctx            n                 ()              encoder positions that the student hears
    m                reach             ()              how far n is drawn from the end of the clip
    hidden states    states            (clips, tokens, d_model) each: the embedding, every layer

    n = clip(50 * seconds + u, 1, N),  u uniform in [-m, m),  m = min(64, n / 3)                 (1)
    L = mean over states, tokens and features of (student(n) - teacher(N))^2                     (2)

The mel frames are cut to 2 n, the table of positions to its first n rows; both decoders read the
same text. Adam, learning rate 1e-6, one clip a step, eight epochs. At n = N the student is the
teacher, and (2) is zero.

The defaults are the published values. What differs, or is ours:

- A step trains on one n. Where it holds several clips, that is the n of the longest, and each clip
  counts in (2) by its tokens. 50 * seconds is rounded up, not to the nearest; the text is not
  lowercased, and its end is no input. Clips up to the full window are used, not up to 29 s.
- An exported model has a few windows, not any n: `windows_s`. With `lengths = "windows"` (ours) the
  student is trained on these alone, and hears each clip through the very window that decoding will
  take; no speech is ever cut away. The published draw (1) cuts up to a third of a clip.
- `margin`, `full_share`, `kl`, `ce` (ours, off by default).
- Afterwards the checkpoint records its windows. Everything that trains, calibrates, decodes or
  exports it takes, for every clip, the shortest one that holds it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from devices.runner.audio import shortest
from edgewhisper import whisper
from edgewhisper.alignment import position_s
from edgewhisper.compress.near import Teacher, frozen_copy
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.shear import mean_by_tokens
from edgewhisper.compress.work import Work
from edgewhisper.examples import IGNORED, Batch
from edgewhisper.recipe import Range
from edgewhisper.training import LossTerm, Training, cross_entropy, train
from export.cost import macs_by_window
from export.problem import Problem

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Options:
    windows_s: tuple[float, ...] = ()
    """Lengths of audio that the model is made for, in seconds, ascending; the full window is always
    one more. Empty: a third of it and two thirds (ours)."""
    lengths: Literal["jitter", "windows"] = "jitter"
    """How much the student hears of a step's clips. jitter: (1), as published. windows (ours): the
    window that decoding would take for the longest one: the shortest that holds it."""
    reach: Annotated[int, Range(0)] = 64
    """m in (1), at most; in encoder positions."""
    margin: Annotated[int, Range(0)] = 0
    """Ours: added to 50 * seconds in (1): positions of silence behind the end of the longest clip.
    No matter for lengths = "windows"."""
    full_share: Annotated[float, Range(0, 1)] = 0.0
    """Ours: share of the steps in which the student hears the full window, lest it forget that."""
    kl: Weight = 0.0
    """Ours: weight of the divergence of the student's next tokens from the teacher's."""
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


# ------------------------------------------------------------------------- how much is heard, (1)


def drawn_length(needed: int, reach: int, full: int, rng: np.random.Generator) -> int:
    """(1): `needed` positions hold the clip, `full` is N."""
    m = min(reach, needed // 3)
    u = int(rng.integers(-m, m)) if m else 0
    return min(max(1, needed + u), full)


@dataclass(frozen=True)
class Lengths:
    """The rule by which a step's window is found: from the seed and the step alone, so that it is
    the same on every process and after a stop."""

    options: Options
    windows: tuple[int, ...]
    seed: int

    def __call__(self, step: int, needed: int) -> int:
        full = self.windows[-1]
        rng = np.random.default_rng([self.seed, 3, step])
        if rng.random() < self.options.full_share:
            return full
        if self.options.lengths == "windows":
            return shortest(self.windows, needed)
        return drawn_length(needed + self.options.margin, self.options.reach, full, rng)


def windows_for(seconds: Sequence[float], full: int, step_s: float) -> list[int]:
    """Windows in encoder positions of step_s each, with the full one.

    Raises Problem where they are not ascending, or not within the full window.
    """
    if not seconds:
        return sorted({max(1, round(full / 3)), max(1, round(2 * full / 3)), full})
    windows = [round(s / step_s) if 0 < s < inf else 0 for s in seconds]
    if windows != sorted(set(windows)) or windows[0] < 1 or windows[-1] > full:
        raise Problem(
            f"short: windows_s is {list(seconds)}; it must be ascending, and between {step_s:g} "
            f"and the model's {full * step_s:g} s",
            hint="name the lengths of most of your clips, such as "
            f"windows_s = [{full * step_s / 3:g}, {2 * full * step_s / 3:g}]",
        )
    return windows if windows[-1] == full else [*windows, full]


# ------------------------------------------------------------------------------------ the loss, (2)


def state_distance(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """(2) of each token: states (clips, tokens, d_model) of both -> (clips, tokens)."""
    pairs = zip(wanted, found, strict=True)
    errors = [(new.float() - old.float()).square().mean(dim=-1) for old, new in pairs]
    return torch.stack(errors).mean(dim=0)


def distillation(teacher: nn.Module, options: Options) -> LossTerm:
    """(2), with our terms; the loop's own cross entropy is taken away as far as `ce` asks."""
    asked = Teacher(teacher, options.training.cache_encoder)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        wanted = full_outputs(asked, batch)
        told = batch.labels != IGNORED  # (clips, tokens)
        real = told.flip(1).cumsum(1).flip(1) > 0  # everything up to the last that is told
        near = state_distance(wanted.decoder_hidden_states, outputs.decoder_hidden_states)
        loss = mean_by_tokens(near, real, told)
        if options.kl:
            new, old = (x.logits[told].float().log_softmax(-1) for x in (outputs, wanted))
            divergence = functional.kl_div(new, old, log_target=True, reduction="batchmean")
            loss = loss + options.kl * divergence
        return loss + (options.ce - 1) * cross_entropy(outputs.logits, batch.labels)

    return term


def full_outputs(teacher: Teacher, batch: Batch) -> Any:
    """What the teacher makes of the whole window, with its hidden states."""
    assert batch.whole_features is not None
    return teacher(batch, batch.whole_features, output_hidden_states=True)


@contextmanager
def telling_states(model: nn.Module) -> Iterator[None]:
    """The model tells its hidden states unasked, for a block: the loop does not ask."""
    before = model.config.output_hidden_states
    model.config.output_hidden_states = True
    try:
        yield
    finally:
        model.config.output_hidden_states = before


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Record the windows, and teach the model to hear through them.

    `work.record["short"]` has the windows and what the model costs in each. Raises Problem for
    windows it cannot have, and what training.train raises.
    """
    refuse_quantised(model, "short", options)
    step_s, full = position_s(work.processor), model.config.max_source_positions
    windows = windows_for(options.windows_s, full, step_s)
    teacher = frozen_copy(model)
    whisper.set_windows(model.config, windows)
    with telling_states(model):
        log = train(
            model,
            work.processor,
            work.train,
            options.training,
            run_dir=work.run_dir / "short-training",
            seed=work.seed,
            identity=repr(options),
            loss_term=distillation(teacher, options),
            window=Lengths(options, tuple(windows), work.seed),
            label="short: learning to hear less",
        )
    work.record["short"] = {
        "windows": windows,
        "windows_s": [n * step_s for n in windows],
        "macs": macs_by_window(model),
        "training": log.summary(),
    }
    return model
