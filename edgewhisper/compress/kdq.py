"""Whisper-KDQ, later DQ-Whisper: guided knowledge distillation and quantisation (Shao et al. 2023,
arXiv:2305.10788).

A smaller Whisper learns from a larger one on speech of the target language. Each layer of the
student's decoder imitates the teacher's layer that it is nearest to at the moment, and the decoder
is trained with the rounding of its weights. The two guide each other: the layers that lose most by
quantisation are distilled, the layers that have learnt most are quantised.

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
    K = T^2 KL(softmax_T(z_t) || softmax_T(z_s))                        divergence           (2)
    L = (1 - alpha) CE + alpha (1 / N_s sum_i D_i,m(i) + K)             distillation         (3)
    m(i) = argmin_j D_ij, of all j or of j >= m(i - 1)                  nolimit, limit       (4)
    D_ij = T^2 sum |softmax_T(W_i) - softmax_T(A W_j B^T)|              weight_distance      (5)
    q_i = |W - Q(W)|_1 / |W|_1, all quantised weights of layer i        rounding_loss        (6)

(5) replaces (1) where `guided_mode` is "KDQ"; B (d_s, d_t) adapts the width. Losses are sums over
features and means over the tokens to be found; the authors sum over tokens, which for Adam is the
same as long as all terms do. (5) has no tokens to sum over: its weight beside the others is ours.

The paper describes the guidance in a sentence. Our reading of it, with both shares at 1 in the
published configuration: at each step, D_i,m(i) counts for the layers with the largest q_i, and in
the next pass the layers with the smallest D_i,m(i) see rounded weights. Layers that are not
quantised in the end are stored in 16 bits.

(4) and the guidance go by the distances of one pass, over the clips of all processes, so two
processes match as one does. A step of several passes (`training.accumulate`) chooses anew in each
of them, for the costs of the whole step would take a forward pass more: only with static matches
and both shares at 1 is it the same as a step of one pass.

Where we differ, each by an option named below or because a published detail is an oversight:

- The authors scale by the signed maximum of a weight; a weight below minus that would overflow in
  int8. We take max|W|, for every output (`scales` = "tensor" is theirs: one for the whole weight).
- Their recomputed activations see later tokens, for want of the causal mask. Ours are those of the
  forward pass itself.
- "dp" (ours): the best of all monotone matches. The greedy "limit" is stuck at the last layer as
  soon as one layer has picked it.
- `features` = "normalised" (ours): (1) and (5) between layer-normalised features, as means. A
  softmax over thousands of activations is nearly uniform, and its distances nearly zero.
- `encoder` (ours): the encoder learns too, likewise. The paper's has no gradients.
- The authors cut windows to 15 s. Here the window is the checkpoint's.
- An adapter between equal widths starts as the identity.
- Without a `teacher`, it is the model as it was before the step: training for quantisation alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper import whisper
from edgewhisper.compress.near import Teacher, freeze, frozen_copy
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
from edgewhisper.compress.work import Work
from edgewhisper.examples import IGNORED, Batch
from edgewhisper.recipe import Range
from edgewhisper.training import LossTerm, Training, cross_entropy, train
from export.problem import Problem
from export.quantise import fake_quantise, is_quantised, schemes

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Hidden = dict[str, list[Tensor]]
"""Side -> what enters fc2 in each of its layers, (clips, positions, ffn)."""
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Options:
    teacher: str = ""
    """A directory or hub id; empty: the model as it comes into this step."""
    distill_mode: Literal["features", "logits"] = "features"
    """"logits" leaves (1) out of (3)."""
    guided_mode: Literal["KD", "KDQ"] = "KD"
    """KD: layers imitate activations (1). KDQ: weights of fc1 (5)."""
    matching: Literal["static", "limit", "nolimit", "dp"] = "limit"
    """static: evenly spaced, layer i of 6 imitates layer 2 i + 1 of 12. The others: see (4);
    chosen by the clips of a pass, whatever the number of processes that share it."""
    features: Literal["softmax", "normalised"] = "softmax"
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0
    """T."""
    alpha: Share = 0.9
    distil_share: Share = 1.0
    """Share of the layers, those with the largest (6), that imitate."""
    quantise_share: Share = 1.0
    """Share of the layers, those nearest to the teacher, that are quantised."""
    encoder: bool = False
    """Train and distil the encoder too."""
    quantise: Precision = field(default_factory=lambda: Precision(encoder=16))
    """[step.quantise]: the bits; the paper has the encoder in 16."""
    training: Training = field(
        default_factory=lambda: Training(steps=400, learning_rate=3e-5, mask_mels=15)
    )


# ------------------------------------------------------------------------- distances, (1) (2) (5)


def feature_distance(student: Tensor, teacher: Tensor, counts: Tensor, options: Options) -> Tensor:
    """(1) of adapted activations, (n, f) both -> (); each row counts as `counts` (n,) says."""
    off = comparable(student, options) - comparable(teacher, options)
    return (counts * added(off.square(), options)).sum()


def weight_distance(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """(5) of adapted weights, (f, d) both -> ()."""
    off = comparable(student, options) - comparable(teacher, options)
    rows = added(off.abs(), options)
    return rows.sum() if options.features == "softmax" else rows.mean()


def comparable(features: Tensor, options: Options) -> Tensor:
    """(n, f) -> (n, f)."""
    if options.features == "softmax":
        return (features.float() / options.temperature).softmax(-1)
    return functional.layer_norm(features.float(), features.shape[-1:])


def added(differences: Tensor, options: Options) -> Tensor:
    """(n, f) -> (n,): a sum times T^2 for the paper's features, a mean for ours."""
    if options.features == "softmax":
        return options.temperature**2 * differences.sum(-1)
    return differences.mean(-1)


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """(2) of logits (tokens, V) -> (), a mean per token."""
    wanted, found = ((z.float() / temperature).log_softmax(-1) for z in (teacher, student))
    mean = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    return temperature**2 * mean


