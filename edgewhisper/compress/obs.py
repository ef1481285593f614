"""Optimal brain surgeon for structures: remove units, heads and dimensions, and refit the rest.

A structure is removed if the following layer loses little after its remaining weights are refitted.
The refit has a closed form, so nothing is trained. The methods are ZipLM (Kurtic et al. 2023,
arXiv:2302.04089) and SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), after Hassibi and
Stork (1992).

    here          removed                                       updated
    units         columns of fc2, with the rows of fc1          fc2
    heads         blocks of columns of out_proj                 out_proj
    value_dims    dimensions of the values of all heads         out_proj, v_proj (rotated)
    score_dims    dimensions of the queries and keys            q_proj, k_proj (rotated)
    low_rank      singular values of fc1 and fc2              both, as products of two factors
    branches      all columns of fc2 or out_proj                its bias: the mean of the output

Steps and their files:

1. The dense model processes the clips once, one residual branch at a time (branches.py, walk.py).
   The covariance of the inputs of a branch's last layer gives the loss for each number of removed
   structures (surgeon.py).
2. Two levels of each kind are tried in the whole model. The Kullback-Leibler divergence of its
   next-token distributions converts the losses of different branches to one unit (curves.py). It is
   measured on calibration clips and on held-out clips, because a layer of the decoder can have more
   inputs than there are tokens.
3. Dynamic programming chooses a level for each branch, such that the sum of the divergences is
   smallest for the requested saving (allocation.py).
4. The clips are processed again. Each branch is pruned and fitted to its inputs in the compressed
   model (fits.py).

Differences to ZipLM:

- Covariances are centred, and the bias absorbs the mean of removed features (FLAP, An et al. 2023,
  arXiv:2312.11983). Encoder positions after the end of a clip are not counted.
- Levels are compared by their measured divergence instead of the squared error of a layer.
- Dimensions of heads are removed after a rotation. Values keep the best subspace of the head's
  output, which is a low-rank approximation of W_v W_o (AdaPTwin, Biju et al. 2024,
  arXiv:2406.08904). Queries and keys keep the directions that contribute most to the scores. Keys
  are weighted by their attention.
- The decoder also reads random tokens before each text (random_tokens.py). 60 clips have 803
  tokens, fewer than a layer of tiny.en has units. With 25 % removed, the divergence was 0.02 on
  these clips and 0.11 on others, most of it at tokens that the 60 clips do not contain. The test
  WER is 10.3 % with random tokens, and was 11.4 % without.
- Units are removed in groups instead of one by one. That is faster by the size of a group.
- A feed-forward branch may be factorised instead of pruned. tiny.en, one branch changed at a time,
  10 held-out clips, divergence with half of the branch's parameters:

      branch             pruned    factorised
      encoder.0.ffn      0.017     0.016
      encoder.1.ffn      0.020     0.013
      encoder.2.ffn      0.052     0.016
      encoder.3.ffn      0.062     0.033
      decoder.0.ffn      0.0036    0.0051
      decoder.1.ffn      0.0019    0.0082
      decoder.2.ffn      0.0020    0.0091
      decoder.3.ffn      0.0131    0.0743

  With three quarters of the parameters of all four branches of the encoder, 8 calibration clips and
  8 held-out clips, the divergence is 0.101 if they are pruned, and 0.039 if they are factorised.

  Attentions are not factorised: removal of dimensions after a rotation loses less in 23 of 24 cases
  (12 attentions with three quarters and with half of their parameters).

The result has zeros in its weights. The step `shrink` makes it smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor, nn

from edgewhisper.calibration import Speech
from edgewhisper.compress.allocation import Level, allocate
from edgewhisper.compress.branches import FFN, SIDES, Branch, branches_of
from edgewhisper.compress.budgets import Axis, Budget, budget_of, total_of
from edgewhisper.compress.calibration_speech import decoder_speech
from edgewhisper.compress.context import Context
from edgewhisper.compress.curves import Part, damping_of, levels_of, measure_parts
from edgewhisper.compress.fits import (
    branch_modules,
    factorise,
    fit_of,
    reduce_scores,
    reduce_values,
    remove_branch,
    remove_units,
    whole_of,
)
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.stored_curves import Measured, file_of, read, write
from edgewhisper.compress.walk import Walk
from edgewhisper.progress import progress_steps
from edgewhisper.recipe import Range
from edgewhisper.silence import silence_for, silence_in_groups
from export.problem import Problem
from export.shrink import layer_shapes

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip
    from edgewhisper.whisper import WhisperForConditionalGeneration

REMOVES = ("remove",)


@dataclass(frozen=True)
class Options:
    remove: Annotated[float, Range(0, 1)] = 0.15
    """Share of the cost to remove."""
    budget_of: Axis = "parameters"
    """The cost: parameters outside the token table; or, for one window and 32 tokens, macs
    (multiply-accumulates) or latency on a device; or bytes of the artifact."""
    device: str = ""
    """Device whose latency table is used if the budget is latency."""
    precision: Literal["fp32", "fp16", "int8", "int4"] = "int8"
    """Precision of the artifact if the budget is bytes."""

    units: bool = True
    """Remove units of feed-forward branches."""
    low_rank: bool = False
    """Factorise both layers of a feed-forward branch instead, where that loses less. With 25 % of
    tiny.en removed, it changed the divergence from 0.138 to 0.140."""
    heads: bool = True
    """Remove attention heads."""
    value_dims: bool = True
    """Remove dimensions of values, the same number in every head of an attention."""
    score_dims: bool = True
    """Remove dimensions of queries and keys, the same number in every head of an attention."""
    branches: bool = False
    """Replace whole branches by their mean output. `shrink` removes a layer without branches."""
    most_removed: Annotated[float, Range(0, 0.95)] = 0.75
    """No branch loses more than this share of one kind of structure."""
    round_to: Annotated[int, Range(1)] = 8
    """Remaining units and dimensions are multiples of this, if the dense number is one."""

    clips: Annotated[int, Range(1)] = 100
    """Clips of calibration speech, drawn from the training clips by the seed; all if fewer."""
    effect_clips: Annotated[int, Range(0)] = 10
    """Number of dev clips, and of calibration clips, on which step 2 measures the divergence. 0:
    use the relative error of a branch's output instead."""
    own_words: bool = True
    """Whether the decoder reads the dense model's transcripts of the clips, with its case and
    punctuation, instead of the texts of the manifest."""
    silence_stride: Annotated[int, Range(1)] = 1
    """Compute so many encoder positions of the silence after a clip as one, as
    `export --silence-stride` does. Calibration then takes less time. Models with short windows
    compute all positions."""
    random_tokens: Annotated[int, Range(0)] = 28
    """Random tokens before the text of a clip in further decoder inputs, because a hundred texts
    contain few of the tokens (see random_tokens.py). 0: only the texts."""
    damping: Annotated[float, Range(0, 10)] = 0.01
    """Share of the mean variance that is added to the diagonal of the encoder's covariances."""
    decoder_damping: Annotated[float, Range(0, 10)] = 0.03
    """The same for the decoder, which has fewer positions."""
    decoder_weight: Annotated[float, Range(0.01, 100)] = 1.0
    """Factor of the divergences of the decoder's branches when levels are chosen."""


