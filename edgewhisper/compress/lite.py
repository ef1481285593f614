"""LiteASR: low-rank encoder layers from principal components of activations (Kamahori, Kasai,
Kojima and Kasikci 2025, arXiv:2502.20583).

The outputs of a linear layer in Whisper's encoder lie near a small subspace. LiteASR finds it by
principal component analysis on calibration speech and projects the outputs onto it. The layer then
becomes a product of two thin layers. Nothing is trained.

    paper         here           shape
    Y             outputs        (frames, d_out)   outputs of one layer on all speech
    Y_M           mean           (d_out,)          mean of Y
    S^2           variances      (d_out,)          of Y along its principal axes, largest first
    V_k           axes           (d_out, k)        the first k principal axes
    W, b          weight, bias   (d_out, d_in)     transposed in the paper, where Y = X W
    W_1, W_2      down, up       (k, d_in), (d_out, k)
    theta         theta_attn, theta_mlp            share of the variance to exceed

    Y - Y_M = U S V^T                                                                       (2)
    y = up down x + shift,  down = V_k^T W,  up = V_k,  shift = Y_M + V_k V_k^T (b - Y_M)   (5)

k is the smallest multiple of 16 with sum(S_1^2 ... S_k^2) > theta sum(S^2). A layer stays dense if
k is more than d_out / 2 (attention) or 0.8 d_out (feed-forward), because two products would then
cost more than one. Key projections have no bias in Whisper and get one here, the shift. A softmax
ignores it, and exact removal (step "shrink", or export) drops it again.

Implementation differences with the same result:

- Y is never stored. Cov(Y) = W Cov(X) W^T follows from the moments of a layer's inputs, in
  float64. q, k and v share X. fc2 has four times as many inputs as outputs, so the moments of its
  outputs are collected instead.
- If no multiple of 16 exceeds theta (a flat spectrum), the layer stays dense. The authors' code
  then keeps all axes but one, which makes the layer larger.

The paper calibrates on 100 English clips of eight sets, including padding, recorded while decoding.
Its thresholds for the smaller models are not published. Ours, off by default: `mask_padding`,
`budget`, `sequential` and `recovery`. `basis = "weights"` is a baseline: the singular vectors of W
replace V_k, the bias does not change, and the ranks are the same.

`share`, off by default as in the paper, runs attention in the reduced dimension; its equations (12)
and (16) are in shared_attention.py.

`sequential` compresses the layers in order. Each is fitted to its actual inputs x, the outputs of
the compressed layers before it, with the original outputs y as the target. This is reduced-rank
regression: least squares, then principal components of the predictions.

    W* = W + (C_yx - W C_xx) (C_xx + r I)^-1,   b* = mean(y) - W* mean(x)                   (A)

Then (5) is applied with W*, b* for W, b and the axes of W* C_xx W*^T. The ridge r keeps W in
directions that the speech does not cover. Layers that stay dense are refitted too.

`budget` replaces the thresholds. A layer may stay dense or take any rank, and its loss is the lost
share of variance in units of 1 - theta. Over all layers, the smallest losses per saved weight are
taken first, until the budget is met.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper import whisper
from edgewhisper.calibration import Moments, Point, Speech, collect_together, exact
from edgewhisper.compress.context import Context
from edgewhisper.compress.low_rank import (
    inputs_of,
    principal_axes,
    refit,
    set_dense,
    set_factors,
    split,
    square_root,
    weight_of,
)
from edgewhisper.compress.output_statistics import OutputStatistics, Roots, calibrate
from edgewhisper.compress.ranks import Choice, allocate, choices, energy_at, rank_for, worth_it
from edgewhisper.compress.shared_attention import share_attention
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.teacher import distance_term
from edgewhisper.model_modes import without_gradients
from edgewhisper.progress import progress_steps
from edgewhisper.recipe import Range
from edgewhisper.training import LossTerm, Training
from edgewhisper.whisper import LowRank, input_of, linears, reads_audio, side_and_layer
from export.cost import count_parameters, macs
from export.problem import Problem
from export.shrink import layer_shapes

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

TOKENS_PER_WINDOW = 32
"""Number of tokens that a decoder layer runs on in each window, for a budget in MACs."""
REMOVES = ("theta_attn", "theta_mlp", "budget")


@dataclass(frozen=True)
class Options:
    layers: str = "model.encoder.layers.*"
    """Shell pattern of the linear layers that may be split. The paper splits the encoder. The
    decoder's "*.encoder_attn.[kv]_proj" (ours) also run once per encoder position."""
    theta_attn: Annotated[float, Range(0, 1)] = 0.99
    """Share of variance that q_proj, k_proj, v_proj and out_proj must keep; 1 keeps them dense."""
    theta_mlp: Annotated[float, Range(0, 1)] = 0.999
    """Share of variance that fc1 and fc2 must keep; 1 keeps them dense."""
    round_to: Annotated[int, Range(1)] = 16
    """Ranks are multiples of this. Fast kernels need multiples of 16."""
    max_cost: Annotated[float, Range(0, 1)] = 1.0
    """A layer is split if the two factors have at most this share of its weights. 1 is the paper's
    rule, which also splits at break-even."""

    basis: Literal["activations", "weights"] = "activations"
    """weights: a baseline, singular value decomposition of W at the same ranks."""

    clips: Annotated[int, Range(1)] = 100
    """Number of calibration clips, drawn from the training clips by the seed; all if fewer."""
    mask_padding: bool = False
    """Ours: ignore positions after the end of a clip. The paper includes them."""

    budget: Annotated[float, Range(0, 1)] = 0.0
    """Ours: share of the chosen layers' cost that may remain. Ranks are then allocated over all
    layers together, and the thetas only weigh the losses. 0 uses the thetas as thresholds."""
    budget_of: Literal["parameters", "macs"] = "parameters"
    """The cost that the budget counts: weights, or multiply-accumulates of a window with 32 tokens.
    The two differ only if layers of the decoder are chosen."""

    sequential: bool = False
    """Ours: fit each layer to the outputs of the compressed layers before it. It takes one pass of
    the speech through both models per group of layers, instead of one pass in total."""
    ridge: Annotated[float, Range(1e-12, 1)] = 1e-4
    """r of (A), as a share of the mean variance of the inputs. Used only with `sequential`."""

    share: bool = False
    """Attend in the reduced dimension in every encoder layer whose key and value both have ranks
    below a head's width, see shared_attention.py. Outputs do not change."""

    keep: Annotated[float, Range(0)] = 1.0
    """Weight of the distance to the original model (teacher.distance) in `recovery`."""
    factors_only: bool = True
    """Train only the factors in `recovery`; false trains all parameters."""
    recovery: Training = field(default_factory=lambda: Training(steps=0))
    """Ours: fine-tuning after splitting; the paper has 0 steps."""


