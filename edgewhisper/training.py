"""The training loop of all methods, which add a loss term and a hook after each step.

    L = mean over the target tokens of ( cross entropy + loss_term )

One step trains on one global batch of `batch_size` clips, independent of the number of processes
and passes: the cross entropy of every clip is divided by the number of target tokens of the global
batch. Two processes (`torchrun --nproc_per_node 2`) therefore compute the same as one, up to the
rounding of sums. The clips of step s and their augmentation depend only on the seed and s, so an
interrupted training resumes bit for bit.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.examples import IGNORED, Batch, Examples, SpeechWindows, WindowRule
from edgewhisper.frozen_encoder import FrozenEncoder
from edgewhisper.model_modes import checkpointing, partly_frozen, regularised, unwrap
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Range
from edgewhisper.resume import State, fingerprint, graceful_stop, interrupted
from export.problem import Problem

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip

LossTerm = Callable[[nn.Module, Batch, Any], Tensor]
AfterStep = Callable[[nn.Module, int, float], None]


@dataclass(frozen=True)
class Training:
    """The options of a training; methods have one as a table of their recipe step."""

    steps: Annotated[int, Range(0)] = 200
    """Optimiser steps; 0 skips the training."""
    batch_size: Annotated[int, Range(1)] = 16
    """Clips per optimiser step, over all processes."""
    accumulate: Annotated[int, Range(1)] = 1
    """Passes into which each process splits its part of a batch, to save memory."""
    learning_rate: Annotated[float, Range(1e-12, 100)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Range(0, 1)] = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    clip_norm: Annotated[float, Range(1e-3)] = 1.0
    """Maximum norm of the gradient; inf disables clipping."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; "no" trains in float32."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.0
    """Dropout rate. Above 0, the result depends on the number of processes."""
    noise_snr_db: Annotated[float, Range(1e-3)] = math.inf
    """Signal-to-noise ratio of added white noise: this, or up to 30 dB more; inf adds none."""
    mask_mels: Annotated[int, Range(0)] = 0
    """SpecAugment (arXiv:1904.08779): two bands of up to this many mel channels, and two spans
    of up to this many frames, are set to the clip's mean; 0 disables masking."""
    workers: Annotated[int, Range(0)] = 0
    """Processes that prefetch clips; 0 reads them in the training process. Each computes features
    with one thread."""
    checkpoint_steps: Annotated[int, Range(1)] = 500
    """Maximum number of steps between two saved states."""
    checkpoint_s: Annotated[float, Range(1e-3)] = 120.0
    """Maximum number of seconds between two saved states."""
    epochs: Annotated[float, Range(0)] = 0.0
    """Passes over all clips. Above 0, this replaces `steps`."""
    encoder: bool = True
    """false freezes the encoder."""
    cache_encoder: bool = False
    """Cache the states of a frozen encoder, the model's or a teacher's, for each clip (up to
    512 MB). Clips augmented by noise or masks are not cached."""
    token_table: bool = True
    """false freezes the token table, unless it is factorised. Recommended for a few hundred clips:
    most tokens do not occur in them, but the gradient of the output layer changes all tokens."""
    windows: Literal["decoding", "speech"] = "decoding"
    """Audio length of a step. decoding: the window used in decoding, 30 s for OpenAI's models.
    speech: the longest clip and up to a second more, and every eighth step the window of decoding;
    several times cheaper. It suits distillation, where the teacher processes the same audio."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass
class TrainingLog:
    """The record of a training."""

    seed: int
    processes: int
    clips: int
    skipped: int
    """Number of clips left out because their audio or text is longer than the model's window."""
    losses: list[float] = field(default_factory=list)
    """Mean loss per token of every step before its update, including the loss term."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps at which the training was resumed."""
    seconds: float = 0.0
    """Duration of the training, without interruptions."""

    def summary(self) -> dict[str, Any]:
        """Return the record with the mean loss of the first and the last tenth of the steps."""
        tenth = max(1, len(self.losses) // 10)
        ends = self.losses[:tenth], self.losses[-tenth:]
        first, last = (sum(losses) / tenth if losses else None for losses in ends)
        record = {k: v for k, v in asdict(self).items() if k != "losses"}
        return {**record, "steps": len(self.losses), "first_loss": first, "last_loss": last}


def train(
    model: "WhisperForConditionalGeneration",
    processor: "WhisperProcessor",
    clips: "Sequence[Clip]",
    options: Training,
    *,
    run_dir: Path,
    seed: int = 0,
    identity: str = "",
    loss_term: LossTerm | None = None,
    after_step: AfterStep | None = None,
    window: WindowRule | None = None,
    label: str = "training",
) -> TrainingLog:
    """Train `model` in place on `clips` and return the record of the training.

    - `loss_term(model, batch, outputs)` returns a mean per token, which is added to the cross
      entropy.
    - `after_step(model, step, learning_rate)` runs on every process without gradients, and must
      have the same effect on each.
    - `window` sets the audio length of each step (see edgewhisper/examples.py). By default it
      follows `options.windows`.
    - `run_dir` stores the training state. A state of the same training in it is resumed.
    - `identity` distinguishes trainings that differ in their hooks only.

    Raises Problem: no clips, the state of another training in `run_dir`, or a loss that is not
    finite. Raises Interrupted after Ctrl-C, when the state is saved.
    """
    options = counted(options, len(clips))
    if options.steps == 0:
        return TrainingLog(seed, 1, len(clips), 0)
    accelerator = start_accelerator(options)
    examples = examples_for(model, processor, clips, options, seed, window)
    log = TrainingLog(seed, accelerator.num_processes, len(examples), examples.skipped)
    home = next(model.parameters()).device
    was_training = model.training
    state = State(run_dir, accelerator, fingerprint(model, examples, options, [seed, identity]))
    bar = progress_bar(options.steps, label, accelerator.is_main_process)
    # Whisper's encoder positions are fixed sinusoids; transformers 5 makes them trainable on load
    model.model.encoder.embed_positions.requires_grad_(False)
    with (
        regularised(model, options.dropout),
        partly_frozen(model, options.encoder, options.token_table),
        checkpointing(model, options.gradient_checkpointing),
        graceful_stop() as stop,
        bar as show,
    ):
        seed_everything(seed)
        loop = Loop(model, examples, options, accelerator, state, log, (loss_term, after_step))
        try:
            loop.run(stop, show)
        finally:
            unwrap(model)
            model.to(home).train(was_training)
    return log


def examples_for(
    model: "WhisperForConditionalGeneration",
    processor: "WhisperProcessor",
    clips: "Sequence[Clip]",
    options: Training,
    seed: int,
    window: WindowRule | None = None,
) -> Examples:
    """Return the examples that `train` uses with these options."""
    augmentation = options.noise_snr_db, options.mask_mels
    rule = window or (SpeechWindows(model) if options.windows == "speech" else None)
    return Examples(clips, model, processor, seed, *augmentation, options.batch_size, rule)


def counted(options: Training, clips: int) -> Training:
    """Return the options with `epochs` converted to `steps` for this number of clips."""
    if options.epochs == 0:
        return options
    return replace(options, steps=math.ceil(options.epochs * clips / options.batch_size), epochs=0)


@torch.no_grad()
def initial_loss(
    model: "WhisperForConditionalGeneration",
    processor: "WhisperProcessor",
    clips: "Sequence[Clip]",
    options: Training,
    seed: int = 0,
    batches: int = 4,
) -> float:
    """Return the mean cross entropy per token on the first batches that `train` will use."""
    examples = examples_for(model, processor, clips, options, seed)
    device = next(model.parameters()).device
    losses = []
    for step in range(batches):
        first = step * options.batch_size
        batch = examples[range(first, first + options.batch_size)].to(device)
        outputs = model(
            batch.input_features, decoder_input_ids=batch.decoder_input_ids, use_cache=False
        )
        losses.append(float(cross_entropy(outputs.logits, batch.labels)))
    return sum(losses) / len(losses)


# ----------------------------------------------------------------------------------------- loop


class Loop:
    """A running training: the model, its optimiser and their state."""

    def __init__(
        self,
        model: "WhisperForConditionalGeneration",
        examples: Examples,
        options: Training,
        accelerator: "Accelerator",
        state: State,
        log: TrainingLog,
        hooks: tuple[LossTerm | None, AfterStep | None],
    ) -> None:
        self.examples, self.options, self.accelerator = examples, options, accelerator
        self.state, self.log = state, log
        self.loss_term, self.after_step = hooks
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, weight_decay=options.weight_decay)
        self.frozen = FrozenEncoder.of(model) if options.cache_encoder else None
        self.model = model
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)

    def run(self, stop: threading.Event, bar: Callable[[int, str], None]) -> None:
        first, record = self.state.resume()
        if record:
            self.log.losses, self.log.seconds = record["losses"], record["seconds"]
            self.log.resumed_at = [*record["resumed_at"], first]
        started = saved = time.monotonic()
        self.wrapped.train()
        batches = self.batches(first)
        for step in range(first, self.options.steps):
            rate = learning_rate(step, self.options)
            due = time.monotonic() - saved > self.options.checkpoint_s
            loss, stopping, due = self.agree(self.gradients(step, batches), stop.is_set(), due)
            self.refuse_nan(loss, step, rate)
            self.update(step, rate)
            self.log.losses.append(loss)
            bar(step + 1, f"loss {loss:.3f}")
            done = step + 1
            if due or stopping or done % self.options.checkpoint_steps == 0 or self.finished(done):
                self.log.seconds += time.monotonic() - started
                started = saved = time.monotonic()
                self.state.save(done, asdict(self.log))
            if stopping:
                raise interrupted(done, self.options.steps, self.state.directory)
        # a stop during the last step or while its state was saved: another training may follow
        none = torch.zeros((), device=self.accelerator.device)
        if self.agree(none, stop.is_set(), False)[1]:
            raise interrupted(self.options.steps, self.options.steps, self.state.directory)

    def finished(self, done: int) -> bool:
        return done == self.options.steps

    def batches(self, first: int) -> Iterator[Batch]:
        """Yield this process's batches of all passes from step `first` on."""
        passes = [p for s in range(first, self.options.steps) for p in self.passes(s)]
        loader = torch.utils.data.DataLoader(
            self.examples,
            sampler=passes,
            batch_size=None,
            num_workers=self.options.workers,
            # its own generator: drawing a seed from the global one would change the resumed state
            generator=torch.Generator(),
        )
        return iter(loader)

    def passes(self, step: int) -> list[list[int]]:
        """Return this process's positions in the stream of clips for each pass of a step. Pass i of
        all processes together has the same clips as pass i of a single process."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        passes, batch = self.options.accumulate, self.batch_positions(step)
        return [list(batch[i::passes][rank::processes]) for i in range(passes)]

    def batch_positions(self, step: int) -> range:
        return range(step * self.options.batch_size, (step + 1) * self.options.batch_size)

    def gradients(self, step: int, batches: Iterator[Batch]) -> Tensor:
        """Compute the gradients of this process and return its part of the loss, () float32."""
        tokens = self.examples.tokens(self.batch_positions(step))
        total = torch.zeros((), device=self.accelerator.device)
        for i in range(self.options.accumulate):
            last = i == self.options.accumulate - 1
            sync = nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            batch = next(batches).to(self.accelerator.device)
            with sync:
                loss = self.mean_loss(batch)
                # the gradients of the processes are averaged, so the weights of all passes of all
                # processes must sum to the number of processes
                share = int((batch.labels != IGNORED).sum()) / tokens
                loss = loss * (share * self.accelerator.num_processes)
                self.accelerator.backward(loss)
            total += loss.detach().float()
        return total

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the cross entropy per token of one pass, plus the method's loss term."""
        inputs = (
            {"encoder_outputs": self.frozen(batch)}
            if self.frozen
            else {"input_features": batch.input_features}
        )
        outputs = self.wrapped(**inputs, decoder_input_ids=batch.decoder_input_ids, use_cache=False)
        loss = cross_entropy(outputs.logits, batch.labels)
        if self.loss_term is None:
            return loss
        return loss + self.loss_term(self.model, batch, outputs)

    def update(self, step: int, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(self.options.clip_norm):
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.model, step, rate)

    def agree(self, loss: Tensor, stopping: bool, due: bool) -> tuple[float, bool, bool]:
        """Return the mean loss, whether any process was asked to stop, and whether the main process
        is due to save its state. All processes must act alike, or they would deadlock."""
        due = due and self.accelerator.is_main_process
        flags = torch.tensor([float(stopping), float(due)], device=loss.device)
        values = torch.cat([loss.reshape(1), flags])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        return float(values[0]), bool(values[1] > 0), bool(values[2] > 0)

    def refuse_nan(self, loss: float, step: int, rate: float) -> None:
        if not math.isfinite(loss):
            raise Problem(
                f"training: the loss is {loss} at step {step + 1} of {self.options.steps}, with "
                f"learning rate {rate:.2g}",
                hint="lower learning_rate or the method's penalties, or set precision to 'no'",
            )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over the tokens whose label is not IGNORED. logits (clips,
    tokens, vocabulary), labels (clips, tokens)."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )


def learning_rate(step: int, options: Training) -> float:
    """Return the learning rate of a step, counted from 0: a linear warmup, then the schedule."""
    warmup = round(options.warmup * options.steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, options.steps - warmup)
    decay = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
    }
    return options.learning_rate * decay[options.schedule]


def start_accelerator(options: Training) -> "Accelerator":
    """Return accelerate's interface to the device and the processes of this training."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # hides "removed shared tensor": the tied token table, which load_state ties again
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    # accelerate keeps the precision for the process; a second training may use another one
    AcceleratorState._reset_state()
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=options.precision)
    except ValueError as error:
        raise Problem(
            f"training: precision {options.precision!r} does not work here: {error}",
            hint="set precision to 'no' or 'bf16'",
        ) from error
    parts = accelerator.num_processes * options.accumulate
    if options.batch_size < parts:
        raise Problem(
            f"training: batch_size {options.batch_size} cannot be shared by "
            f"{accelerator.num_processes} processes in {options.accumulate} passes each",
            hint=f"set batch_size to {parts} or more",
        )
    return accelerator


def seed_everything(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)
