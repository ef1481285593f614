"""TSPAR: fine-tuning for structured sparsity and adaptive pruning (Mudi, Sachan, Devapriya and
Kalyani 2025, arXiv:2510.12666).

TSPAR fine-tunes with a sparse group lasso, so that many weights and whole columns become nearly
zero. It then prunes once, in two passes, with thresholds based on the statistics of the weights
instead of a fixed ratio. There are no rounds of pruning and retraining, and no adapters.

    paper            here              shape
    W_jl             weight            (d_out, d_in)   matrix j of layer l: weight of a linear layer
    W_jl[:, i]       weight[:, i]      (d_out,)        column i = one group = input feature i
    lambda_1..4      encoder_element, decoder_element, encoder_column, decoder_column
    L_L1             element_penalty   ()              (2)
    L_L2             column_penalty    ()              (3)

    L = L_CE + lambda_1 L_L1^E + lambda_2 L_L1^D + lambda_3 L_L2^E + lambda_4 L_L2^D       (1)
    L_L1 = sum over matrices of || W ||_1                                                  (2)
    L_L2 = sum over matrices and columns of || W[:, i] ||_2                                (3)

The paper leaves details open. Our choices:

- Matrices: every linear layer of the encoder and decoder blocks. Excluded are the convolutions,
  LayerNorms, biases and embeddings (the output layer is tied to the token table).
- (3) is the group lasso, with the factor sqrt(d_out) of Simon et al. Summaries of the paper print
  the squared norm, which is ridge regression and selects no columns (`group_norm = "l2_squared"`).
- `reg_mode = "subgradient"` differentiates (1) directly. With Adam, weights then oscillate around
  zero. `reg_mode = "proximal"` (ours) takes a step on L_CE, followed by the exact proximal step of
  the penalty, which produces exact zeros.
- For the two passes and their order, see `two_pass`. c1, c2 and rho are not published. A search
  finds how far pruning may go towards the values given here before dev WER rises too much; see
  pruning_strength.py.
- Ours, off by default: `layers`, `min_removed`, `min_zero`, `recovery`, `keep` and
  `protect_alignment`.
"""

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.branches import SIDES
from edgewhisper.compress.context import Context
from edgewhisper.compress.masks import (
    Masks,
    bookkeeping,
    guarded,
    guards,
    matching,
    set_pruned,
    trained_masked,
    weights_of,
)
from edgewhisper.compress.pruning_strength import (
    SHARES,
    largest_strength,
    refuse_unreachable,
    smallest_strength,
)
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.teacher import distance_term, total
from edgewhisper.examples import Batch
from edgewhisper.recipe import Range
from edgewhisper.training import AfterStep, LossTerm, Training, initial_loss
from edgewhisper.whisper import side_and_layer

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]
REMOVES = ("min_removed", "min_zero")


@dataclass(frozen=True)
class Options:
    layers: str = "*"
    """Shell pattern of the linear layers that are penalised and pruned. "*" is our reading of the
    paper. "*.fc2" is ours: each pruned column also removes the row of fc1 that feeds it."""

    encoder_element: Weight = 1.0
    """lambda_1, relative to a scale that depends on reg_mode. subgradient: at 1.0, the penalty
    equals the cross entropy, both of the initial model. proximal: at 1.0, steps whose learning
    rates sum to 1 shrink an element of average size to zero if no gradient opposes it."""
    decoder_element: Weight = 1.0
    """lambda_2."""
    encoder_column: Weight = 1.0
    """lambda_3, scaled like lambda_1, with a column of average norm instead of an element."""
    decoder_column: Weight = 1.0
    """lambda_4."""
    group_norm: Literal["l2", "l2_squared"] = "l2"
    """The norm of a column in (3)."""
    reg_mode: Literal["subgradient", "proximal"] = "subgradient"
    """How the penalties are minimised."""

    c1: Annotated[float, Range(0)] = 1.0
    """Pass 1 prunes elements closer to the mean than c1 standard deviations."""
    c2: Annotated[float, Range(-3)] = 0.0
    """Pass 2 prunes columns whose norm is more than c2 standard deviations below the mean."""
    rho: Annotated[float, Range(0, 1)] = 0.05
    """Pass 2 also prunes columns of which less than this share survived pass 1."""
    stats_scope: Literal["per_matrix", "per_layer", "global"] = "per_matrix"
    """Means and deviations are taken over a matrix, its layer, or its side of the model."""
    centered: bool = True
    """Whether pass 1 uses the distance to the mean (true) or to zero (false)."""
    pass_order: Literal["element_then_column", "statistics_then_apply"] = "element_then_column"
    """Compute column statistics after pass 1, or all statistics from the unpruned weights."""

    search: bool = True
    """Approach c1, c2 and rho only as far as dev WER allows. false applies them as given, or, with
    `min_removed` or `min_zero`, only as far as these require."""
    wer_margin: Annotated[float, Range(0)] = 0.5
    """Highest increase of dev WER by training and pruning, in percentage points."""
    evaluations: Annotated[int, Range(1)] = 7
    """Number of dev evaluations of the search."""
    min_removed: Annotated[float, Range(0, 1)] = 0.0
    """Ours: minimum share of the parameters outside the token table that step shrink can remove.
    It takes precedence over wer_margin, and recovery must then restore the accuracy. 0 sets no
    minimum. A share that c1, c2 and rho do not reach is an error."""
    min_zero: Annotated[float, Range(0, 1)] = 0.0
    """Ours: like min_removed, for the share of parameters that are removable or zero. It allows a
    comparison with IMP at an equal number of nonzero parameters."""

    keep: Weight = 0.0
    """Ours: weight of the distance to the model before the step (teacher.distance), added to the
    cross entropy in training and recovery. The paper has 0."""

    protect_alignment: bool = False
    """Ours: neither penalise nor prune the cross-attention heads that token timestamps are read
    from (generation_config.alignment_heads)."""

    training: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-4))
    recovery: Training = field(default_factory=lambda: Training(steps=0))
    """Ours: fine-tuning after pruning, with pruned weights at zero. The paper has 0 steps."""


