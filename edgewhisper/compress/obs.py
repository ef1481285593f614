"""Optimal brain surgeon for structures: remove units, heads and dimensions, and refit the rest.

What goes is chosen by how little the layer behind it loses once its remaining weights make up for
it, and these weights have a closed form. Nothing is trained. The methods are ZipLM (Kurtic et al.
2023, arXiv:2302.04089) and SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), which take them
from Hassibi and Stork (1992). The arithmetic is in surgeon.py, the order of the model's branches in
branches.py, and the choice of how much each branch loses in allocation.py.

    here             removed                                      updated
    units            columns of fc2, with the rows of fc1         fc2
    heads            blocks of columns of out_proj                out_proj
    value_dims       dimensions of every head's values            out_proj, v_proj (rotated)
    score_dims       dimensions of every head's queries and keys  q_proj, k_proj (rotated)

The steps:

1. The dense model hears the clips once, branch by branch. Each branch gives the covariance of what
   its last layer reads, and from it the loss of each number of removed structures.
2. These losses are in units of one layer's output. Two levels of each kind are tried by themselves,
   and the Kullback-Leibler divergence of the model's next-token distributions is measured. Between
   and beyond them the divergence is taken as a power of the loss.
3. Dynamic programming picks a level for each branch, so that the sum of divergences is smallest.
4. The clips are heard again. Each branch is fitted to what it reads in the compressed model.

What we do otherwise than ZipLM:

- Covariances are centred, and the mean of what is removed goes into the bias (FLAP, An et al. 2023,
  arXiv:2312.11983). Positions behind the end of a clip do not count.
- `correct` fits each branch to the dense model's states instead of its own old output, so that it
  also makes up for the branches before it.
- Head dimensions are removed after a rotation into the directions that matter least. Values: the
  best subspace of what the head writes (low rank of W_v W_o in the metric of the data; AdaPTwin, Biswas
  et al. 2024, arXiv:2406.08904). Queries and keys: the directions that add least to the scores,
  where keys count by the attention that they get.
- One group of columns is removed at a time, which is faster than single columns by its size.

The result has zeros in its weights. The step `shrink` makes it smaller.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn

from edgewhisper import decoding
from edgewhisper.calibration import Speech
from edgewhisper.compress.allocation import Level, allocate
from edgewhisper.compress.branches import Branch, branches_of
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.surgeon import (
    balanced,
    damped,
    fitted_loss,
    orthonormal_rows,
    refit,
    refit_columns,
    remove_blocks,
    remove_columns,
    score_directions,
    value_directions,
)
from edgewhisper.compress.walk import ScoreSums, Sums, Walk, divergence
from edgewhisper.compress.work import Work
from edgewhisper.examples import permutation
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Range
from edgewhisper.runs import main_process
from export.cost import count_parameters, macs, window_macs
from export.problem import Problem

if TYPE_CHECKING:
    from benchmarks.speech import Clip
    from edgewhisper.whisper import WhisperForConditionalGeneration

TOKENS = 32
"""Tokens of a window, where the budget is in MACs."""
GROUPS = 96
"""Units of a feed-forward branch are removed in at most so many groups."""
STEPS = 32
"""Levels of a feed-forward branch."""


@dataclass(frozen=True)
class Options:
    remove: Annotated[float, Range(0, 1)] = 0.15
    """Share of the cost to remove: of the parameters outside the token table, or of the MACs."""
    budget_of: Literal["parameters", "macs"] = "parameters"
    """macs: multiply-accumulates of one window and 32 tokens."""

    units: bool = True
    """Remove units of feed-forward branches."""
    heads: bool = True
    """Remove attention heads."""
    value_dims: bool = True
    """Remove dimensions of values, the same number in every head of an attention."""
    score_dims: bool = True
    """Remove dimensions of queries and keys, likewise."""
    most_removed: Annotated[float, Range(0, 0.95)] = 0.75
    """No branch loses more than this share of one kind of structure."""
    round_to: Annotated[int, Range(1)] = 8
    """Units and dimensions that remain are multiples of this, where the dense number is one."""

    clips: Annotated[int, Range(1)] = 100
    """Clips of calibration speech, drawn from the training clips by the seed; all if fewer."""
    effect_clips: Annotated[int, Range(0)] = 16
    """Dev clips that the divergence of step 2 is measured on. 0: the relative error of a branch's
    output stands for it."""
    own_words: bool = True
    """The decoder reads the dense model's transcripts of the clips, in the case and punctuation that
    it will write later. False: it reads the texts of the manifest."""
    damping: Annotated[float, Range(0, 10)] = 0.01
    """Added to the diagonal of the encoder's covariances, as a share of the mean variance."""
    decoder_damping: Annotated[float, Range(0, 10)] = 0.1
    """Likewise in the decoder, which reads fewer positions."""
    correct: Annotated[float, Range(0, 1)] = 0.0
    """Share of the difference to the dense encoder's states that each branch makes up for."""
    decoder_correct: Annotated[float, Range(0, 1)] = 0.0
    """Likewise in the decoder."""
    decoder_weight: Annotated[float, Range(0.01, 100)] = 1.0
    """Divergences of the decoder's branches are multiplied by this before levels are chosen."""


