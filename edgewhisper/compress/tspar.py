"""TSPAR: fine-tuning for structured sparsity and adaptive pruning (Mudi, Sachan, Devapriya and
Kalyani 2025, arXiv:2510.12666).

Fine-tune with a sparse group lasso, so that many weights, and whole columns of weights, become
nearly zero while the speech is learnt. Then prune once, in two passes, with thresholds that follow
the statistics of the weights instead of a fixed ratio. No rounds of pruning and retraining, and no
adapters.

    paper            here              shape
    W_jl             weight            (d_out, d_in)   matrix j of layer l: a linear layer's weight
    W_jl[:, i]       weight[:, i]      (d_out,)        column i = one group = input feature i
    lambda_1..4      encoder_element, decoder_element, encoder_column, decoder_column
    L_L1             element_penalty   ()              (2)
    L_L2             column_penalty    ()              (3)

    L = L_CE + lambda_1 L_L1^E + lambda_2 L_L1^D + lambda_3 L_L2^E + lambda_4 L_L2^D       (1)
    L_L1 = sum over matrices of || W ||_1                                                  (2)
    L_L2 = sum over matrices and columns of || W[:, i] ||_2                                (3)

The paper is not explicit everywhere; what we fill in:

- Matrices: every linear layer of the encoder and decoder blocks. The convolution stem, LayerNorms,
  biases and embeddings (the output is tied to the token table) are left out.
- (3) is read as the group lasso, with Simon et al.'s factor sqrt(d_out); summaries of the paper
  print the norm squared, which is ridge and selects no columns (`group_norm = "l2_squared"`).
- The lambdas are free of scale: see Options.
- `reg_mode = "subgradient"` differentiates (1) as it stands. Adam then makes weights flutter
  around zero. `reg_mode = "proximal"` (ours) takes a step on L_CE and then the exact proximal
  step of the penalty, which makes exact zeros.
- The two passes and their order: see `two_pass`. c1, c2 and rho are not published; bisection finds
  how far towards the values given here pruning may go before dev WER suffers.
- Ours, off by default: `layers`, `min_removed`, `min_zero`, `recovery`, `keep`,
  `protect_alignment`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.masks import (
    Masks,
    bookkeeping,
    chosen,
    guarded,
    guards,
    hold,
    masked_gradients,
    removed_share,
    set_pruned,
    weights_of,
    zero_share,
)
from edgewhisper.compress.near import keep_term, total
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.work import Work
from edgewhisper.examples import Batch
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Range
from edgewhisper.runs import main_process
from edgewhisper.training import (
    AfterStep,
    LossTerm,
    Training,
    loss_before,
    train,
)
from export.problem import Problem

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

SIDES = ("encoder", "decoder")
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Options:
    layers: str = "*"
    """Shell pattern of the linear layers that are penalised and pruned: "*" is the paper's reading,
    "*.fc2" (ours) takes the columns that leave the model with the rows of fc1 that feed them."""

    encoder_element: Weight = 1.0
    """lambda_1. What 1.0 means depends on reg_mode. subgradient: the penalty weighs as much as the
    cross entropy, both taken on the starting model. proximal: while the learning rates of all
    steps add up to 1, an element of average size is pulled to zero if nothing opposes it."""
    decoder_element: Weight = 1.0
    """lambda_2."""
    encoder_column: Weight = 1.0
    """lambda_3; likewise, with a column of average norm in place of an element."""
    decoder_column: Weight = 1.0
    """lambda_4."""
    group_norm: Literal["l2", "l2_squared"] = "l2"
    reg_mode: Literal["subgradient", "proximal"] = "subgradient"

    c1: Annotated[float, Range(0)] = 1.0
    """Pass 1 zeroes elements closer to the mean than c1 standard deviations."""
    c2: Annotated[float, Range(-3)] = 0.0
    """Pass 2 drops columns whose norm is more than c2 standard deviations below the mean."""
    rho: Annotated[float, Range(0, 1)] = 0.05
    """Pass 2 also drops columns of which a smaller share than rho survived pass 1."""
    stats_scope: Literal["per_matrix", "per_layer", "global"] = "per_matrix"
    """Means and deviations are taken over one matrix, all of its layer, or all of its side."""
    centered: bool = True
    """Distance to the mean element (true) or to zero (false) in pass 1."""
    pass_order: Literal["element_then_column", "statistics_then_apply"] = "element_then_column"
    """Column statistics from what pass 1 left, or all statistics from the unpruned weights."""

    search: bool = True
    """Go towards c1, c2 and rho only as far as dev WER allows; false applies them as given, or
    where `min_removed` or `min_zero` is set, goes just as far as that."""
    wer_margin: Annotated[float, Range(0)] = 0.5
    """Points of dev WER that training and pruning together may cost against the model before the
    step."""
    evaluations: Annotated[int, Range(1)] = 7
    """Dev evaluations the search may spend."""
    min_removed: Annotated[float, Range(0, 1)] = 0.0
    """Ours: prune at least until this share of the parameters outside the token table would go,
    whatever wer_margin says (recovery then has to make up for it). 0 leaves it to the search. A
    share that c1, c2 and rho do not reach at full strength is refused."""
    min_zero: Annotated[float, Range(0, 1)] = 0.0
    """Ours: likewise, until this share would go or is zero: what IMP's `target` says of its
    matrices, so that the two can be compared at equal nonzero parameters."""

    keep: Weight = 0.0
    """Ours: weight of the distance to the model before the step (near.distance), added to the
    cross entropy in training and recovery. It says something about every frame of speech where
    the text says a few words, so little speech goes a long way. 0 is the paper."""

    protect_alignment: bool = False
    """Ours: leave the cross-attention heads that token timestamps are read from as they are
    (generation_config.alignment_heads): neither penalised nor pruned."""

    training: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-4))
    recovery: Training = field(default_factory=lambda: Training(steps=0))
    """Ours: fine-tuning after pruning, with what was pruned held at zero; 0 steps is the paper."""


# ---------------------------------------------------------------- sparse group lasso, (1) to (3)


def element_penalty(weight: Tensor) -> Tensor:
    """(d_out, d_in) -> (): one matrix's part of (2)."""
    return weight.abs().sum()


