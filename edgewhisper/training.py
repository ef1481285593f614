"""The one training loop. Methods plug in a loss term and a hook after the step.

    L = mean over the target tokens of ( cross entropy + loss_term )

One step trains on one global batch of `batch_size` clips, however many processes share it and in
however many passes: the cross entropy of every clip is divided by the number of target tokens of
the whole global batch. So two processes (`torchrun --nproc_per_node 2`) do what one does, up to
the rounding of sums. Which clips make up step s, and the random numbers that augment them, follow
from the seed and s alone, so a run that was stopped resumes to the same bits.
"""

import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.recipe import Range
from export.files import writing
from export.problem import Problem

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech import Clip

IGNORED = -100
"""Label of a padding position: it counts nowhere."""

SAMPLE_RATE = 16_000
CACHED_BYTES = 512_000_000
"""Features of clips that are used again are kept in memory up to this."""

UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages whose transcripts Whisper does not begin with a space."""

NOT_DECISIVE = ("workers", "checkpoint_steps", "checkpoint_s")
"""Options that may change between a stop and its resumption."""

LossTerm = Callable[[nn.Module, "Batch", Any], Tensor]
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


@dataclass
class Batch:
    input_features: Tensor
    """(clips, mels, frames)"""
    decoder_input_ids: Tensor
    """(clips, tokens): start, prompt, text; the end token as padding."""
    labels: Tensor
    """(clips, tokens): what comes next; IGNORED in the prompt, which decoding is given and does
    not have to find, and in the padding."""

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.input_features, self.decoder_input_ids, self.labels)
        return Batch(*(tensor.to(device) for tensor in tensors))


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


class Interrupted(Problem):
    """Training was asked to stop; its state is saved and the same command goes on from there."""


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
    progress: bool | None = None,
    label: str = "training",
) -> TrainingLog:
    """Train `model` in place on `clips`, and say how it went.

    `loss_term(model, batch, outputs)` is a mean per token, added to the cross entropy.
    `after_step(model, step, learning_rate)` runs on every process, without gradients, and must do
    the same thing on each. State is kept under `run_dir`; where it holds the state of the same
    training, that is resumed, to the same bits (`identity` tells trainings apart that differ only
    in what the hooks do). `progress`: None shows a bar on a terminal only.

    Raises Problem: no clips, clips in a language the model does not know, state of another
    training in run_dir, a loss that is not finite, Ctrl-C (Interrupted: state is saved first).
    """
    if options.steps == 0:
        return TrainingLog(seed, 1, len(clips), 0)
    accelerator = start_accelerator(options)
    examples = Examples(clips, model, processor, options, seed)
    log = TrainingLog(seed, accelerator.num_processes, len(examples), examples.skipped)
    home = next(model.parameters()).device
    was_training = model.training
    state = State(run_dir, accelerator, fingerprint(model, examples, options, [seed, identity]))
    bar = progress_bar(options.steps, progress, accelerator.is_main_process, label)
    # Whisper's encoder positions are fixed sinusoids; transformers 5 forgets that when it loads
    model.model.encoder.embed_positions.requires_grad_(False)
    with regularised(model, options), graceful_stop() as stop, bar as show:
        seed_everything(seed)
        loop = Loop(model, examples, options, accelerator, state, log, (loss_term, after_step))
        try:
            loop.run(stop, show)
        finally:
            unwrap(model)
            model.to(home).train(was_training)
    return log


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
    examples = Examples(clips, model, processor, options, seed)
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


# --------------------------------------------------------------------------------------- speech


class Examples:
    """Clips as features and labels. Position p of the endless stream of shuffled clips is always
    the same clip with the same augmentation, whoever asks for it and whenever."""

    def __init__(
        self,
        clips: "Sequence[Clip]",
        model: "WhisperForConditionalGeneration",
        processor: "WhisperProcessor",
        options: Training,
        seed: int,
    ) -> None:
        self.extractor = processor.feature_extractor
        self.options, self.seed = options, seed
        if not clips:
            raise Problem("training: there are no clips to train on", hint="name a speech manifest")
        spelled = [(clip, *token_ids(clip, model, processor.tokenizer)) for clip in clips]
        window_s = self.extractor.n_samples / self.extractor.sampling_rate
        room = model.config.max_target_positions
        fitting = [
            (clip, given, found)
            for clip, given, found in spelled
            if seconds(clip) <= window_s and len(given) + len(found) - 1 <= room
        ]
        self.skipped = len(clips) - len(fitting)
        if not fitting:
            raise Problem(
                f"training: all {len(clips)} clips are longer than the window of {window_s:g} s "
                f"or {room} tokens",
                hint="cut the recordings into shorter clips",
            )
        if self.skipped:
            warnings.warn(
                f"training: {self.skipped} of {len(clips)} clips are longer than the window of "
                f"{window_s:g} s or {room} tokens and are left out",
                stacklevel=3,
            )
        self.clips = [clip for clip, _, _ in fitting]
        self.texts = [(given, found) for _, given, found in fitting]
        self._kept: dict[int, Tensor] = {}
        frames = self.extractor.nb_max_frames
        self._room = CACHED_BYTES // (4 * self.extractor.feature_size * frames)

    def __len__(self) -> int:
        return len(self.clips)

    def index(self, position: int) -> int:
        """The clip at a position of the stream: each epoch is one permutation of all clips."""
        epoch, place = divmod(position, len(self))
        return permutation(self.seed, epoch, len(self))[place]

    def tokens(self, positions: Sequence[int]) -> int:
        """How many tokens are to be found there."""
        return sum(len(self.texts[self.index(p)][1]) for p in positions)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        texts = [self.texts[self.index(p)] for p in positions]
        inputs = [given + found[:-1] for given, found in texts]
        labels = [[IGNORED] * (len(given) - 1) + found for given, found in texts]
        features = torch.stack([self.features(p) for p in positions])
        return Batch(features, padded(inputs, texts[0][1][-1]), padded(labels, IGNORED))

    def features(self, position: int) -> Tensor:
        """(mels, frames), augmented by random numbers of the seed and the position."""
        rng = np.random.default_rng([self.seed, 1, position])
        index = self.index(position)
        if self.options.noise_snr_db == math.inf:
            features = self._plain(index)
        else:
            pcm = add_noise(self._pcm(index), self.options.noise_snr_db, rng)
            features = log_mel(self.extractor, pcm)
        return mask(features, self.options.mask_mels, rng)

    def _plain(self, index: int) -> Tensor:
        if index not in self._kept:
            features = log_mel(self.extractor, self._pcm(index))
            if len(self._kept) >= self._room:
                return features
            self._kept[index] = features
        return self._kept[index]

    def _pcm(self, index: int) -> np.ndarray:
        pcm = self.clips[index].pcm()
        if len(pcm) > self.extractor.n_samples:
            raise Problem(
                f"training: {self.clips[index].audio} lasts {len(pcm) / SAMPLE_RATE:.2f} s, which "
                "is longer than its manifest says and than the model's window",
                hint="correct the duration in the manifest, or leave it out",
            )
        return pcm


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, 0, epoch]).permutation(size).tolist())


def padded(rows: list[list[int]], filler: int) -> Tensor:
    """(rows, longest row) int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def token_ids(
    clip: "Clip", model: "WhisperForConditionalGeneration", tokenizer: Any
) -> tuple[list[int], list[int]]:
    """What decoding is given (start and the model's own prompt), and what it shall find (the text
    as Whisper writes it, and the end)."""
    language = clip.lang.split("-")[0].lower()
    text = clip.text.strip()
    spaced = f" {text}" if text and language not in UNSPACED else text
    ids = tokenizer(spaced, add_special_tokens=False).input_ids
    given = [model.config.decoder_start_token_id, *prompt_ids(language, model.generation_config)]
    return given, [*ids, model.config.eos_token_id]


