"""Iterative magnitude pruning, the baseline that TSPAR is compared with. Its masks and rounds are
those of Han et al. 2015 (arXiv:1506.02626), rewinding is Frankle and Carbin's 2019
(arXiv:1803.03635); Kim et al. 2023 (MRL, 2023.mrl-1.7) prune Whisper in such rounds.

Train, prune the smallest weights by magnitude, train what is left, prune again. Every round takes
the same share of the weights that are still there, so it takes fewer the later it comes. The last
mask is kept while the model is fine-tuned.

    here             shape            meaning
    weight           (d_out, d_in)    W of one linear layer
    keep             (d_out, d_in)    its mask m, bool: true where a weight is left
    share            ()               p, what one round prunes of the weights left
    target           ()               S, what all rounds together prune
    kept_after       (rounds,)        (1)

    kept after round r = max((1 - p)^r, 1 - S), for r = 1 ... R, the first r that reaches 1 - S  (1)
    m <- m without the smallest |W|, as many as (1) says                                         (2)
    W <- m * W, or m * W0 with `rewind`                                                          (3)
    between prunings, AdamW on L_CE with m * gradient                                            (4)

TSPAR's authors do not say which implementation they compared with; what we fill in:

- Matrices: as in TSPAR, every linear layer of the encoder and decoder blocks.
- p, S and how long a round trains. The last round prunes just enough to end at S.
- Magnitudes are ranked in each matrix by itself, or over all together (`scope = "global"`). The
  default is the stronger baseline: of the embedded model, pruned by 60 % at once and not trained,
  every matrix alike makes 6 % of the words of 20 dev clips wrong, all together 18 %.
- Every round has its own learning rate schedule, from the start, and a new optimiser.
- `rewind` takes every parameter, not only those of the masked matrices, back to W0: the weights
  after `start`. None is the default: a round goes on from the weights the round before it found.
- What is pruned is zero, element by element; hardly anything can be removed physically, which is
  what structured methods are for. Counts of nonzero parameters compare with the paper's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.masks import (
    Masks,
    bookkeeping,
    guarded,
    guards,
    hold,
    masked_gradients,
    never_smallest,
    set_pruned,
    smallest,
    weights_of,
)
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.work import Work
from edgewhisper.recipe import Range
from edgewhisper.resume import Finished, decisive, digest
from edgewhisper.training import Training, train
from export.prompt import language_for

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration


@dataclass(frozen=True)
class Options:
    layers: str = "*"
    """Shell pattern of the linear layers that are pruned."""
    share: Annotated[float, Range(0.001, 1)] = 0.2
    """p: what every round prunes of the weights left."""
    target: Annotated[float, Range(0, 0.99)] = 0.5
    """S: what is pruned in the end; the number of rounds follows. 0 prunes nothing."""
    scope: Literal["per_matrix", "global"] = "per_matrix"
    """As large a share of every matrix, or the smallest weights of all matrices together."""
    rewind: bool = False
    """After every pruning, go back to the weights after `start` instead of going on."""
    protect_alignment: bool = False
    """Ours: leave the cross-attention heads that token timestamps are read from as they are
    (generation_config.alignment_heads)."""

    start: Training = field(default_factory=lambda: Training(steps=0))
    """Before the first round, on all weights; 0 steps where the model is fine-tuned already."""
    training: Training = field(default_factory=lambda: Training(steps=100, learning_rate=5e-4))
    """One round's training, before its pruning."""
    recovery: Training = field(default_factory=lambda: Training(steps=200, learning_rate=5e-4))
    """After the last pruning, its mask held."""


# ------------------------------------------------------------------------- rounds and magnitudes


def kept_after(share: float, target: float) -> list[float]:
    """(1): the share of the weights left after every round; empty where nothing is to go."""
    kept = [1.0]
    while kept[-1] > 1 - target + 1e-9:  # 0.8 ** 2 is not quite 1 - 0.36
        kept.append(max((1 - share) ** len(kept), 1 - target))
    return kept[1:]


def prune(
    weights: Mapping[str, Tensor], keep: Masks, left: float, scope: str, guard: Masks | None = None
) -> dict[str, Tensor]:
    """(2): masks that leave this share of all weights, or of every matrix; none comes back, and
    what is guarded stays."""
    guard = guard or {}
    sizes = {
        name: never_smallest(masked_sizes(weight, keep[name]), guard.get(name))
        for name, weight in weights.items()
    }
    if scope == "per_matrix":
        masks = {name: ~smallest(size, pruned(size, left)) for name, size in sizes.items()}
        return guarded(masks, guard)
    joint = torch.cat([size.flatten() for size in sizes.values()])
    parts = (~smallest(joint, pruned(joint, left))).split([s.numel() for s in sizes.values()])
    masks = {n: part.view_as(sizes[n]) for n, part in zip(sizes, parts, strict=True)}
    return guarded(masks, guard)


