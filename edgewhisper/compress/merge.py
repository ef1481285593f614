"""BaldWhisper, stage 1: merging adjacent decoder layers (Sy, Cerisara and Illina 2025,
arXiv:2510.08599). Stage 2 is shear.py.

Removing decoder layers loses accuracy that fine-tuning on little speech cannot recover. Adjacent
layers compute similar functions, so BaldWhisper replaces each pair by the weighted average of its
parameters. The model with half the decoder layers is then distilled from the original model.

    paper            here              shape
    W_2k-1, W_2k     lower, upper      any             a parameter of the two layers of pair k
    alpha, beta      alpha, beta       ()              their weights, the same for all pairs
    lambda, gamma    ce, kl            ()              weights of the two losses
    T                log_temperature   ()              T = exp(log_temperature), trained
    p_teacher        teacher           (tokens, V)     the frozen model before merging

    W_merged(k) = (alpha W_2k-1 + beta W_2k) / (alpha + beta),    k = 1 ... L/2             (1)
    L1 = lambda CE(student, y) + gamma KL(p_teacher^(T) || p_student^(T))                   (2)

The paper searches (alpha, beta) with Bayesian optimisation: 30 trials, each trained on 30 % of the
training speech and evaluated by WER on 60 % of the dev speech. Result: alpha must be small and beta
hardly matters, so the best merged layer is nearly its upper layer. `start = "upper"` (alpha = 0) is
therefore the baseline for merging. `lower`, `random` and `taylor` are further baselines.

Differences and choices:

- lambda, gamma and the start value of T are not published, nor are the optimiser, batch size and
  schedule.
- `t_squared` multiplies the KL by T^2, so that its gradient does not vanish as T grows. Only the
  learning rate limits a trained T: with the factor, (2) falls as T falls; without it, (2) falls as
  T grows. The record has its last value.
- The search uses Optuna's Parzen estimators instead of Ax's Gaussian process. Its first trials are
  the baselines upper and lower (`baselines = false` omits them). `search = "grid"` is ours: only
  alpha / beta matters, so it tries five values of it.
- Stage 0, fine-tuning the model that becomes both start and teacher, is the table `baseline`.
- The arithmetic of (1) is in decoder_layers.py, the scores of `taylor` in layer_scores.py.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgewhisper.compress.context import Context
from edgewhisper.compress.decoder_layers import (
    Plan,
    layer_tensors,
    parse_groups,
    refuse_unequal,
    regroup,
    single_layers,
    with_weights,
)
from edgewhisper.compress.layer_scores import random_layers, similarities, taylor_layers
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.teacher import Teacher, divergence, frozen_copy
from edgewhisper.examples import IGNORED, Batch, batches
from edgewhisper.recipe import Range
from edgewhisper.runs import main_process
from edgewhisper.search import Dimension, Outcome, Point, Trial, best, minimise
from edgewhisper.training import LossTerm, Training, cross_entropy, start_accelerator
from export.problem import Problem
from export.prompt import prompt_language

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]

GRID = tuple({"alpha": alpha, "beta": 1.0} for alpha in (0.0, 0.1, 0.25, 0.5, 1.0))
BASELINES = ({"alpha": 0.0, "beta": 1.0}, {"alpha": 1.0, "beta": 0.0})
"""The upper layer of each pair alone, and the lower layer alone."""
REMOVES = ("pairs", "groups")


@dataclass(frozen=True)
class Options:
    start: Literal["merge", "upper", "lower", "taylor", "random"] = "merge"
    """merge: (1). upper, lower: keep that layer of each pair. taylor: for each pair, remove the
    layer whose removal raises the loss least, to first order. random: remove random layers."""
    groups: str = ""
    """Layers to merge, numbered from 0: "0+1 2+3 4 5" merges two pairs and keeps two layers. Empty:
    all adjacent layers are paired, as in the paper."""
    pairs: Annotated[int, Range(0)] = 0
    """Ours: number of pairs to merge, in the middle of the decoder, without `groups`; 0: all."""
    alpha: Weight = 0.1
    """Weight of the lower layer of a pair, without a search. Ours; the paper says small."""
    beta: Weight = 1.0
    """Weight of the upper layer."""

    search: Literal["off", "bayes", "grid"] = "off"
    """bayes: search over alpha and beta, as in the paper. grid: five ratios (ours)."""
    trials: Annotated[int, Range(1)] = 30
    """Number of trials of bayes."""
    highest: Annotated[float, Range(1e-3)] = 10.0
    """bayes draws alpha and beta between 0 and this."""
    baselines: bool = True
    """Ours: the first two trials of bayes use the upper or the lower layers alone."""
    train_share: Annotated[float, Range(1e-6, 1)] = 0.3
    """Share of the training clips for trials, the same clips in every trial."""
    dev_share: Annotated[float, Range(1e-6, 1)] = 0.6
    """Share of the dev clips that a trial is evaluated on."""

    ce: Weight = 1.0
    """lambda of (2)."""
    kl: Weight = 1.0
    """gamma of (2)."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 2.0
    """Start value of T."""
    learn_temperature: bool = True
    t_squared: bool = True
    """Multiply the KL by T^2."""
    calibration: Annotated[int, Range(1)] = 64
    """Number of clips for the similarity of layers (in the record) and for `taylor`."""

    baseline: Training = field(default_factory=lambda: Training(steps=0))
    """Stage 0: fine-tuning before merging; 0 steps if the model is already fine-tuned."""
    trial: Training = field(default_factory=lambda: Training(steps=100, learning_rate=5e-5))
    """Training of one trial."""
    training: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-5))
    """Training of the merged model."""


