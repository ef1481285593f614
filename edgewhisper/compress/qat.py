"""Quantisation-aware training (QAT): trains weights for the grids that export stores them on.

Every forward pass uses the quantised weights. Gradients go to the float weights, as if rounding
were the identity (straight-through estimator: Bengio, Leonard and Courville 2013,
arXiv:1308.3432). Afterwards the weights are set to their quantised values and
config.edgewhisper records the bits, so export recovers exactly the same integer codes. The grids
are defined only in export/quantise.py. Without training steps, this is plain rounding to nearest.

    symbol   here             shape
    W        module.weight    (d_out, d_in)   float weight, updated by the optimiser
    Q(W)     fake_quantise    (d_out, d_in)   quantised weight, used in the forward pass

    forward   W + stopgrad(Q(W) - W)                                                       (1)
    backward  dL/dW = dL/dQ(W)                                                             (2)

Only weights are quantised here; the runtime quantises activations dynamically. Dead structure is
removed first, because scales belong to rows and blocks, and a quantised model cannot be shrunk
later. Two steps may quantise different layers: layers that are already quantised stay on their
grids while the second step trains.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.context import Context
from edgewhisper.compress.shrink import slimmed
from edgewhisper.compress.teacher import distance_term
from edgewhisper.model_modes import removed_after
from edgewhisper.recipe import Range
from edgewhisper.training import Training
from edgewhisper.whisper import linear_names
from export.problem import Problem
from export.quantise import Scheme, fake_quantise, is_quantised, row_parts, schemes
from export.shrink import ATTENTIONS, layer_shapes

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Schemes = Mapping[nn.Module, Scheme]
"""Modules whose `weight` is quantised, and how."""


@dataclass(frozen=True)
class Precision:
    encoder: Literal[4, 8, 16, 32] = 8
    """Bits of the encoder's linear layers; 32 keeps them in float32, also in an int8 artifact."""
    decoder: Literal[4, 8, 16, 32] = 8
    layers: str = "*"
    """Shell pattern of the linear layers that get these bits; other layers do not change."""
    token_table: Literal[8, 16, 32] = 8
    stem: Literal[8, 32] = 32
    """Bits of the convolutions; with 32, an int8 artifact stores them in float16."""
    scales: Literal["channel", "tensor"] = "channel"
    """channel: one scale per output (in 4 bits: per block). tensor: one scale per weight matrix."""
    block: Literal[16, 32, 64, 128, 256] = 32
    """Number of neighbouring inputs that share a scale in 4 bits. Smaller blocks are more accurate
    and larger on disk: each scale takes 4 bytes."""

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored in fewer than 32 bits."""
        return min(self.encoder, self.decoder, self.token_table, self.stem) < 32


REMOVES = ("encoder", "decoder")


@dataclass(frozen=True)
class Options(Precision):
    keep: Annotated[float, Range(0)] = 0.0
    """Weight of the distance to the model before the recipe (teacher.distance), added to the cross
    entropy."""
    training: Training = field(default_factory=lambda: Training(steps=0))


def quantises(options: Options) -> bool:
    """Whether the step stores any weight in fewer than 32 bits."""
    return options.quantised


def allowed_after_quantisation(options: Options) -> bool:
    """QAT trains under the rounding of all quantised weights and returns them to their grids."""
    return True


# ------------------------------------------------------------------------ straight through, (1, 2)


class StraightThrough(torch.autograd.Function):
    """W -> Q(W) exactly; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return fake_quantise(weight.detach(), scheme).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@contextmanager
def fake_quantised(model: nn.Module, chosen: Callable[[], Schemes]) -> Iterator[None]:
    """Use Q(W) instead of W in every forward pass of `model`; gradients go to W.

    Outside the passes, modules hold W, for the optimiser, saved states and loss terms. `chosen` is
    called before each pass and returns the modules to quantise.
    """
    users = _users(model)
    replaced: list[tuple[nn.Module, Tensor]] = []

    def quantise(module: nn.Module, args: Any) -> None:
        for layer, scheme in chosen().items():
            weight = layer.weight
            quantised = StraightThrough.apply(weight, scheme)
            for user in users[layer]:  # the output layer shares the token table
                user._parameters["weight"] = quantised
                replaced.append((user, weight))

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        while replaced:
            layer, weight = replaced.pop()
            layer._parameters["weight"] = weight

    hooks = [
        model.register_forward_pre_hook(quantise),
        model.register_forward_hook(restore, always_call=True),
    ]
    with removed_after(*hooks):
        yield


