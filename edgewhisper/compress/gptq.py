"""GPTQ: 4-bit weights by error propagation, in closed form and without training.

Frantar, Ashkboos, Hoefler and Alistarh 2022 (arXiv:2210.17323). Rounding to nearest treats each
weight alone. GPTQ rounds the inputs of a layer one after the other and corrects the inputs that are
still to come, so that the layer's output on calibration speech changes least.

    here       shape           meaning
    W          (d_out, d_in)   weight of a linear layer
    H          (d_in, d_in)    damped second moments of the layer's input
    U          (d_in, d_in)    upper Cholesky factor of H^-1
    s          (d_out, blocks) scales, from W before any rounding: integers times a power of two

    for each input j, in the order of falling H_jj:
        q       = s clamp(round(W_:j / s), -8, 7)                                           (1)
        W_:j   <- q
        W_:k   <- W_:k - (W_:j - q) U_jk / U_jj     for all k after j                       (2)

The order by falling H_jj is the paper's `act-order`; scales belong to blocks of neighbouring inputs
whatever the order. Ours: H is centred, and the bias absorbs the change of the mean output.
Keys have no bias and need none, because a constant added to all keys does not change a softmax.
H of the token table is not centred, because logits have no bias. Its columns are divided by powers
of two first, as export does in int8 (export/onnx/tables.py). Its first rows can have 8 bits: a BPE
vocabulary begins with the most frequent tokens, and errors of their logits matter most. If only the
table of tiny.en is quantised, the divergence on other clips is 0.0109 with no rows in 8 bits,
0.0058 with 2048, and 0.0049 with 4096, which take 0.7 MB more.

The branches of the model are quantised in order, each on the states that the quantised ones before
it compute (see walk.py). Export stores exactly these weights (export/quantise.py finds the grids).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from edgewhisper.calibration import Moments
from edgewhisper.compress.branches import SIDES, Branch, branches_of
from edgewhisper.compress.calibration_speech import decoder_speech
from edgewhisper.compress.context import Context
from edgewhisper.compress.qat import counted, note_bits, settle
from edgewhisper.compress.shrink import slimmed
from edgewhisper.compress.surgeon import damped, invert
from edgewhisper.compress.walk import Walk
from edgewhisper.progress import progress_steps
from edgewhisper.recipe import Range
from edgewhisper.silence import silence_for, silence_in_groups
from export.onnx.tables import column_exponents
from export.problem import Problem
from export.quantise import (
    Scheme,
    block_scales,
    column_factors,
    fake_quantise,
    is_quantised,
    on_grid,
    row_parts,
    row_steps,
    schemes,
)

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

LAZY = 128
"""Inputs that are rounded before the others are corrected for them together."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Factors of the scales among which each block takes the one with the least rounding error."""
INPUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ffn": (("fc1",), ("fc2",)),
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("out_proj",)),
    "encoder_attn": (("q_proj",), ("k_proj", "v_proj"), ("out_proj",)),
}
"""Kind of a branch -> its linear layers in order; layers of one group read the same input."""


@dataclass(frozen=True)
class Options:
    encoder: Literal[4, 8, 16, 32] = 4
    """Bits of the encoder's linear layers. Layers in 8 or 16 bits are rounded to nearest."""
    decoder: Literal[4, 8, 16, 32] = 4
    token_table: Literal[4, 8, 16, 32] = 4
    token_rows_in_8_bits: Annotated[int, Range(0)] = 0
    """First rows of a token table in 4 bits that get 8 bits instead: the most frequent tokens. A
    table with fewer rows has 8 bits. Each 1000 rows of tiny.en take 0.18 MB more."""
    rare_token_rows: Annotated[int, Range(0)] = 0
    """Row of a token table in 4 bits from which on text tokens have 3 bits: the rarest tokens. 0:
    none. Each 1000 rows of tiny.en take 0.05 MB less."""
    stem: Literal[8, 32] = 8
    """Bits of the convolutions, rounded to nearest; 32: float16 in an int4 artifact."""
    layers: str = "*"
    """Shell pattern of the linear layers that get these bits."""
    in_8_bits: str = ""
    """Shell patterns, separated by spaces, of layers among these that get 8 bits instead."""
    scales: ClassVar = "channel"
    block: Literal[16, 32, 64, 128, 256] = 32
    """Number of neighbouring inputs that share a scale of 8 bits."""

    clips: Annotated[int, Range(1)] = 100
    """Calibration clips, drawn from the training clips by the seed; all if fewer."""
    own_words: bool = True
    """Whether the decoder reads the model's own transcripts of the clips instead of their texts."""
    silence_stride: Annotated[int, Range(1)] = 1
    """Compute so many encoder positions of the silence after a clip as one, as
    `export --silence-stride` does. Calibration then takes less time. Models with short windows
    compute all positions."""
    damping: Annotated[float, Range(0, 10)] = 0.01
    """Share of the mean of H's diagonal that is added to it."""
    decoder_damping: Annotated[float, Range(0, 10)] = 0.3
    """The same in the decoder, whose statistics count tokens: far fewer than positions."""
    table_damping: Annotated[float, Range(0, 10)] = 1.0
    """The same for the token table, whose H counts tokens as well. With 60 clips and tiny.en, the
    divergence on other clips is 0.0345 with 0.1, 0.0306 with 1, and 0.0307 with 3."""