def prompt_ids(language: str, generation: Any) -> list[int]:
    """Language, task, no timestamps; the last alone where the model knows English only."""
    if not getattr(generation, "is_multilingual", False):
        return [generation.no_timestamps_token_id]
    known = generation.lang_to_id
    if f"<|{language}|>" not in known:
        raise Problem(
            f"training: a clip's language is {language!r}, which the model has no token for",
            hint=f"use one of its {len(known)} languages, such as {', '.join(list(known)[:5])}",
        )
    task = generation.task_to_id["transcribe"]
    return [known[f"<|{language}|>"], task, generation.no_timestamps_token_id]


def seconds(clip: "Clip") -> float:
    return clip.duration_s if clip.duration_s is not None else len(clip.pcm()) / SAMPLE_RATE


def log_mel(extractor: Any, pcm: np.ndarray) -> Tensor:
    """(samples,) at 16 kHz -> (mels, frames), padded to the model's window."""
    features = extractor(pcm, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    return features[0]


def add_noise(pcm: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """White noise between snr_db and 30 dB below that, relative to the clip's mean power."""
    level = math.sqrt(float(np.mean(pcm**2))) * 10 ** (-(snr_db + rng.uniform(0, 30)) / 20)
    return (pcm + level * rng.standard_normal(len(pcm))).astype(np.float32)


def mask(features: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """(mels, frames) with two bands and two stretches of up to `width` set to the mean."""
    if width == 0:
        return features
    features = features.clone()
    mean = features.mean()
    for axis, size in ((0, features.shape[0]), (1, features.shape[1])) * 2:
        extent = int(rng.integers(0, min(width, size) + 1))
        start = int(rng.integers(0, size - extent + 1))
        features.narrow(axis, start, extent).fill_(mean)
    return features


# ----------------------------------------------------------------------------------------- loop


class Loop:
    """The model, its optimiser and where they stand."""

    def __init__(
        self,
        model: "WhisperForConditionalGeneration",
        examples: Examples,
        options: Training,
        accelerator: "Accelerator",
        state: "State",
        log: TrainingLog,
        hooks: tuple[LossTerm | None, AfterStep | None],
    ) -> None:
        self.examples, self.options, self.accelerator = examples, options, accelerator
        self.state, self.log = state, log
        self.loss_term, self.after_step = hooks
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, weight_decay=options.weight_decay)
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
        """Positions in the stream of clips that this process trains on in each pass of a step."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = self.batch_positions(step)[rank::processes]
        return [list(share[i :: self.options.accumulate]) for i in range(self.options.accumulate)]

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
        outputs = self.wrapped(
            input_features=batch.input_features,
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        )
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


# -------------------------------------------------------------------------------- stop and resume


class State:
    """Saved states under one directory: `step-000120/` is complete or absent."""

    def __init__(self, directory: Path, accelerator: "Accelerator", fingerprint: str) -> None:
        self.directory, self.accelerator, self.fingerprint = directory, accelerator, fingerprint

    def newest(self) -> Path | None:
        found = sorted(self.directory.glob("step-*[0-9]"))
        return found[-1] if found else None

    def save(self, step: int, log: TrainingLog) -> None:
        """Written beside its final name and renamed once whole; then older states are removed."""
        final = self.directory / f"step-{step:09d}"
        partial = final.with_suffix(".partial")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(self.directory):
            partial.mkdir(parents=True, exist_ok=True)
            try:
                self.accelerator.save_state(str(partial), safe_serialization=True)
            except (RuntimeError, SafetensorError) as error:  # what a full disk is called there
                raise OSError(str(error)) from error
        self.accelerator.wait_for_everyone()
        if main:
            older = list(self.directory.glob("step-*[0-9]"))
            record = {"fingerprint": self.fingerprint, "step": step, "log": asdict(log)}
            (partial / "progress.json").write_text(json.dumps(record), "utf-8")
            os.replace(partial, final)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def resume(self, log: TrainingLog) -> int:
        """Load the newest state, if there is one -> the number of steps already done."""
        newest = self.newest()
        if newest is None:
            return 0
        try:
            record = json.loads((newest / "progress.json").read_text("utf-8"))
            known, done, told = record["fingerprint"], int(record["step"]), record["log"]
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(newest, error) from error
        if known != self.fingerprint:
            raise Problem(
                f"{self.directory} holds the state of another training: the model, the clips, the "
                "options or the seed differ",
                hint="choose another output directory, or delete that one",
            )
        try:
            self.accelerator.load_state(str(newest))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise unreadable(newest, error) from error
        log.losses, log.seconds = told["losses"], told["seconds"]
        log.resumed_at = [*told["resumed_at"], done]
        return done


def unreadable(state: Path, error: Exception) -> Problem:
    return Problem(
        f"{state} cannot be read as the state of a training ({error})",
        hint="delete it: training then starts from an older state, or anew",
    )


def fingerprint(
    model: nn.Module, examples: Examples, options: Training, others: list[int | str]
) -> str:
    """A hash of all that decides the result: weights at the start, clips, options, seed, hooks."""
    digest = sha256()
    decisive = {k: v for k, v in asdict(options).items() if k not in NOT_DECISIVE}
    names = [str(clip.audio.name) for clip in examples.clips]
    digest.update(json.dumps([decisive, others, names, examples.texts]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def interrupted(done: int, steps: int, directory: Path) -> Interrupted:
    return Interrupted(
        f"training: stopped after step {done} of {steps}; its state is in {directory}",
        hint="run the same command again: it goes on from there",
    )


@contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(
    steps: int, wanted: bool | None, main: bool, label: str
) -> Iterator[Callable[[int, str], None]]:
    """A function of (steps done, a note) that draws a bar on stderr, or nothing."""
    if not (sys.stderr.isatty() if wanted is None else wanted) or not main:
        yield lambda done, note: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=steps, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
