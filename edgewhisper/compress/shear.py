"""BaldWhisper, stage 2: head shearing (Sy, Cerisara and Illina 2025, arXiv:2510.08599). Stage 1 is
merge.py.

In a small Whisper, the token table is the largest block; it is also the output layer ("LM head").
Head shearing replaces it by the product of two thin matrices, used for look-ups and for logits.
Unlike a reduced vocabulary, this loses no word. The factors start from a singular value
decomposition and are then trained by distillation. No attention head is changed.

    paper        here            shape
    E            table           (V, h)         the original token table, frozen
    E1, E2       rows, basis     (V, r), (r, h) its factors; the model stores rows and basis.T
    x            ids             (clips, n)     input tokens of the decoder
    h or s       states          (tokens, h)    last decoder states, before the logits
    d            feature_distance

    E ~ E1 E2:  inputs e(x) = E1[x] E2,  logits z = (s E2^T) E1^T                        (3)
    d(a, b) = mean |a - b| - log sigmoid(cos(a, b))                                      (4)
    L2 = CE(student, y) + d(E[x], E1[x] E2) + d(h E^T, (h E2^T) E1^T)                    (5)

The paper has r = 96 for whisper-base. Differences and choices:

- The weights of the terms of (5) are not published; we use 1. The first d of (5) covers all input
  tokens of a clip, including the prompt. The second covers the positions that have a label.
- The paper does not say whose states h enter (5). `states`: first the teacher's, then the
  student's (as in Lillama, arXiv:2412.16719, by the same authors), without gradients into h: this
  term trains the factors, the cross entropy trains the rest.
- `start` = "svd" is the paper's. The others (ours) minimise a weighted error. With token
  frequencies f and S S^T = E[h h^T] over calibration speech:

      U Sigma V^T = SVD(diag(f)^(1/2) E S),  E1 = diag(f)^(-1/2) U_r,  E2 = Sigma_r V_r^T S^-1  (6)

  "both" is (6). "frequency" has S = I and is optimal for look-ups. "activation" has f = 1 and is
  optimal for logits. "mix" uses f to the power `mix` and E[h h^T] to the power 1 - mix, because one
  table serves both. Frequencies below `floor` are raised to it, so that no row is lost. WER of the
  embedded model (30 dev clips, 3.8 % before) at rank 8 without training: svd 55 %, activation 23 %,
  frequency and mix above 100 %: rare tokens get wrong logits and are decoded. These two need a
  larger floor, or training.
- The product does not fix the scale of E1 and E2. Column k of E1 and row k of E2 get equal mean
  squares, so that one learning rate suits both factors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper import whisper
from edgewhisper.compress.context import Context
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.teacher import Teacher, forward, frozen_copy, mean_by_tokens
from edgewhisper.examples import IGNORED, Batch, Examples, batches
from edgewhisper.model_modes import removed_after
from edgewhisper.recipe import Range
from edgewhisper.training import AfterStep, LossTerm, Training, counted
from export.cost import count_parameters, macs
from export.problem import Problem
from export.shrink import FORMAT

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]
TABLE = "model.decoder.embed_tokens"
Captured = dict[str, Tensor]
"""The key "states" holds the last decoder states before the logits, (clips, n, h)."""
ROUND_TO = 16
"""Ranks chosen by `share` and `theta` are multiples of this."""
RIDGE = 1e-6
"""Added to the diagonal of E[h h^T], as a share of its mean, because states of a few clips do not
span all directions."""
REMOVES = ("rank", "share", "theta")


@dataclass(frozen=True)
class Options:
    rank: Annotated[int, Range(1)] = 96
    """r of (3)."""
    share: Annotated[float, Range(0, 1)] = 0.0
    """Ours: instead of `rank`, use this share of d_model, rounded to a multiple of 16; one recipe
    then suits models of several sizes. 0 uses `rank`."""
    theta: Annotated[float, Range(0, 1)] = 0.0
    """Ours: instead of `rank`, use the smallest multiple of 16 that keeps more than this share of
    sum(Sigma^2) in (6). If that rank saves no parameters, the table is neither factorised nor
    trained. 0 uses `rank`."""
    start: Literal["svd", "frequency", "activation", "both", "mix"] = "svd"
    """How the factors are computed before training, see (6)."""
    mix: Annotated[float, Range(0, 1)] = 0.5
    """For start = "mix": 1 is "frequency", 0 is "activation"."""
    floor: Annotated[float, Range(1e-12, 1)] = 1e-6
    """Lower limit of a token's frequency."""
    calibration: Annotated[int, Range(1)] = 256
    """Number of clips that E[h h^T] is computed from."""

    input_weight: Weight = 1.0
    """Weight of the distance between embeddings in (5)."""
    logit_weight: Weight = 1.0
    """Weight of the distance between logits in (5)."""
    states: Literal["teacher_then_student", "teacher", "student"] = "teacher_then_student"
    """The model whose states h are used in the second distance of (5)."""
    switch: Annotated[float, Range(0, 1)] = 0.5
    """For "teacher_then_student": share of the steps that use the teacher's states."""

    training: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-5))


