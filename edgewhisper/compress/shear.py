"""BaldWhisper, stage 2: head shearing (Sy, Cerisara and Illina 2025, arXiv:2510.08599). Stage 1 is
merge.py.

In a small Whisper the token table, which is also the output layer ("LM head"), is the largest
block. It becomes the product of two thin matrices, used for look-ups and logits alike, so that no
word is lost, as it would be if the vocabulary were cut. The factors start from a singular value
decomposition and learn from what really passes through them.

    paper        here            shape
    E            table           (V, h)         the token table before, frozen
    E1, E2       rows, basis     (V, r), (r, h) its factors; the model stores rows and basis.T
    x            ids             (clips, n)     tokens that the decoder reads
    h or s       states          (tokens, h)    what the decoder ends in, before the logits
    d            feature_distance

    E ~ E1 E2:  inputs e(x) = E1[x] E2,  logits z = (s E2^T) E1^T                        (3)
    d(a, b) = mean |a - b| - log sigmoid(cos(a, b))                                      (4)
    L2 = CE(student, y) + d(E[x], E1[x] E2) + d(h E^T, (h E2^T) E1^T)                    (5)

"Head shearing" is this; no attention head is touched. r = 96 is the paper's, for whisper-base.

What we fill in, and where we differ:

- Weights of the terms of (5) are not published: 1. Its first d looks at every token of a clip, the
  prompt too; its second at the positions whose next token is to be found.
- Which h feeds (5) is not published either. `states`: the teacher's for a while, then the
  student's own (as in Lillama, arXiv:2412.16719, by the same authors), without gradients into it:
  the term teaches the factors, the cross entropy teaches the rest.
- `start` = "svd" is the paper's. The others, ours, minimise the error where it counts. With token
  frequencies f and S S^T = E[h h^T] over calibration speech:

      U Sigma V^T = SVD(diag(f)^(1/2) E S),  E1 = diag(f)^(-1/2) U_r,  E2 = Sigma_r V_r^T S^-1  (6)

  "both" is (6); "frequency" has S = I, and is best for look-ups; "activation" has f = 1, and is
  best for logits; "mix" takes f to the power `mix` and E[h h^T] to the power 1 - mix, since one
  table serves both. Frequencies below `floor` count as `floor`, so that no row dies. Measured on
  the embedded model (30 dev clips, WER before 3.8 %), rank 8 and no training: svd 55 %, activation
  23 %, frequency and mix beyond 100 %: tokens that are rarely read get logits far from their own,
  and are uttered. A larger floor, or training, is needed there.
- The product leaves the scale between E1 and E2 open. We give column k of E1 and row k of E2 equal
  mean squares: steps of one size then suit both factors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper import whisper
from edgewhisper.compress.near import Teacher, frozen_copy
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.work import Work
from edgewhisper.examples import IGNORED, Batch, Examples, batches
from edgewhisper.recipe import Range
from edgewhisper.training import AfterStep, LossTerm, Training, counted, train
from export.cost import count_parameters, macs
from export.problem import Problem
from export.shrink import FORMAT

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]
TABLE = "model.decoder.embed_tokens"
Seen = dict[str, Tensor]
ROUND_TO = 16
"""Ranks that `theta` chooses are multiples of this."""
LISTENING = "shear: listening"
RIDGE = 1e-6
"""Of the mean square of a state's features, added to each: few clips span few directions."""


@dataclass(frozen=True)
class Options:
    rank: Annotated[int, Range(1)] = 96
    """r."""
    theta: Annotated[float, Range(0, 1)] = 0.0
    """Ours: not `rank`, but the smallest multiple of 16 that keeps more than this share of the
    square that the start weighs. The table stays as it is, and is not trained, where that rank
    saves no parameters. 0 switches it off."""
    start: Literal["svd", "frequency", "activation", "both", "mix"] = "svd"
    mix: Annotated[float, Range(0, 1)] = 0.5
    """Of start = "mix": 1 is "frequency", 0 is "activation"."""
    floor: Annotated[float, Range(1e-12, 1)] = 1e-6
    """Smallest frequency a token is taken to have."""
    calibration: Annotated[int, Range(1)] = 256
    """Clips whose decoder states make up E[h h^T]."""

    input_weight: Weight = 1.0
    """Of the distance between embeddings in (5)."""
    logit_weight: Weight = 1.0
    """Of the distance between logits."""
    states: Literal["teacher_then_student", "teacher", "student"] = "teacher_then_student"
    """Whose states the logits of (5) are computed from."""
    switch: Annotated[float, Range(0, 1)] = 0.5
    """Share of the steps after which the student's follow the teacher's."""

    training: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-5))


