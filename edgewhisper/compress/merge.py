"""BaldWhisper, stage 1: merging adjacent decoder layers (Sy, Cerisara and Illina 2025,
arXiv:2510.08599). Stage 2 is shear.py.

Where little speech is at hand, dropping layers of the decoder loses what fine-tuning cannot bring
back. Adjacent layers do similar work, so each pair becomes one layer: the weighted average of the
two, all parameters alike. The model with half the decoder then learns from the one it was made of.

    paper            here              shape
    W_2k-1, W_2k     lower, upper      any             a parameter of the two layers of pair k
    alpha, beta      alpha, beta       ()              their weights, the same for all pairs
    lambda, gamma    ce, kl            ()              weights of the two losses
    T                log_temperature   ()              exp of it; learnt along with the weights
    p_teacher        teacher           (tokens, V)     the frozen model before merging

    W_merged(k) = (alpha W_2k-1 + beta W_2k) / (alpha + beta),    k = 1 ... L/2             (1)
    L1 = lambda CE(student, y) + gamma KL(p_teacher^(T) || p_student^(T))                   (2)

The paper searches (alpha, beta) with Bayesian optimisation: 30 trials, each trained on 30 % of the
training speech and judged by WER on 60 % of the dev speech. It found that alpha must be small and
beta hardly matters, so the best merged layer is nearly its upper layer: `start = "upper"`, which
is alpha = 0, is the baseline that merging has to beat. `lower`, `random` and `taylor` are others.

What we fill in, and where we differ:

- lambda, gamma and the first T are not published, nor are the optimiser, batch size and schedule.
- `t_squared` multiplies the KL by T^2, so that its gradient does not fade as T grows. Nothing but
  the learning rate keeps a learnt T in place: (2) falls as T falls with that factor, and as T
  grows without. The record says where it went.
- The search is Optuna's Parzen estimators in place of Ax's Gaussian process. The two baselines are
  its first trials (`baselines = false` leaves them out). `search = "grid"` is ours: only alpha /
  beta matters, so five values of it stand for the plane.
- Stage 0, fine-tuning the model that becomes both start and teacher, is the table `baseline`.
"""

import copy
import hashlib
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper import alignment, whisper
from edgewhisper.compress.near import Teacher, frozen_copy
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.work import Work
from edgewhisper.examples import IGNORED, Batch, batches
from edgewhisper.recipe import Range
from edgewhisper.runs import main_process
from edgewhisper.search import Dimension, Found, Point, Tried, best, minimise
from edgewhisper.training import (
    LossTerm,
    Training,
    cross_entropy,
    start_accelerator,
    train,
)
from export.problem import Problem
from export.prompt import language_for

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]
Plan = list[tuple[int, ...]]
"""The new decoder's layers: each is one of the old, or the merger of two, (lower, upper)."""

LAYERS = "model.decoder.layers."
GRID = tuple({"alpha": alpha, "beta": 1.0} for alpha in (0.0, 0.1, 0.25, 0.5, 1.0))
BASELINES = ({"alpha": 0.0, "beta": 1.0}, {"alpha": 1.0, "beta": 0.0})
"""Keep the upper layer of each pair, and the lower."""