# ------------------------------------------------------------------------------ applying a level


@dataclass(frozen=True)
class Fit:
    """What the last layer of a branch should write (wanted, mean_y), and what it reads."""

    weight: Tensor
    """(d_out, d) W, corrected."""
    h: Tensor
    """(d, d)"""
    wanted: Tensor
    """(d_out, d) W H."""
    mean_x: Tensor
    mean_y: Tensor


def fit_of(last: nn.Module, sums: Sums, damping: float, correct: float) -> Fit:
    """The regression of a last layer. With `correct` it starts from the best fit to the targets."""
    weight, bias = last.weight.detach().double(), last.bias.detach().double()
    covariance, mean_x = sums.covariance, sums.mean
    h = damped(covariance, damping)
    mean_y = weight @ mean_x + bias
    if correct:
        step = sums.cross - weight @ covariance
        weight = weight + correct * torch.linalg.solve(h, step, left=False)
        mean_y = mean_y + correct * (sums.target_mean - mean_y)
    return Fit(weight, h, weight @ h, mean_x, mean_y)


@torch.no_grad()
def put(last: nn.Module, fit: Fit, weight: Tensor, mean_x: Tensor) -> None:
    """Write a weight (d_out, d) and the bias that keeps the mean of the output."""
    last.weight.copy_(weight)
    last.bias.copy_(fit.mean_y - weight @ mean_x)