# ---------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Split the chosen layers where that saves weights; `context.record["lite"]` has the ranks.

    Raises Problem if no layer matches, there is no speech, or the budget cannot be met; and what
    training.train raises.
    """
    refuse_quantised(model, "lite", options)
    refuse_sequential_weights(options)
    home = next(model.parameters()).device
    names = chosen(model, options.layers)
    before = count_parameters(model), macs(model)
    weight = options.keep if options.recovery.steps else 0.0
    term = distance_term(model, weight, options.recovery.cache_encoder)
    speech = calibration_speech(options, context)
    model.to(fastest_device())
    outputs = calibrate(model, names, speech)
    ranks = choose_ranks(model, outputs, options)
    record: dict[str, Any] = {
        "calibration": {"clips": len(speech.clips), "positions": outputs.positions},
        "layers": {name: layer_record(model, name, ranks, outputs) for name in names},
    }
    if any(ranks.values()):
        if options.sequential:
            split_in_turn(model, ranks, speech, options)
        else:
            split_at_once(model, ranks, outputs, options.basis)
        model = whisper.rebuild(model, model.state_dict(), layer_shapes(model))
    model.to(home)
    recover(model, term, options, context, record)
    if options.share:
        model, record["shared"] = share_attention(model)
    record["parameters"] = {"before": before[0], "after": count_parameters(model)}
    record["macs"] = {"before": before[1], "after": macs(model)}
    context.record["lite"] = record
    return model


def refuse_sequential_weights(options: Options) -> None:
    """Raise Problem for basis = "weights" with sequential = true."""
    if options.sequential and options.basis == "weights":
        raise Problem(
            'lite: basis = "weights" uses no activations, and sequential = true needs them',
            hint='set sequential to false, or basis to "activations"',
        )


def chosen(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of the linear layers that match the pattern.

    Factors of layers that are already split do not count. Raises Problem if no layer matches.
    """
    factors = (".down", ".up")
    names = [name for name, _ in linears(model) if not name.endswith(factors)]
    matching = [name for name in names if fnmatchcase(name, pattern)]
    if not matching:
        raise Problem(
            f"lite: {pattern!r} matches none of the {len(names)} linear layers that can be split",
            hint='names look like "model.encoder.layers.0.self_attn.q_proj" or "....fc1"',
        )
    return matching


