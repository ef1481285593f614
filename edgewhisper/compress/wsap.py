"""Weight statistics aware pruning, WSAP (University of Surrey, Sedimark project; IEEE CSCN 2025).

Matrices whose weights spread far from their mean are taken to hold more that can go. Rank the
matrices by the coefficient of variation of their weights, prune the low third lightly and the high
third hard, by magnitude; then fine-tune. A weak baseline: a linear layer's mean is nearly zero, so
the coefficient is mostly noise.

    here             shape            meaning
    weight           (d_out, d_in)    one linear layer's weight
    variation        ()               (1), one number a matrix
    ratio            ()               (2), the share of the matrix that is pruned

    variation = std(W) / |mean(W)|, infinite where the mean is zero                        (1)
    ratio = low where variation <= a, middle where it is <= b, high elsewhere              (2)
    a, b = the 33rd and 66th percentile of all matrices' variations, infinite ones as 0    (3)
    W <- W without its `ratio` smallest |W|                                                (4)

The authors' older version has a = 150 and b = 600 instead of (3): `thresholds = "fixed"`. What we
fill in: the matrices are TSPAR's, every linear layer of the blocks; std divides by the number of
weights; percentiles are interpolated linearly; fine-tuning holds what was pruned at zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from torch import Tensor

from edgewhisper.compress.masks import (
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
from edgewhisper.resume import digest
from edgewhisper.training import Training, train

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

PERCENTILES = (33, 66)
FIXED = (150.0, 600.0)
Ratio = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Options:
    layers: str = "*"
    """Shell pattern of the linear layers that are pruned."""
    thresholds: Literal["percentiles", "fixed"] = "percentiles"
    """(3), or the older 150 and 600."""
    low: Ratio = 0.3
    """The share pruned of matrices whose weights vary least."""
    middle: Ratio = 0.5
    high: Ratio = 0.7
    protect_alignment: bool = False
    """Ours: leave the cross-attention heads that token timestamps are read from as they are
    (generation_config.alignment_heads)."""
    recovery: Training = field(default_factory=lambda: Training(steps=400, learning_rate=5e-4))
    """Fine-tuning after pruning, what was pruned held at zero."""


def variation(weight: Tensor) -> float:
    """(1), (d_out, d_in) -> ()."""
    mean = float(weight.double().mean().abs())
    return float(weight.double().std(correction=0)) / mean if mean else math.inf


def bounds(variations: Mapping[str, float], thresholds: str) -> tuple[float, float]:
    """a and b, see (3)."""
    if thresholds == "fixed":
        return FIXED
    finite = [v if math.isfinite(v) else 0.0 for v in variations.values()]
    a, b = np.percentile(finite, PERCENTILES)
    return float(a), float(b)


def ratios(variations: Mapping[str, float], options: Options) -> dict[str, float]:
    """(2), for every matrix."""
    a, b = bounds(variations, options.thresholds)
    return {
        name: options.low if v <= a else options.middle if v <= b else options.high
        for name, v in variations.items()
    }


def keep_largest(weight: Tensor, ratio: float, guard: Tensor | None = None) -> Tensor:
    """(4): what stays, (d_out, d_in) bool; all that is guarded does."""
    sizes = never_smallest(weight.abs(), guard)
    return ~smallest(sizes, round(ratio * weight.numel()))


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """Prune once, then fine-tune; what was pruned is zero in the result.

    `work.record["wsap"]` has every matrix's variation and ratio. Raises what training.train raises.
    """
    refuse_quantised(model, "wsap", options)
    weights = weights_of(model, options.layers)
    variations = {name: variation(weight) for name, weight in weights.items()}
    shares = ratios(variations, options)
    guard = guards(model, options.protect_alignment)
    keep = {n: keep_largest(weight, shares[n], guard.get(n)) for n, weight in weights.items()}
    keep = guarded(keep, guard)
    set_pruned(model, weights, keep)
    with masked_gradients(model, keep):
        log = train(
            model,
            work.processor,
            work.train,
            options.recovery,
            run_dir=work.run_dir / "wsap-recovery",
            seed=work.seed,
            identity=digest(keep, "wsap"),
            after_step=hold(keep),
            label="wsap: fine-tuning",
        )
    work.record["wsap"] = {
        "bounds": bounds(variations, options.thresholds),
        # an infinite variation is no number in JSON
        "variations": {n: v if math.isfinite(v) else None for n, v in variations.items()},
        "ratios": shares,
        "recovery": log.summary(),
        "pruned": bookkeeping(model),
    }
    return model
