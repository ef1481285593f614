"""Whisper-KDQ, later DQ-Whisper: guided knowledge distillation and quantisation (Shao et al. 2023,
arXiv:2305.10788).

A smaller Whisper learns from a larger one on speech of the target language. Each decoder layer of
the student imitates the nearest decoder layer of the teacher, and the decoder is trained with its
weights quantised. Each of the two guides the other: the layers with the largest quantisation loss
are distilled, and the layers nearest to the teacher are quantised.

    paper       here        shape
    hs_i, ht_j  hidden      (rows, f_s), (rows, f_t)  fc1's output after GELU, in layer i or j
    A           adapter     (f_s, f_t)                learnt, shared by all layers, then dropped
    W_i         fc1_weight  (f_s, d_s)                weight of fc1
    z_s, z_t    logits      (tokens, V)
    m(i)        matches     (N_s,)                    the teacher's layer that layer i imitates
    T, alpha    temperature, alpha
    Q           export.quantise.fake_quantise

    softmax_T(v) = softmax(v / T)
    D_ij = T^2 sum (softmax_T(hs_i) - softmax_T(A ht_j))^2              feature_distance     (1)
    K = T^2 KL(softmax_T(z_t) || softmax_T(z_s))                        T^2 divergence       (2)
    L = (1 - alpha) CE + alpha (1 / N_s sum_i D_i,m(i) + K)             distillation         (3)
    m(i) = argmin_j D_ij, of all j or of j >= m(i - 1)                  nolimit, limit       (4)
    D_ij = T^2 sum |softmax_T(W_i) - softmax_T(A W_j B^T)|              weight_distance      (5)
    q_i = |W - Q(W)|_1 / |W|_1, all quantised weights of layer i        rounding_loss        (6)

(5) replaces (1) if `guided_mode` is "KDQ"; B (d_s, d_t) adapts the width. Losses are sums over
features and means over the labelled tokens. The authors sum over tokens, which is equivalent for
Adam as long as all terms do. (5) has no tokens to sum over, so its weight relative to the other
terms is our choice.

The paper describes the guidance in one sentence. Our reading, with both shares at 1 in the
published configuration: in each step, D_i,m(i) counts for the layers with the largest q_i, and the
next pass quantises the layers with the smallest D_i,m(i). Layers that are not quantised at the end
are stored in 16 bits.

(4) and the guidance use the distances of one pass over the clips of all processes, so the matches
do not depend on the number of processes. A step of several passes (`training.accumulate`) chooses
new matches in each pass, because distances of the whole step would need another forward pass. It
equals a step of one pass only with static matches and both shares at 1.

Differences:

- The authors scale by the signed maximum of a weight, so a weight below minus the maximum would
  overflow in int8. We use max|W| per output; `scales` = "tensor" has one scale per weight matrix,
  as theirs.
- Their recomputed activations include later tokens, because the causal mask is missing. Ours are
  those of the forward pass itself.
- "dp" (ours): the best of all monotone matches. The greedy "limit" stays at the last layer once a
  layer has matched it.
- `features` = "normalised" (ours): (1) and (5) as means over layer-normalised features. A softmax
  over thousands of activations is nearly uniform, and its distances are nearly zero.
- `encoder` (ours): the encoder is distilled in the same way. In the paper it has no gradients.
- The authors cut windows to 15 s. Here the window is the checkpoint's.
- An adapter between equal widths starts as the identity. Without a `teacher`, the teacher is the
  model before the step: training for quantisation alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.context import Context
from edgewhisper.compress.layer_matching import (
    MATCHING,
    Hidden,
    fc1_weight,
    feature_distance,
    ffn_width,
    hidden_of,
    layers_of,
    rows_of,
    weight_distance,
)
from edgewhisper.compress.qat import (
    Precision,
    Schemes,
    errors,
    fake_quantised,
    note_bits,
    settle,
    settled_encoder,
)
from edgewhisper.compress.shrink import slimmed
from edgewhisper.compress.teacher import Teacher, divergence, forward, frozen_copy, load_teacher
from edgewhisper.examples import IGNORED, Batch
from edgewhisper.recipe import Range
from edgewhisper.training import LossTerm, Training, cross_entropy
from export.problem import Problem
from export.quantise import fake_quantise, is_quantised, schemes

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Share = Annotated[float, Range(0, 1)]
REMOVES = ("quantise.encoder", "quantise.decoder")


@dataclass(frozen=True)
class Options:
    teacher: str = ""
    """A directory or hub id. Empty: a copy of the model before this step."""
    distill_mode: Literal["features", "logits"] = "features"
    """features: (3). logits: (3) without the distances D."""
    guided_mode: Literal["KD", "KDQ"] = "KD"
    """KD: layers imitate activations, (1). KDQ: layers imitate weights of fc1, (5)."""
    matching: Literal["static", "limit", "nolimit", "dp"] = "limit"
    """static: evenly spaced, layer i of 6 imitates layer 2 i + 1 of 12. limit, nolimit: (4). dp
    (ours): the best monotone matches."""
    features: Literal["softmax", "normalised"] = "softmax"
    """What (1) and (5) compare: softmax of each row (the paper), or its layer norm (ours)."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
    """T of (1), (2) and (5)."""
    alpha: Share = 0.9
    """Weight of distillation in (3)."""
    distil_share: Share = 1.0
    """Share of the layers that imitate: those with the largest rounding loss (6)."""
    quantise_share: Share = 1.0
    """Share of the layers that are quantised: those nearest to the teacher."""
    encoder: bool = False
    """Ours: train and distil the encoder too."""
    quantise: Precision = field(default_factory=lambda: Precision(encoder=16))
    """[step.quantise]: bits of the weights; the paper has 16 for the encoder."""
    training: Training = field(
        default_factory=lambda: Training(steps=400, learning_rate=3e-5, mask_mels=15)
    )