def calibration_speech(options: Options, context: Context) -> Speech:
    """Return the calibration speech. Raises Problem if there are no training clips."""
    clips = context.calibration_clips("lite", options.clips)
    return Speech(clips, context.processor, options.mask_padding)


def fastest_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator
    device = accelerator.current_accelerator() if accelerator.is_available() else None
    return device or torch.device("cpu")


def theta_of(name: str, options: Options) -> float:
    """Return the threshold of a layer: theta_mlp for fc1 and fc2, else theta_attn."""
    return options.theta_mlp if name.endswith(("fc1", "fc2")) else options.theta_attn


def layer_record(
    model: nn.Module, name: str, ranks: Mapping[str, int | None], outputs: OutputStatistics
) -> dict[str, Any]:
    """Return a layer's record: rank (None: dense), size, and the share of variance kept."""
    rank = ranks[name]
    kept = 1.0 if rank is None else energy_at(outputs.variances[name], rank)
    d_out, d_in = weight_of(model, name).shape
    return {"rank": rank, "outputs": d_out, "inputs": d_in, "energy": kept}


# -- ranks


def choose_ranks(
    model: nn.Module, outputs: OutputStatistics, options: Options
) -> dict[str, int | None]:
    """Return the rank of each layer, None if it stays dense."""
    if options.budget > 0:
        return allocate(budget_choices(model, outputs, options), options.budget)
    ranks = {}
    for name, variances in outputs.variances.items():
        d_out, d_in = weight_of(model, name).shape
        rank = rank_for(variances, d_out, theta_of(name, options), options.round_to)
        ranks[name] = rank if worth_it(rank, d_out, d_in, options.max_cost) else None
    return ranks


def budget_choices(
    model: nn.Module, outputs: OutputStatistics, options: Options
) -> dict[str, list[Choice]]:
    """Return the choices of each layer, with costs in weights or in MACs."""
    result = {}
    for name, variances in outputs.variances.items():
        d_out, d_in = weight_of(model, name).shape
        positions = model.config.max_source_positions if reads_audio(name) else TOKENS_PER_WINDOW
        result[name] = choices(
            variances,
            d_out,
            d_in,
            unit=positions if options.budget_of == "macs" else 1,
            theta=theta_of(name, options),
            round_to=options.round_to,
            max_cost=options.max_cost,
        )
    return result


# -- splitting