# ------------------------------------------------------------------------------ the factors, (6)


def powers(options: Options) -> tuple[float, float]:
    """Return the exponents of f and of E[h h^T] in (6)."""
    fixed = {"svd": (0.0, 0.0), "frequency": (1.0, 0.0), "activation": (0.0, 1.0)}
    fixed |= {"both": (1.0, 1.0), "mix": (options.mix, 1 - options.mix)}
    return fixed[options.start]


def factorise(
    table: Tensor, rank: int, frequencies: Tensor, metric: Tensor, theta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(6): table (V, h), f (V,), E[h h^T] (h, h) -> rows (V, r), basis (r, h).

    With `theta` above 0, the rank is chosen by `enough`.
    """
    left = frequencies.double().sqrt()[:, None]  # (V, 1)
    right, back = square_root(metric)  # (h, h): S, S^-1
    u, sigma, v = torch.linalg.svd(left * table.double() @ right, full_matrices=False)
    rank = enough(sigma, theta) if theta else rank
    rows = u[:, :rank] / left
    basis = sigma[:rank, None] * v[:rank] @ back
    rows, basis = balanced(rows, basis)
    return rows.to(table.dtype), basis.to(table.dtype)


def enough(sigma: Tensor, theta: float) -> int:
    """Return the smallest multiple of 16 whose share of sum(sigma^2) exceeds theta.

    sigma (n,), largest first. Returns n if no multiple does.
    """
    kept = (sigma.square().cumsum(0) / sigma.square().sum())[ROUND_TO - 1 :: ROUND_TO]
    above = (kept > theta).nonzero()
    return ROUND_TO * (int(above[0]) + 1) if len(above) else len(sigma)


def square_root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return S (h, h) with S S = metric, which is symmetric positive definite, and its inverse."""
    values, vectors = torch.linalg.eigh(metric.double())
    roots = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def power(metric: Tensor, exponent: float) -> Tensor:
    """Return a symmetric positive matrix (h, h) to a power; the identity for exponent 0."""
    if exponent == 0:
        return torch.eye(len(metric), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).pow(exponent)) @ vectors.T