def remove_units(model: nn.Module, branch: Branch, fit: Fit, units: int) -> None:
    """Leave so many units of a feed-forward branch."""
    d = len(fit.h)
    removal = remove_columns(fit.weight, fit.h, max(1, d // GROUPS), d - units)
    put_units(model, branch, fit, torch.cat([*removal.order, torch.empty(0).long()]))


def put_units(model: nn.Module, branch: Branch, fit: Fit, removed: Tensor) -> None:
    kept = torch.ones(len(fit.h), dtype=torch.bool)
    kept[removed] = False
    weight = torch.zeros_like(fit.weight)
    weight[:, kept] = refit_columns(fit.wanted, fit.h, kept.nonzero().flatten())
    put(branch.last_of(model), fit, weight, fit.mean_x)


@torch.no_grad()
def reduce_values(model: nn.Module, branch: Branch, fit: Fit, heads: int, dims: int) -> None:
    """Leave so many heads of an attention, and so many value dimensions of each."""
    attention = branch.attention_of(model)
    total = attention.num_heads
    width = len(fit.h) // total
    bases = value_bases(fit, total, heads, dims)  # head -> (dims, width)
    basis = placed(bases, len(fit.h))
    compact = refit(fit.wanted, fit.h, basis)  # (d_out, heads * dims)
    weight, mean = torch.zeros_like(fit.weight), torch.zeros_like(fit.mean_x)
    value = attention.v_proj
    for place, (head, rows) in enumerate(bases.items()):
        own, new = slice(head * width, (head + 1) * width), place * dims
        weight[:, own.start : own.start + dims] = compact[:, new : new + dims]
        mean[own.start : own.start + dims] = rows @ fit.mean_x[own]
        if dims < width:
            rotate(value, own, rows)
    put(attention.out_proj, fit, weight, mean)


def value_bases(fit: Fit, total: int, heads: int, dims: int) -> dict[int, Tensor]:
    """Head that remains -> the directions of its values that remain, (dims, width)."""
    width = len(fit.h) // total
    gone = remove_blocks(fit.weight, fit.h, width, total - heads).order
    removed = {int(group[0]) // width for group in gone}
    left = [head for head in range(total) if head not in removed]
    if dims == width:
        return {head: torch.eye(width, dtype=fit.h.dtype) for head in left}
    columns = torch.cat([torch.arange(head * width, (head + 1) * width) for head in left])
    weight = refit_columns(fit.wanted, fit.h, columns)
    directions, _ = value_directions(weight, fit.h[columns][:, columns], heads)
    return {
        head: orthonormal_rows(rows[:dims]) for head, rows in zip(left, directions, strict=True)
    }


def placed(bases: dict[int, Tensor], d: int) -> Tensor:
    """Directions of heads -> rows over the features of all heads, (heads * dims, d)."""
    rows = []
    for head, basis in bases.items():
        dims, width = basis.shape
        row = basis.new_zeros(dims, d)
        row[:, head * width : (head + 1) * width] = basis
        rows.append(row)
    return torch.cat(rows)


@torch.no_grad()
def rotate(linear: nn.Module, own: slice, rows: Tensor) -> None:
    """One head's outputs (width) of a projection become rows @ outputs, and zeros behind them."""
    end = own.start + len(rows)
    parameters = [linear.weight] + ([] if linear.bias is None else [linear.bias])
    for parameter in parameters:
        new = rows @ parameter[own].double()
        parameter[own] = 0
        parameter[own.start : end] = new.to(parameter.dtype)


def reduce_scores(
    model: nn.Module, branch: Branch, sums: ScoreSums, dims: int, damping: float
) -> None:
    """Leave so many dimensions of queries and keys in each head."""
    attention = branch.attention_of(model)
    width = attention.head_dim
    if dims == width:
        return
    for head in range(attention.num_heads):
        queries, keys = damped(sums.queries[head], damping), damped(sums.keys[head], damping)
        left, right, _ = score_directions(queries, keys)
        left, right = balanced(left[:dims], right[:dims])
        own = slice(head * width, (head + 1) * width)
        rotate(attention.q_proj, own, left)
        rotate(attention.k_proj, own, right)


# ------------------------------------------------------------------------------ losses of levels


@dataclass(frozen=True)
class Curve:
    """Loss of each size of one kind of structure. The first size is the whole."""

    sizes: list[int]
    losses: list[float]

    def at(self, size: int) -> float:
        return self.losses[self.sizes.index(size)]


def sizes_of(total: int, step: int, most_removed: float) -> list[int]:
    """Sizes to try: the whole, then multiples of `step` below it, down to the smallest allowed."""
    least = max(1, total * (1 - most_removed))
    return [total, *(n for n in range(total - 1, 0, -1) if n % step == 0 and n >= least)]


def unit_curve(fit: Fit, options: Options) -> tuple[Curve, Callable[[int], Tensor]]:
    """The losses of numbers of units, and the units that go at each number."""
    d = len(fit.h)
    step = max(1, -(-d // STEPS // options.round_to) * options.round_to) if d >= STEPS else 1
    sizes = sizes_of(d, step, options.most_removed)
    removal = remove_columns(fit.weight, fit.h, max(1, d // GROUPS), d - sizes[-1])
    order = torch.cat([*removal.order, torch.empty(0).long()])
    counts = torch.tensor([0, *(len(g) for g in removal.order)]).cumsum(0).double()
    losses = [interpolated(counts, removal.losses, d - size) for size in sizes]
    return Curve(sizes, losses), lambda size: order[: d - size]


def interpolated(counts: Tensor, losses: Sequence[float], at: int) -> float:
    place = int(torch.searchsorted(counts, float(at)))
    if place == 0:
        return losses[0]
    low, high = float(counts[place - 1]), float(counts[place])
    return losses[place - 1] + (losses[place] - losses[place - 1]) * (at - low) / (high - low)


def head_curve(fit: Fit, total: int, options: Options) -> Curve:
    sizes = sizes_of(total, 1, options.most_removed)
    removal = remove_blocks(fit.weight, fit.h, len(fit.h) // total, total - sizes[-1])
    return Curve(sizes, [removal.losses[total - size] for size in sizes])


def value_curve(fit: Fit, total: int, options: Options) -> Curve:
    width = len(fit.h) // total
    sizes = sizes_of(width, options.round_to, options.most_removed)
    losses = [0.0]
    for dims in sizes[1:]:
        basis = placed(value_bases(fit, total, total, dims), len(fit.h))
        losses.append(max(0.0, fitted_loss(fit.weight, fit.wanted, fit.h, basis)))
    return Curve(sizes, losses)


def score_curve(sums: ScoreSums, options: Options, damping: float) -> Curve:
    width = sums.queries.shape[-1]
    sizes = sizes_of(width, options.round_to, options.most_removed)
    found = [
        score_directions(damped(q, damping), damped(k, damping))[2]
        for q, k in zip(sums.queries, sums.keys, strict=True)
    ]
    shares = torch.stack([losses / losses.sum() for losses in found]).mean(0)
    return Curve(sizes, [float(shares[size:].sum()) for size in sizes])


def scaled(curve: Curve, measured: dict[int, float]) -> Curve:
    """A curve in divergences: a power of its losses through the measured ones."""
    points = sorted((curve.at(size), value) for size, value in measured.items())
    points = [(max(loss, 1e-30), max(value, 1e-9)) for loss, value in points]
    (low, first), (high, second) = points[0], points[-1]
    power = 1.0
    if high > low * 1.01:
        ratio = torch.tensor([second / first, high / low]).log()
        power = min(max(float(ratio[0] / ratio[1]), 0.5), 2.0)
    anchor, value = (low, first) if len(points) == 1 else (high, second)
    return Curve(
        curve.sizes,
        [value * (loss / anchor) ** power if loss > 0 else 0.0 for loss in curve.losses],
    )


# ------------------------------------------------------------------------------ the dense model


@dataclass(frozen=True)
class Part:
    """One branch at all levels."""

    branch: Branch
    curves: dict[str, Curve]
    """"units"; or "heads", "value_dims" and "score_dims". Losses are divergences."""


def measure_parts(
    walk: Walk, options: Options, done: Callable[[], None] = lambda: None
) -> list[Part]:
    """The curves of all branches, from one walk of the dense model."""
    model, parts = walk.model, []
    first = branches_of(model, "encoder")[0]
    dense = walk.logits(first)
    for side in ("encoder", "decoder"):
        if side == "decoder":
            walk.enter_decoder()
        for branch in branches_of(model, side):
            parts.append(measure_part(walk, branch, dense, options))
            walk.move(branch)
            done()
    return parts


def measure_part(walk: Walk, branch: Branch, dense: list[Tensor], options: Options) -> Part:
    damping = damping_of(branch, options)
    fit = fit_of(branch.last_of(walk.model), walk.collect(branch), damping, 0.0)
    energy = float((fit.wanted * fit.weight).sum())
    tries: dict[str, tuple[Curve, Callable[[int], None]]] = {}
    if branch.kind == "ffn":
        if options.units:
            curve, removed = unit_curve(fit, options)
            tries["units"] = (
                curve,
                lambda size: put_units(walk.model, branch, fit, removed(size)),
            )
    else:
        tries = attention_tries(walk, branch, fit, options)
    curves = {}
    for kind, (curve, change) in tries.items():
        if kind != "score_dims":
            curve = Curve(curve.sizes, [loss / energy for loss in curve.losses])
        measured = try_levels(walk, branch, curve, change, dense, options)
        curves[kind] = scaled(curve, measured) if measured else curve
    return Part(branch, curves)


def attention_tries(
    walk: Walk, branch: Branch, fit: Fit, options: Options
) -> dict[str, tuple[Curve, Callable[[int], None]]]:
    model, damping = walk.model, damping_of(branch, options)
    attention = branch.attention_of(model)
    total, width = attention.num_heads, len(fit.h) // attention.num_heads
    tries: dict[str, tuple[Curve, Callable[[int], None]]] = {}
    if options.heads:
        tries["heads"] = (
            head_curve(fit, total, options),
            lambda size: reduce_values(model, branch, fit, size, width),
        )
    if options.value_dims:
        tries["value_dims"] = (
            value_curve(fit, total, options),
            lambda size: reduce_values(model, branch, fit, total, size),
        )
    if options.score_dims:
        scores = walk.collect_scores(branch)
        tries["score_dims"] = (
            score_curve(scores, options, damping),
            lambda size: reduce_scores(model, branch, scores, size, damping),
        )
    return tries


def try_levels(
    walk: Walk,
    branch: Branch,
    curve: Curve,
    change: Callable[[int], None],
    dense: list[Tensor],
    options: Options,
) -> dict[int, float]:
    """The divergence at about a quarter and a half of the structures removed."""
    if not dense or len(curve.sizes) < 2:
        return {}
    whole, measured = curve.sizes[0], {}
    for share in (0.75, 0.5):
        size = min(curve.sizes[1:], key=lambda size: abs(size - share * whole))
        if size not in measured:
            with restored(branch_modules(walk.model, branch)):
                change(size)
                measured[size] = divergence(dense, walk.logits(branch))
    return measured


def branch_modules(model: nn.Module, branch: Branch) -> nn.Module:
    return branch.last_of(model) if branch.kind == "ffn" else branch.attention_of(model)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards the module has the weights that it had before."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(before)


def damping_of(branch: Branch, options: Options) -> float:
    return options.damping if branch.side == "encoder" else options.decoder_damping


# ------------------------------------------------------------------------------ levels and costs


def levels_of(model: nn.Module, part: Part, options: Options) -> list[Level]:
    """All ways to have a branch."""
    weigh = options.decoder_weight if part.branch.side == "decoder" else 1.0
    whole = whole_of(model, part.branch)
    cost = cost_of(model, part.branch, options.budget_of)
    if part.branch.kind == "ffn":
        curve = part.curves.get("units", Curve([whole[0]], [0.0]))
        return [
            Level((size,), cost(whole) - cost((size,)), weigh * loss)
            for size, loss in zip(curve.sizes, curve.losses, strict=True)
        ]
    curves = [
        part.curves.get(kind, Curve([size], [0.0]))
        for kind, size in zip(("heads", "value_dims", "score_dims"), whole, strict=True)
    ]
    levels = []
    for kept in product(*(curve.sizes for curve in curves)):
        heads, values, scores = (c.at(size) for c, size in zip(curves, kept, strict=True))
        loss = heads + (values + scores) * kept[0] / whole[0]  # what is left can lose dimensions
        levels.append(Level(kept, cost(whole) - cost(kept), weigh * loss))
    return levels


def whole_of(model: nn.Module, branch: Branch) -> tuple[int, ...]:
    """(units,) of a feed-forward branch; (heads, value dims, score dims) of an attention."""
    inputs = branch.last_of(model).weight.shape[1]
    if branch.kind == "ffn":
        return (inputs,)
    attention = branch.attention_of(model)
    return attention.num_heads, inputs // attention.num_heads, attention.head_dim


def cost_of(model: nn.Module, branch: Branch, budget_of: str) -> Callable[[tuple[int, ...]], float]:
    """Parameters, or multiply-accumulates of one window, of a branch at a level."""
    d, sound = model.config.d_model, model.config.max_source_positions
    rows = sound if branch.side == "encoder" else TOKENS
    source = sound if branch.kind == "encoder_attn" else rows
    if budget_of == "parameters":
        unit, value, score = 2 * d + 1, 2 * d + 1, 2 * d + 1  # one bias each
    else:
        unit = 2 * d * rows
        value = score = d * (rows + source) + rows * source

    def cost(kept: tuple[int, ...]) -> float:
        if len(kept) == 1:
            return unit * kept[0]
        heads, values, scores = kept
        return heads * (value * values + score * scores)

    return cost


def choose_levels(model: nn.Module, parts: Sequence[Part], options: Options) -> list[Level]:
    """Raises Problem where the levels cannot save the share that is asked for."""
    if options.budget_of == "parameters":
        total = count_parameters(model)["rest"]
    else:
        total = window_macs(macs(model, TOKENS), TOKENS)
    levels = [levels_of(model, part, options) for part in parts]
    most = sum(max(level.saved for level in of_part) for of_part in levels) / total
    if most < options.remove:
        raise Problem(
            f"obs: remove = {options.remove:g} is asked for; the kinds that are chosen can save "
            f"{most:.3f} of the {options.budget_of}",
            hint="lower remove, raise most_removed, or allow more of units, heads, value_dims and "
            "score_dims",
        )
    return allocate(levels, options.remove * total)


# ------------------------------------------------------------------------------ walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Remove structures and refit the rest; `work.record["obs"]` says what is left of each branch.

    Raises Problem: no speech, no kind of structure, low-rank or shared layers, a share out of reach.
    """
    refuse_quantised(model, "obs", options)
    refuse(model, options)
    if not work.train:
        raise Problem("obs: there are no clips to calibrate on", hint="name a speech manifest")
    speech = calibration_speech(model, work.train, options.clips, options, work)
    judges = calibration_speech(model, work.dev, options.effect_clips, options, work)
    parts = measure_parts(Walk(model, speech, judges=judges), options)
    levels = choose_levels(model, parts, options)
    record = {
        "clips": len(speech.clips),
        "branches": {
            part.branch.name: {
                "whole": list(whole_of(model, part.branch)),
                "kept": list(level.kept),
                "divergence": level.loss,
            }
            for part, level in zip(parts, levels, strict=True)
        },
    }
    prune(model, speech, [part.branch for part in parts], levels, options)
    work.record["obs"] = record
    return model


def refuse(model: nn.Module, options: Options) -> None:
    if not (options.units or options.heads or options.value_dims or options.score_dims):
        raise Problem(
            "obs: units, heads, value_dims and score_dims are all false, so nothing may be removed",
            hint="set one of them to true",
        )
    for side in ("encoder", "decoder"):
        for branch in branches_of(model, side):
            linears = dict(branch_modules(model, branch).named_modules())
            split = [name for name, module in linears.items() if hasattr(module, "down")]
            shared = branch.kind != "ffn" and getattr(branch.attention_of(model), "shared", False)
            if split or shared:
                raise Problem(
                    f"obs: {branch.name} has low-rank layers or shared keys and values",
                    hint="put the step obs before lite in the recipe",
                )


def calibration_speech(
    model: "WhisperForConditionalGeneration",
    source: "Sequence[Clip]",
    count: int,
    options: Options,
    work: Work,
) -> Speech:
    """So many of the clips, drawn by the seed, with the texts that the decoder reads."""
    clips = [source[i] for i in permutation(work.seed, 0, len(source))[:count]]
    if options.own_words and clips:
        clips = in_own_words(model, clips, work)
    return Speech(clips, work.processor, mask_padding=True)


def in_own_words(
    model: "WhisperForConditionalGeneration", clips: "Sequence[Clip]", work: Work
) -> "list[Clip]":
    """The clips with the model's transcripts, where it writes any."""
    from benchmarks.speech import Samples

    longest = max(len(clip.text.split()) for clip in clips)
    with progress_bar(len(clips), None, main_process(), "obs: transcripts") as show:
        texts = decoding.transcribe(
            model,
            work.processor,
            Samples(clips),
            [clip.lang for clip in clips],
            max_tokens=4 * longest + 32,
            done=lambda finished: show(finished, ""),
        )
    return [
        replace(clip, text=text) if text else clip for clip, text in zip(clips, texts, strict=True)
    ]


def prune(
    model: "WhisperForConditionalGeneration",
    speech: Speech,
    branches: Sequence[Branch],
    levels: Sequence[Level],
    options: Options,
) -> None:
    """Bring every branch to its level, each fitted to what the ones before it have become."""
    walk = Walk(model, speech, options.correct > 0 or options.decoder_correct > 0)
    changed = False
    for branch, level in zip(branches, levels, strict=True):
        if branch.side == "decoder" and walk.side == "encoder":
            walk.enter_decoder()
        changed = changed or level.kept != whole_of(model, branch)
        if walk.follows:
            walk.move_dense(branch)
        if changed:
            prune_branch(walk, branch, level, options)
        walk.move(branch)


def prune_branch(walk: Walk, branch: Branch, level: Level, options: Options) -> None:
    model, damping = walk.model, damping_of(branch, options)
    whole = whole_of(model, branch)
    correct = options.correct if branch.side == "encoder" else options.decoder_correct
    if level.kept == whole and not correct:
        return
    if branch.kind != "ffn" and level.kept[2] < whole[2]:
        reduce_scores(model, branch, walk.collect_scores(branch), level.kept[2], damping)
    fit = fit_of(branch.last_of(model), walk.collect(branch), damping, correct)
    if branch.kind == "ffn":
        remove_units(model, branch, fit, level.kept[0])
    elif correct or level.kept[:2] != whole[:2]:
        reduce_values(model, branch, fit, *level.kept[:2])
