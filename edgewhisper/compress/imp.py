"""Iterative magnitude pruning (IMP), the baseline that TSPAR is compared with.

Masks and rounds follow Han et al. 2015 (arXiv:1506.02626), rewinding follows Frankle and Carbin
2019 (arXiv:1803.03635). Kim et al. 2023 (MRL, 2023.mrl-1.7) prune Whisper in such rounds.

A round trains the model and then prunes the smallest weights by magnitude. Every round prunes the
same share of the remaining weights, so later rounds prune fewer. After the last round, the model is
fine-tuned with its mask fixed.

    here             shape            meaning
    weight           (d_out, d_in)    W of one linear layer
    mask             (d_out, d_in)    m, bool: true where a weight remains
    share            ()               p, share of the remaining weights that a round prunes
    target           ()               S, share of all weights pruned after the last round
    kept_after       (rounds,)        (1)

    kept after round r = max((1 - p)^r, 1 - S), for r = 1 ... R, the first r that reaches 1 - S  (1)
    m <- m without the smallest |W|, as many as (1) requires                                     (2)
    W <- m * W, or m * W0 with `rewind`                                                          (3)
    between prunings, AdamW on L_CE with m * gradient                                            (4)

TSPAR's authors do not say which implementation they compared with. Our choices:

- Matrices: every linear layer of the encoder and decoder blocks, as in TSPAR.
- p, S and the length of a round. The last round prunes just enough to end at S.
- Magnitudes are ranked within each matrix, or over all matrices (`scope = "global"`). The default
  is the stronger baseline: pruning the embedded model by 60 % at once without training gives 6 %
  WER on 20 dev clips with ranking per matrix, and 18 % with global ranking.
- Every round has its own learning rate schedule and a new optimiser.
- `rewind` resets every parameter, not only the masked matrices, to W0: the weights after `start`.
  By default there is no rewinding: a round continues from the weights of the round before.
- Pruned weights are zero, element by element. Hardly any structure can be removed physically; that
  needs structured methods. Compare counts of nonzero parameters with the paper's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.context import Context
from edgewhisper.compress.masks import (
    Masks,
    bookkeeping,
    guarded,
    guards,
    never_smallest,
    set_pruned,
    smallest,
    trained_masked,
    weights_of,
)
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.recipe import Range
from edgewhisper.resume import Finished, decisive, digest
from edgewhisper.training import Training
from export.prompt import prompt_language

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

REMOVES = ("target",)


@dataclass(frozen=True)
class Options:
    layers: str = "*"
    """Shell pattern of the linear layers that are pruned."""
    share: Annotated[float, Range(0.001, 1)] = 0.2
    """p: share of the remaining weights that each round prunes."""
    target: Annotated[float, Range(0, 0.99)] = 0.5
    """S: share of the weights that is pruned in total; it sets the number of rounds. 0 prunes
    nothing."""
    scope: Literal["per_matrix", "global"] = "per_matrix"
    """per_matrix: prune the same share of every matrix. global: prune the smallest weights of all
    matrices together."""
    rewind: bool = False
    """After each pruning, reset the remaining weights to their values after `start`."""
    protect_alignment: bool = False
    """Ours: do not prune the cross-attention heads that token timestamps are read from
    (generation_config.alignment_heads)."""

    start: Training = field(default_factory=lambda: Training(steps=0))
    """Training before the first round, on all weights; 0 steps if the model is fine-tuned."""
    training: Training = field(default_factory=lambda: Training(steps=100, learning_rate=5e-4))
    """Training of one round, before its pruning."""
    recovery: Training = field(default_factory=lambda: Training(steps=200, learning_rate=5e-4))
    """Training after the last pruning, with its mask fixed."""


# ------------------------------------------------------------------------- rounds and magnitudes


def kept_after(share: float, target: float) -> list[float]:
    """(1): the share of weights that remains after each round; empty if target is 0."""
    kept = [1.0]
    while kept[-1] > 1 - target + 1e-9:  # rounding: 0.8 ** 2 is not exactly 1 - 0.36
        kept.append(max((1 - share) ** len(kept), 1 - target))
    return kept[1:]


def prune(
    weights: Mapping[str, Tensor],
    masks: Masks,
    remaining: float,
    scope: str,
    protected: Masks | None = None,
) -> dict[str, Tensor]:
    """(2): return masks that keep the share `remaining` of every matrix, or of all weights.

    Pruned weights stay pruned, and protected weights are kept.
    """
    protected = protected or {}
    sizes = {
        name: never_smallest(masked_sizes(weight, masks[name]), protected.get(name))
        for name, weight in weights.items()
    }
    if scope == "per_matrix":
        pruned = {n: ~smallest(size, pruned_count(size, remaining)) for n, size in sizes.items()}
        return guarded(pruned, protected)
    joint = torch.cat([size.flatten() for size in sizes.values()])
    kept = ~smallest(joint, pruned_count(joint, remaining))
    parts = kept.split([size.numel() for size in sizes.values()])
    pruned = {n: part.view_as(sizes[n]) for n, part in zip(sizes, parts, strict=True)}
    return guarded(pruned, protected)


def masked_sizes(weight: Tensor, mask: Tensor) -> Tensor:
    """Return |W|, and -1 where W is pruned: smaller than every remaining weight."""
    return weight.abs().masked_fill(~mask, -1.0)


def pruned_count(sizes: Tensor, remaining: float) -> int:
    """Return how many weights are pruned if the share `remaining` of them is kept."""
    return round((1 - remaining) * sizes.numel())


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Run rounds of training and pruning, then fine-tune; pruned weights are zero in the result.

    An interrupted run continues in its current round and gives the same bits as one without
    interruption. `context.record["imp"]` describes every round. Raises Problem if no layer
    matches, and what training.train raises.
    """
    refuse_quantised(model, "imp", options)
    weights = weights_of(model, options.layers)
    guards(model, options.protect_alignment)  # raises before the first training, not after it
    masks: Masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    start = train_masked(model, masks, options.start, context, 0, "imp-start")
    masks, rounds = run_rounds(model, masks, options, context)
    last = len(rounds) + 1
    recovery = train_masked(model, masks, options.recovery, context, last, "imp-recovery")
    context.record["imp"] = {
        "start": start,
        "rounds": rounds,
        "recovery": recovery,
        "pruned": bookkeeping(model),
    }
    return model