# ---------------------------------------------------------------------------- distillation, (2)


def distillation(teacher: nn.Module, options: Options) -> LossTerm | None:
    """Return the loss term: (2) minus the cross entropy, which the training loop adds; or None."""
    if options.ce == 1 and options.kl == 0:
        return None
    cached = Teacher(teacher, options.training.cache_encoder)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        loss = (options.ce - 1) * cross_entropy(outputs.logits, batch.labels)
        if options.kl == 0:
            return loss
        labelled = batch.labels != IGNORED  # (clips, tokens)
        target = cached(batch, batch.input_features).logits[labelled]  # (labelled, V)
        t = model.log_temperature.exp()
        kl = divergence(target, outputs.logits[labelled], t)
        return loss + options.kl * (kl * t.square() if options.t_squared else kl)

    return term


@contextmanager
def temperature_in(model: nn.Module, options: Options) -> Iterator[Tensor]:
    """Make log T a parameter of the model, so that it is trained, saved and resumed with it."""
    device = next(model.parameters()).device
    value = torch.tensor(math.log(options.temperature), device=device)
    trained = options.learn_temperature and options.kl > 0
    model.log_temperature = nn.Parameter(value, requires_grad=trained)
    try:
        yield model.log_temperature
    finally:
        del model.log_temperature


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Fine-tune (stage 0), merge decoder layers, and distil the original model into the result.

    `context.record["merge"]` has the merged layers, the trials, the trainings, and the new numbers
    of the alignment heads. Raises Problem if layers cannot be merged, and what training.train and
    search.minimise raise.
    """
    refuse_quantised(model, "merge", options)
    plan = plan_of(options, model.config.decoder_layers)
    refuse_before_training(model, plan, options)
    record: dict[str, Any] = {"start": options.start}
    fine_tune(model, options, context, record)
    teacher = frozen_copy(model)
    record["similarity"] = similarities(teacher, calibration(options, context, teacher))
    student = choose(teacher, plan, options, context, record)
    record["training"] = distil(
        student, teacher, options, options.training, context, "merge-training", "merge: distilling"
    )
    context.record["merge"] = record
    return student


def refuse_before_training(model: nn.Module, plan: Plan, options: Options) -> None:
    """Raise Problem for layers that cannot be merged, or a search without merging."""
    if options.start == "merge":
        tensors = model.state_dict()
        for group in with_weights(plan, options.alpha, options.beta):
            if len(group) == 2:
                lower, upper = (layer_tensors(tensors, layer) for layer in group)
                refuse_unequal(lower, upper)
    elif options.search != "off":
        raise Problem(
            f"merge: search is {options.search!r}, but start {options.start!r} has no weights to "
            "search",
            hint="set search to 'off', or start to 'merge'",
        )


def plan_of(options: Options, layers: int) -> Plan:
    """Return the plan for a decoder with this many layers.

    Raises Problem for invalid `groups`, for `pairs` with `groups`, or for too many `pairs`.
    """
    if options.pairs == 0:
        return parse_groups(options.groups, layers)
    if options.groups or 2 * options.pairs > layers:
        where = "together with groups" if options.groups else f"for a decoder of {layers} layers"
        raise Problem(
            f"merge: pairs is set to {options.pairs} {where}",
            hint=f"remove groups, and set pairs to at most {layers // 2}",
        )
    first = (layers - 2 * options.pairs + 1) // 2
    last = first + 2 * options.pairs
    merged: Plan = [(i, i + 1) for i in range(first, last, 2)]
    return [*((i,) for i in range(first)), *merged, *((i,) for i in range(last, layers))]


def fine_tune(model: nn.Module, options: Options, context: Context, record: dict[str, Any]) -> None:
    """Fine-tune the model before merging (stage 0)."""
    record["baseline"] = context.trained(
        model, options.baseline, "merge-baseline", label="merge: fine-tuning"
    )


def distil(
    student: nn.Module,
    teacher: nn.Module,
    options: Options,
    training: Training,
    context: Context,
    run_name: str,
    label: str,
) -> dict[str, Any]:
    """Train the student by (2); return the training's summary."""
    loss = [options.ce, options.kl, options.temperature]
    switches = [options.learn_temperature, options.t_squared]
    with temperature_in(student, options) as log_temperature:
        summary = context.trained(
            student,
            training,
            run_name,
            seed=1,
            identity=repr((loss, switches)),
            loss_term=distillation(teacher, options),
            label=label,
        )
        return {**summary, "temperature": log_temperature.exp().item()}