def quantises(options: Options) -> bool:
    """Whether the step stores any weight in fewer than 32 bits."""
    return options.quantise.quantised


def allowed_after_quantisation(options: Options) -> bool:
    """KDQ trains under the rounding of all quantised weights and returns them to their grids."""
    return True


def sides(options: Options) -> tuple[str, ...]:
    """Return the sides of the model that learn."""
    return ("encoder", "decoder") if options.encoder else ("decoder",)


def rounding_loss(chosen: Schemes) -> Tensor:
    """(6) of one layer, given its quantised weights; -> ()."""
    pairs = [(layer.weight.detach(), scheme) for layer, scheme in chosen.items()]
    if not pairs:
        return torch.zeros(())
    lost = sum((weight - fake_quantise(weight, scheme)).abs().sum() for weight, scheme in pairs)
    return lost / sum(weight.abs().sum() for weight, _ in pairs).clamp_min(1e-30)


def published_bytes(model: nn.Module, bits: int = 8) -> int:
    """Return a model's size in bytes as the paper counts it.

    Matrices, norm weights and token table of the decoder have `bits`; positions, biases and the
    encoder have 16. By this count, small in 16 bits is 5.17 times as large as base in 8 bits and
    10.47 times as large as tiny in 8 bits (the paper: 5.18 and 10.48).
    """
    narrow = 0
    for name, parameter in model.model.decoder.named_parameters():
        if name.endswith(".weight") and "embed_positions" not in name:
            narrow += parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return (narrow * bits + (total - narrow) * 16) // 8


# --------------------------------------------------------------------------------- the adapters


class Distiller(nn.Module):
    """Adapters, and the losses and matches of each layer in the last pass.

    It is a module of the student during training, so that it is optimised, saved and resumed with
    the weights.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, options: Options) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        for side in sides(options):
            layers = len(layers_of(student, side))
            self.register_buffer(f"{side}_losses", torch.full((layers,), torch.nan))
            self.register_buffer(f"{side}_matches", torch.zeros(layers, dtype=torch.int64))
            if options.distill_mode == "logits":
                continue
            for ours in layers_of(student, side):
                for theirs in layers_of(teacher, side):
                    self._add(side, ffn_width(theirs), ffn_width(ours))
            if options.guided_mode == "KDQ":
                self._add(f"{side}_width", teacher.config.d_model, student.config.d_model)

    def _add(self, kind: str, d_in: int, d_out: int) -> None:
        name = f"{kind}_{d_in}_{d_out}"
        if name in self.adapters:
            return
        self.adapters[name] = adapter = nn.Linear(d_in, d_out)
        if d_in == d_out:
            nn.init.eye_(adapter.weight)
            nn.init.zeros_(adapter.bias)

    def adapt(self, kind: str, theirs: Tensor, width: int) -> Tensor:
        """Adapt features of the teacher, (..., d_in) -> (..., width)."""
        return self.adapters[f"{kind}_{theirs.shape[-1]}_{width}"](theirs)


# ------------------------------------------------------------------------------- distillation, (3)


@dataclass(frozen=True)
class Lesson:
    """Inputs of the loss. Forward passes fill `ours` and `theirs`, the two models' activations."""

    teacher: nn.Module
    student: nn.Module
    """It has a Distiller as its attribute `distiller`."""
    ours: Hidden
    theirs: Hidden
    quantised: Schemes
    options: Options