# ---------------------------------------------------------------- sparse group lasso, (1) to (3)


def element_penalty(weight: Tensor) -> Tensor:
    """The term of one matrix in (2), (d_out, d_in) -> ()."""
    return weight.abs().sum()


def column_penalty(weight: Tensor, group_norm: str = "l2") -> Tensor:
    """The term of one matrix in (3), (d_out, d_in) -> ()."""
    if group_norm == "l2_squared":
        return weight.square().sum()
    return weight.shape[0] ** 0.5 * weight.norm(dim=0).sum()


def soft_threshold(weight: Tensor, amount: float) -> Tensor:
    """argmin_X of |X - W|^2 / 2 + amount |X|_1, any shape: shrinks every element by amount."""
    return weight.sign() * (weight.abs() - amount).clamp_min(0)


def shrink_columns(weight: Tensor, amount: float, group_norm: str = "l2") -> Tensor:
    """argmin_X of |X - W|^2 / 2 + amount * column_penalty(X), (d_out, d_in) -> (d_out, d_in).

    "l2" shortens every column by amount * sqrt(d_out), at most to zero.
    """
    if group_norm == "l2_squared":
        return weight / (1 + 2 * amount)
    norms = weight.norm(dim=0)  # (d_in,)
    factor = 1 - amount * weight.shape[0] ** 0.5 / norms.clamp_min(torch.finfo(weight.dtype).tiny)
    return weight * factor.clamp_min(0)


def proximal(weight: Tensor, element: float, column: float, group_norm: str = "l2") -> Tensor:
    """The exact proximal step of both penalties: elements first, then columns."""
    return shrink_columns(soft_threshold(weight, element), column, group_norm)


# ------------------------------------------------------------------------- two passes of pruning


@dataclass(frozen=True)
class Thresholds:
    c1: float
    c2: float
    rho: float

    def at(self, strength: float) -> "Thresholds":
        """Return the thresholds at a strength from 0 (prune nothing) to 1 (the recipe's values)."""
        if strength == 0:
            return Thresholds(0.0, float("inf"), 0.0)
        slack = (1 - strength) / strength
        return Thresholds(strength * self.c1, self.c2 + slack, strength * self.rho)


def two_pass(
    weights: Mapping[str, Tensor], thresholds: Thresholds, options: Options
) -> dict[str, Tensor]:
    """Return the mask of each weight (d_out, d_in), by name."""
    elements = keep_elements(weights, thresholds.c1, options)
    columns = keep_columns(weights, elements, thresholds, options)
    return {name: elements[name] & columns[name] for name in weights}


def keep_elements(weights: Mapping[str, Tensor], c1: float, options: Options) -> dict[str, Tensor]:
    """Pass 1: keep elements with |w - mean| >= c1 * sigma, with statistics over the scope."""
    statistics = scoped(weights, options.stats_scope)
    masks = {}
    for name, weight in weights.items():
        mean, sigma = statistics[name]
        distance = (weight - mean).abs() if options.centered else weight.abs()
        masks[name] = distance >= c1 * sigma
    return masks