def masked_sizes(weight: Tensor, keep: Tensor) -> Tensor:
    """|W|, and -1 where W is pruned already: smaller than all that is left."""
    return weight.abs().masked_fill(~keep, -1.0)


def pruned(sizes: Tensor, left: float) -> int:
    """How many of so many weights are pruned when that share is left."""
    return round((1 - left) * sizes.numel())


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Rounds of training and pruning, then fine-tuning; what is pruned is zero in the result.

    Interrupted and started again with the same options, it goes on in the round it was in, to the
    same bits. `work.record["imp"]` says what every round did. Raises what training.train raises.
    """
    refuse_quantised(model, "imp", options)
    weights = weights_of(model, options.layers)
    guards(model, options.protect_alignment)  # refused now, not after the first training
    keep: Masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    start = train_masked(model, keep, options.start, work, 0, work.run_dir / "imp-start")
    keep, rounds = run_rounds(model, keep, options, work)
    last, place = len(rounds) + 1, work.run_dir / "imp-recovery"
    recovery = train_masked(model, keep, options.recovery, work, last, place)
    work.record["imp"] = {
        "start": start,
        "rounds": rounds,
        "recovery": recovery,
        "pruned": bookkeeping(model),
    }
    return model


def train_masked(
    model: "WhisperForConditionalGeneration",
    keep: Masks,
    training: Training,
    work: Work,
    part: int,
    run_dir: Path,
) -> dict[str, Any]:
    """(4). A training belongs to its mask as much as to the weights it starts from: a pruned zero
    stays one, a zero that is left may grow. Parts differ in their seeds, so in their clips' order.
    """
    with masked_gradients(model, keep):
        log = train(
            model,
            work.processor,
            work.train,
            training,
            run_dir=run_dir,
            seed=work.seed + part,
            identity=digest(keep, "imp"),
            after_step=hold(keep),
            label=f"imp: training {part}",
        )
    return log.summary()


def run_rounds(
    model: "WhisperForConditionalGeneration", keep: Masks, options: Options, work: Work
) -> tuple[Masks, list[dict[str, Any]]]:
    """Every round that is not finished yet: train, prune, perhaps rewind; the last mask, a log."""
    finished = Finished(work.run_dir / "imp-rounds", identity(model, options, work))
    start = copies(model) if options.rewind else {}
    guard = guards(model, options.protect_alignment)
    done, tensors, rounds = finished.newest()
    if done:
        keep = restore(model, tensors)
    rounds = rounds or []
    schedule = kept_after(options.share, options.target)
    for number, left in enumerate(schedule[done:], start=done + 1):
        place = finished.training(number)
        log = train_masked(model, keep, options.training, work, number, place)
        keep = prune(weights_of(model, options.layers), keep, left, options.scope, guard)
        put(model, start)
        set_pruned(model, weights_of(model, options.layers), keep)  # (3)
        rounds.append({"left": left, "training": log})
        finished.save(number, copies(model) | named_masks(keep), rounds)
    return keep, rounds


def identity(model: nn.Module, options: Options, work: Work) -> str:
    """What decides the rounds: the weights before them, their schedule and training, the speech."""
    prompted = partial(language_for, model.generation_config)
    clips = [(clip.audio.name, clip.text, prompted(clip.lang)) for clip in work.train]
    schedule = kept_after(options.share, options.target)
    how = [options.layers, options.scope, options.rewind, decisive(options.training)]
    how += [options.protect_alignment]
    return digest(model.state_dict(), ["imp", schedule, how, clips, work.seed])


# -- a round's result on disk: every parameter once, and the masks under names of their own

MASK = "mask:"


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def named_masks(keep: Masks) -> dict[str, Tensor]:
    return {MASK + name: mask for name, mask in keep.items()}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> Masks:
    """Put a finished round's weights into the model; its masks."""
    put(model, {name: t for name, t in tensors.items() if not name.startswith(MASK)})
    masks = {n.removeprefix(MASK): t for n, t in tensors.items() if n.startswith(MASK)}
    device = next(model.parameters()).device
    return {name: mask.to(device) for name, mask in masks.items()}


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
