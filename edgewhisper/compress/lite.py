"""LiteASR: low-rank encoder layers from principal components of activations (Kamahori, Kasai,
Kojima and Kasikci 2025, arXiv:2502.20583).

What a linear layer of Whisper's encoder writes lies near a small subspace. Find it with principal
component analysis on some speech, project the layer's output onto it, and the layer becomes a
product of two thin ones. Nothing is trained.

    paper         here           shape
    Y             outputs        (frames, d_out)   what one layer writes, all speech
    Y_M           mean           (d_out,)          mean of Y
    S^2           variances      (d_out,)          of Y along its principal axes, largest first
    V_k           axes           (d_out, k)        the first k of them
    W, b          weight, bias   (d_out, d_in)     the paper's transposed: Y = X W there
    W_1, W_2      down, up       (k, d_in), (d_out, k)
    theta         theta_attn, theta_mlp            share of the variance to exceed

    Y - Y_M = U S V^T                                                                       (2)
    y = up down x + shift,  down = V_k^T W,  up = V_k,  shift = Y_M + V_k V_k^T (b - Y_M)   (5)

k is the smallest multiple of 16 with sum(S_1^2 ... S_k^2) > theta sum(S^2). A layer stays dense
where k is more than d_out / 2 (attention) or 0.8 d_out (feed-forward): two products would cost more
than one. Key projections have no bias in Whisper and get one here, the shift; a softmax does not
see it, and exact removal (step "shrink", or export) drops it again.

What we do otherwise, with the same result:

- Y is never stored. With the moments of a layer's inputs, Cov(Y) = W Cov(X) W^T, in float64.
  q, k and v read the same X. The last layer, fc2, reads four times as many features as it writes,
  so there the moments of Y itself are taken.
- If no multiple of 16 exceeds theta (a flat spectrum), the layer stays dense; the authors' code
  then keeps all axes but one and makes the layer larger.

The paper calibrates on 100 English clips of eight sets, padding included, recorded while decoding;
its thresholds for the smaller models are not published. Ours, off by default: `mask_padding`,
`budget`, `sequential` and `recovery`. `basis = "weights"` is a baseline, plain singular value
decomposition: the singular vectors of W in the place of V_k, the bias as it was, the same ranks.

`share`, off by default as in the paper, attends in the small dimensions where keys and values have
fewer of them than a head has. With A = X down_q, B = X down_k, C = X down_v (frames, k), which all
heads share, and the factors `up` of head i,

    Q_i K_i^T = A M_i B^T + A up_q^T bias_k + bias_q up_k B^T + bias_q bias_k             (12)
    M_i = up_q^T up_k
    softmax(...) V_i = softmax(...) C up_v^T + bias_v                                     (16)

The second and the fourth term of (12) are the same for every key, and a softmax does not see them.
So the queries of head i are A M_i + bias_q up_k, their only key is B, and up_v goes into out_proj.
The authors have a kernel for it; in this form it is plain matrix products, and every graph has
those.

`sequential` goes through the layers in order and fits each to what it will really read, the outputs
of the compressed layers before it (x), while it should still write what the original wrote (y).
That is reduced-rank regression: least squares first, then principal components of its predictions.

    W* = W + (C_yx - W C_xx) (C_xx + r I)^-1,   b* = mean(y) - W* mean(x)                   (A)

and (5) with W*, b* for W, b and the axes of W* C_xx W*^T. The ridge r keeps W where the speech says
nothing. Layers that stay dense are refitted as well.

`budget` replaces the thresholds. Each layer may stay dense or take any rank; what it then loses is
its lost share of variance, in units of 1 - theta. The cheapest losses per saved weight are taken
first, over all layers, until the budget is met.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from edgewhisper import whisper
from edgewhisper.calibration import Moments, Point, Speech, collect, collect_together, exact
from edgewhisper.compress.near import keep_term
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.work import Work
from edgewhisper.examples import permutation
from edgewhisper.model_modes import without_gradients
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Range
from edgewhisper.runs import main_process
from edgewhisper.training import Training, train
from edgewhisper.whisper import (
    GatherLinear,
    LowRank,
    input_of,
    linears,
    reads_sound,
    side_and_layer,
)
from export.cost import count_parameters, macs
from export.problem import Problem
from export.shrink import layer_shapes

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

CONTEXT = 32
"""Tokens of a window that a decoder layer is taken to run on, where a budget is in MACs."""


@dataclass(frozen=True)
class Options:
    layers: str = "model.encoder.layers.*"
    """Shell pattern of the linear layers that may be split. The paper's: all of the encoder. The
    decoder's "*.encoder_attn.[kv]_proj" (ours) run on the same positions, once a window."""
    theta_attn: Annotated[float, Range(0, 1)] = 0.99
    """Share of variance that q_proj, k_proj, v_proj and out_proj must keep; 1 leaves them dense."""
    theta_mlp: Annotated[float, Range(0, 1)] = 0.999
    """Likewise for fc1 and fc2."""
    round_to: Annotated[int, Range(1)] = 16
    """Ranks are multiples of this: the width that fast kernels like."""
    max_cost: Annotated[float, Range(0, 1)] = 1.0
    """A layer is split where the two factors have at most this share of its weights. 1 is the
    paper's rule, which splits at break-even too."""

    basis: Literal["activations", "weights"] = "activations"
    """weights: a baseline, plain singular value decomposition of W at the same ranks."""

    clips: Annotated[int, Range(1)] = 100
    """Clips of calibration speech, drawn from the training clips by the seed; all if fewer."""
    mask_padding: bool = False
    """Ours: positions behind the end of a clip do not count. They do in the paper."""

    budget: Annotated[float, Range(0, 1)] = 0.0
    """Ours: the share of the chosen layers' cost that may remain. Ranks are then allocated over all
    layers at once, and the thetas only weigh them against each other. 0 switches it off."""
    budget_of: Literal["parameters", "macs"] = "parameters"
    """What the budget counts: weights, or multiply-accumulates of a window with 32 tokens. The two
    differ only where layers of the decoder are among the chosen."""

    sequential: bool = False
    """Ours: fit every layer to the outputs of the compressed layers before it. One pass of speech
    through both models for each group of layers instead of one pass in all."""
    ridge: Annotated[float, Range(1e-12, 1)] = 1e-4
    """r of (A), as a share of the mean variance of the inputs. Used by `sequential` only."""

    share: bool = False
    """Attend in the reduced dimensions, in every encoder layer whose key and value both have ranks
    below a head's width; see (12) and (16). Exact, and done last."""

    keep: Annotated[float, Range(0)] = 1.0
    """Weight of the distance to the original's encoder output and words (near.distance) in
    `recovery`."""
    factors_only: bool = True
    """Recovery trains the factors; false trains everything."""
    recovery: Training = field(default_factory=lambda: Training(steps=0))
    """Ours: fine-tuning afterwards; 0 steps is the paper."""