def _users(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Return, for each module, all modules that share its weight parameter."""
    sharing: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(module)
    return {module: modules for modules in sharing.values() for module in modules}


@torch.no_grad()
def settle(chosen: Schemes) -> None:
    """Set the weights to their quantised values."""
    for layer, scheme in chosen.items():
        layer.weight.copy_(fake_quantise(layer.weight, scheme))


@contextmanager
def settled_encoder(model: nn.Module, chosen: Schemes, frozen: bool) -> Iterator[None]:
    """Quantise the weights of a frozen encoder during the block; do nothing unless `frozen`.

    The states of a frozen encoder may be computed outside the model's forward pass.
    """
    inside = set(model.model.encoder.modules()) if frozen else set()
    part = {layer: scheme for layer, scheme in chosen.items() if layer in inside}
    before = {layer: layer.weight.detach().clone() for layer in part}
    settle(part)
    try:
        yield
    finally:
        for layer, weight in before.items():
            layer.weight.data.copy_(weight)


# --------------------------------------------------------------------------- walking the model


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Return the model with quantised weights; `context.record["qat"]` counts them.

    Raises Problem if no layer matches, and what training.train raises.
    """
    if not is_quantised(model):
        model, _ = slimmed(model)
    original = context.original or model
    term = distance_term(original, options.keep, options.training.cache_encoder)
    note_bits(model, options)
    chosen = schemes(model)
    with (
        settled_encoder(model, chosen, not options.training.encoder),
        fake_quantised(model, lambda: chosen),
    ):
        training = context.trained(
            model,
            options.training,
            "qat",
            identity=repr(options),
            loss_term=term,
            label="qat: training",
        )
    record = {"training": training, "error": errors(chosen), "weights": counted(chosen)}
    settle(chosen)
    context.record["qat"] = record
    return model


def note_bits(model: "WhisperForConditionalGeneration", options: Any) -> None:
    """Write the bits into config.edgewhisper, where schemes() and export read them.

    Raises Problem if no layer matches.
    """
    shapes = layer_shapes(model)
    for side, attentions in ATTENTIONS.items():
        bits = getattr(options, side)
        for number, shape in enumerate(shapes[side]):
            names = {
                name: f"model.{side}.layers.{number}.{name}" for name in linear_names(attentions)
            }
            new = {n: bits for n, full in names.items() if fnmatchcase(full, options.layers)}
            shape["bits"] = shape.get("bits", {}) | new
    if not any(shape["bits"] for side in ATTENTIONS for shape in shapes[side]):
        raise Problem(
            f"no linear layer matches {options.layers!r}",
            hint="correct `layers` in the recipe; a name is model.decoder.layers.0.fc1",
        )
    shapes |= {"token_bits": options.token_table, "block": options.block, "scales": options.scales}
    model.config.edgewhisper = shapes | ({} if options.stem == 32 else {"stem_bits": options.stem})


def counted(chosen: Schemes) -> dict[str, int]:
    """Return the number of weights for each number of bits."""
    counts: dict[str, int] = {}
    for layer, scheme in chosen.items():
        for rows, part in row_parts(layer.weight, scheme):
            counts[str(part.bits)] = counts.get(str(part.bits), 0) + rows.numel()
    return counts


@torch.no_grad()
def errors(chosen: Schemes) -> dict[str, float]:
    """Return ||Q(W) - W|| / ||W|| for each number of bits, over all weights with that number."""
    sums: dict[str, tuple[float, float]] = {}
    for layer, scheme in chosen.items():
        weight = layer.weight
        off, size = sums.get(str(scheme.bits), (0.0, 0.0))
        off += float((fake_quantise(weight, scheme) - weight).double().square().sum())
        sums[str(scheme.bits)] = off, size + float(weight.double().square().sum())
    return {bits: (off / size) ** 0.5 for bits, (off, size) in sums.items() if size}