def keep_columns(
    weights: Mapping[str, Tensor],
    elements: Mapping[str, Tensor],
    thresholds: Thresholds,
    options: Options,
) -> dict[str, Tensor]:
    """Pass 2: keep columns with n_i >= mean(n) - c2 * std(n) and enough elements left by pass 1.

    n_i is the RMS of a column. Returns name -> (d_in,) bool. The largest column is always kept, so
    that no matrix disappears.
    """
    after = options.pass_order == "element_then_column"
    pruned = {n: w * elements[n] if after else w for n, w in weights.items()}
    rms = {n: w.norm(dim=0) / w.shape[0] ** 0.5 for n, w in pruned.items()}  # (d_in,)
    statistics = scoped(rms, options.stats_scope)
    masks = {}
    for name, norms in rms.items():
        mean, sigma = statistics[name]
        survivors = elements[name].float().mean(dim=0)  # (d_in,)
        strong = (norms >= mean - thresholds.c2 * sigma) | (sigma == 0)
        masks[name] = strong & (survivors >= thresholds.rho)
        masks[name][norms.argmax()] = True
    return masks


def scoped(values: Mapping[str, Tensor], scope: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each name, mean and standard deviation of all values in its scope."""
    groups: dict[Hashable, list[Tensor]] = {}
    for name, value in values.items():
        groups.setdefault(scope_of(name, scope), []).append(value.flatten())
    statistics = {key: torch.cat(parts) for key, parts in groups.items()}
    moments = {key: (v.mean(), v.std(correction=0)) for key, v in statistics.items()}
    return {name: moments[scope_of(name, scope)] for name in values}


def scope_of(name: str, scope: str) -> Hashable:
    """Return the matrix, layer or side that the name belongs to."""
    side, layer = side_and_layer(name)
    return {"per_matrix": name, "per_layer": (side, layer), "global": side}[scope]


def side_of(name: str) -> str:
    """Return "encoder" or "decoder"."""
    return side_and_layer(name)[0]


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Fine-tune with the penalties, then prune once; pruned weights are zero in the result.

    The step "shrink" removes them physically. `context.record["tspar"]` has the thresholds and
    their dev WER. Raises Problem for shares that cannot be reached, and what training.train raises.
    """
    refuse_quantised(model, "tspar", options)
    record: dict[str, Any] = {}
    protected = guards(model, options.protect_alignment)
    refuse_unreachable(model, shares_of(options), options.layers, protected)
    before = context.wer(model).wer
    penalty, after_step, record["scales"] = regulariser(model, options, context)
    distance = distance_term(model, options.keep, options.training.cache_encoder)
    record["training"] = context.trained(
        model,
        options.training,
        "tspar-training",
        identity=repr(options),
        loss_term=total(penalty, distance),
        after_step=after_step,
        label="tspar: fine-tuning",
    )
    record["dev_wer"] = {"before": before, "trained": context.wer(model).wer}
    prune(model, options, context, record)
    recover(model, distance, options, context, record)
    context.record["tspar"] = record
    return model


# -- the penalties during training

Lambdas = dict[tuple[str, str], float]
"""(side, "element" or "column") -> lambda."""


def lambdas_of(options: Options) -> Lambdas:
    """Return the four lambdas of (1)."""
    kinds = ("element", "column")
    return {(side, kind): getattr(options, f"{side}_{kind}") for side in SIDES for kind in kinds}


def regulariser(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> tuple[LossTerm | None, AfterStep | None, dict[str, float]]:
    """Return the loss term or the hook after each step, and the scales of the lambdas."""
    if not any(lambdas_of(options).values()):
        return None, None, {}
    protected = guards(model, options.protect_alignment)
    if options.reg_mode == "proximal":
        scales = average_sizes(weights_of(model, options.layers))
        return None, proximal_hook(options, scales, protected), readable(scales)
    loss = initial_loss(model, context.processor, context.train, options.training, context.seed)
    with torch.no_grad():
        start = penalties(model, options, protected)
    scales = {key: loss / float(penalty) for key, penalty in start.items()}
    return penalty_term(options, scales, protected), None, readable(scales)


def penalties(
    model: nn.Module, options: Options, protected: Masks | None = None
) -> dict[tuple[str, str], Tensor]:
    """Return the four sums of (1), without protected weights."""
    sums: dict[tuple[str, str], list[Tensor]] = {}
    for name, module in matching(model, options.layers):
        weight = unprotected(module.weight, name, protected or {})
        column = column_penalty(weight, options.group_norm)
        sums.setdefault((side_of(name), "element"), []).append(element_penalty(weight))
        sums.setdefault((side_of(name), "column"), []).append(column)
    return {key: torch.stack(parts).sum() for key, parts in sums.items()}


def unprotected(weight: Tensor, name: str, protected: Masks) -> Tensor:
    """Return the weight with protected elements set to zero."""
    return weight * ~protected[name].to(weight.device) if name in protected else weight


def penalty_term(options: Options, scales: Lambdas, protected: Masks) -> LossTerm:
    """Return (1) without L_CE; `scales` are cross entropy / penalty of the initial model."""
    lambdas = lambdas_of(options)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        sums = penalties(model, options, protected)
        return torch.stack([lambdas[key] * scales[key] * sums[key] for key in sums]).sum()

    return term


def proximal_hook(options: Options, scales: Lambdas, protected: Masks) -> AfterStep:
    """Return the hook that takes the proximal step after AdamW's, decoupled like weight decay.

    AdamW moves an element by about the learning rate, whatever its gradient's size, so the step of
    the penalty is learning rate * scale. `scales` are the average size of an element and the
    average RMS of a column in the initial model.
    """
    lambdas = lambdas_of(options)

    def hook(model: nn.Module, step: int, learning_rate: float) -> None:
        amounts = {key: learning_rate * lambdas[key] * scales[key] for key in scales}
        for name, module in matching(model, options.layers):
            amount = amounts[side_of(name), "element"], amounts[side_of(name), "column"]
            free = unprotected(module.weight, name, protected)  # the step keeps zeros at zero
            new = proximal(free, *amount, options.group_norm)
            module.weight.copy_(new + (module.weight - free) if name in protected else new)

    return hook


def average_sizes(weights: Mapping[str, Tensor]) -> Lambdas:
    """Return, for each side, the mean |w| of its elements and the mean RMS of its columns."""
    elements: dict[str, list[Tensor]] = {}
    columns: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        elements.setdefault(side_of(name), []).append(weight.abs().flatten())
        columns.setdefault(side_of(name), []).append(weight.square().mean(dim=0).sqrt())
    sizes = {(side, "element"): float(torch.cat(w).mean()) for side, w in elements.items()}
    return sizes | {(side, "column"): float(torch.cat(c).mean()) for side, c in columns.items()}


def readable(scales: Lambdas) -> dict[str, float]:
    """Return the scales by the names of their options."""
    return {f"{side}_{kind}": scale for (side, kind), scale in scales.items()}


# -- pruning and recovery


def prune(
    model: "WhisperForConditionalGeneration", options: Options, context: Context, record: dict
) -> None:
    """Choose the strength, then prune once."""
    dense = {n: weight.clone() for n, weight in weights_of(model, options.layers).items()}
    full = Thresholds(options.c1, options.c2, options.rho)
    protected = guards(model, options.protect_alignment)

    def prune_to(strength: float) -> None:
        masks = two_pass(dense, full.at(strength), options)
        set_pruned(model, dense, guarded(masks, protected))

    thresholds = f"c1 = {options.c1:g}, c2 = {options.c2:g} and rho = {options.rho:g}"
    shares = shares_of(options).items()
    floors = [smallest_strength(n, share, model, prune_to, thresholds) for n, share in shares]
    floor = max(floors, default=0.0)
    strength = floor or 1.0
    if options.search:
        limit = record["dev_wer"]["before"] + options.wer_margin / 100

        def wer_at(strength: float) -> float:
            prune_to(strength)
            return context.wer(model).wer

        strength, trials = largest_strength(wer_at, floor, limit, options.evaluations)
        record["dev_wer"]["pruned"] = wer_at(strength)
        record["search"] = {"limit": limit, "floor": floor, "tried": trials}
    prune_to(strength)
    record["thresholds"] = {"strength": strength, **asdict(full.at(strength))}
    record["pruned"] = bookkeeping(model)


def shares_of(options: Options) -> dict[str, float]:
    """Return the minimum shares that are set, by the names of their options."""
    return {name: getattr(options, name) for name in SHARES if getattr(options, name) > 0}


def recover(
    model: "WhisperForConditionalGeneration",
    loss_term: LossTerm | None,
    options: Options,
    context: Context,
    record: dict[str, Any],
) -> None:
    """Fine-tune without the penalties; pruned weights stay zero."""
    masks = {name: weight != 0 for name, weight in weights_of(model).items()}
    record["recovery"] = trained_masked(
        context,
        model,
        masks,
        options.recovery,
        "tspar-recovery",
        seed=1,
        identity=repr(options),
        loss_term=loss_term,
        label="tspar: recovering",
    )