KINDS = ("units", "low_rank", "heads", "value_dims", "score_dims", "branches")
"""Options that name what may be removed."""


def choose_levels(
    model: nn.Module, parts: Sequence[Part], options: Options, budget: Budget
) -> list[Level]:
    """Return a level for each part. Raises Problem if the levels save less than requested."""
    total = total_of(model, budget)
    levels = [levels_of(model, part, options, budget) for part in parts]
    most = sum(max(level.saved for level in of_part) for of_part in levels) / total
    if most < options.remove:
        raise Problem(
            f"obs: remove = {options.remove:g} is asked for; the kinds that are chosen can save "
            f"{most:.3f} of the {options.budget_of}",
            hint=f"lower remove, raise most_removed, or allow more of {', '.join(KINDS)}",
        )
    return allocate(levels, options.remove * total)


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Remove structures and refit the others; `context.record["obs"]` has the numbers per branch.

    Raises Problem if there is no speech or no kind of structure, for low-rank or shared layers, and
    if the share cannot be removed.
    """
    refuse_quantised(model, "obs", options)
    refuse(model, options)
    budget = budget_of(options.budget_of, options.precision, options.device)
    clips = context.calibration_clips("obs", options.clips)
    home, training = next(model.parameters()).device, model.training
    model.cpu().eval()  # statistics are float64, which some accelerators lack
    silence = silence_for(model, options.silence_stride)
    with silence_in_groups(model, silence):
        measured = measure(model, clips, options, context)
    levels = choose_levels(model, measured.parts, options, budget)
    context.record["obs"] = {
        "clips": {"calibration": len(clips), "effect": measured.effect_clips},
        "branches": {
            part.branch.name: described(model, part, level)
            for part, level in zip(measured.parts, levels, strict=True)
        },
    }
    branches = [part.branch for part in measured.parts]
    texts = [replace(clip, text=t) for clip, t in zip(clips, measured.texts, strict=True)]
    speech = Speech(texts, context.processor, True, options.random_tokens)
    with (
        progress_steps(len(branches), "obs: pruning branches") as done,
        silence_in_groups(model, silence),
    ):
        prune(model, speech, branches, levels, options, done)
    if any(len(level.kept) == 2 for level in levels):
        model.config.edgewhisper = layer_shapes(model)
    return model.to(home).train(training)


def measure(
    model: "WhisperForConditionalGeneration",
    clips: "Sequence[Clip]",
    options: Options,
    context: Context,
) -> Measured:
    """Return the curves of all branches, stored ones if there are any."""
    dev = context.drawn(context.dev, options.effect_clips)
    file = file_of(model, clips, dev, options, context)
    measured = read(file)
    if measured is None:
        speech = decoder_speech(
            model, clips, options.own_words, context, "obs", options.random_tokens
        )
        held_out = decoder_speech(model, dev, options.own_words, context, "obs")
        total = sum(len(branches_of(model, side)) for side in SIDES)
        with progress_steps(total, "obs: measuring branches") as done:
            parts = measure_parts(Walk(model, speech, held_out), options, done)
        measured = Measured(parts, [clip.text for clip in speech.clips], len(dev))
        write(file, measured)
    return measured


def described(model: nn.Module, part: Part, level: Level) -> dict[str, Any]:
    """Return the record of a branch: structures before and after, and the estimated divergence."""
    ffn = part.branch.kind == "ffn"
    kinds = ("units", "rank") if ffn else ("heads", "value_dims", "score_dims")
    return {
        "before": dict(zip(kinds, whole_of(model, part.branch), strict=False)),
        "after": dict(zip(kinds, level.kept, strict=False)),
        "divergence": level.loss,
    }


def refuse(model: nn.Module, options: Options) -> None:
    """Raise Problem if no kind of structure may be removed, or a branch is low-rank or shared."""
    if not any(getattr(options, kind) for kind in KINDS):
        raise Problem(
            f"obs: {', '.join(KINDS)} are all false, so nothing may be removed",
            hint="set one of them to true",
        )
    for side in SIDES:
        for branch in branches_of(model, side):
            linears = dict(branch_modules(model, branch).named_modules())
            split = [name for name, module in linears.items() if hasattr(module, "down")]
            shared = branch.kind != "ffn" and getattr(branch.attention_of(model), "shared", False)
            if split or shared:
                raise Problem(
                    f"obs: {branch.name} has low-rank layers or shared keys and values",
                    hint="put the step obs before lite in the recipe",
                )


def prune(
    model: "WhisperForConditionalGeneration",
    speech: Speech,
    branches: Sequence[Branch],
    levels: Sequence[Level],
    options: Options,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Prune every branch to its level, fitted to the output of the pruned branches before it."""
    walk = Walk(model, speech)
    for branch, level in zip(branches, levels, strict=True):
        if branch.side == "decoder" and walk.side == "encoder":
            walk.enter_decoder()
        walk.move(branch, prune_branch(walk, branch, level, options))
        done()