def column_penalty(weight: Tensor, group_norm: str = "l2") -> Tensor:
    """(d_out, d_in) -> (): one matrix's part of (3)."""
    if group_norm == "l2_squared":
        return weight.square().sum()
    return weight.shape[0] ** 0.5 * weight.norm(dim=0).sum()


def soft_threshold(weight: Tensor, amount: float) -> Tensor:
    """argmin_X of |X - W|^2 / 2 + amount |X|_1, any shape: every element nears zero by amount."""
    return weight.sign() * (weight.abs() - amount).clamp_min(0)


def shrink_columns(weight: Tensor, amount: float, group_norm: str = "l2") -> Tensor:
    """argmin_X of |X - W|^2 / 2 + amount * column_penalty(X), (d_out, d_in) -> (d_out, d_in).

    "l2": every column is shortened by amount * sqrt(d_out), or becomes zero.
    """
    if group_norm == "l2_squared":
        return weight / (1 + 2 * amount)
    norms = weight.norm(dim=0)  # (d_in,)
    kept = 1 - amount * weight.shape[0] ** 0.5 / norms.clamp_min(torch.finfo(weight.dtype).tiny)
    return weight * kept.clamp_min(0)


def proximal(weight: Tensor, element: float, column: float, group_norm: str = "l2") -> Tensor:
    """The exact proximal step of both penalties. The order matters: elements, then columns."""
    return shrink_columns(soft_threshold(weight, element), column, group_norm)


# ------------------------------------------------------------------------- two passes of pruning


@dataclass(frozen=True)
class Thresholds:
    c1: float
    c2: float
    rho: float

    def at(self, strength: float) -> "Thresholds":
        """The path of the search: 0 prunes nothing (c2 is infinite), 1 is the recipe's values."""
        if strength == 0:
            return Thresholds(0.0, float("inf"), 0.0)
        slack = (1 - strength) / strength
        return Thresholds(strength * self.c1, self.c2 + slack, strength * self.rho)


def two_pass(
    weights: Mapping[str, Tensor], thresholds: Thresholds, options: Options
) -> dict[str, Tensor]:
    """name -> weight (d_out, d_in), to name -> what to keep (d_out, d_in), bool."""
    elements = keep_elements(weights, thresholds.c1, options)
    columns = keep_columns(weights, elements, thresholds, options)
    return {name: elements[name] & columns[name] for name in weights}