# ------------------------------------------------------------------------- factorisation, (2), (5)


class Factors(NamedTuple):
    """y = up down x + shift."""

    down: Tensor
    """(k, d_in)"""
    up: Tensor
    """(d_out, k)"""
    shift: Tensor
    """(d_out,)"""


def square_root(covariance: Tensor) -> Tensor:
    """(d, d) -> R (d, d) with R R^T = covariance."""
    variances, axes = torch.linalg.eigh(covariance)
    return axes * variances.clamp_min(0).sqrt()


def spectrum(root: Tensor) -> Tensor:
    """root (d_out, r) of Cov(Y) -> S^2 of (2) (min(d_out, r),), largest first; the rest are 0."""
    gram = root.T @ root if root.shape[1] < root.shape[0] else root @ root.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def principal_axes(root: Tensor, rank: int) -> Tensor:
    """root (d_out, r) of Cov(Y) -> V_k of (2), (d_out, k)."""
    return torch.linalg.svd(root, full_matrices=False).U[:, :rank]


def split(weight: Tensor, bias: Tensor | None, mean: Tensor, axes: Tensor) -> Factors:
    """(5): weight (d_out, d_in), bias (d_out,) or None, mean (d_out,), axes (d_out, k)."""
    offset = -mean if bias is None else bias - mean
    return Factors(axes.T @ weight, axes, mean + axes @ (axes.T @ offset))