def rounding_loss(chosen: Schemes) -> Tensor:
    """(6) of one layer's weights -> ()."""
    pairs = [(layer.weight.detach(), scheme) for layer, scheme in chosen.items()]
    if not pairs:
        return torch.zeros(())
    lost = sum((weight - fake_quantise(weight, scheme)).abs().sum() for weight, scheme in pairs)
    return lost / sum(weight.abs().sum() for weight, _ in pairs).clamp_min(1e-30)


# ----------------------------------------------------------------------------------- matching, (4)


def static(cost: Tensor) -> list[int]:
    """The last layer imitates the last, those before at even distances. cost (N_s, N_t)."""
    mine, theirs = cost.shape
    return [max(0, (i + 1) * theirs // mine - 1) for i in range(mine)]


def nolimit(cost: Tensor) -> list[int]:
    return cost.argmin(dim=1).tolist()


def limit(cost: Tensor) -> list[int]:
    """From the first layer on, the nearest one that is not below the match of the layer before."""
    matches, lowest = [], 0
    for row in cost:
        lowest += int(row[lowest:].argmin())
        matches.append(lowest)
    return matches


def monotone(cost: Tensor) -> list[int]:
    """The cheapest of all matches that do not go back, by dynamic programming.

    best[i, j]: what layers 0 to i cost at least where i imitates j.
    """
    best = [cost[0]]
    for row in cost[1:]:
        best.append(row + best[-1].cummin(0).values)
    last, matches = cost.shape[1] - 1, []
    for costs in reversed(best):
        last = int(costs[: last + 1].argmin())
        matches.append(last)
    return matches[::-1]


MATCHING: dict[str, Callable[[Tensor], list[int]]] = {
    "static": static,
    "nolimit": nolimit,
    "limit": limit,
    "dp": monotone,
}


# --------------------------------------------------------------------------------- size, as told


def published_bytes(model: nn.Module, bits: int = 8) -> int:
    """A model's size as the paper counts it, with its decoder in so many bits.

    The decoder's matrices, norms' weights and token table are `bits` wide; positions, biases and
    the encoder 16. By it, small in 16 bits is 5.17 times as large as base and 10.47 times as large
    as tiny in 8 (the paper has 5.18 and 10.48), of which 3.33 and 6.40 are the smaller model's.
    """
    few = 0
    for name, parameter in model.model.decoder.named_parameters():
        if name.endswith(".weight") and "embed_positions" not in name:
            few += parameter.numel()
    everything = sum(parameter.numel() for parameter in model.parameters())
    return (few * bits + (everything - few) * 16) // 8


# ------------------------------------------------------------------- what trains beside the student


class Distiller(nn.Module):
    """Adapters, and what the last pass told of each layer. A module of the student while it
    trains, so that all of it is optimised, saved and resumed with the weights."""

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
                    self._add(side, _units(theirs), _units(ours))
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
        """(..., d_in) -> (..., width)."""
        return self.adapters[f"{kind}_{theirs.shape[-1]}_{width}"](theirs)


def sides(options: Options) -> tuple[str, ...]:
    return ("encoder", "decoder") if options.encoder else ("decoder",)


def layers_of(model: nn.Module, side: str) -> nn.ModuleList:
    return getattr(model.model, side).layers


def _units(layer: nn.Module) -> int:
    return len(getattr(layer.fc1, "up", layer.fc1).weight)


def fc1_weight(layer: nn.Module) -> Tensor:
    """(ffn, d_model), whatever form the layer has; features that are not read are zero."""
    fc1 = layer.fc1
    first = getattr(fc1, "down", fc1)
    weight, inputs = first.weight, getattr(first, "inputs", None)
    if inputs is not None:
        wide = weight.new_zeros(len(weight), layer.embed_dim)
        weight = wide.index_copy(1, inputs, weight)
    return weight if first is fc1 else fc1.up.weight @ weight


@contextmanager
def hidden_of(model: nn.Module, options: Options) -> Iterator[Hidden]:
    """What enters fc2 in the last forward pass: the activations that fc1 and GELU made."""
    seen: Hidden = {side: [torch.empty(0)] * len(layers_of(model, side)) for side in sides(options)}

    def hook(side: str, number: int) -> Callable[[nn.Module, Any], None]:
        def remember(module: nn.Module, args: Any) -> None:
            seen[side][number] = args[0]

        return remember

    handles = [
        layer.fc2.register_forward_pre_hook(hook(side, number))
        for side in seen
        for number, layer in enumerate(layers_of(model, side))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rows_of(hidden: Tensor, labels: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Hidden (clips, positions, f) -> the rows that count (n, f), and how much each does (n,).

    In the decoder, positions whose next token is to be found; in the encoder all, a clip counting
    by its tokens, so that batches can be split over processes.
    """
    told = labels != IGNORED  # (clips, tokens)
    if side == "decoder":
        return hidden[told], hidden.new_full((int(told.sum()),), 1 / int(told.sum()))
    clips = told.sum(dim=1) / (told.sum() * hidden.shape[1])  # (clips,)
    return hidden.flatten(0, 1), clips.to(hidden.dtype).repeat_interleave(hidden.shape[1])


# ------------------------------------------------------------------------------- distillation, (3)


@dataclass(frozen=True)
class Lesson:
    """Who learns what from whom. The models' forward passes fill `ours` and `theirs`."""

    teacher: nn.Module
    student: nn.Module
    """With its Distiller as `distiller`."""
    ours: Hidden
    theirs: Hidden
    quantised: Schemes
    options: Options


def distillation(lesson: Lesson) -> LossTerm:
    """(3) without the cross entropy that training adds on its own."""
    options, teacher = lesson.options, lesson.teacher
    asked = Teacher(teacher, options.training.cache_encoder)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        told = batch.labels != IGNORED
        if options.encoder:
            wanted = outputs_of(teacher, batch)
        else:
            wanted = asked(batch, batch.input_features)
        learnt = divergence(wanted.logits[told], outputs.logits[told], options.temperature)
        if options.distill_mode == "features":
            for side in sides(options):
                learnt = learnt + imitation(side, lesson, batch.labels)
        return options.alpha * (learnt - cross_entropy(outputs.logits, batch.labels))

    return term


@torch.no_grad()
def outputs_of(teacher: nn.Module, batch: Batch) -> Any:
    """The teacher's outputs, its encoder run as well: hooks want what passes through it."""
    ids = batch.decoder_input_ids
    teacher.to(ids.device)
    return teacher(batch.input_features, decoder_input_ids=ids, use_cache=False)


def imitation(side: str, lesson: Lesson, labels: Tensor) -> Tensor:
    """1 / N_s sum_i D_i,m(i) of one side; notes D and m in the distiller."""
    distiller = lesson.student.distiller
    matches = MATCHING[lesson.options.matching](costs(side, lesson, labels))
    distance = distance_of(side, lesson, labels)
    losses = torch.stack([distance(i, j) for i, j in enumerate(matches)])
    getattr(distiller, f"{side}_losses").copy_(over_processes(losses.detach(), labels))
    getattr(distiller, f"{side}_matches").copy_(torch.tensor(matches))
    kept = torch.zeros_like(losses)
    kept[in_need(side, lesson)] = 1
    # processes wait for the gradient of every parameter, of adapters without a match too
    idle = torch.stack([parameter.sum() for parameter in distiller.parameters()]).sum()
    return (losses * kept).sum() / len(losses) + 0 * idle


@torch.no_grad()
def costs(side: str, lesson: Lesson, labels: Tensor) -> Tensor:
    """D_ij of all pairs, (N_s, N_t); a static match does not ask for them."""
    ours, theirs = (len(layers_of(model, side)) for model in (lesson.student, lesson.teacher))
    if lesson.options.matching == "static":
        return torch.zeros(ours, theirs)
    distance = distance_of(side, lesson, labels)
    rows = [torch.stack([distance(i, j) for j in range(theirs)]) for i in range(ours)]
    return over_processes(torch.stack(rows), labels).cpu()


def over_processes(means: Tensor, labels: Tensor) -> Tensor:
    """Means over this process's tokens -> over the tokens of all processes in this pass. What is
    chosen by them must be the same everywhere, and the same as on one process."""
    from accelerate import PartialState
    from accelerate.utils import reduce

    if PartialState().num_processes == 1:
        return means
    tokens = (labels != IGNORED).sum().to(means.dtype)
    sums = reduce(torch.cat([means.flatten() * tokens, tokens[None]]), reduction="sum")
    return (sums[:-1] / sums[-1]).view_as(means)


def distance_of(side: str, lesson: Lesson, labels: Tensor) -> Callable[[int, int], Tensor]:
    """The function of two layers' numbers that (1), or (5), is."""
    adapt, options = lesson.student.distiller.adapt, lesson.options
    mine, others = (layers_of(model, side) for model in (lesson.student, lesson.teacher))

    def of_weights(i: int, j: int) -> Tensor:
        ours, theirs = fc1_weight(mine[i]), fc1_weight(others[j])
        theirs = adapt(f"{side}_width", theirs, ours.shape[1])  # (f_t, d_s)
        return weight_distance(ours, adapt(side, theirs.T, len(ours)).T, options)

    def of_features(i: int, j: int) -> Tensor:
        ours, counts = rows_of(lesson.ours[side][i], labels, side)
        theirs, _ = rows_of(lesson.theirs[side][j], labels, side)
        return feature_distance(ours, adapt(side, theirs, ours.shape[-1]), counts, options)

    return of_weights if options.guided_mode == "KDQ" else of_features


# -- who is distilled, who is quantised


def in_need(side: str, lesson: Lesson) -> list[int]:
    """Layers with the largest (6), as many as `distil_share` says."""
    layers = list(layers_of(lesson.student, side))
    count = round(lesson.options.distil_share * len(layers))
    if count == len(layers):
        return list(range(count))
    parts = [part_of(lesson.quantised, layer) for layer in layers]
    lost = torch.stack([rounding_loss(part).cpu() for part in parts])
    return lost.argsort(descending=True, stable=True)[:count].tolist()


def ready(side: str, model: nn.Module, options: Options) -> list[int]:
    """Layers that were nearest to the teacher in the last pass; before it none, unless all are."""
    losses = getattr(model.distiller, f"{side}_losses")
    count = round(options.quantise_share * len(losses))
    if count == len(losses):
        return list(range(count))
    return losses.argsort(stable=True)[:count].tolist() if losses.isfinite().all() else []


def part_of(quantised: Schemes, layer: nn.Module) -> Schemes:
    inside = set(layer.modules())
    return {module: scheme for module, scheme in quantised.items() if module in inside}


def enabled(model: nn.Module, quantised: Schemes, options: Options) -> Schemes:
    """What the next pass sees rounded: all but the layers that are not ready."""
    waiting: set[nn.Module] = set()
    for side in sides(options):
        here = set(ready(side, model, options))
        for number, layer in enumerate(layers_of(model, side)):
            waiting |= set() if number in here else set(layer.modules())
    return {module: scheme for module, scheme in quantised.items() if module not in waiting}


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """The student, distilled and quantised; `work.record["kdq"]` says what imitated what.

    Raises Problem where the teacher does not fit, or the options leave nothing to guide by, and
    what training.train raises.
    """
    refuse(options)
    teacher = find_teacher(model, options, work)
    if not is_quantised(model):
        model, _ = slimmed(model)
    note_bits(model, options.quantise)
    quantised = schemes(model)
    with distilling(model, teacher, options, work) as distiller:
        log = trained(model, teacher, quantised, options, work)
        record: dict[str, Any] = {
            "training": log,
            "matches": {s: getattr(distiller, f"{s}_matches").tolist() for s in sides(options)},
            "quantised": {side: ready(side, model, options) for side in sides(options)},
        }
        leave_wide(model, record["quantised"], options)
    quantised = schemes(model)
    record["error"] = errors(quantised)
    record["published_bytes"] = {
        "teacher, 16 bits": published_bytes(teacher, 16),
        "student": published_bytes(model, options.quantise.decoder),
    }
    settle(quantised)
    work.record["kdq"] = record
    return model


def refuse(options: Options) -> None:
    if options.quantise_share < 1 and options.distill_mode == "logits":
        raise Problem(
            f"kdq: quantise_share {options.quantise_share:g} chooses layers by their distance to "
            "the teacher's, which distill_mode 'logits' does not measure",
            hint="set distill_mode to 'features', or quantise_share to 1",
        )


def find_teacher(model: nn.Module, options: Options, work: Work) -> nn.Module:
    if not options.teacher:
        return frozen_copy(model)
    teacher = whisper.load(options.teacher)
    vocabulary = whisper.load_processor(options.teacher).tokenizer.get_vocab()
    check_teacher(teacher, model, options.teacher)
    check_vocabulary(vocabulary, work.processor.tokenizer.get_vocab(), options.teacher)
    return freeze(teacher)


def check_teacher(teacher: nn.Module, student: nn.Module, name: str) -> None:
    """Both hear the same features and speak of the same tokens."""
    for key, what in (
        ("vocab_size", "tokens"),
        ("num_mel_bins", "mel bins"),
        ("max_source_positions", "encoder positions"),
    ):
        theirs, ours = (getattr(model.config, key) for model in (teacher, student))
        if theirs != ours:
            raise Problem(
                f"kdq: the teacher {name} has {theirs} {what}, the student {ours}",
                hint="distil from a Whisper of the same family; large-v3 differs from the others, "
                "and English-only models from multilingual ones",
            )
    theirs, ours = (model.config.max_target_positions for model in (teacher, student))
    if theirs < ours:
        raise Problem(
            f"kdq: the teacher {name} reads {theirs} text tokens, the student {ours}",
            hint="distil from a teacher with as long a text window as the student's",
        )


def check_vocabulary(theirs: dict[str, int], ours: dict[str, int], name: str) -> None:
    other = len(theirs.items() ^ ours.items())
    if other:
        raise Problem(
            f"kdq: the teacher {name} spells text otherwise: of {len(theirs)} and {len(ours)} "
            f"tokens, {other} are in one vocabulary only or have another number",
            hint="distil from a model with the student's tokenizer",
        )


@contextmanager
def distilling(
    model: nn.Module, teacher: nn.Module, options: Options, work: Work
) -> Iterator[Distiller]:
    """The distiller in its place, and the encoder without gradients unless it learns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        distiller = Distiller(teacher, model, options)
    before = [(p, p.requires_grad) for p in model.model.encoder.parameters()]
    model.distiller = distiller.to(next(model.parameters()).device)
    if not options.encoder:
        model.model.encoder.requires_grad_(False)
    try:
        yield distiller
    finally:
        del model.distiller
        for parameter, learns in before:
            parameter.requires_grad_(learns)


def trained(
    model: "WhisperForConditionalGeneration",
    teacher: nn.Module,
    quantised: Schemes,
    options: Options,
    work: Work,
) -> dict[str, Any]:
    """Train the student in place by (3) -> how it went."""
    with (
        settled_encoder(model, quantised, not options.encoder and options.training.cache_encoder),
        hidden_of(model, options) as ours,
        hidden_of(teacher, options) as theirs,
        fake_quantised(model, lambda: enabled(model, quantised, options)),
    ):
        log = train(
            model,
            work.processor,
            work.train,
            options.training,
            run_dir=work.run_dir / "kdq",
            seed=work.seed,
            identity=repr(options),
            loss_term=distillation(Lesson(teacher, model, ours, theirs, quantised, options)),
            label="kdq: distilling",
        )
    return log.summary()


def leave_wide(model: nn.Module, kept: dict[str, Sequence[int]], options: Options) -> None:
    """Note 16 bits for the layers that did not become ready."""
    for side, numbers in kept.items():
        for number, shape in enumerate(model.config.edgewhisper[side]):
            if number not in numbers and options.quantise_share < 1:
                shape["bits"] = {name: max(16, bits) for name, bits in shape["bits"].items()}