def distillation(lesson: Lesson) -> LossTerm:
    """Return the loss term: (3) minus the cross entropy, which the training loop adds."""
    options, teacher = lesson.options, lesson.teacher
    cached = Teacher(teacher, options.training.cache_encoder)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        labelled = batch.labels != IGNORED
        cacheable = not options.encoder  # distances need the encoder's forward pass
        target = cached(batch, batch.input_features) if cacheable else forward(teacher, batch)
        t = options.temperature
        loss = t**2 * divergence(target.logits[labelled], outputs.logits[labelled], t)  # (2)
        if options.distill_mode == "features":
            for side in sides(options):
                loss = loss + imitation(side, lesson, batch.labels)
        return options.alpha * (loss - cross_entropy(outputs.logits, batch.labels))

    return term


def imitation(side: str, lesson: Lesson, labels: Tensor) -> Tensor:
    """Return 1 / N_s sum_i D_i,m(i) of one side, and store D and m in the distiller."""
    distiller = lesson.student.distiller
    matches = MATCHING[lesson.options.matching](costs(side, lesson, labels))
    distance = distance_of(side, lesson, labels)
    losses = torch.stack([distance(i, j) for i, j in enumerate(matches)])
    getattr(distiller, f"{side}_losses").copy_(over_processes(losses.detach(), labels))
    getattr(distiller, f"{side}_matches").copy_(torch.tensor(matches))
    mask = torch.zeros_like(losses)
    mask[imitating(side, lesson)] = 1
    # distributed training needs a gradient for every parameter, also of adapters without a match
    unused = torch.stack([parameter.sum() for parameter in distiller.parameters()]).sum()
    return (losses * mask).sum() / len(losses) + 0 * unused


@torch.no_grad()
def costs(side: str, lesson: Lesson, labels: Tensor) -> Tensor:
    """Return D_ij of all pairs, (N_s, N_t); zeros for static matches, which do not depend on D."""
    ours, theirs = (len(layers_of(model, side)) for model in (lesson.student, lesson.teacher))
    if lesson.options.matching == "static":
        return torch.zeros(ours, theirs)
    distance = distance_of(side, lesson, labels)
    rows = [torch.stack([distance(i, j) for j in range(theirs)]) for i in range(ours)]
    return over_processes(torch.stack(rows), labels).cpu()


def over_processes(means: Tensor, labels: Tensor) -> Tensor:
    """Average means over the tokens of all processes, given those over this process's tokens.

    Matches and guidance must be the same on every process, and the same as with one process.
    """
    from accelerate import PartialState
    from accelerate.utils import reduce

    if PartialState().num_processes == 1:
        return means
    tokens = (labels != IGNORED).sum().to(means.dtype)
    sums = reduce(torch.cat([means.flatten() * tokens, tokens[None]]), reduction="sum")
    return (sums[:-1] / sums[-1]).view_as(means)


def distance_of(side: str, lesson: Lesson, labels: Tensor) -> Callable[[int, int], Tensor]:
    """Return the function (i, j) -> D_ij: (1), or (5) if guided_mode is "KDQ"."""
    adapt, options = lesson.student.distiller.adapt, lesson.options
    form = options.features, options.temperature
    students, teachers = (layers_of(model, side) for model in (lesson.student, lesson.teacher))

    def of_weights(i: int, j: int) -> Tensor:
        ours, theirs = fc1_weight(students[i]), fc1_weight(teachers[j])
        theirs = adapt(f"{side}_width", theirs, ours.shape[1])  # (f_t, d_s)
        return weight_distance(ours, adapt(side, theirs.T, len(ours)).T, *form)

    def of_features(i: int, j: int) -> Tensor:
        ours, counts = rows_of(lesson.ours[side][i], labels, side)
        theirs, _ = rows_of(lesson.theirs[side][j], labels, side)
        return feature_distance(ours, adapt(side, theirs, ours.shape[-1]), counts, *form)

    return of_weights if options.guided_mode == "KDQ" else of_features


# -- guidance: which layers imitate, which are quantised


def imitating(side: str, lesson: Lesson) -> list[int]:
    """Return the layers with the largest (6); `distil_share` gives their number."""
    layers = list(layers_of(lesson.student, side))
    count = round(lesson.options.distil_share * len(layers))
    if count == len(layers):
        return list(range(count))
    parts = [part_of(lesson.quantised, layer) for layer in layers]
    losses = torch.stack([rounding_loss(part).cpu() for part in parts])
    return losses.argsort(descending=True, stable=True)[:count].tolist()