def balanced(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale the factors so that column k of rows and row k of basis have equal mean squares.

    Their product does not change.
    """
    tall, wide = (x.square().mean(dim=d).sqrt() for x, d in ((rows, 0), (basis, 1)))  # (r,)
    scale = (wide / tall).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    return rows * scale, basis / scale[:, None]


def weighted_error(table: Tensor, product: Tensor, frequencies: Tensor, metric: Tensor) -> float:
    """Return || diag(f)^(1/2) (E - E1 E2) S ||^2 / || diag(f)^(1/2) E S ||^2.

    Shapes are those of `factorise`.
    """
    sizes = []
    for matrix in (table.double() - product.double(), table.double()):
        square = torch.einsum("vh,hk,vk->v", matrix, metric.double(), matrix)
        sizes.append((frequencies.double() * square).sum())
    return float(sizes[0] / sizes[1])


# ----------------------------------------------------------------------- feature distillation, (4)


def feature_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """(4) per row, both (..., features) -> (...,)."""
    teacher, student = teacher.float(), student.float()
    similarity = functional.cosine_similarity(teacher, student, dim=-1)
    return (teacher - student).abs().mean(dim=-1) - functional.logsigmoid(similarity)


class Distillation:
    """(5) without its cross entropy, as a loss term and a hook that counts the steps."""

    def __init__(
        self, teacher: nn.Module, captured: Captured, options: Options, steps: int
    ) -> None:
        """`captured` holds the student's states, see `captured_states`; `steps` is the number of
        training steps."""
        self.teacher, self.captured, self.options = teacher, captured, options
        self.cached = Teacher(teacher, options.training.cache_encoder)
        ends = {"teacher_then_student": options.switch, "teacher": 1.0, "student": 0.0}
        self.teacher_steps = round(ends[options.states] * steps)

    def term(self, model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        self.teacher.to(batch.labels.device)
        old, new = (m.model.decoder.embed_tokens for m in (self.teacher, model))
        ids = batch.decoder_input_ids
        distances = feature_distance(old(ids), new(ids))  # (clips, n)
        loss = self.options.input_weight * mean_by_tokens(distances, batch.labels)
        if self.options.logit_weight == 0:
            return loss
        states = self.states(model, batch)[batch.labels != IGNORED].detach()  # (labelled, h)
        target = functional.linear(states, old.weight)  # (labelled, V)
        distances = feature_distance(target, new.logits(states))
        return loss + self.options.logit_weight * distances.mean()

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the states h (clips, n, h) of teacher or student, depending on the step.

        The student's are those of its forward pass, which has just run.
        """
        if int(model.shear_steps) >= self.teacher_steps:
            return self.captured["states"]
        with captured_states(self.teacher.proj_out) as captured:
            self.cached(batch, batch.input_features)
            return captured["states"]

    def after_step(self, model: nn.Module, step: int, learning_rate: float) -> None:
        model.shear_steps += 1


def states_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the decoder's states before the logits, (clips, n, h)."""
    with captured_states(model.proj_out) as captured:
        forward(model, batch)
        return captured["states"]


@contextmanager
def captured_states(output_layer: nn.Module) -> Iterator[Captured]:
    """Yield a dictionary whose entry "states" is the last input of the module, (clips, n, h)."""
    captured: Captured = {}

    def capture(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured["states"] = args[0]

    with removed_after(output_layer.register_forward_pre_hook(capture)):
        yield captured


@contextmanager
def step_counter(model: nn.Module) -> Iterator[None]:
    """Give the model a step counter: a buffer, saved and resumed with the weights."""
    device = next(model.parameters()).device
    model.register_buffer("shear_steps", torch.zeros((), dtype=torch.int64, device=device))
    try:
        yield
    finally:
        del model.shear_steps


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Factorise the token table, then train with feature distillation.

    `context.record["shear"]` has parameter counts and the errors of the factors before training: in
    the plain norm, and in the norms of look-ups and logits. If the rank that `theta` requires saves
    no parameters, the model is returned unchanged, and the record says so. Raises Problem for a
    `rank` that saves no parameters, and what training.train raises.
    """
    refuse_quantised(model, "shear", options)
    refuse_rank(model, 1 if options.theta else rank_of(model, options))
    teacher = frozen_copy(model)
    frequencies = token_frequencies(model, context, options.floor)
    metric = second_moment(teacher, options, context)
    rows, basis = factors_of(model, options, frequencies, metric)
    if options.theta and not saves(len(basis), model):
        context.record["shear"] = kept_dense(len(basis), model)
        return model
    student = sheared(model, rows, basis)
    record: dict[str, Any] = {
        "rank": len(basis),
        "parameters": {"before": count_parameters(model), "after": count_parameters(student)},
        "macs": {"before": macs(model), "after": macs(student)},
        "start_error": start_errors(model, student, frequencies, metric),
    }
    record["training"] = distil(student, teacher, options, context)
    context.record["shear"] = record
    return student


def rank_of(model: nn.Module, options: Options) -> int:
    """Return the rank that `share` or `rank` asks for."""
    if options.share:
        return max(1, round(options.share * model.config.d_model / ROUND_TO)) * ROUND_TO
    return options.rank


def refuse_rank(model: nn.Module, rank: int) -> None:
    """Raise Problem if the table is factorised already, or factors of this rank save nothing."""
    table = model.model.decoder.embed_tokens
    if isinstance(table, whisper.FactorisedTable):
        raise Problem(
            f"shear: the token table is already factorised, with rank {table.rows.embedding_dim}",
            hint="remove this step, or start from a model without a factorised table",
        )
    limit = min(table.weight.shape)
    if rank > limit:
        raise Problem(
            f"shear: rank {rank} exceeds the highest rank {limit} of a table of "
            f"{table.weight.shape[0]} tokens by {table.weight.shape[1]}",
            hint=f"set rank to {limit // 4}, a quarter of it, or less",
        )
    if not saves(rank, model):
        raise Problem(
            f"shear: two factors of rank {rank} have {factor_parameters(rank, model):,} "
            f"parameters, the token table has {table.weight.numel():,}; this saves nothing",
            hint=f"set rank to {limit // 4}, a quarter of the width, or less",
        )


def saves(rank: int, model: nn.Module) -> bool:
    """Return whether two factors of this rank have fewer parameters than the table."""
    return factor_parameters(rank, model) < model.model.decoder.embed_tokens.weight.numel()


def factor_parameters(rank: int, model: nn.Module) -> int:
    """Return the number of parameters of both factors."""
    return rank * sum(model.model.decoder.embed_tokens.weight.shape)


def kept_dense(rank: int, model: nn.Module) -> dict[str, Any]:
    """Return the record of a table that is not factorised."""
    counts = {"parameters": count_parameters(model), "macs": macs(model)}
    return {
        "rank": None,
        "kept_dense": {
            "rank_needed": rank,
            "parameters_of_factors": factor_parameters(rank, model),
        },
        **{name: {"before": value, "after": value} for name, value in counts.items()},
    }


def factors_of(
    model: nn.Module, options: Options, frequencies: Tensor, metric: Tensor
) -> tuple[Tensor, Tensor]:
    """Return rows (V, r) and basis (r, h) before training, see (6)."""
    table = model.model.decoder.embed_tokens.weight.detach()
    f, m = powers(options)
    weights = (frequencies.double() ** f, power(metric, m))
    return factorise(table.cpu(), rank_of(model, options), *weights, options.theta)


def sheared(
    model: "WhisperForConditionalGeneration", rows: Tensor, basis: Tensor
) -> "WhisperForConditionalGeneration":
    """Return the model with the table replaced by its factors."""
    dense = {f"{TABLE}.weight", "proj_out.weight"}
    tensors = {name: t for name, t in model.state_dict().items() if name not in dense}
    tensors |= {f"{TABLE}.rows.weight": rows, f"{TABLE}.up.weight": basis.T.contiguous()}
    shapes = getattr(model.config, "edgewhisper", None) or {"format": FORMAT}
    return whisper.rebuild(model, tensors, {**shapes, "token_rank": len(basis)})


def token_frequencies(
    model: "WhisperForConditionalGeneration", context: Context, floor: float
) -> Tensor:
    """Return each token's share of the decoder inputs in training, at least `floor`; (V,)."""
    examples = Examples(context.train, model, context.processor, context.seed)
    inputs = [token for prompt, text in examples.texts for token in [*prompt, *text[:-1]]]
    counts = torch.bincount(torch.tensor(inputs), minlength=model.config.vocab_size).double()
    return (counts / counts.sum()).clamp_min(floor)


def second_moment(model: nn.Module, options: Options, context: Context) -> Tensor:
    """Return E[h h^T] over the positions that have a label, (h, h) float64."""
    width = model.config.d_model
    total, tokens = torch.zeros(width, width, dtype=torch.float64), 0
    clips = context.train[: options.calibration]
    size, label = options.training.batch_size, "shear: calibrating"
    for batch in batches(clips, model, context.processor, size, label):
        states = states_of(model, batch)[batch.labels != IGNORED].cpu().double()  # (labelled, h)
        total += states.T @ states
        tokens += len(states)
    moment = total / tokens
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def start_errors(
    before: nn.Module, after: nn.Module, frequencies: Tensor, metric: Tensor
) -> dict[str, float]:
    """Return the relative squared errors of the factors, in the norms of start "svd" (table),
    "frequency" (embeddings) and "activation" (logits)."""
    table = before.model.decoder.embed_tokens.weight.detach().cpu()
    factors = after.model.decoder.embed_tokens
    product = (factors.rows.weight @ factors.up.weight.T).detach().cpu()
    ones, identity = torch.ones(len(table)), torch.eye(table.shape[1])
    return {
        "table": weighted_error(table, product, ones, identity),
        "embeddings": weighted_error(table, product, frequencies, identity),
        "logits": weighted_error(table, product, ones, metric),
    }


def distil(
    student: nn.Module, teacher: nn.Module, options: Options, context: Context
) -> dict[str, Any]:
    """Train the student by (5); return the training's summary."""
    training = counted(options.training, len(context.train))
    weights = (options.input_weight, options.logit_weight, options.states, options.switch)
    with captured_states(student.proj_out) as captured, step_counter(student):
        loss_term, after_step = hooks(teacher, captured, options, training.steps)
        return context.trained(
            student,
            training,
            "shear-training",
            seed=2,
            identity=repr(weights),
            loss_term=loss_term,
            after_step=after_step,
            label="shear: distilling",
        )


def hooks(
    teacher: nn.Module, captured: Captured, options: Options, steps: int
) -> tuple[LossTerm | None, AfterStep | None]:
    """Return the loss term and the hook after each step; None if both weights of (5) are 0."""
    if options.input_weight == 0 and options.logit_weight == 0:
        return None, None
    distillation = Distillation(teacher, captured, options, steps)
    return distillation.term, distillation.after_step
