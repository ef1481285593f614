"""Optimal brain surgeon for structures: remove units, heads and dimensions, and refit the rest.

A structure is removed if the layer behind it loses little once its remaining weights are refitted.
The refit has a closed form, so nothing is trained. The methods are ZipLM (Kurtic et al. 2023,
arXiv:2302.04089) and SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), after Hassibi and
Stork (1992).

    here          removed                                       updated
    units         columns of fc2, with the rows of fc1          fc2
    heads         blocks of columns of out_proj                 out_proj
    value_dims    dimensions of the values of all heads         out_proj, v_proj (rotated)
    score_dims    dimensions of the queries and keys            q_proj, k_proj (rotated)

The steps, and the files that they are in:

1. The dense model hears the clips once, one residual branch at a time (branches.py, walk.py). Each
   branch gives the covariance of the inputs of its last layer, and from it the loss of each number
   of removed structures (surgeon.py).
2. Two levels of each kind are tried in the whole model. The Kullback-Leibler divergence of its
   next-token distributions turns the losses of different branches into one unit (curves.py). It is
   measured on calibration clips and on others, since a decoder's layer can have more inputs than
   there are tokens.
3. Dynamic programming chooses a level for each branch, so that the sum of the divergences is
   smallest for the wanted saving (allocation.py).
4. The clips are heard again. Each branch is pruned and fitted to its inputs in the compressed model
   (fits.py).

Differences to ZipLM:

- Covariances are centred, and the mean of what is removed goes into the bias (FLAP, An et al. 2023,
  arXiv:2312.11983). Encoder positions behind the end of a clip do not count.
- Levels are compared by their measured divergence instead of the squared error of a layer.
- Dimensions of heads are removed after a rotation. Values keep the best subspace of what the head
  writes, which is a low rank of W_v W_o (AdaPTwin, Biju et al. 2024, arXiv:2406.08904). Queries
  and keys keep the directions that contribute most to the scores, where keys are weighted by the
  attention that they get.
- Units are removed in groups instead of one by one, which is faster by the size of a group.

The result has zeros in its weights. The step `shrink` makes it smaller.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import nn

from edgewhisper import decoding
from edgewhisper.calibration import Speech
from edgewhisper.compress.allocation import Level, allocate
from edgewhisper.compress.branches import SIDES, Branch, branches_of
from edgewhisper.compress.context import Context
from edgewhisper.compress.curves import TOKENS, Part, damping_of, levels_of, measure_parts
from edgewhisper.compress.fits import (
    branch_modules,
    fit_of,
    reduce_scores,
    reduce_values,
    remove_units,
    whole_of,
)
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.walk import Walk
from edgewhisper.examples import permutation
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Range
from edgewhisper.runs import main_process
from export.cost import count_parameters, macs, window_macs
from export.problem import Problem

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip
    from edgewhisper.whisper import WhisperForConditionalGeneration


@dataclass(frozen=True)
class Options:
    remove: Annotated[float, Range(0, 1)] = 0.15
    """Share of the cost to remove: of the parameters outside the token table, or of the MACs."""
    budget_of: Literal["parameters", "macs"] = "parameters"
    """macs: multiply-accumulates of one window and 32 tokens."""

    units: bool = True
    """Remove units of feed-forward branches."""
    heads: bool = True
    """Remove attention heads."""
    value_dims: bool = True
    """Remove dimensions of values, the same number in every head of an attention."""
    score_dims: bool = True
    """Remove dimensions of queries and keys, likewise."""
    most_removed: Annotated[float, Range(0, 0.95)] = 0.75
    """No branch loses more than this share of one kind of structure."""
    round_to: Annotated[int, Range(1)] = 8
    """Units and dimensions that remain are multiples of this, where the dense number is one."""

    clips: Annotated[int, Range(1)] = 100
    """Clips of calibration speech, drawn from the training clips by the seed; all if fewer."""
    effect_clips: Annotated[int, Range(0)] = 10
    """The divergence of step 2 is measured on so many dev clips and on as many calibration clips.
    0: the relative error of a branch's output stands for it."""
    own_words: bool = True
    """The decoder reads the dense model's transcripts of the clips, in its own case and
    punctuation. False: it reads the texts of the manifest."""
    damping: Annotated[float, Range(0, 10)] = 0.01
    """Added to the diagonal of the encoder's covariances, as a share of the mean variance."""
    decoder_damping: Annotated[float, Range(0, 10)] = 0.1
    """Likewise in the decoder, which reads fewer positions."""
    decoder_weight: Annotated[float, Range(0.01, 100)] = 1.0
    """Divergences of the decoder's branches are multiplied by this before levels are chosen."""