# ---------------------------------------------------------------------------------------- ranks


def energies(variances: Tensor) -> Tensor:
    """S^2 (d,) -> share of the variance that the first k axes keep, at index k: (d + 1,)."""
    kept = torch.cat([variances.new_zeros(1), variances.cumsum(0)])
    return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def energy_at(variances: Tensor, rank: int) -> float:
    """`variances` may lack the zeros at its end, so rank may be larger than it is long."""
    return float(energies(variances)[min(rank, len(variances))])


def rank_for(variances: Tensor, d_out: int, theta: float, round_to: int = 16) -> int | None:
    """The smallest multiple of round_to below d_out that keeps more than theta; None if none."""
    shares = energies(variances).tolist()
    tested = range(round_to, d_out, round_to)
    return next((k for k in tested if shares[min(k, len(variances))] > theta), None)


def worth_it(rank: int | None, d_out: int, d_in: int, max_cost: float = 1.0) -> bool:
    """Whether two factors of that rank have at most max_cost of the layer's weights."""
    return rank is not None and rank * (d_out + d_in) <= max_cost * d_out * d_in


class Choice(NamedTuple):
    """One way to have a layer: dense (rank None), or split."""

    rank: int | None
    cost: float
    loss: float


def choices(
    variances: Tensor, d_out: int, d_in: int, options: Options, unit: float, theta: float
) -> list[Choice]:
    """All ways to have a layer, dearest first: dense, and every rank that is cheaper.

    `unit` is the cost of one weight; losses are in units of 1 - theta.
    """
    found = [Choice(None, unit * d_out * d_in, 0.0)]
    shares = energies(variances).tolist()
    for rank in reversed(range(options.round_to, d_out, options.round_to)):
        cost = unit * rank * (d_out + d_in)
        if worth_it(rank, d_out, d_in, options.max_cost) and cost < found[0].cost and theta < 1:
            lost = 1 - shares[min(rank, len(variances))]
            found.append(Choice(rank, cost, max(lost, 0.0) / (1 - theta)))
    return found


def price(dear: Choice, cheap: Choice) -> float:
    """Loss per saved cost of going from one choice to a cheaper one."""
    return (cheap.loss - dear.loss) / (dear.cost - cheap.cost)


def bargains(found: Sequence[Choice]) -> list[Choice]:
    """Of choices, dearest first, those on the lower convex hull: prices rise along it."""
    hull: list[Choice] = []
    for choice in found:
        while len(hull) > 1 and price(hull[-1], choice) <= price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def allocate(layers: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, int | None]:
    """Choices of every layer, dearest first -> a rank each: the cheapest losses first, until the
    costs add up to at most `budget` of what they are now.

    Raises Problem where the lowest ranks cost more than that.
    """
    taken = {name: found[0] for name, found in layers.items()}
    dense = sum(choice.cost for choice in taken.values())
    over = dense * (1 - budget)
    least = sum(found[-1].cost for found in layers.values())
    if dense - least < over:
        raise Problem(
            f"lite: a budget of {budget:g} is asked for; the lowest ranks that the options allow "
            f"already cost {least / dense:.3f} of the chosen layers",
            hint="raise budget, lower round_to, or choose more layers",
        )
    steps = [
        (price(dear, cheap), name, dear, cheap)
        for name, found in layers.items()
        for dear, cheap in pairwise(bargains(found))
    ]
    for _, name, dear, cheap in sorted(steps, key=lambda step: step[0]):
        if over <= 0:
            break
        if dear.cost - cheap.cost > over:  # the last step need not go all the way
            enough = [c for c in layers[name] if dear.cost - c.cost >= over]
            cheap = min(enough, key=lambda c: (c.loss, c.cost))
        taken[name] = cheap
        over -= dear.cost - cheap.cost
    return {name: choice.rank for name, choice in taken.items()}


# ------------------------------------------------------------------------------- regression, (A)