def split_at_once(
    model: nn.Module,
    ranks: Mapping[str, int | None],
    outputs: OutputStatistics,
    basis: str = "activations",
) -> None:
    """Apply (5) to every layer, with the statistics of the original model."""
    split_ranks = {name: rank for name, rank in ranks.items() if rank is not None}
    with progress_steps(len(split_ranks), "lite: splitting") as done:
        for name, rank in split_ranks.items():
            weight, bias = weight_of(model, name), model.get_submodule(name).bias
            own = None if bias is None else exact(bias)
            roots = white_noise(weight, own) if basis == "weights" else outputs.of(model, name)
            axes = principal_axes(roots.root, rank)
            set_factors(model, name, split(weight, own, roots.mean, axes))
            done()


def white_noise(weight: Tensor, bias: Tensor | None) -> Roots:
    """Return mean and root of a layer's outputs for white noise as input.

    Principal axes are then the singular vectors of W, and the shift of (5) is the bias.
    """
    return Roots(weight.new_zeros(len(weight)) if bias is None else bias, weight)


def split_in_turn(
    model: "WhisperForConditionalGeneration",
    ranks: Mapping[str, int | None],
    speech: Speech,
    options: Options,
) -> None:
    """Apply (A) and (5) layer by layer, each fitted to the compressed layers before it."""
    original = copy.deepcopy(model)
    groups = [
        list(group) for _, group in groupby(ranks, lambda n: (input_of(n), side_and_layer(n)))
    ]
    changed = False
    with progress_steps(len(groups) * len(speech.clips), "lite: splitting layer by layer") as done:
        for group in groups:
            changed = changed or any(ranks[name] for name in group)
            if not changed:  # inputs are still those of the original, so (A) returns W
                continue
            points = [Point(group[0])], [Point(name, "output") for name in group]
            moments = collect_together([model, original], points, speech, done)
            refit_group(model, group, ranks, moments, options.ridge)


def refit_group(
    model: nn.Module,
    group: Sequence[str],
    ranks: Mapping[str, int | None],
    moments: Moments,
    ridge: float,
) -> None:
    """Refit and split layers that read the same input.

    `moments` are those of their input, followed by the original outputs of each layer.
    """
    widths = [weight_of(model, name).shape[0] for name in group]
    mean, covariance = moments.mean, moments.covariance
    width = len(mean) - sum(widths)
    ends = [sum(widths[: i + 1]) + width for i in range(len(group))]
    for name, d_out, end in zip(group, widths, ends, strict=True):
        linear = model.get_submodule(name)
        x = inputs_of(linear, mean[:width])
        y = slice(end - d_out, end)
        c_xx, c_yx = covariance[x][:, x], covariance[y][:, x]
        weight, bias = refit(weight_of(model, name), mean[x], mean[y], c_xx, c_yx, ridge)
        rank = ranks[name]
        if rank is None:
            set_dense(linear, weight, bias)
        else:
            axes = principal_axes(weight @ square_root(c_xx), rank)
            set_factors(model, name, split(weight, bias, mean[y], axes))


# -- recovery


def recover(
    model: "WhisperForConditionalGeneration",
    loss_term: LossTerm | None,
    options: Options,
    context: Context,
    record: dict[str, Any],
) -> None:
    """Fine-tune the factors with the distance to the original as a loss term."""
    with training_only_factors(model, options.factors_only):
        record["recovery"] = context.trained(
            model,
            options.recovery,
            "lite-recovery",
            identity=repr(options),
            loss_term=loss_term,
            label="lite: recovering",
        )


@contextmanager
def training_only_factors(model: nn.Module, only_factors: bool) -> Iterator[None]:
    """Disable gradients of all parameters that are not factors; do nothing if there are none."""
    modules = [module for module in model.modules() if isinstance(module, LowRank)]
    factors = {id(p) for module in modules for p in module.parameters()}
    others = [p for p in model.parameters() if id(p) not in factors]
    with without_gradients(others if only_factors and factors else []):
        yield
