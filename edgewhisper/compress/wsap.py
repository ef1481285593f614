"""Weight statistics aware pruning, WSAP (University of Surrey, Sedimark project; IEEE CSCN 2025).

WSAP assumes that a matrix whose weights vary more, relative to their mean, has more weights to
spare. It ranks the matrices by the coefficient of variation of their weights, prunes the low third
lightly and the high third heavily, by magnitude, and then fine-tunes. It is a weak baseline: the
mean of a linear layer's weights is nearly zero, so the coefficient is mostly noise.

    here             shape            meaning
    weight           (d_out, d_in)    weight of one linear layer
    variation        ()               (1), one number per matrix
    ratio            ()               (2), share of the matrix that is pruned

    variation = std(W) / |mean(W)|, infinite if the mean is zero                           (1)
    ratio = low if variation <= a, middle if variation <= b, else high                     (2)
    a, b = 33rd and 66th percentile of all variations, infinite ones counted as 0          (3)
    W <- W with its `ratio` smallest |W| set to zero                                       (4)

An older version of the authors has a = 150 and b = 600 instead of (3): `thresholds = "fixed"`. The
authors leave these open; our choices: the matrices are all linear layers of the blocks, as in
TSPAR; std divides by the number of weights; percentiles are interpolated linearly; fine-tuning
keeps pruned weights at zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from torch import Tensor

from edgewhisper.compress.context import Context
from edgewhisper.compress.masks import (
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
from edgewhisper.resume import digest
from edgewhisper.training import Training

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

PERCENTILES = (33, 66)
FIXED = (150.0, 600.0)
Ratio = Annotated[float, Range(0, 1)]
REMOVES = ("low", "middle", "high")


@dataclass(frozen=True)
class Options:
    layers: str = "*"
    """Shell pattern of the linear layers that are pruned."""
    thresholds: Literal["percentiles", "fixed"] = "percentiles"
    """percentiles: (3). fixed: 150 and 600."""
    low: Ratio = 0.3
    """Share pruned of the matrices with the smallest variation."""
    middle: Ratio = 0.5
    high: Ratio = 0.7
    protect_alignment: bool = False
    """Ours: do not prune the cross-attention heads that token timestamps are read from
    (generation_config.alignment_heads)."""
    recovery: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-4))
    """Fine-tuning after pruning; pruned weights stay zero."""


def variation(weight: Tensor) -> float:
    """(1), (d_out, d_in) -> ()."""
    mean = float(weight.double().mean().abs())
    return float(weight.double().std(correction=0)) / mean if mean else math.inf


def bounds(variations: Mapping[str, float], thresholds: str) -> tuple[float, float]:
    """Return a and b, see (3)."""
    if thresholds == "fixed":
        return FIXED
    finite = [v if math.isfinite(v) else 0.0 for v in variations.values()]
    a, b = np.percentile(finite, PERCENTILES)
    return float(a), float(b)


def ratios(variations: Mapping[str, float], options: Options) -> dict[str, float]:
    """Return the ratio (2) of every matrix, by name."""
    a, b = bounds(variations, options.thresholds)
    return {
        name: options.low if v <= a else options.middle if v <= b else options.high
        for name, v in variations.items()
    }


def keep_largest(weight: Tensor, ratio: float, protected: Tensor | None = None) -> Tensor:
    """Return the mask of (4), (d_out, d_in) bool: true where a weight is kept.

    Weights that are protected, (d_out, d_in) bool, are pruned last.
    """
    sizes = never_smallest(weight.abs(), protected)
    return ~smallest(sizes, round(ratio * weight.numel()))


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Prune once, then fine-tune; pruned weights are zero in the result.

    `context.record["wsap"]` has the variation and ratio of every matrix. Raises Problem if no layer
    matches, and what training.train raises.
    """
    refuse_quantised(model, "wsap", options)
    weights = weights_of(model, options.layers)
    variations = {name: variation(weight) for name, weight in weights.items()}
    shares = ratios(variations, options)
    protected = guards(model, options.protect_alignment)
    masks = {n: keep_largest(w, shares[n], protected.get(n)) for n, w in weights.items()}
    masks = guarded(masks, protected)
    set_pruned(model, weights, masks)
    recovery = trained_masked(
        context,
        model,
        masks,
        options.recovery,
        "wsap-recovery",
        identity=digest(masks, "wsap"),
        label="wsap: fine-tuning",
    )
    context.record["wsap"] = {
        "bounds": bounds(variations, options.thresholds),
        # JSON has no infinity
        "variations": {n: v if math.isfinite(v) else None for n, v in variations.items()},
        "ratios": shares,
        "recovery": recovery,
        "pruned": bookkeeping(model),
    }
    return model