def prune_branch(walk: Walk, branch: Branch, level: Level, options: Options) -> Tensor | None:
    """Prune and refit one branch; the walk's states are its input. Returns the weight for
    `Walk.move`."""
    model, damping = walk.model, damping_of(branch, options)
    whole = whole_of(model, branch)
    attention = branch.kind != "ffn"
    if not attention and len(level.kept) == 2:
        factorise_ffn(walk, branch, level.kept[1], damping)
        return None
    if attention and 0 < level.kept[2] < whole[2]:
        reduce_scores(model, branch, walk.collect_scores(branch), level.kept[2], damping)
    if level.kept[:2] == whole[:2]:
        return None
    fit = fit_of(branch.last_of(model), walk.collect(branch, store=attention), damping)
    if level.kept[0] == 0:
        remove_branch(model, branch, fit)
    elif attention:
        return reduce_values(model, branch, fit, *level.kept[:2])
    else:
        remove_units(model, branch, fit, level.kept[0])
    return None


def factorise_ffn(walk: Walk, branch: Branch, rank: int, damping: float) -> None:
    """Factorise the layers of a feed-forward branch, the second one fitted to the first one."""
    for name in FFN:
        linear = getattr(branch.layer_of(walk.model), name)
        fit = fit_of(linear, walk.collect(branch, linear), damping)
        full_name = f"model.{branch.side}.layers.{branch.layer}.{name}"
        factorise(walk.model, full_name, fit, rank)