def keep_elements(weights: Mapping[str, Tensor], c1: float, options: Options) -> dict[str, Tensor]:
    """Pass 1: |w - mean| >= c1 * sigma, statistics over the scope."""
    statistics = scoped(weights, options.stats_scope)
    keep = {}
    for name, weight in weights.items():
        mean, sigma = statistics[name]
        distance = (weight - mean).abs() if options.centered else weight.abs()
        keep[name] = distance >= c1 * sigma
    return keep


def keep_columns(
    weights: Mapping[str, Tensor],
    elements: Mapping[str, Tensor],
    thresholds: Thresholds,
    options: Options,
) -> dict[str, Tensor]:
    """Pass 2: n_i >= mean(n) - c2 * std(n), and enough survivors; n_i is a column's RMS.

    Returns name -> (d_in,) bool. The largest column always stays: no matrix may vanish.
    """
    after = options.pass_order == "element_then_column"
    left = {n: w * elements[n] if after else w for n, w in weights.items()}
    rms = {n: w.norm(dim=0) / w.shape[0] ** 0.5 for n, w in left.items()}  # (d_in,)
    statistics = scoped(rms, options.stats_scope)
    keep = {}
    for name, norms in rms.items():
        mean, sigma = statistics[name]
        survivors = elements[name].float().mean(dim=0)  # (d_in,)
        strong = (norms >= mean - thresholds.c2 * sigma) | (sigma == 0)
        keep[name] = strong & (survivors >= thresholds.rho)
        keep[name][norms.argmax()] = True
    return keep


def scoped(values: Mapping[str, Tensor], scope: str) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> mean and standard deviation of all values in that name's scope."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        groups.setdefault(scope_of(name, scope), []).append(value.flatten())
    statistics = {key: torch.cat(parts) for key, parts in groups.items()}
    moments = {key: (v.mean(), v.std(correction=0)) for key, v in statistics.items()}
    return {name: moments[scope_of(name, scope)] for name in values}


def scope_of(name: str, scope: str) -> str:
    """ "model.encoder.layers.3.fc1" belongs to itself, to "encoder.3", or to "encoder"."""
    if scope == "per_matrix":
        return name
    layer = name.split(".layers.")[1].split(".")[0]
    return f"{side_of(name)}.{layer}" if scope == "per_layer" else side_of(name)