def choose_levels(model: nn.Module, parts: Sequence[Part], options: Options) -> list[Level]:
    """Raises Problem where the levels cannot save the share that is asked for."""
    if options.budget_of == "parameters":
        total = count_parameters(model)["rest"]
    else:
        total = window_macs(macs(model, TOKENS), TOKENS)
    levels = [levels_of(model, part, options) for part in parts]
    most = sum(max(level.saved for level in of_part) for of_part in levels) / total
    if most < options.remove:
        raise Problem(
            f"obs: remove = {options.remove:g} is asked for; the kinds that are chosen can save "
            f"{most:.3f} of the {options.budget_of}",
            hint="lower remove, raise most_removed, or allow more of units, heads, value_dims and "
            "score_dims",
        )
    return allocate(levels, options.remove * total)


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Remove structures and refit the rest; `context.record["obs"]` has the rest of each branch.

    Raises Problem for no speech, no kind of structure, low-rank or shared layers, and for a share
    that is out of reach.
    """
    refuse_quantised(model, "obs", options)
    refuse(model, options)
    if not context.train:
        raise Problem("obs: there are no clips to calibrate on", hint="name a speech manifest")
    home, training = next(model.parameters()).device, model.training
    model.cpu().eval()  # statistics are float64, which some accelerators lack
    speech = calibration_speech(model, context.train, options.clips, options.own_words, context)
    others = options.effect_clips, options.own_words
    judges = calibration_speech(model, context.dev, *others, context)
    total = sum(len(branches_of(model, side)) for side in SIDES)
    with progress(total, "obs: measuring branches") as done:
        parts = measure_parts(Walk(model, speech, judges=judges), options, done)
    levels = choose_levels(model, parts, options)
    context.record["obs"] = {
        "clips": {"calibration": len(speech.clips), "effect": len(judges.clips)},
        "branches": {
            part.branch.name: described(model, part, level)
            for part, level in zip(parts, levels, strict=True)
        },
    }
    with progress(total, "obs: pruning branches") as done:
        prune(model, speech, [part.branch for part in parts], levels, options, done)
    return model.to(home).train(training)


def described(model: nn.Module, part: Part, level: Level) -> dict[str, Any]:
    """The record of one branch: its structures before and after, and the estimated divergence."""
    kinds = ("units",) if part.branch.kind == "ffn" else ("heads", "value_dims", "score_dims")
    whole = whole_of(model, part.branch)
    return {
        "before": dict(zip(kinds, whole, strict=True)),
        "after": dict(zip(kinds, level.kept, strict=True)),
        "divergence": level.loss,
    }


def refuse(model: nn.Module, options: Options) -> None:
    """Raise Problem if no kind of structure may be removed, or a branch is low-rank or shared."""
    if not (options.units or options.heads or options.value_dims or options.score_dims):
        raise Problem(
            "obs: units, heads, value_dims and score_dims are all false, so nothing may be removed",
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


def calibration_speech(
    model: "WhisperForConditionalGeneration",
    source: "Sequence[Clip]",
    size: int,
    own_words: bool,
    context: Context,
) -> Speech:
    """So many of the clips, drawn by the seed, with the texts that the decoder reads."""
    clips = [source[i] for i in permutation(context.seed, 0, len(source))[:size]]
    if own_words and clips:
        clips = in_own_words(model, clips, context)
    return Speech(clips, context.processor, mask_padding=True)


@contextmanager
def progress(steps: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar that counts calls."""
    counter = count(1)
    with progress_bar(steps, None, main_process(), label) as show:
        yield lambda: show(next(counter), "")


def in_own_words(
    model: "WhisperForConditionalGeneration", clips: "Sequence[Clip]", context: Context
) -> "list[Clip]":
    """The clips with the model's transcripts, where it writes any."""
    from benchmarks.speech.clips import Samples

    longest = max(len(clip.text.split()) for clip in clips)
    with progress_bar(len(clips), None, main_process(), "obs: transcripts") as show:
        texts = decoding.transcribe(
            model,
            context.processor,
            Samples(clips),
            [clip.lang for clip in clips],
            max_tokens=4 * longest + 32,
            done=lambda finished: show(finished, ""),
        )
    return [
        replace(clip, text=text) if text else clip for clip, text in zip(clips, texts, strict=True)
    ]


def prune(
    model: "WhisperForConditionalGeneration",
    speech: Speech,
    branches: Sequence[Branch],
    levels: Sequence[Level],
    options: Options,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Bring every branch to its level, each fitted to what the ones before it have become."""
    walk = Walk(model, speech)
    for branch, level in zip(branches, levels, strict=True):
        if branch.side == "decoder" and walk.side == "encoder":
            walk.enter_decoder()
        prune_branch(walk, branch, level, options)
        walk.move(branch)
        done()


def prune_branch(walk: Walk, branch: Branch, level: Level, options: Options) -> None:
    """Prune and refit one branch; the walk's states stand in front of it."""
    model, damping = walk.model, damping_of(branch, options)
    whole = whole_of(model, branch)
    if level.kept == whole:
        return
    if branch.kind != "ffn" and level.kept[2] < whole[2]:
        reduce_scores(model, branch, walk.collect_scores(branch), level.kept[2], damping)
    fit = fit_of(branch.last_of(model), walk.collect(branch), damping)
    if branch.kind == "ffn":
        remove_units(model, branch, fit, level.kept[0])
    elif level.kept[:2] != whole[:2]:
        reduce_values(model, branch, fit, *level.kept[:2])