def quantises(options: Options) -> bool:
    """Whether the step stores any weight in fewer than 32 bits."""
    return min(options.encoder, options.decoder, options.token_table, options.stem) < 32


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Return the model with quantised weights; `context.record["gptq"]` has the error of each
    layer, relative to its output, and that of rounding to nearest.

    Raises Problem if the model is quantised already, if there are no clips, or if no layer matches.
    """
    if is_quantised(model):
        raise Problem(
            "gptq: the model is quantised already",
            hint="start from the checkpoint before that step",
        )
    clips = context.calibration_clips("gptq", options.clips)
    home, training = next(model.parameters()).device, model.training
    model, _ = slimmed(model.cpu().eval())  # statistics are float64, which some devices lack
    speech = decoder_speech(model, clips, options.own_words, context, "gptq")
    note_grids(model, options)
    chosen = schemes(model)
    with silence_in_groups(model, silence_for(model, options.silence_stride)):
        errors = quantise_in_order(Walk(model, speech), chosen, options)
    settle(chosen)  # layers in 8 and 16 bits
    context.record["gptq"] = {
        "clips": len(clips),
        "weights": counted(chosen),
        "error": {name: {"gptq": e[0], "nearest": e[1]} for name, e in errors.items()},
    }
    return model.to(home).train(training)


def note_grids(model: "WhisperForConditionalGeneration", options: Options) -> None:
    """Write bits, scales and column exponents into config.edgewhisper, where export reads them.

    Raises Problem if no layer matches, or none for a pattern of `in_8_bits`.
    """
    note_bits(model, options)
    for pattern in options.in_8_bits.split():
        note_8_bits(model, pattern)
    model.config.edgewhisper["integer_scales"] = True
    table = model.model.decoder.embed_tokens
    if options.token_table == 4 and not hasattr(table, "rows"):
        note_table(model.config, table, options)


def note_table(config: Any, table: nn.Module, options: Options) -> None:
    """Note the columns of a dense token table in 4 bits, and its rows in 8 and 3 bits."""
    config.edgewhisper["token_columns"] = column_exponents(table.weight.detach().numpy())
    first, rare, end = options.token_rows_in_8_bits, options.rare_token_rows, config.eos_token_id
    if first >= config.vocab_size:
        config.edgewhisper["token_bits"] = 8
    elif first:
        config.edgewhisper["token_rows_in_8_bits"] = first
    if rare and max(first, rare) < end:
        config.edgewhisper["token_rows_in_3_bits"] = [max(first, rare), end]


def note_8_bits(model: nn.Module, pattern: str) -> None:
    """Change the noted bits of matching layers to 8. Raises Problem if there are none."""
    matched = False
    for side in SIDES:
        for number, shape in enumerate(model.config.edgewhisper[side]):
            for name in shape["bits"]:
                if fnmatchcase(f"model.{side}.layers.{number}.{name}", pattern):
                    shape["bits"][name], matched = 8, True
    if not matched:
        raise Problem(
            f"gptq: in_8_bits has {pattern!r}, which matches no linear layer",
            hint="a name is model.encoder.layers.0.self_attn.v_proj",
        )


# ------------------------------------------------------------------------------- along the model


def quantise_in_order(
    walk: Walk, chosen: dict[nn.Module, Scheme], options: Options
) -> dict[str, list[float]]:
    """Quantise all branches and the token table. Returns the errors of each layer, see
    quantise_linear."""
    errors: dict[str, list[float]] = {}
    branches = {side: branches_of(walk.model, side) for side in SIDES}
    steps = sum(map(len, branches.values())) + 1
    with progress_steps(steps, "gptq: quantising branches") as done:
        for side, damping in zip(SIDES, (options.damping, options.decoder_damping), strict=True):
            if side == "decoder":
                walk.enter_decoder()
            for branch in branches[side]:
                errors |= quantise_branch(walk, branch, chosen, damping)
                walk.move(branch)
                done()
        errors |= quantise_table(walk, chosen, options.table_damping)
        done()
    return errors


def quantise_branch(
    walk: Walk, branch: Branch, chosen: dict[nn.Module, Scheme], damping: float
) -> dict[str, list[float]]:
    """Quantise the 4-bit layers of a branch; the walk's states are its input."""
    owner = branch.layer_of(walk.model) if branch.kind == "ffn" else branch.attention_of(walk.model)
    errors = {}
    for group in INPUTS[branch.kind]:
        of_encoder = branch.kind == "encoder_attn" and "k_proj" in group
        shared: Moments | None = None
        for name, module in parts(owner, group):
            scheme = chosen.get(module, Scheme(32))
            if scheme.bits != 4:
                continue
            if name.endswith(".up"):  # its input is the output of its own first factor
                moments = walk.collect(branch, module, of_encoder)
            else:
                moments = shared = shared or walk.collect(branch, module, of_encoder)
            kept = getattr(module, "inputs", None)
            moments = moments if kept is None else moments.of(kept)
            errors[f"{branch.name}.{name}"] = quantise_linear(module, moments, scheme, damping)
    return errors