def calibration(options: Options, context: Context, model: nn.Module) -> Iterator[Batch]:
    """Yield batches of the first training clips, prepared for `model`."""
    clips = context.train[: options.calibration]
    size = options.training.batch_size
    return batches(clips, model, context.processor, size, "merge: calibrating")


# -- the smaller model


def choose(
    teacher: "WhisperForConditionalGeneration",
    plan: Plan,
    options: Options,
    context: Context,
    record: dict[str, Any],
) -> "WhisperForConditionalGeneration":
    """Return the student before its training, made as option `start` says."""
    alpha, beta = options.alpha, options.beta
    if options.search != "off":
        alpha, beta = search(teacher, plan, options, context, record)
    elif options.start in ("upper", "lower"):
        alpha, beta = {"upper": (0.0, 1.0), "lower": (1.0, 0.0)}[options.start]
    elif options.start == "random":
        plan = single_layers(random_layers(teacher, len(plan), context.seed))
    elif options.start == "taylor":
        calibrate = partial(calibration, options, context)
        layers, record["taylor"] = taylor_layers(teacher, len(plan), calibrate)
        plan = single_layers(layers)
    student, layer_record = regroup(teacher, plan, alpha, beta)
    record |= {"alpha": alpha, "beta": beta, **layer_record}
    return student


# -- searching alpha and beta


def search(
    teacher: "WhisperForConditionalGeneration",
    plan: Plan,
    options: Options,
    context: Context,
    record: dict[str, Any],
) -> tuple[float, float]:
    """Return the weights alpha, beta with the lowest dev WER after a short training."""
    subset = replace(
        context,
        train=share(context.train, options.train_share, context.seed),
        dev=share(context.dev, options.dev_share, context.seed),
    )
    grid = options.search == "grid"
    trials = len(GRID) if grid else options.trials

    def objective(point: Point, finished: Sequence[Trial]) -> Outcome:
        student, _ = regroup(teacher, plan, **point)
        run_name = "merge-trials/{alpha!r}-{beta!r}".format(**point)
        label = f"merge: trial {len(finished) + 1} of {trials}"
        distil(student, teacher, options, options.trial, subset, run_name, label)
        wer = subset.wer(student).wer
        if main_process():
            shutil.rmtree(context.run_dir / run_name, ignore_errors=True)
        return Outcome((wer,))

    tried = minimise(
        objective,
        dict.fromkeys(("alpha", "beta"), Dimension(0.0, options.highest)),
        trials=trials,
        first=GRID if grid else BASELINES if options.baselines else (),
        run_dir=context.run_dir,
        name=search_name(teacher, plan, options, subset),
        seed=context.seed,
        accelerator=start_accelerator(options.trial),
    )
    trials_record = [{**trial.point, "dev_wer": trial.value} for trial in tried]
    record["search"] = {"clips": [len(subset.train), len(subset.dev)], "tried": trials_record}
    chosen = best(tried).point
    return chosen["alpha"], chosen["beta"]


def share(clips: "Sequence[Clip]", part: float, seed: int) -> "list[Clip]":
    """Draw this share of the clips, at least one, and return them in their order."""
    count = max(1, round(part * len(clips)))
    drawn = np.random.default_rng([seed, 2]).permutation(len(clips))[:count]
    return [clips[i] for i in sorted(drawn)]


DECISIVE = ("ce", "kl", "temperature", "learn_temperature", "t_squared", "trial")
"""Options that determine the result of a trial. Other options may change in a resumed search."""


def search_name(teacher: nn.Module, plan: Plan, options: Options, context: Context) -> str:
    """Return a name for the search; two searches share it only if their trials are the same."""
    values = asdict(options)
    prompted = partial(prompt_language, teacher.generation_config)
    clips = [
        [(c.audio.name, c.text, c.lang, prompted(c.lang)) for c in clips]
        for clips in (context.train, context.dev)
    ]
    digest = hashlib.sha256(
        repr([plan, [values[k] for k in DECISIVE], clips, context.seed]).encode()
    )
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"bald-merge-{digest.hexdigest()[:16]}"