def side_of(name: str) -> str:
    return next(side for side in SIDES if f"{side}.layers." in name)


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Fine-tune with the penalties, then prune once; what is pruned is zero in the result.

    `work.record["tspar"]` says what was measured and decided. Physical removal is the step
    "shrink". Raises Problem for shares that are out of reach, and what training.train raises.
    """
    refuse_quantised(model, "tspar", options)
    record: dict[str, Any] = {}
    guards(model, options.protect_alignment)  # refused now, not after the training
    refuse_unreachable(model, options)
    before = work.wer(model).wer
    penalty, after_step, record["scales"] = regulariser(model, options, work)
    keep = keep_term(model, options.keep, options.training.cache_encoder)
    log = train(
        model,
        work.processor,
        work.train,
        options.training,
        run_dir=work.run_dir / "tspar-training",
        seed=work.seed,
        identity=repr(options),
        loss_term=total(penalty, keep),
        after_step=after_step,
        label="tspar: fine-tuning",
    )
    record["training"] = log.summary()
    record["dev_wer"] = {"before": before, "trained": work.wer(model).wer}
    prune(model, options, work, record)
    recover(model, keep, options, work, record)
    work.record["tspar"] = record
    return model


# -- the penalties during training

Lambdas = dict[tuple[str, str], float]
"""(side, "element" or "column") -> lambda."""


def lambdas_of(options: Options) -> Lambdas:
    kinds = ("element", "column")
    return {(side, kind): getattr(options, f"{side}_{kind}") for side in SIDES for kind in kinds}


def regulariser(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> tuple[LossTerm | None, AfterStep | None, dict[str, float]]:
    """The loss term, or the hook after the step, and the scales it was given."""
    if not any(lambdas_of(options).values()):
        return None, None, {}
    guard = guards(model, options.protect_alignment)
    if options.reg_mode == "proximal":
        scales = average_sizes(weights_of(model, options.layers))
        return None, proximal_hook(options, scales, guard), readable(scales)
    loss = loss_before(model, work.processor, work.train, options.training, work.seed)
    with torch.no_grad():
        start = penalties(model, options, guard)
    scales = {key: loss / float(penalty) for key, penalty in start.items()}
    return penalty_term(options, scales, guard), None, readable(scales)


def penalties(
    model: nn.Module, options: Options, guard: Masks | None = None
) -> dict[tuple[str, str], Tensor]:
    """The four sums of (1), without what is guarded."""
    sums: dict[tuple[str, str], list[Tensor]] = {}
    for name, module in chosen(model, options.layers):
        weight = unguarded(module.weight, name, guard or {})
        column = column_penalty(weight, options.group_norm)
        sums.setdefault((side_of(name), "element"), []).append(element_penalty(weight))
        sums.setdefault((side_of(name), "column"), []).append(column)
    return {key: torch.stack(parts).sum() for key, parts in sums.items()}


def unguarded(weight: Tensor, name: str, guard: Masks) -> Tensor:
    """The weight with zeros where it is guarded."""
    return weight * ~guard[name].to(weight.device) if name in guard else weight


def penalty_term(options: Options, scales: Lambdas, guard: Masks) -> LossTerm:
    """(1) without L_CE; a scale is (cross entropy / penalty) of the starting model."""
    lambdas = lambdas_of(options)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        sums = penalties(model, options, guard)
        return torch.stack([lambdas[key] * scales[key] * sums[key] for key in sums]).sum()

    return term


def proximal_hook(options: Options, scales: Lambdas, guard: Masks) -> AfterStep:
    """The proximal step after AdamW's, decoupled from the gradient as AdamW's weight decay is.

    AdamW moves an element by about the learning rate, whatever the size of its gradient; so the
    effective step of the penalty is learning rate * scale, with the average size of an element,
    or the average RMS of a column, of the starting model as its scale.
    """
    lambdas = lambdas_of(options)

    def hook(model: nn.Module, step: int, learning_rate: float) -> None:
        amounts = {key: learning_rate * lambdas[key] * scales[key] for key in scales}
        for name, module in chosen(model, options.layers):
            amount = amounts[side_of(name), "element"], amounts[side_of(name), "column"]
            free = unguarded(module.weight, name, guard)  # zeros stay zeros in the step
            near = proximal(free, *amount, options.group_norm)
            module.weight.copy_(near + (module.weight - free) if name in guard else near)

    return hook


def average_sizes(weights: Mapping[str, Tensor]) -> Lambdas:
    """Mean |w| over a side's elements, and mean RMS over its columns."""
    elements: dict[str, list[Tensor]] = {}
    columns: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        elements.setdefault(side_of(name), []).append(weight.abs().flatten())
        columns.setdefault(side_of(name), []).append(weight.square().mean(dim=0).sqrt())
    sizes = {(side, "element"): float(torch.cat(w).mean()) for side, w in elements.items()}
    return sizes | {(side, "column"): float(torch.cat(c).mean()) for side, c in columns.items()}


def readable(scales: Lambdas) -> dict[str, float]:
    return {f"{side}_{kind}": scale for (side, kind), scale in scales.items()}


# -- pruning


def prune(
    model: "WhisperForConditionalGeneration", options: Options, work: Work, record: dict[str, Any]
) -> None:
    """Choose the strength, then zero what the two passes say, once."""
    dense = {n: weight.clone() for n, weight in weights_of(model, options.layers).items()}
    full = Thresholds(options.c1, options.c2, options.rho)
    guard = guards(model, options.protect_alignment)

    def prune_to(strength: float) -> None:
        keep = two_pass(dense, full.at(strength), options)
        set_pruned(model, dense, guarded(keep, guard))

    floor = max(strength_for(name, options, model, prune_to) for name in SHARES)
    strength = floor or 1.0
    if options.search:
        strength = choose_strength(model, prune_to, floor, options, work, record)
    prune_to(strength)
    thresholds = full.at(strength)
    record["thresholds"] = {"strength": strength, **asdict(thresholds)}
    record["pruned"] = bookkeeping(model)