def parts(owner: Any, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of these names; two for a low-rank layer."""
    for name in names:
        module = getattr(owner, name, None)
        if module is None:
            continue
        if hasattr(module, "down"):
            yield f"{name}.down", module.down
            yield f"{name}.up", module.up
        else:
            yield name, module


@torch.no_grad()
def quantise_table(
    walk: Walk, chosen: dict[nn.Module, Scheme], damping: float
) -> dict[str, list[float]]:
    """Quantise a token table in 4 bits for the logits of the decoder's last states. Rows in 8 bits
    are rounded to nearest."""
    table, norm = walk.model.model.decoder.embed_tokens, walk.model.model.decoder.layer_norm
    scheme = chosen.get(table, Scheme(32))
    if scheme.bits != 4:
        return {}
    moments = Moments(table.weight.shape[1])
    for i in walk.counted_windows():
        moments.add(norm(walk.states[i])[0])
    factors = column_factors(scheme).double()
    h = damped(moments.products / moments.count, damping) * torch.outer(factors, factors)
    weight, plain = table.weight.double() / factors, replace(scheme, columns=())
    rounded = torch.cat(
        [
            nearest(rows, part) if part.bits == 8 else round_inputs(rows, h, part)
            for rows, part in row_parts(weight, plain)
        ]
    )
    errors = [loss(weight, other, h) for other in (rounded, nearest(weight, plain))]
    table.weight.copy_(rounded * factors)
    return {"decoder.embed_tokens": errors}


@torch.no_grad()
def quantise_linear(
    module: nn.Module, moments: Moments, scheme: Scheme, damping: float
) -> list[float]:
    """Quantise a linear layer and keep the mean of its output. Returns the error of its output,
    relative to the output's standard deviation, of GPTQ and of rounding to nearest."""
    h, weight = damped(moments.covariance, damping), module.weight.double()
    rounded = round_inputs(weight, h, scheme)
    errors = [loss(weight, other, h) for other in (rounded, nearest(weight, scheme))]
    if module.bias is not None:
        module.bias += ((weight - rounded) @ moments.mean).to(module.bias.dtype)
    module.weight.copy_(rounded)
    return errors


# --------------------------------------------------------------------------------- one weight


def round_inputs(weight: Tensor, h: Tensor, scheme: Scheme) -> Tensor:
    """Return weight (d_out, d_in) on the grid of a 4-bit scheme, by (1) and (2); h (d_in, d_in)."""
    order = h.diagonal().argsort(descending=True, stable=True)
    scale = scales_of(weight, h, scheme)[:, order]
    left = weight[:, order].clone()
    upper = torch.linalg.cholesky(invert(h[order][:, order]), upper=True)
    for start in range(0, left.shape[1], LAZY):
        end = min(start + LAZY, left.shape[1])
        block, u = left[:, start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            step = scale[:, start + j]
            rounded = on_grid(block[:, j], step, scheme)
            errors[:, j] = (block[:, j] - rounded) / u[j, j]
            block[:, j] = rounded
            block[:, j + 1 :] -= torch.outer(errors[:, j], u[j, j + 1 :])
        left[:, end:] -= errors @ upper[start:end, end:]
    return left[:, order.argsort()]


def scales_of(weight: Tensor, h: Tensor, scheme: Scheme) -> Tensor:
    """Return the scale of each weight, (d_out, d_in): for each block, the one of SHRINKS with the
    least rounding error, weighted by the diagonal of h."""
    d_in = weight.shape[1]
    pad = -d_in % scheme.block
    blocks = nn.functional.pad(weight.float(), (0, pad)).unflatten(1, (-1, scheme.block))
    importance = nn.functional.pad(h.diagonal().float(), (0, pad)).view(1, -1, scheme.block)
    step = row_steps(blocks, scheme)
    best: Tensor | None = None
    least = torch.full(blocks.shape[:2], torch.inf)
    for shrink in SHRINKS:
        scale = block_scales(blocks * shrink, scheme, step)
        rounded = on_grid(blocks, scale, scheme)
        error = ((rounded - blocks).square() * importance).sum(2)
        better = error < least
        best = scale if best is None else torch.where(better[..., None], scale, best)
        least = torch.where(better, error, least)
    assert best is not None
    return best.expand_as(blocks).flatten(1)[:, :d_in].double()


def nearest(weight: Tensor, scheme: Scheme) -> Tensor:
    return fake_quantise(weight.float(), scheme).double()


def loss(weight: Tensor, other: Tensor, h: Tensor) -> float:
    """Return sqrt(tr((W - Q) H (W - Q)^T) / tr(W H W^T))."""

    def energy(x: Tensor) -> float:
        return float((x @ h * x).sum())

    return (energy(weight - other) / max(energy(weight), 1e-300)) ** 0.5