def ready(side: str, model: nn.Module, options: Options) -> list[int]:
    """Return the layers to quantise: those nearest to the teacher in the last pass.

    Before the first pass there are none, unless `quantise_share` is 1.
    """
    losses = getattr(model.distiller, f"{side}_losses")
    count = round(options.quantise_share * len(losses))
    if count == len(losses):
        return list(range(count))
    return losses.argsort(stable=True)[:count].tolist() if losses.isfinite().all() else []


def part_of(quantised: Schemes, layer: nn.Module) -> Schemes:
    """Return the quantised modules of one layer."""
    inside = set(layer.modules())
    return {module: scheme for module, scheme in quantised.items() if module in inside}


def enabled(model: nn.Module, quantised: Schemes, options: Options) -> Schemes:
    """Return the modules that the next pass quantises: all except in layers that are not ready."""
    waiting: set[nn.Module] = set()
    for side in sides(options):
        ready_layers = set(ready(side, model, options))
        for number, layer in enumerate(layers_of(model, side)):
            waiting |= set() if number in ready_layers else set(layer.modules())
    return {module: scheme for module, scheme in quantised.items() if module not in waiting}


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Distil and quantise the student; `context.record["kdq"]` has the matches of its layers.

    Raises Problem if teacher and student do not fit, or the options give no distances for the
    guidance; and what training.train raises.
    """
    refuse_guidance_without_distances(options)
    if options.teacher:
        teacher = load_teacher(options.teacher, model, context.processor, "kdq")
    else:
        teacher = frozen_copy(model)
    if not is_quantised(model):
        model, _ = slimmed(model)
    note_bits(model, options.quantise)
    quantised = schemes(model)
    with distilling(model, teacher, options, context) as distiller:
        log = trained(model, teacher, quantised, options, context)
        record: dict[str, Any] = {
            "training": log,
            "matches": {s: getattr(distiller, f"{s}_matches").tolist() for s in sides(options)},
            "quantised": {side: ready(side, model, options) for side in sides(options)},
        }
        keep_16_bits(model, record["quantised"], options)
    quantised = schemes(model)
    record["error"] = errors(quantised)
    record["published_bytes"] = {
        "teacher, 16 bits": published_bytes(teacher, 16),
        "student": published_bytes(model, options.quantise.decoder),
    }
    settle(quantised)
    context.record["kdq"] = record
    return model


def refuse_guidance_without_distances(options: Options) -> None:
    """Raise Problem for quantise_share below 1 with distill_mode "logits"."""
    if options.quantise_share < 1 and options.distill_mode == "logits":
        raise Problem(
            f"kdq: quantise_share is {options.quantise_share:g}, which chooses layers by their "
            "distance to the teacher's, and distill_mode 'logits' does not measure distances",
            hint="set distill_mode to 'features', or quantise_share to 1",
        )


@contextmanager
def distilling(
    model: nn.Module, teacher: nn.Module, options: Options, context: Context
) -> Iterator[Distiller]:
    """Attach a Distiller to the model, and freeze the encoder unless it learns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        distiller = Distiller(teacher, model, options)
    before = [(p, p.requires_grad) for p in model.model.encoder.parameters()]
    model.distiller = distiller.to(next(model.parameters()).device)
    if not options.encoder:
        model.model.encoder.requires_grad_(False)
    try:
        yield distiller
    finally:
        del model.distiller
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def trained(
    model: "WhisperForConditionalGeneration",
    teacher: nn.Module,
    quantised: Schemes,
    options: Options,
    context: Context,
) -> dict[str, Any]:
    """Train the student by (3), in place; return the training's summary."""
    with (
        settled_encoder(model, quantised, not options.encoder and options.training.cache_encoder),
        hidden_of(model, sides(options)) as ours,
        hidden_of(teacher, sides(options)) as theirs,
        fake_quantised(model, lambda: enabled(model, quantised, options)),
    ):
        return context.trained(
            model,
            options.training,
            "kdq",
            identity=repr(options),
            loss_term=distillation(Lesson(teacher, model, ours, theirs, quantised, options)),
            label="kdq: distilling",
        )


def keep_16_bits(
    model: nn.Module, ready_layers: dict[str, Sequence[int]], options: Options
) -> None:
    """Record at least 16 bits for the layers that are not ready."""
    for side, numbers in ready_layers.items():
        for number, shape in enumerate(model.config.edgewhisper[side]):
            if number not in numbers and options.quantise_share < 1:
                shape["bits"] = {name: max(16, bits) for name, bits in shape["bits"].items()}