def train_masked(
    model: "WhisperForConditionalGeneration",
    masks: Masks,
    training: Training,
    context: Context,
    part: int,
    name: str,
) -> dict[str, Any]:
    """(4): train with pruned weights at zero; return the training's summary.

    The masks are part of the training's identity: a pruned zero stays zero, while any other zero
    may change. Each part has its own seed, and so its own order of clips.
    """
    return trained_masked(
        context,
        model,
        masks,
        training,
        name,
        seed=part,
        identity=digest(masks, "imp"),
        label=f"imp: training {part}",
    )


def run_rounds(
    model: "WhisperForConditionalGeneration", masks: Masks, options: Options, context: Context
) -> tuple[Masks, list[dict[str, Any]]]:
    """Run the rounds that are not finished; return the last masks and a record of every round."""
    finished = Finished(context.run_dir / "imp-rounds", identity(model, options, context))
    start = copies(model) if options.rewind else {}
    protected = guards(model, options.protect_alignment)
    done, tensors, rounds = finished.newest()
    if done:
        masks = restore(model, tensors)
    rounds = rounds or []
    schedule = kept_after(options.share, options.target)
    for number, remaining in enumerate(schedule[done:], start=done + 1):
        name = str(finished.training(number).relative_to(context.run_dir))
        log = train_masked(model, masks, options.training, context, number, name)
        weights = weights_of(model, options.layers)
        masks = prune(weights, masks, remaining, options.scope, protected)
        put(model, start)
        set_pruned(model, weights_of(model, options.layers), masks)  # (3)
        rounds.append({"left": remaining, "training": log})
        finished.save(number, copies(model) | named_masks(masks), rounds)
    return masks, rounds


def identity(model: nn.Module, options: Options, context: Context) -> str:
    """Return a hash of what determines the rounds: start weights, options, speech and seed."""
    prompted = partial(prompt_language, model.generation_config)
    clips = [(clip.audio.name, clip.text, prompted(clip.lang)) for clip in context.train]
    schedule = kept_after(options.share, options.target)
    choices = [options.layers, options.scope, options.rewind, decisive(options.training)]
    choices += [options.protect_alignment]
    return digest(model.state_dict(), ["imp", schedule, choices, clips, context.seed])


# -- the files of a round: every parameter once, and the masks under prefixed names

MASK = "mask:"


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def named_masks(masks: Masks) -> dict[str, Tensor]:
    """Return the masks under the names that they are saved as."""
    return {MASK + name: mask for name, mask in masks.items()}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> Masks:
    """Load the weights of a finished round into the model; return its masks."""
    put(model, {name: t for name, t in tensors.items() if not name.startswith(MASK)})
    masks = {n.removeprefix(MASK): t for n, t in tensors.items() if n.startswith(MASK)}
    device = next(model.parameters()).device
    return {name: mask.to(device) for name, mask in masks.items()}


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into the model's parameters of the same names."""
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