def refit(
    weight: Tensor, mean_x: Tensor, mean_y: Tensor, c_xx: Tensor, c_yx: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """(A): weight (d_out, d_in), C_xx (d_in, d_in), C_yx (d_out, d_in) -> W*, b*."""
    r = ridge * c_xx.diagonal().mean() + torch.finfo(c_xx.dtype).tiny
    damped = c_xx + r * torch.eye(len(c_xx), dtype=c_xx.dtype, device=c_xx.device)
    better = weight + torch.linalg.solve(damped, c_yx - weight @ c_xx, left=False)
    return better, mean_y - better @ mean_x


# ------------------------------------------------------- attention of reduced dimension, (12), (16)


def queries_of_shared_key(
    query: Tensor, query_bias: Tensor, key: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """up_q (heads * d, k_q), its bias, up_k (heads * d, k_k) -> M of all heads (heads * k_k, k_q)
    and its bias (heads * k_k,), without the terms of (12) that a softmax does not see."""
    query, bias, key = (x.unflatten(0, (heads, -1)) for x in (query, query_bias, key))
    return (key.mT @ query).flatten(0, 1), (key.mT @ bias[..., None]).flatten()


def output_of_shared_value(
    out: Tensor, value: Tensor, value_bias: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """out (d_out, heads * d), up_v (heads * d, k_v), its bias -> out (d_out, heads * k_v), which
    reads what (16) mixes, and what the bias contributes (d_out,)."""
    of_head = out.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, d_out, d)
    folded = of_head @ value.unflatten(0, (heads, -1))  # (heads, d_out, k_v)
    return folded.transpose(0, 1).flatten(1), out @ value_bias


# ---------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Split the chosen layers where that pays; `work.record["lite"]` says into what ranks.

    Raises Problem: no such layer, no speech, a budget too small; and what training.train raises.
    """
    refuse_quantised(model, "lite", options)
    refuse(options)
    home = next(model.parameters()).device
    names = chosen(model, options.layers)
    before = count_parameters(model), macs(model)
    keep = (
        keep_term(model, options.keep, options.recovery.cache_encoder)
        if options.recovery.steps
        else None
    )
    speech = calibration_speech(options, work)
    model.to(fastest_device())
    outputs = listen(model, names, speech)
    ranks = choose_ranks(model, outputs, options)
    record: dict[str, Any] = {
        "calibration": {"clips": len(speech.clips), "positions": outputs.positions},
        "layers": {name: told(model, name, ranks, outputs) for name in names},
    }
    if any(ranks.values()):
        if options.sequential:
            split_in_turn(model, ranks, speech, options)
        else:
            split_at_once(model, ranks, outputs, options.basis)
        model = whisper.rebuild(model, model.state_dict(), layer_shapes(model))
    model.to(home)
    recover(model, keep, options, work, record)
    if options.share:
        model, record["shared"] = share_attention(model)
    record["parameters"] = {"before": before[0], "after": count_parameters(model)}
    record["macs"] = {"before": before[1], "after": macs(model)}
    work.record["lite"] = record
    return model


def refuse(options: Options) -> None:
    if options.sequential and options.basis == "weights":
        raise Problem(
            'lite: basis = "weights" looks at no activations, so there is nothing that '
            "sequential = true could follow",
            hint="leave one of the two out",
        )


def chosen(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers that match, without the factors of layers that are split already.

    Raises Problem where none does.
    """
    factors = (".down", ".up")
    names = [name for name, _ in linears(model) if not name.endswith(factors)]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise Problem(
            f"lite: none of the {len(names)} linear layers that could be split is called "
            f"{pattern!r}",
            hint='names look like "model.encoder.layers.0.self_attn.q_proj" or "....fc1"',
        )
    return found


def calibration_speech(options: Options, work: Work) -> Speech:
    """Some of the training clips, drawn by the seed."""
    if not work.train:
        raise Problem("lite: there are no clips to calibrate on", hint="name a speech manifest")
    order = permutation(work.seed, 0, len(work.train))[: options.clips]
    return Speech([work.train[i] for i in order], work.processor, options.mask_padding)


def fastest_device() -> torch.device:
    accelerator = torch.accelerator
    found = accelerator.current_accelerator() if accelerator.is_available() else None
    return found or torch.device("cpu")


def theta_of(name: str, options: Options) -> float:
    return options.theta_mlp if name.endswith(("fc1", "fc2")) else options.theta_attn


def told(
    model: nn.Module, name: str, ranks: Mapping[str, int | None], outputs: "Outputs"
) -> dict[str, Any]:
    """What is recorded of a layer: its rank (None: dense), its size, and what that rank keeps."""
    rank = ranks[name]
    kept = 1.0 if rank is None else energy_at(outputs.variances[name], rank)
    d_out, d_in = weight_of(model, name).shape
    return {"rank": rank, "outputs": d_out, "inputs": d_in, "energy": kept}


def weight_of(model: nn.Module, name: str) -> Tensor:
    """(d_out, d_in) float64"""
    return exact(model.get_submodule(name).weight)


def inputs_of(linear: nn.Module, features: Tensor) -> Tensor:
    """Which of the features (d,) a layer reads: indices."""
    inputs = getattr(linear, "inputs", torch.arange(len(features)))
    return inputs.to(features.device)


# -- listening


class Roots(NamedTuple):
    """Mean (d,) and a square root (d, r) of the covariance of some rows."""

    mean: Tensor
    root: Tensor


class Outputs:
    """Mean and covariance of what layers write, by their names."""

    def __init__(
        self, model: nn.Module, moments: dict[Point, Moments], points: Mapping[str, Point]
    ):
        self.points = points
        self.positions = max(m.count for m in moments.values())
        self.roots: dict[Point, Roots] = {}
        self.variances: dict[str, Tensor] = {}
        with progress(len(moments) + len(points), "lite: principal components") as done:
            while moments:  # one by one: both at once would take twice the memory
                point, found = moments.popitem()
                self.roots[point] = Roots(found.mean, square_root(found.covariance))
                done()
            for name in points:
                self.variances[name] = spectrum(self.of(model, name).root)
                done()

    def of(self, model: nn.Module, name: str) -> Roots:
        """Y = W X + b, so mean(Y) = W mean(X) + b and Cov(Y) = (W R) (W R)^T with R of X."""
        found = self.roots[self.points[name]]
        if self.points[name].side == "output":
            return found
        linear = model.get_submodule(name)
        read = inputs_of(linear, found.mean)
        weight = weight_of(model, name)
        mean = weight @ found.mean[read]
        mean = mean if linear.bias is None else mean + exact(linear.bias)
        return Roots(mean, weight @ found.root[read])


def listen(
    model: "WhisperForConditionalGeneration", names: Sequence[str], speech: Speech
) -> Outputs:
    points = where_to_listen(model, names)
    with progress(len(speech.clips), "lite: listening") as heard:
        moments = collect(model, dict.fromkeys(points.values()), speech, heard)
    return Outputs(model, moments, points)


def where_to_listen(model: nn.Module, names: Sequence[str]) -> dict[str, Point]:
    """For every layer the point that tells its outputs: its input, which it may share with others,
    or its output, whichever takes less memory."""
    readers: dict[str, list[str]] = {}
    for name in names:
        readers.setdefault(input_of(name), []).append(name)
    points = {}
    for source, group in readers.items():
        shapes = [weight_of(model, name).shape for name in group]
        direct = sum(d_out**2 for d_out, _ in shapes) < max(d_in for _, d_in in shapes) ** 2
        for name in group:
            points[name] = Point(name, "output") if direct else Point(source)
    return points


@contextmanager
def progress(steps: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar that counts calls."""
    done = 0
    with progress_bar(steps, None, main_process(), label) as show:

        def step() -> None:
            nonlocal done
            done += 1
            show(done, "")

        yield step


# -- ranks


def choose_ranks(model: nn.Module, outputs: Outputs, options: Options) -> dict[str, int | None]:
    """name -> rank, or None where the layer stays dense."""
    if options.budget > 0:
        return allocate(budget_choices(model, outputs, options), options.budget)
    ranks = {}
    for name, variances in outputs.variances.items():
        d_out, d_in = weight_of(model, name).shape
        rank = rank_for(variances, d_out, theta_of(name, options), options.round_to)
        ranks[name] = rank if worth_it(rank, d_out, d_in, options.max_cost) else None
    return ranks


def budget_choices(model: nn.Module, outputs: Outputs, options: Options) -> dict[str, list[Choice]]:
    found = {}
    for name, variances in outputs.variances.items():
        d_out, d_in = weight_of(model, name).shape
        positions = model.config.max_source_positions if reads_sound(name) else CONTEXT
        unit = positions if options.budget_of == "macs" else 1
        found[name] = choices(variances, d_out, d_in, options, unit, theta_of(name, options))
    return found


# -- splitting


def split_at_once(
    model: nn.Module,
    ranks: Mapping[str, int | None],
    outputs: Outputs,
    basis: str = "activations",
) -> None:
    """(5) for every layer, from the activations of the original model."""
    chosen = {name: rank for name, rank in ranks.items() if rank is not None}
    with progress(len(chosen), "lite: splitting") as done:
        for name, rank in chosen.items():
            weight, bias = weight_of(model, name), model.get_submodule(name).bias
            own = None if bias is None else exact(bias)
            found = plain(weight, own) if basis == "weights" else outputs.of(model, name)
            axes = principal_axes(found.root, rank)
            put(model, name, split(weight, own, found.mean, axes))
            done()


def plain(weight: Tensor, bias: Tensor | None) -> Roots:
    """What a layer would write if its inputs were white noise: axes are those of W alone, and the
    shift of (5) is the bias."""
    return Roots(weight.new_zeros(len(weight)) if bias is None else bias, weight)


def split_in_turn(
    model: "WhisperForConditionalGeneration",
    ranks: Mapping[str, int | None],
    speech: Speech,
    options: Options,
) -> None:
    """(A) and (5), layer after layer, each from what the ones before it have become."""
    original = copy.deepcopy(model)
    groups = [
        list(group) for _, group in groupby(ranks, lambda n: (input_of(n), side_and_layer(n)))
    ]
    changed = False
    with progress(len(groups) * len(speech.clips), "lite: layer after layer") as heard:
        for group in groups:
            changed = changed or any(ranks[name] for name in group)
            if not changed:  # nothing differs yet, and nothing shall
                continue
            points = [Point(group[0])], [Point(name, "output") for name in group]
            moments = collect_together([model, original], points, speech, heard)
            refit_group(model, group, ranks, moments, options.ridge)


def refit_group(
    model: nn.Module,
    group: Sequence[str],
    ranks: Mapping[str, int | None],
    moments: Moments,
    ridge: float,
) -> None:
    """Layers that read the same; `moments` are of that and of what each should write, in turn."""
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
            put_dense(linear, weight, bias)
        else:
            axes = principal_axes(weight @ square_root(c_xx), rank)
            put(model, name, split(weight, bias, mean[y], axes))


@torch.no_grad()
def put_dense(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """A key projection has no bias, and needs none: a softmax does not see it."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


@torch.no_grad()
def put(model: nn.Module, name: str, factors: Factors) -> None:
    """Replace a linear layer by its factors; one that reads some inputs only still does."""
    dense = model.get_submodule(name)
    rank, d_in = factors.down.shape
    down: nn.Linear
    if isinstance(dense, GatherLinear):
        down = GatherLinear(d_in, rank, bias=False)
        down.inputs.copy_(dense.inputs)
    else:
        down = nn.Linear(d_in, rank, bias=False)
    up = nn.Linear(rank, len(factors.up))
    down.weight.copy_(factors.down)
    up.weight.copy_(factors.up)
    up.bias.copy_(factors.shift)
    parent, _, part = name.rpartition(".")
    low_rank = LowRank(down, up).to(dense.weight.device, dense.weight.dtype)
    setattr(model.get_submodule(parent), part, low_rank.train(dense.training))


# -- recovery


def recover(
    model: "WhisperForConditionalGeneration",
    keep: Any,
    options: Options,
    work: Work,
    record: dict[str, Any],
) -> None:
    """Fine-tune the factors, near what the original said and heard."""
    with training_only_factors(model, options.factors_only):
        log = train(
            model,
            work.processor,
            work.train,
            options.recovery,
            run_dir=work.run_dir / "lite-recovery",
            seed=work.seed,
            identity=repr(options),
            loss_term=keep,
            label="lite: recovering",
        )
    record["recovery"] = log.summary()


@contextmanager
def training_only_factors(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradients for low-rank layers only, and afterwards for all that had them before."""
    modules = [module for module in model.modules() if isinstance(module, LowRank)]
    factors = {id(p) for module in modules for p in module.parameters()}
    others = [p for p in model.parameters() if id(p) not in factors]
    with without_gradients(others if wanted and factors else []):
        yield


# -- attention of reduced dimension


def share_attention(
    model: "WhisperForConditionalGeneration",
) -> "tuple[WhisperForConditionalGeneration, list[int]]":
    """The same function with one key and one value for all heads, in the encoder layers where that
    is narrower; and the numbers of those layers."""
    tensors, shapes = dict(model.state_dict()), layer_shapes(model)
    found = []
    for number, layer in enumerate(model.model.encoder.layers):
        if narrower_than_a_head(layer.self_attn):
            found.append(number)
            prefix = f"model.encoder.layers.{number}.self_attn."
            for name in [name for name in tensors if name.startswith(prefix)]:
                del tensors[name]
            ours, shape = shared(layer.self_attn)
            tensors |= {f"{prefix}{name}": tensor for name, tensor in ours.items()}
            describe_shared(shapes["encoder"][number], shape, set(ours))
    return (whisper.rebuild(model, tensors, shapes) if found else model), found


def narrower_than_a_head(attention: nn.Module) -> bool:
    key, value = attention.k_proj, attention.v_proj
    if getattr(attention, "shared", False) or not all(isinstance(m, LowRank) for m in (key, value)):
        return False
    return all(m.down.out_features < m.up.out_features // attention.num_heads for m in (key, value))


def shared(attention: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the attention in its shared form, by their names in it, and its shape."""
    query, key, value, out = (getattr(attention, f"{n}_proj") for n in ("q", "k", "v", "out"))
    heads = attention.num_heads
    first, last = getattr(out, "down", out), getattr(out, "up", out)
    folded, constant = output_of_shared_value(
        exact(first.weight), exact(value.up.weight), exact(value.up.bias), heads
    )
    if last is not first:
        constant = exact(last.weight) @ constant
    last_query = getattr(query, "up", query)
    narrow, bias = queries_of_shared_key(
        exact(last_query.weight), exact(last_query.bias), exact(key.up.weight), heads
    )
    tensors = {
        **of_linear(query, narrow, bias),
        **named("k_proj", key.down),
        **named("v_proj", value.down),
        **named("out_proj", out),
    }
    tensors[f"out_proj.{'' if last is first else 'down.'}weight"] = folded
    tensors[f"out_proj.{'' if last is first else 'up.'}bias"] = exact(last.bias) + constant
    shape = {"qk_dim": key.down.out_features, "v_dim": value.down.out_features}
    like = first.weight
    cast = {n: t.to(like.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    on_device = {name: tensor.to(like.device) for name, tensor in cast.items()}
    return on_device, {"heads": heads, **shape, "shared": True}


def of_linear(query: nn.Module, narrow: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The queries' new last factor; both factors in one where that is no larger."""
    if not isinstance(query, LowRank):
        return named("q_proj", query) | {"q_proj.weight": narrow, "q_proj.bias": bias}
    rank, d_in = query.down.weight.shape
    if worth_it(rank, len(narrow), d_in):
        return named("q_proj", query) | {"q_proj.up.weight": narrow, "q_proj.up.bias": bias}
    whole = {"q_proj.weight": narrow @ exact(query.down.weight), "q_proj.bias": bias}
    return named("q_proj", query.down) | whole


def named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def describe_shared(layer: dict[str, Any], shape: dict[str, Any], tensors: set[str]) -> None:
    """Correct a layer's shapes for its attention in the shared form."""
    layer["self_attn"] = shape
    for name in ("q_proj", "k_proj", "v_proj"):
        if f"{name}.weight" in tensors:
            layer["ranks"].pop(f"self_attn.{name}", None)
    layer.pop("biases", None)
