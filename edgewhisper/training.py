"""The one training loop. Methods plug in a loss term and a hook after the step.

    L = mean over the target tokens of ( cross entropy + loss_term )

One step trains on one global batch of `batch_size` clips, however many processes share it and in
however many passes: the cross entropy of every clip is divided by the number of target tokens of
the whole global batch. So two processes (`torchrun --nproc_per_node 2`) do what one does, up to
the rounding of sums. Which clips make up step s, and the random numbers that augment them, follow
from the seed and s alone, so a run that was stopped resumes to the same bits.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from devices.runner.audio import shortest
from edgewhisper.examples import CACHED_BYTES, IGNORED, Batch, Examples, WindowRule
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Range
from edgewhisper.resume import State, fingerprint, graceful_stop, interrupted
from export.problem import Problem
from export.shrink import windows_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip

LossTerm = Callable[[nn.Module, Batch, Any], Tensor]
AfterStep = Callable[[nn.Module, int, float], None]


@dataclass(frozen=True)
class Training:
    steps: Annotated[int, Range(0)] = 200
    """Optimiser steps; 0 trains nothing."""
    batch_size: Annotated[int, Range(1)] = 16
    """Clips of one optimiser step, over all processes."""
    accumulate: Annotated[int, Range(1)] = 1
    """Passes into which each process splits its share of a batch, to save memory."""
    learning_rate: Annotated[float, Range(1e-12, 100)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Range(0, 1)] = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    clip_norm: Annotated[float, Range(1e-3)] = 1.0
    """Gradients longer than this are scaled down to it; inf switches it off."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; "no" is float32 throughout."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.0
    """Above 0, the result depends on the number of processes."""
    noise_snr_db: Annotated[float, Range(1e-3)] = math.inf
    """White noise is added at this ratio, or up to 30 dB weaker; inf adds none."""
    mask_mels: Annotated[int, Range(0)] = 0
    """SpecAugment (arXiv:1904.08779): two bands of up to this many mel channels, and two
    stretches of up to this many frames, are set to the clip's mean. 0 masks none."""
    workers: Annotated[int, Range(0)] = 0
    """Processes that read clips ahead; 0 reads them in the loop. Each computes features on one
    thread, which rounds as one thread of this process does."""
    checkpoint_steps: Annotated[int, Range(1)] = 500
    checkpoint_s: Annotated[float, Range(1e-3)] = 120.0
    """State is saved after so many steps, or seconds, whichever comes first."""
    epochs: Annotated[float, Range(0)] = 0.0
    """Above 0, as many steps as this many passes over the clips take, in place of `steps`."""
    encoder: bool = True
    """false freezes the encoder."""
    cache_encoder: bool = False
    """Compute the states of a frozen encoder, the model's own or a teacher's, once for each clip
    and keep them (up to 512 MB). Where noise or masks augment the clips, nothing is kept."""
    token_table: bool = True
    """false freezes the token table, where it is not factorised. With a few hundred clips that is
    safer: most tokens are never read, and the output layer would move them all."""
    windows: Literal["decoding", "speech"] = "decoding"
    """How much of the window a step trains on. decoding: as in decoding, which for stock Whisper is
    always 30 s. speech: up to a second behind the longest clip, and every eighth step as in
    decoding; several times cheaper. It suits distillation, where the teacher hears the same."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass
class TrainingLog:
    seed: int
    processes: int
    clips: int
    skipped: int
    """Clips left out because their audio or text is longer than the model's window."""
    losses: list[float] = field(default_factory=list)
    """Cross entropy per token of every step, before that step's update, with the loss term."""
    resumed_at: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Without the loss of every step: the mean of the first and of the last tenth."""
        tenth = max(1, len(self.losses) // 10)
        ends = self.losses[:tenth], self.losses[-tenth:]
        first, last = (sum(losses) / tenth if losses else None for losses in ends)
        told = {k: v for k, v in asdict(self).items() if k != "losses"}
        return {**told, "steps": len(self.losses), "first_loss": first, "last_loss": last}


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
    progress: bool | None = None,
    label: str = "training",
) -> TrainingLog:
    """Train `model` in place on `clips`, and say how it went.

    `loss_term(model, batch, outputs)` is a mean per token, added to the cross entropy.
    `after_step(model, step, learning_rate)` runs on every process, without gradients, and must do
    the same thing on each. `window` decides how long the audio of each step is, in place of the
    rule that it is as in decoding (see edgewhisper/examples.py). State is kept under `run_dir`;
    where it holds the state of the same training, that is resumed, to the same bits (`identity`
    tells trainings apart that differ only in what the hooks do). `progress`: see
    progress_bar.

    Raises Problem: no clips, state of another training in run_dir, a loss that is not finite,
    Ctrl-C (Interrupted: state is saved first).
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
    bar = progress_bar(options.steps, progress, accelerator.is_main_process, label)
    # Whisper's encoder positions are fixed sinusoids; transformers 5 forgets that when it loads
    model.model.encoder.embed_positions.requires_grad_(False)
    with (
        regularised(model, options),
        partly_frozen(model, options),
        checkpointing(model, options),
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
    augmentation = options.noise_snr_db, options.mask_mels
    rule = window or (SpeechWindows(model) if options.windows == "speech" else None)
    return Examples(clips, model, processor, seed, *augmentation, options.batch_size, rule)


class SpeechWindows:
    """The rule of `windows = "speech"`: what the speech of a step needs, and some silence behind
    it; every eighth step, what decoding takes."""

    def __init__(self, model: nn.Module) -> None:
        self.windows = windows_of(model.config)
        self.unit = max(1, self.windows[-1] // 60)

    def __call__(self, step: int, needed: int) -> int:
        whole = shortest(self.windows, needed)
        # a multiple, so that states which were computed once are of use again
        units = math.ceil(needed / self.unit) + 1
        return whole if step % 8 == 7 else min(units * self.unit, whole)


def counted(options: Training, clips: int) -> Training:
    """The same training with its epochs counted out as steps."""
    if options.epochs == 0:
        return options
    return replace(options, steps=math.ceil(options.epochs * clips / options.batch_size), epochs=0)


@torch.no_grad()
def loss_before(
    model: "WhisperForConditionalGeneration",
    processor: "WhisperProcessor",
    clips: "Sequence[Clip]",
    options: Training,
    seed: int = 0,
    batches: int = 4,
) -> float:
    """Cross entropy per token on the first batches that train() will use, before any step."""
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
    """The model, its optimiser and where they stand."""

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
        first = self.state.resume(self.log)
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
                self.state.save(done, self.log)
            if stopping:
                raise interrupted(done, self.options.steps, self.state.directory)
        # asked during the last step, or while its state was saved: more work may come after it
        none = torch.zeros((), device=self.accelerator.device)
        if self.agree(none, stop.is_set(), False)[1]:
            raise interrupted(self.options.steps, self.options.steps, self.state.directory)

    def finished(self, done: int) -> bool:
        return done == self.options.steps

    def batches(self, first: int) -> Iterator[Batch]:
        """This process's passes, from step `first` on, made ahead by the data workers."""
        passes = [p for s in range(first, self.options.steps) for p in self.passes(s)]
        loader = torch.utils.data.DataLoader(
            self.examples,
            sampler=passes,
            batch_size=None,
            num_workers=self.options.workers,
            # of its own, or starting to read would disturb the state that resume() restored
            generator=torch.Generator(),
        )
        return iter(loader)

    def passes(self, step: int) -> list[list[int]]:
        """Positions in the stream of clips that this process trains on in each pass of a step.

        The clips of all processes in pass i are those of one process in pass i.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        passes, batch = self.options.accumulate, self.batch_positions(step)
        return [list(batch[i::passes][rank::processes]) for i in range(passes)]

    def batch_positions(self, step: int) -> range:
        return range(step * self.options.batch_size, (step + 1) * self.options.batch_size)

    def gradients(self, step: int, batches: Iterator[Batch]) -> Tensor:
        """Backward over this process's passes -> its part of the loss, () float32."""
        tokens = self.examples.tokens(self.batch_positions(step))
        total = torch.zeros((), device=self.accelerator.device)
        for i in range(self.options.accumulate):
            last = i == self.options.accumulate - 1
            quiet = nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            batch = next(batches).to(self.accelerator.device)
            with quiet:
                loss = self.mean_loss(batch)
                # gradients of processes are averaged, so the weights of all passes of all
                # processes must add up to the number of processes
                share = int((batch.labels != IGNORED).sum()) / tokens
                loss = loss * (share * self.accelerator.num_processes)
                self.accelerator.backward(loss)
            total += loss.detach().float()
        return total

    def mean_loss(self, batch: Batch) -> Tensor:
        """Cross entropy per token of one pass, plus the method's term."""
        heard = (
            {"encoder_outputs": self.frozen(batch)}
            if self.frozen
            else {"input_features": batch.input_features}
        )
        outputs = self.wrapped(**heard, decoder_input_ids=batch.decoder_input_ids, use_cache=False)
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
        """What one process sees, all must act on: mean loss, anyone's stop, the main one's clock.

        Processes that disagreed would wait for each other for ever.
        """
        due = due and self.accelerator.is_main_process
        flags = torch.tensor([float(stopping), float(due)], device=loss.device)
        seen = torch.cat([loss.reshape(1), flags])
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.reduce(seen, reduction="mean")
        return float(seen[0]), bool(seen[1] > 0), bool(seen[2] > 0)

    def refuse_nan(self, loss: float, step: int, rate: float) -> None:
        if not math.isfinite(loss):
            raise Problem(
                f"training: the loss is {loss} at step {step + 1} of {self.options.steps}, with "
                f"learning rate {rate:.2g}",
                hint="lower learning_rate or the method's penalties, or set precision to 'no'",
            )


class FrozenEncoder:
    """The states of an encoder that does not learn: computed once for each clip and window, and
    kept up to CACHED_BYTES. Without `cache`, and of augmented clips, they are computed every time,
    the whole batch at once."""

    def __init__(self, encoder: nn.Module, cache: bool = True) -> None:
        self.encoder, self.cache, self.bytes = encoder, cache, 0
        self.kept: dict[tuple[int, int], Tensor] = {}
        """(clip, positions) -> states (positions, d_model)"""

    @classmethod
    def of(cls, model: "WhisperForConditionalGeneration") -> "FrozenEncoder | None":
        """None where some parameter of the encoder learns, or dropout makes its states random."""
        encoder = model.model.encoder
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        random = any(getattr(m, "dropout", 0.0) for m in encoder.modules())
        return None if learns or random else cls(encoder)

    def __call__(self, batch: Batch) -> BaseModelOutput:
        if batch.clips is None or not self.cache:
            return BaseModelOutput(self.states(batch.input_features))
        positions = batch.input_features.shape[-1] // 2
        rows = [
            self.known((clip, positions), features)
            for clip, features in zip(batch.clips, batch.input_features, strict=True)
        ]
        return BaseModelOutput(torch.stack(rows))

    def known(self, key: tuple[int, int], features: Tensor) -> Tensor:
        """One clip (mels, frames) -> (positions, d_model). Computed alone, so that the rounding
        does not depend on what else is in the batch, or was computed before a stop."""
        if key in self.kept:
            return self.kept[key]
        states = self.states(features[None])[0]
        size = states.numel() * states.element_size()
        if self.bytes + size <= CACHED_BYTES:
            self.kept[key] = states
            self.bytes += size
        return states

    @torch.no_grad()
    def states(self, features: Tensor) -> Tensor:
        """(clips, mels, frames) -> (clips, positions, d_model)"""
        return self.encoder(features).last_hidden_state


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(clips, tokens, vocabulary), (clips, tokens) -> mean over the tokens that count."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )


def learning_rate(step: int, options: Training) -> float:
    """The rate of step 0, 1, ...: a linear rise, then a fall towards 0 (or none)."""
    rise = round(options.warmup * options.steps)
    if step < rise:
        return options.learning_rate * (step + 1) / (rise + 1)
    done = (step - rise) / max(1, options.steps - rise)
    fall = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "constant": 1.0,
    }
    return options.learning_rate * fall[options.schedule]


def start_accelerator(options: Training) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # "removed shared tensor": the tied token table, which load_state ties again
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    # the precision is process-wide state of accelerate, and a second training may want another
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


def unwrap(model: nn.Module) -> None:
    """Undo accelerate's mixed precision. Its own unwrapping leaves a bound method behind, which a
    deep copy of the model would share with the original."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def seed_everything(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)


@contextmanager
def regularised(model: nn.Module, options: Training) -> Iterator[None]:
    """Dropout as the options say, and none of the model's own random masks and layer drops."""
    ours = {"dropout": options.dropout, "activation_dropout": 0.0, "layerdrop": 0.0}
    before = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ours
        if isinstance(getattr(module, name, None), float)
    ]
    masks = getattr(model.config, "apply_spec_augment", False)
    for module, name, _ in before:
        setattr(module, name, ours[name])
    model.config.apply_spec_augment = False
    try:
        yield
    finally:
        model.config.apply_spec_augment = masks
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def partly_frozen(model: "WhisperForConditionalGeneration", options: Training) -> Iterator[None]:
    """No gradients for the parts that the options freeze; afterwards as before."""
    parts: list[nn.Parameter] = []
    if not options.encoder:
        parts += list(model.model.encoder.parameters())
    table = getattr(model.model.decoder.embed_tokens, "weight", None)
    if not options.token_table and table is not None:
        parts.append(table)
    with without_gradients(parts):
        yield


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for these parameters; afterwards again for those that had them."""
    frozen = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def checkpointing(model: "WhisperForConditionalGeneration", options: Training) -> Iterator[None]:
    """Gradient checkpointing, where the options ask for it."""
    if options.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    try:
        yield
    finally:
        if options.gradient_checkpointing:
            disable = getattr(model, "activation_checkpointing_disable", None)
            (disable or model.gradient_checkpointing_disable)()