@dataclass(frozen=True)
class Options:
    start: Literal["merge", "upper", "lower", "taylor", "random"] = "merge"
    """merge: (1). upper, lower: keep that layer of each pair. taylor: remove the layer whose
    absence costs least, to first order, as often as there are pairs. random: remove any."""
    groups: str = ""
    """Layers that become one, from 0: "0+1 2+3 4 5" merges two pairs and keeps two layers. Without
    it, adjacent layers are paired, which is the paper."""
    pairs: Annotated[int, Range(0)] = 0
    """Ours: without `groups`, merge only so many pairs, in the middle of the decoder; 0: all."""
    alpha: Weight = 0.1
    """Weight of a pair's lower layer, where nothing is searched. Ours; the paper says small."""
    beta: Weight = 1.0
    """Weight of the upper one."""

    search: Literal["off", "bayes", "grid"] = "off"
    """bayes: the paper's search over alpha and beta. grid: five ratios, ours."""
    trials: Annotated[int, Range(1)] = 30
    """Of bayes."""
    highest: Annotated[float, Range(1e-3)] = 10.0
    """bayes draws alpha and beta from 0 to this."""
    baselines: bool = True
    """Ours: bayes tries the upper and the lower layers alone before it draws."""
    train_share: Annotated[float, Range(1e-6, 1)] = 0.3
    """A trial trains on this share of the clips, the same one every time."""
    dev_share: Annotated[float, Range(1e-6, 1)] = 0.6
    """And is judged on this share of the dev clips."""

    ce: Weight = 1.0
    """lambda of (2)."""
    kl: Weight = 1.0
    """gamma of (2)."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 2.0
    """T, where it starts."""
    learn_temperature: bool = True
    t_squared: bool = True
    """Multiply the KL by T^2."""
    calibration: Annotated[int, Range(1)] = 64
    """Clips that the similarity of layers (for the record) and `taylor` are measured on."""

    baseline: Training = field(default_factory=lambda: Training(steps=0))
    """Stage 0: fine-tuning before merging; 0 steps where the model is fine-tuned already."""
    trial: Training = field(default_factory=lambda: Training(steps=100, learning_rate=5e-5))
    """Training of one trial."""
    training: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-5))
    """Training of the merged model."""


# ------------------------------------------------------------------------------------ merging, (1)


def merge_tensor(lower: Tensor, upper: Tensor, alpha: float, beta: float) -> Tensor:
    """(1), of any shape. Written as a step from lower to upper, so that equal ones stay equal to
    the bit and a weight of zero leaves the other layer as it is."""
    return torch.lerp(lower, upper, beta / (alpha + beta))


def merge_layers(
    lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], alpha: float, beta: float
) -> dict[str, Tensor]:
    """All parameters of two layers, by name. Raises Problem where they do not correspond."""
    refuse_unequal(lower, upper)
    return {
        name: merge_tensor(tensor, upper[name], alpha, beta)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in lower.items()
    }


def refuse_unequal(lower: Mapping[str, Tensor], upper: Mapping[str, Tensor]) -> None:
    for name in sorted(lower.keys() | upper.keys()):
        sizes = [
            tuple(layer[name].shape) if name in layer else "absent" for layer in (lower, upper)
        ]
        if sizes[0] != sizes[1]:
            raise unmergeable(f"{name} is {sizes[0]} in the lower and {sizes[1]} in the upper one")
        if ".down." in name:
            # the average of two products is not the product of the averages
            raise unmergeable(
                f"{name} is a factor of a low-rank layer, and factors have no average"
            )
        if name.endswith("inputs") and not lower[name].equal(upper[name]):
            raise unmergeable(f"they read different features ({name})")


def unmergeable(found: str) -> Problem:
    return Problem(
        f"merge: two decoder layers of one pair cannot be averaged: {found}",
        hint="put the step merge before the steps that change layers one by one, "
        "or set start to 'upper'",
    )


def parse_groups(text: str, layers: int) -> Plan:
    """ "0+1 2" -> [(0, 1), (2,)]; "" -> adjacent pairs, the last layer alone where it is odd."""
    if not text.strip():
        return [tuple(range(i, min(i + 2, layers))) for i in range(0, layers, 2)]
    try:
        plan = [tuple(int(number) for number in group.split("+")) for group in text.split()]
    except ValueError:
        plan = []
    named = sorted(number for group in plan for number in group)
    ordered = all(len(group) <= 2 and list(group) == sorted(group) for group in plan)
    if named != list(range(layers)) or not ordered:
        example = " ".join(
            f"{i}+{i + 1}" if i + 1 < layers else f"{i}" for i in range(0, layers, 2)
        )
        raise Problem(
            f"merge: groups {text!r} do not name each of the {layers} decoder layers once, alone "
            "or as lower+upper",
            hint=f"write them like {example!r}",
        )
    return plan


def plan_of(options: Options, layers: int) -> Plan:
    """The plan for a decoder of so many layers. Raises Problem where it has too few for `pairs`."""
    if options.pairs == 0:
        return parse_groups(options.groups, layers)
    if options.groups or 2 * options.pairs > layers:
        asked = "besides groups" if options.groups else f"in a decoder of {layers} layers"
        raise Problem(
            f"merge: pairs = {options.pairs} is given {asked}",
            hint=f"leave groups out, and give at most {layers // 2} pairs",
        )
    first = (layers - 2 * options.pairs + 1) // 2
    last = first + 2 * options.pairs
    merged: Plan = [(i, i + 1) for i in range(first, last, 2)]
    return [*((i,) for i in range(first)), *merged, *((i,) for i in range(last, layers))]


def with_weights(plan: Plan, alpha: float, beta: float) -> Plan:
    """The plan without the layers that a weight of zero leaves out."""
    if alpha + beta <= 0:
        raise Problem(
            f"merge: alpha {alpha:g} and beta {beta:g} leave nothing of either layer",
            hint="give one of them a weight above 0",
        )
    left = [alpha > 0, beta > 0]
    return [
        tuple(i for i, kept in zip(group, left, strict=True) if kept) if len(group) == 2 else group
        for group in plan
    ]


# ---------------------------------------------------------------------------- distillation, (2)


def divergence(teacher: Tensor, student: Tensor, temperature: Tensor, t_squared: bool) -> Tensor:
    """KL(p_teacher^(T) || p_student^(T)) of (2); logits (tokens, V) -> (), a mean per token."""
    wanted, found = (
        (logits.float() / temperature).log_softmax(-1) for logits in (teacher, student)
    )
    loss = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    return loss * temperature.square() if t_squared else loss


def distillation(teacher: nn.Module, options: Options) -> LossTerm | None:
    """(2) without the cross entropy that training adds on its own."""
    if options.ce == 1 and options.kl == 0:
        return None
    asked = Teacher(teacher, options.training.cache_encoder)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        loss = (options.ce - 1) * cross_entropy(outputs.logits, batch.labels)
        if options.kl == 0:
            return loss
        told = batch.labels != IGNORED  # (clips, tokens)
        wanted = asked(batch, batch.input_features).logits[told]  # (told, V)
        temperature = model.log_temperature.exp()
        found = outputs.logits[told]
        return loss + options.kl * divergence(wanted, found, temperature, options.t_squared)

    return term


@torch.no_grad()
def logits_of(teacher: nn.Module, batch: Batch) -> Tensor:
    """(clips, tokens, V)"""
    ids = batch.decoder_input_ids
    teacher.to(ids.device)
    return teacher(batch.input_features, decoder_input_ids=ids, use_cache=False).logits


@contextmanager
def temperature_in(model: nn.Module, options: Options) -> Iterator[Tensor]:
    """log T as a parameter of the model while it trains, so that it is learnt, saved and resumed
    with the weights."""
    device = next(model.parameters()).device
    value = torch.tensor(math.log(options.temperature), device=device)
    learnt = options.learn_temperature and options.kl > 0
    model.log_temperature = nn.Parameter(value, requires_grad=learnt)
    try:
        yield model.log_temperature
    finally:
        del model.log_temperature


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Fine-tune (stage 0), merge the decoder's layers, and distil into what is left.

    `work.record["merge"]` says what was merged, tried and trained, and what became of the heads
    that token timestamps are read from. Raises what training.train and search.minimise raise.
    """
    refuse_quantised(model, "merge", options)
    plan = plan_of(options, model.config.decoder_layers)
    refuse(model, plan, options)
    record: dict[str, Any] = {"start": options.start}
    fine_tune(model, options, work, record)
    teacher = frozen_copy(model)
    record["similarity"] = similarities(teacher, options, work)
    student = choose(teacher, plan, options, work, record)
    record["training"] = distil(
        student, teacher, options, options.training, work, "merge-training", "merge: distilling"
    )
    work.record["merge"] = record
    return student


