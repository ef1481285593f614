"""Quantisation-aware training: weights learn to stand on the grid that export stores them on.

Every forward pass sees the quantised weights; their gradients go to the float weights behind them,
as if rounding were the identity (straight through: Bengio, Leonard and Courville 2013,
arXiv:1308.3432). At the end the weights are what the passes saw, config.edgewhisper notes the bits,
and export finds the very codes again, to the bit. The grids are export/quantise.py's, and nowhere
else. Without steps this is plain rounding to nearest.

    symbol   here             shape
    W        module.weight    (d_out, d_in)   what the optimiser moves
    Q(W)     fake_quantise    (d_out, d_in)   what the forward pass sees

    forward   W + stopgrad(Q(W) - W)                                                       (1)
    backward  dL/dW = dL/dQ(W)                                                             (2)

Weights only: activations are quantised as they come, in the runtime. What is dead is removed first,
because scales belong to the rows and blocks that are there; so nothing can be shrunk afterwards. A
step may quantise some layers and another one the rest: whatever is quantised already stays on its
grid while the second one trains.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edgewhisper.compress.near import keep_term
from edgewhisper.compress.shrink import slimmed
from edgewhisper.compress.work import Work
from edgewhisper.recipe import Range
from edgewhisper.training import Training, train
from edgewhisper.whisper import linear_names
from export.problem import Problem
from export.quantise import Scheme, fake_quantise, is_quantised, schemes
from export.shrink import ATTENTIONS, layer_shapes

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Schemes = Mapping[nn.Module, Scheme]
"""Modules whose `weight` is quantised, and how."""


@dataclass(frozen=True)
class Precision:
    encoder: Literal[4, 8, 16, 32] = 8
    """Bits of the encoder's linear layers; 32 leaves them in float32, in an int8 artifact too."""
    decoder: Literal[4, 8, 16, 32] = 8
    layers: str = "*"
    """Shell pattern of the linear layers that get these bits; others stay as they are."""
    token_table: Literal[8, 16, 32] = 8
    stem: Literal[8, 32] = 32
    """The convolutions; at 32 an int8 artifact has them in float16."""
    scales: Literal["channel", "tensor"] = "channel"
    """One scale for every output (in 4 bits: for every block), or one for a whole weight."""
    block: Literal[16, 32, 64, 128, 256] = 32
    """Neighbouring inputs that share a scale in 4 bits. Smaller is more exact and takes more room:
    4 bytes a block."""


@dataclass(frozen=True)
class Options(Precision):
    keep: Annotated[float, Range(0)] = 0.0
    """Weight of the distance to the model that the recipe began with (near.distance), added to the
    cross entropy."""
    training: Training = field(default_factory=lambda: Training(steps=0))


# ------------------------------------------------------------------------ straight through, (1, 2)


class StraightThrough(torch.autograd.Function):
    """W -> Q(W), to the bit; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return fake_quantise(weight.detach(), scheme).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@contextmanager
def fake_quantised(model: nn.Module, chosen: Callable[[], Schemes]) -> Iterator[None]:
    """Inside, every forward pass of `model` has Q(W) in place of W, and gradients go to W.

    The weights themselves stay in place before and after each pass: the optimiser, saved states
    and the loss terms of methods find W. `chosen` is asked before each pass.
    """
    users = _users(model)
    replaced: list[tuple[nn.Module, Tensor]] = []

    def quantise(module: nn.Module, args: Any) -> None:
        for layer, scheme in chosen().items():
            weight = layer.weight
            seen = StraightThrough.apply(weight, scheme)
            for user in users[layer]:  # the tied output shares the token table
                user._parameters["weight"] = seen
                replaced.append((user, weight))

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        while replaced:
            layer, weight = replaced.pop()
            layer._parameters["weight"] = weight

    hooks = [
        model.register_forward_pre_hook(quantise),
        model.register_forward_hook(restore, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _users(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Module -> all modules whose weight is the same parameter."""
    sharing: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(module)
    return {module: modules for modules in sharing.values() for module in modules}


@torch.no_grad()
def settle(chosen: Schemes) -> None:
    """Put the weights on their grids for good."""
    for layer, scheme in chosen.items():
        layer.weight.copy_(fake_quantise(layer.weight, scheme))


@contextmanager
def settled_encoder(model: nn.Module, chosen: Schemes, frozen: bool) -> Iterator[None]:
    """The encoder's weights on their grids for a block, where it does not learn: its states may be
    computed outside the model's forward pass."""
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
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """The model with quantised weights; `work.record["qat"]` counts them.

    Raises Problem where no layer matches, and what training.train raises.
    """
    if not is_quantised(model):
        model, _ = slimmed(model)
    keep = keep_term(work.original or model, options.keep, options.training.cache_encoder)
    note_bits(model, options)
    chosen = schemes(model)
    with (
        settled_encoder(model, chosen, not options.training.encoder),
        fake_quantised(model, lambda: chosen),
    ):
        log = train(
            model,
            work.processor,
            work.train,
            options.training,
            run_dir=work.run_dir / "qat",
            seed=work.seed,
            identity=repr(options),
            loss_term=keep,
            label="qat: training",
        )
    record = {"training": log.summary(), "error": errors(chosen), "weights": counted(chosen)}
    settle(chosen)
    work.record["qat"] = record
    return model


def note_bits(model: "WhisperForConditionalGeneration", options: Precision) -> None:
    """Write the bits into config.edgewhisper, where schemes() and export read them."""
    told = layer_shapes(model)
    for side, attentions in ATTENTIONS.items():
        bits = getattr(options, side)
        for number, shape in enumerate(told[side]):
            names = {
                name: f"model.{side}.layers.{number}.{name}" for name in linear_names(attentions)
            }
            new = {n: bits for n, full in names.items() if fnmatchcase(full, options.layers)}
            shape["bits"] = shape.get("bits", {}) | new
    if not any(shape["bits"] for side in ATTENTIONS for shape in told[side]):
        raise Problem(
            f"no linear layer is called {options.layers!r}",
            hint="correct `layers` in the recipe; a name is model.decoder.layers.0.fc1",
        )
    told |= {"token_bits": options.token_table, "block": options.block, "scales": options.scales}
    model.config.edgewhisper = told | ({} if options.stem == 32 else {"stem_bits": options.stem})


def counted(chosen: Schemes) -> dict[str, int]:
    """Bits -> weights that are stored so."""
    counts: dict[str, int] = {}
    for layer, scheme in chosen.items():
        counts[str(scheme.bits)] = counts.get(str(scheme.bits), 0) + layer.weight.numel()
    return counts


@torch.no_grad()
def errors(chosen: Schemes) -> dict[str, float]:
    """Bits -> ||Q(W) - W|| / ||W|| over all weights of so many bits, before they settle."""
    sums: dict[str, tuple[float, float]] = {}
    for layer, scheme in chosen.items():
        weight = layer.weight
        off, size = sums.get(str(scheme.bits), (0.0, 0.0))
        off += float((fake_quantise(weight, scheme) - weight).double().square().sum())
        sums[str(scheme.bits)] = off, size + float(weight.double().square().sum())
    return {bits: (off / size) ** 0.5 for bits, (off, size) in sums.items() if size}