# ------------------------------------------------------------------------------ the factors, (6)


def powers(options: Options) -> tuple[float, float]:
    """Exponents of f and of E[h h^T]."""
    fixed = {"svd": (0.0, 0.0), "frequency": (1.0, 0.0), "activation": (0.0, 1.0)}
    fixed |= {"both": (1.0, 1.0), "mix": (options.mix, 1 - options.mix)}
    return fixed[options.start]


def factorise(
    table: Tensor, rank: int, frequencies: Tensor, metric: Tensor, theta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(6): table (V, h), f (V,), E[h h^T] (h, h) -> rows (V, r), basis (r, h)."""
    left = frequencies.double().sqrt()[:, None]  # (V, 1)
    right, back = square_root(metric)  # (h, h): S, S^-1
    u, sigma, v = torch.linalg.svd(left * table.double() @ right, full_matrices=False)
    rank = enough(sigma, theta) if theta else rank
    rows = u[:, :rank] / left
    basis = sigma[:rank, None] * v[:rank] @ back
    rows, basis = balanced(rows, basis)
    return rows.to(table.dtype), basis.to(table.dtype)


def enough(sigma: Tensor, theta: float) -> int:
    """The smallest multiple of 16 whose part of sigma^2 exceeds theta; all, if none does."""
    kept = (sigma.square().cumsum(0) / sigma.square().sum())[ROUND_TO - 1 :: ROUND_TO]
    found = (kept > theta).nonzero()
    return ROUND_TO * (int(found[0]) + 1) if len(found) else len(sigma)


def square_root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric positive (h, h) -> S with S S = metric, and its inverse."""
    values, vectors = torch.linalg.eigh(metric.double())
    roots = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def power(metric: Tensor, exponent: float) -> Tensor:
    """Symmetric positive (h, h) to a power; the identity for 0."""
    if exponent == 0:
        return torch.eye(len(metric), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).pow(exponent)) @ vectors.T