def refuse(model: nn.Module, plan: Plan, options: Options) -> None:
    """Before anything is trained."""
    if options.start == "merge":
        tensors = model.state_dict()
        for group in with_weights(plan, options.alpha, options.beta):
            if len(group) == 2:
                lower, upper = (layer_tensors(tensors, layer) for layer in group)
                refuse_unequal(lower, upper)
    elif options.search != "off":
        raise Problem(
            f"merge: there is nothing to search where start is {options.start!r}",
            hint="set search to 'off', or start to 'merge'",
        )


def fine_tune(model: nn.Module, options: Options, work: Work, record: dict[str, Any]) -> None:
    log = train(
        model,
        work.processor,
        work.train,
        options.baseline,
        run_dir=work.run_dir / "merge-baseline",
        seed=work.seed,
        label="merge: fine-tuning",
    )
    record["baseline"] = log.summary()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    options: Options,
    training: Training,
    work: Work,
    place: str,
    label: str,
) -> dict[str, Any]:
    """Train `student` by (2) -> how it went."""
    loss = [options.ce, options.kl, options.temperature]
    switches = [options.learn_temperature, options.t_squared]
    with temperature_in(student, options) as log_temperature:
        log = train(
            student,
            work.processor,
            work.train,
            training,
            run_dir=work.run_dir / place,
            seed=work.seed + 1,
            identity=repr((loss, switches)),
            loss_term=distillation(teacher, options),
            label=label,
        )
        return {**log.summary(), "temperature": log_temperature.exp().item()}