def choose_strength(
    model: "WhisperForConditionalGeneration",
    prune_to: Callable[[float], None],
    floor: float,
    options: Options,
    work: Work,
    record: dict[str, Any],
) -> float:
    """The largest strength, at least `floor`, whose dev WER stays within the margin of that before
    the step: what training lost counts as well."""
    known = record["dev_wer"]
    limit = known["before"] + options.wer_margin / 100
    tried: list[dict[str, float]] = []

    with progress_bar(
        options.evaluations, None, main_process(), "tspar: choosing thresholds"
    ) as show:

        def good(strength: float) -> bool:
            prune_to(strength)
            wer = work.wer(model).wer
            tried.append({"strength": strength, "dev_wer": wer})
            show(len(tried), f"dev WER {100 * wer:.1f} %")
            return wer <= limit

        strength = largest(good, floor, options.evaluations)
    prune_to(strength)
    known["pruned"] = work.wer(model).wer
    record["search"] = {
        "limit": limit,
        "floor": floor,
        "tried": tried,
    }
    return strength


def largest(good: Callable[[float], bool], low: float, evaluations: int) -> float:
    """Bisection between `low`, which is accepted unseen, and 1, in so many evaluations.

    It relies on more being pruned as the strength grows. That is certain, but for the largest
    column, which always stays, where pass_order is "statistics_then_apply" or c2 is infinite. In
    the default order a larger c1 moves the mean and the deviation that a finite c2 is measured
    against, so that a column may come back; what is returned was found good, or is `low`, all the
    same.
    """
    high = 1.0
    if low >= high or good(high):
        return high
    for _ in range(evaluations - 1):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


# -- shares that are asked for

SHARES = {"min_removed": removed_share, "min_zero": zero_share}
"""Options that ask for a share, and what counts it."""


def strength_for(
    name: str, options: Options, model: nn.Module, prune_to: Callable[[float], None]
) -> float:
    """The smallest strength at which the share that option `name` asks for counts; 0 for none.

    Raises Problem where the recipe's own thresholds, at strength 1, do not reach it.
    """
    share, counted = getattr(options, name), SHARES[name]
    low, high = 0.0, 1.0 if share > 0 else 0.0
    while high - low > 1 / 256:
        middle = (low + high) / 2
        prune_to(middle)
        low, high = (low, middle) if counted(model) >= share else (middle, high)
    if high == 1:
        prune_to(high)
        if (reached := counted(model)) < share:
            thresholds = f"c1 = {options.c1:g}, c2 = {options.c2:g} and rho = {options.rho:g}"
            raise Problem(
                f"tspar: {name} asks for {share:.3f} of the parameters outside the token table; "
                f"at full strength, {thresholds} reach {reached:.3f}",
                hint=f"raise c1 or rho, lower c2, let `layers` name more, or set {name} to "
                f"{math.floor(1000 * reached) / 1000:g} or less",
            )
    return high


def refuse_unreachable(model: "WhisperForConditionalGeneration", options: Options) -> None:
    """Raise Problem, before anything is trained, for a share that all of `layers` together, without
    what is guarded, do not make up."""
    asked = {name: getattr(options, name) for name in SHARES if getattr(options, name) > 0}
    if not asked:
        return
    dense = {name: weight.clone() for name, weight in weights_of(model, options.layers).items()}
    nothing = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in dense.items()}
    set_pruned(model, dense, guarded(nothing, guards(model, options.protect_alignment)))
    there = {name: SHARES[name](model) for name in asked}
    set_pruned(model, dense, {name: ~keep for name, keep in nothing.items()})
    for name, share in asked.items():
        if share > there[name]:
            raise Problem(
                f"tspar: {name} asks for {share:.3f} of the parameters outside the token table; "
                f"all that is in the layers {options.layers!r} and may be pruned makes up "
                f"{there[name]:.3f}",
                hint=f"set {name} to less, or let `layers` name more",
            )


# -- recovery


def recover(
    model: "WhisperForConditionalGeneration",
    loss_term: LossTerm | None,
    options: Options,
    work: Work,
    record: dict[str, Any],
) -> None:
    """Fine-tune without the penalties; what was pruned stays zero."""
    alive = {name: weight != 0 for name, weight in weights_of(model).items()}
    with masked_gradients(model, alive):
        log = train(
            model,
            work.processor,
            work.train,
            options.recovery,
            run_dir=work.run_dir / "tspar-recovery",
            seed=work.seed + 1,
            identity=repr(options),
            loss_term=loss_term,
            after_step=hold(alive),
            label="tspar: recovering",
        )
    record["recovery"] = log.summary()