def balanced(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The same product; column k of rows and row k of basis have equal mean squares."""
    tall, wide = (x.square().mean(dim=d).sqrt() for x, d in ((rows, 0), (basis, 1)))  # (r,)
    scale = (wide / tall).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    return rows * scale, basis / scale[:, None]


def weighted_error(table: Tensor, product: Tensor, frequencies: Tensor, metric: Tensor) -> float:
    """|| diag(f)^(1/2) (E - E1 E2) S ||^2, relative to that of E; shapes as in factorise."""
    sizes = []
    for matrix in (table.double() - product.double(), table.double()):
        square = torch.einsum("vh,hk,vk->v", matrix, metric.double(), matrix)
        sizes.append((frequencies.double() * square).sum())
    return float(sizes[0] / sizes[1])


# ----------------------------------------------------------------------- feature distillation, (4)


def feature_distance(wanted: Tensor, found: Tensor) -> Tensor:
    """(4), (n, features) -> (n,)."""
    wanted, found = wanted.float(), found.float()
    likeness = functional.cosine_similarity(wanted, found, dim=-1)
    return (wanted - found).abs().mean(dim=-1) - functional.logsigmoid(likeness)


def mean_by_tokens(values: Tensor, real: Tensor, told: Tensor) -> Tensor:
    """values, real, told (clips, n) -> (): a clip's mean over its real positions counts by its
    tokens to be found, so that batches can be split over processes."""
    means = (values * real).sum(dim=1) / real.sum(dim=1)  # (clips,)
    return (means * told.sum(dim=1)).sum() / told.sum()


class Distillation:
    """(5) without its cross entropy, as a loss term and a hook that counts the steps."""

    def __init__(self, teacher: nn.Module, seen: Seen, options: Options, steps: int) -> None:
        """`seen` is what the student's output is given, `steps` how many there will be."""
        self.teacher, self.seen, self.options = teacher, seen, options
        self.asked = Teacher(teacher, options.training.cache_encoder)
        ends = {"teacher_then_student": options.switch, "teacher": 1.0, "student": 0.0}
        self.teacher_steps = round(ends[options.states] * steps)

    def term(self, model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        self.teacher.to(batch.labels.device)
        old, new = (m.model.decoder.embed_tokens for m in (self.teacher, model))
        told = batch.labels != IGNORED  # (clips, n)
        real = told.flip(1).cumsum(1).flip(1) > 0  # everything up to the last that is told
        ids = batch.decoder_input_ids
        near = feature_distance(old(ids), new(ids))  # (clips, n)
        loss = self.options.input_weight * mean_by_tokens(near, real, told)
        if self.options.logit_weight == 0:
            return loss
        states = self.states(model, batch)[told].detach()  # (told, h)
        wanted = functional.linear(states, old.weight)  # (told, V)
        near = feature_distance(wanted, new.logits(states))
        return loss + self.options.logit_weight * near.mean()

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        """(clips, n, h); `model` has just computed its own."""
        if int(model.shear_steps) >= self.teacher_steps:
            return self.seen["states"]
        with watched(self.teacher.proj_out) as seen:
            self.asked(batch, batch.input_features)
            return seen["states"]

    def after_step(self, model: nn.Module, step: int, learning_rate: float) -> None:
        model.shear_steps += 1


@torch.no_grad()
def states_of(model: nn.Module, batch: Batch) -> Tensor:
    """What the decoder ends in, (clips, n, h)."""
    with watched(model.proj_out) as seen:
        ids = batch.decoder_input_ids
        model(batch.input_features, decoder_input_ids=ids, use_cache=False)
        return seen["states"]


@contextmanager
def watched(output: nn.Module) -> Iterator[Seen]:
    """A dictionary whose entry "states" is what the module was given last, (clips, n, h)."""
    seen: Seen = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["states"] = args[0]

    hook = output.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def step_counter(model: nn.Module) -> Iterator[None]:
    """The number of steps done, as a buffer: it is saved and resumed with the weights."""
    device = next(model.parameters()).device
    model.register_buffer("shear_steps", torch.zeros((), dtype=torch.int64, device=device))
    try:
        yield
    finally:
        del model.shear_steps


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Factorise the token table, then train with feature distillation.

    `work.record["shear"]` counts parameters and says how close the factors were at the start, in
    the plain norm and in those of look-ups and logits; or that the table was kept as it is, because
    the rank that theta needs saves nothing. Raises Problem for a `rank` that saves nothing, and
    what training.train raises.
    """
    refuse_quantised(model, "shear", options)
    refuse_rank(model, 1 if options.theta else options.rank)
    teacher = frozen_copy(model)
    frequencies = token_frequencies(model, work, options.floor)
    metric = second_moment(teacher, options, work)
    rows, basis = factors_of(model, options, frequencies, metric)
    if options.theta and not saves(len(basis), model):
        work.record["shear"] = kept_dense(len(basis), model)
        return model
    student = sheared(model, rows, basis)
    record: dict[str, Any] = {
        "rank": len(basis),
        "parameters": {"before": count_parameters(model), "after": count_parameters(student)},
        "macs": {"before": macs(model), "after": macs(student)},
        "start_error": start_errors(model, student, frequencies, metric),
    }
    record["training"] = distil(student, teacher, options, work)
    work.record["shear"] = record
    return student


def refuse_rank(model: nn.Module, rank: int) -> None:
    table = model.model.decoder.embed_tokens
    if isinstance(table, whisper.FactorisedTable):
        raise Problem(
            f"shear: the token table is factorised already, with rank {table.rows.embedding_dim}",
            hint="leave this step out, or start from the model before",
        )
    limit = min(table.weight.shape)
    if rank > limit:
        raise Problem(
            f"shear: rank {rank} is more than a table of {table.weight.shape[0]} tokens by "
            f"{table.weight.shape[1]} can have, {limit}",
            hint=f"set rank to {limit // 4}, a quarter, or less",
        )
    if not saves(rank, model):
        raise Problem(
            f"shear: two factors of rank {rank} have {factor_parameters(rank, model):,} "
            f"parameters, the token table has {table.weight.numel():,}: nothing would be saved",
            hint=f"set rank to {limit // 4}, a quarter of the width, or less",
        )


def saves(rank: int, model: nn.Module) -> bool:
    """Whether two factors of this rank have fewer parameters than the table."""
    return factor_parameters(rank, model) < model.model.decoder.embed_tokens.weight.numel()


def factor_parameters(rank: int, model: nn.Module) -> int:
    return rank * sum(model.model.decoder.embed_tokens.weight.shape)


def kept_dense(rank: int, model: nn.Module) -> dict[str, Any]:
    """What the record says of a table that stays as it is."""
    counted = {"parameters": count_parameters(model), "macs": macs(model)}
    return {
        "rank": None,
        "kept_dense": {
            "rank_needed": rank,
            "parameters_of_factors": factor_parameters(rank, model),
        },
        **{what: {"before": value, "after": value} for what, value in counted.items()},
    }


def factors_of(
    model: nn.Module, options: Options, frequencies: Tensor, metric: Tensor
) -> tuple[Tensor, Tensor]:
    """rows (V, r) and basis (r, h) by the options."""
    table = model.model.decoder.embed_tokens.weight.detach()
    f, m = powers(options)
    weights = (frequencies.double() ** f, power(metric, m))
    return factorise(table.cpu(), options.rank, *weights, options.theta)


def sheared(
    model: "WhisperForConditionalGeneration", rows: Tensor, basis: Tensor
) -> "WhisperForConditionalGeneration":
    """The model with a factorised table, before any training."""
    dense = {f"{TABLE}.weight", "proj_out.weight"}
    tensors = {name: t for name, t in model.state_dict().items() if name not in dense}
    tensors |= {f"{TABLE}.rows.weight": rows, f"{TABLE}.up.weight": basis.T.contiguous()}
    shapes = getattr(model.config, "edgewhisper", None) or {"format": FORMAT}
    return whisper.rebuild(model, tensors, {**shapes, "token_rank": len(basis)})


def token_frequencies(model: "WhisperForConditionalGeneration", work: Work, floor: float) -> Tensor:
    """Share of each token among those that decoding reads on the training clips, (V,)."""
    examples = Examples(work.train, model, work.processor, work.seed)
    read = [token for given, found in examples.texts for token in [*given, *found[:-1]]]
    counts = torch.bincount(torch.tensor(read), minlength=model.config.vocab_size).double()
    return (counts / counts.sum()).clamp_min(floor)


def second_moment(model: nn.Module, options: Options, work: Work) -> Tensor:
    """E[h h^T] over the positions whose next token is to be found, (h, h) float64."""
    width = model.config.d_model
    total, tokens = torch.zeros(width, width, dtype=torch.float64), 0
    clips = work.train[: options.calibration]
    for batch in batches(clips, model, work.processor, options.training.batch_size, LISTENING):
        states = states_of(model, batch)[batch.labels != IGNORED].cpu().double()  # (told, h)
        total += states.T @ states
        tokens += len(states)
    moment = total / tokens
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def start_errors(
    before: nn.Module, after: nn.Module, frequencies: Tensor, metric: Tensor
) -> dict[str, float]:
    table = before.model.decoder.embed_tokens.weight.detach().cpu()
    factors = after.model.decoder.embed_tokens
    product = (factors.rows.weight @ factors.up.weight.T).detach().cpu()
    even, plain = torch.ones(len(table)), torch.eye(table.shape[1])
    return {
        "table": weighted_error(table, product, even, plain),
        "embeddings": weighted_error(table, product, frequencies, plain),
        "logits": weighted_error(table, product, even, metric),
    }


def distil(student: nn.Module, teacher: nn.Module, options: Options, work: Work) -> dict[str, Any]:
    """Train the student by (5) -> how it went."""
    training = counted(options.training, len(work.train))
    asked = (options.input_weight, options.logit_weight, options.states, options.switch)
    with watched(student.proj_out) as seen, step_counter(student):
        loss_term, after_step = hooks(teacher, seen, options, training.steps)
        log = train(
            student,
            work.processor,
            work.train,
            training,
            run_dir=work.run_dir / "shear-training",
            seed=work.seed + 2,
            identity=repr(asked),
            loss_term=loss_term,
            after_step=after_step,
            label="shear: distilling",
        )
    return log.summary()


def hooks(
    teacher: nn.Module, seen: Seen, options: Options, steps: int
) -> tuple[LossTerm | None, AfterStep | None]:
    if options.input_weight == 0 and options.logit_weight == 0:
        return None, None
    distillation = Distillation(teacher, seen, options, steps)
    return distillation.term, distillation.after_step