# -- the smaller model


def choose(
    teacher: "WhisperForConditionalGeneration",
    plan: Plan,
    options: Options,
    work: Work,
    record: dict[str, Any],
) -> "WhisperForConditionalGeneration":
    """The student before its training, by whichever start the options name."""
    alpha, beta = options.alpha, options.beta
    if options.search != "off":
        alpha, beta = search(teacher, plan, options, work, record)
    elif options.start in ("upper", "lower"):
        alpha, beta = {"upper": (0.0, 1.0), "lower": (1.0, 0.0)}[options.start]
    elif options.start == "random":
        plan = survivors(random_layers(teacher, len(plan), work.seed))
    elif options.start == "taylor":
        plan = survivors(taylor_layers(teacher, len(plan), options, work, record))
    student, told = regroup(teacher, plan, alpha, beta)
    record |= {"alpha": alpha, "beta": beta, **told}
    return student


def survivors(layers: Iterable[int]) -> Plan:
    return [(layer,) for layer in layers]


def regroup(
    model: "WhisperForConditionalGeneration", plan: Plan, alpha: float = 1.0, beta: float = 1.0
) -> "tuple[WhisperForConditionalGeneration, dict[str, Any]]":
    """A model whose decoder has the layers of the plan, and what to say about it."""
    plan = with_weights(plan, alpha, beta)
    tensors = dict(model.state_dict())
    layers = [layer_tensors(tensors, i) for i in range(model.config.decoder_layers)]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYERS)}
    for number, group in enumerate(plan):
        merged = layers[group[0]]
        if len(group) == 2:
            merged = merge_layers(merged, layers[group[1]], alpha, beta)
        kept |= {f"{LAYERS}{number}.{name}": tensor for name, tensor in merged.items()}
    shapes = copy.deepcopy(getattr(model.config, "edgewhisper", None))
    if shapes is not None and "decoder" in shapes:
        shapes["decoder"] = [shapes["decoder"][group[0]] for group in plan]
    smaller = whisper.rebuild(model, kept, shapes, decoder_layers=len(plan))
    counts = alignment.head_counts(model)
    heads = move_alignment_heads(smaller, plan, alpha, beta, counts)
    return smaller, {"layers": [list(group) for group in plan], "alignment_heads": heads}


def layer_tensors(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"{LAYERS}{layer}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def move_alignment_heads(
    model: nn.Module, plan: Plan, alpha: float, beta: float, heads: Sequence[int]
) -> dict[str, Any]:
    """Let `model`, whose layers are those of the plan, name the alignment heads it had, of which
    each layer had so many; see head_moves. Says also which of them were dropped."""
    moved = head_moves(plan, alpha, beta, heads)
    told = alignment.carry(model, moved)
    return told | {"dropped": [h for h in told.get("before", []) if tuple(h) not in moved]}


def head_moves(plan: Plan, alpha: float, beta: float, heads: Sequence[int]) -> alignment.Moves:
    """Where each head of each old decoder layer went.

    A head goes with its layer to the one that absorbed it, where its layer has at least half of
    that one's weight. With less it is gone: what stands there is rather the other layer's head of
    the same number.
    """
    larger = [alpha >= beta, beta >= alpha]
    return {
        (layer, head): (number, head)
        for number, group in enumerate(plan)
        for layer, kept in zip(group, larger if len(group) == 2 else [True], strict=True)
        if kept
        for head in range(heads[layer])
    }


# -- searching alpha and beta


def search(
    teacher: "WhisperForConditionalGeneration",
    plan: Plan,
    options: Options,
    work: Work,
    record: dict[str, Any],
) -> tuple[float, float]:
    """The weights whose model has the lowest dev WER after a short training."""
    less = replace(
        work,
        train=share(work.train, options.train_share, work.seed),
        dev=share(work.dev, options.dev_share, work.seed),
    )
    grid = options.search == "grid"
    trials = len(GRID) if grid else options.trials

    def objective(point: Point, finished: Sequence[Tried]) -> Found:
        student, _ = regroup(teacher, plan, **point)
        place = "merge-trials/{alpha!r}-{beta!r}".format(**point)
        label = f"merge: trial {len(finished) + 1} of {trials}"
        distil(student, teacher, options, options.trial, less, place, label)
        wer = less.wer(student).wer
        if main_process():
            shutil.rmtree(work.run_dir / place, ignore_errors=True)
        return Found((wer,))

    tried = minimise(
        objective,
        dict.fromkeys(("alpha", "beta"), Dimension(0.0, options.highest)),
        trials=trials,
        first=GRID if grid else BASELINES if options.baselines else (),
        run_dir=work.run_dir,
        name=search_name(teacher, plan, options, less),
        seed=work.seed,
        accelerator=start_accelerator(options.trial),
    )
    found = [{**trial.point, "dev_wer": trial.value} for trial in tried]
    record["search"] = {"clips": [len(less.train), len(less.dev)], "tried": found}
    chosen = best(tried).point
    return chosen["alpha"], chosen["beta"]


def share(clips: "Sequence[Clip]", part: float, seed: int) -> "list[Clip]":
    """That part of the clips, at least one, drawn by the seed; in their order."""
    count = max(1, round(part * len(clips)))
    drawn = np.random.default_rng([seed, 2]).permutation(len(clips))[:count]
    return [clips[i] for i in sorted(drawn)]


DECISIVE = ("ce", "kl", "temperature", "learn_temperature", "t_squared", "trial")
"""Options that decide a trial's value; the others may change while a search goes on."""


def search_name(teacher: nn.Module, plan: Plan, options: Options, work: Work) -> str:
    """A name that two searches share only if their trials measure the same thing."""
    told = asdict(options)
    prompted = partial(language_for, teacher.generation_config)
    clips = [
        [(c.audio.name, c.text, c.lang, prompted(c.lang)) for c in clips]
        for clips in (work.train, work.dev)
    ]
    digest = hashlib.sha256(repr([plan, [told[k] for k in DECISIVE], clips, work.seed]).encode())
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"bald-merge-{digest.hexdigest()[:16]}"


# -- layers left out instead of merged


def random_layers(model: nn.Module, count: int, seed: int) -> list[int]:
    rng = np.random.default_rng([seed, 3])
    return sorted(rng.permutation(model.config.decoder_layers)[:count].tolist())


def taylor_layers(
    model: "WhisperForConditionalGeneration",
    count: int,
    options: Options,
    work: Work,
    record: dict[str, Any],
) -> list[int]:
    """Remove the layer with the lowest score, one at a time, scoring anew what is left."""
    left = list(range(model.config.decoder_layers))
    record["taylor"] = []
    while len(left) > count:
        scores = layer_scores(regroup(model, survivors(left))[0], options, work)
        record["taylor"].append(dict(zip(map(str, left), scores.tolist(), strict=True)))
        del left[int(scores.argmin())]
    return left


def layer_scores(model: nn.Module, options: Options, work: Work) -> Tensor:
    """E[(dL/dm_i)^2] of gates m_i = 1 on what layer i adds to its input: y = x + m (f(x) - x).

    L is the cross entropy of a batch. (layers,): to first order, the square of what a layer's
    absence would add to the loss.
    """
    layers = model.model.decoder.layers
    gates = torch.ones(len(layers), device=next(model.parameters()).device, requires_grad=True)

    def gate(i: int) -> Any:
        return lambda module, args, output: args[0] + gates[i] * (output - args[0])

    hooks = [layer.register_forward_hook(gate(i)) for i, layer in enumerate(layers)]
    total = torch.zeros_like(gates, requires_grad=False)
    try:
        for batch in calibration(model, options, work):
            ids = batch.decoder_input_ids
            outputs = model(batch.input_features, decoder_input_ids=ids, use_cache=False)
            loss = cross_entropy(outputs.logits, batch.labels)
            total += torch.autograd.grad(loss, gates)[0].square()
    finally:
        for hook in hooks:
            hook.remove()
    return total


@torch.no_grad()
def similarities(model: nn.Module, options: Options, work: Work) -> list[list[float]]:
    """Mean cosine between the outputs of every two decoder layers, which says what to pair."""
    total, tokens = torch.zeros(()), 0
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.model.decoder.layers
    ]
    try:
        for batch in calibration(model, options, work):
            outputs.clear()
            logits_of(model, batch)
            told = batch.labels != IGNORED
            states = torch.stack([functional.normalize(x[told], dim=-1) for x in outputs])
            total = total + torch.einsum("ith,jth->ij", states, states).cpu()
            tokens += int(told.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return (total / tokens).tolist()


def calibration(model: nn.Module, options: Options, work: Work) -> Iterator[Batch]:
    clips = work.train[: options.calibration]
    size = options.training.batch_size
    return batches(clips, model, work.processor, size, "merge: listening")
