"""The quantisers: one definition, for fake quantisation in training and for what export stores.

Symmetric, of weights only; rows of a matrix (out, in) are output channels. With w the weights that
share a scale s:

    bits   codes c           scale s                                   weights that share one
    8      -127 ... 127      max|w| / 127                              a row
    4      -8 ... 7          -x / 8, x the w of largest magnitude      a block of a row
    16     -32767 ... 32767  max|w| / 32767                            a row
    32     none: the weights as they are

    c = round(w / s), Q(w) = c s                                                          (1)

Four bits have the sign of x in the scale: sixteen codes serve instead of fifteen. Or all of a
matrix shares one scale (`per` = "tensor").

Scales are rounded up to 16 significant bits, those of 16-bit codes to a power of two. Then c s is
exact in float32, and so is the way back: the largest weight of Q(w) is a whole number of scales,
its scale is s again, and Q(Q(w)) = Q(w) to the bit. So a checkpoint that holds the floats Q(w) is
exported to exactly these codes, with nothing but the bits noted beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BITS = (4, 8, 16, 32)
SCALES = ("channel", "tensor")
BLOCKS = (16, 32, 64, 128, 256)
"""Sizes that onnxruntime's MatMulNBits knows."""
LARGEST = {4: 8, 8: 127, 16: 32767}
ROUNDED_AWAY = {4: 0xFF, 8: 0xFF, 16: 0x7FFFFF}
"""Bits of a float32's 23 that scales do without."""
TINY = 2.0**-100
"""Weights no larger than this count as zero: their scales would have too few bits."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored."""

    bits: int = 8
    per: str = "channel"
    block: int = 32
    """Neighbouring inputs that share a scale in 4 bits."""
    transposed: bool = False
    """Its columns are the channels: so is the basis of a factorised token table stored."""


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(1): weight (out, in) -> codes (out, in) int8 or int16, scales (out, blocks) float32.

    A row is one block except in 4 bits, where the last block may be shorter. A block of zeros has
    codes of zero and scale 1.
    """
    codes, scale = _codes(_in_blocks(weight.float(), scheme), scheme)
    whole = codes.flatten(1)[:, : weight.shape[1]]
    return whole.to(torch.int16 if scheme.bits == 16 else torch.int8), scale.squeeze(2)


def dequantise(codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Codes (out, in), scales (out, blocks) -> Q(w) (out, in) float32, exact."""
    wide = _in_blocks(codes.float(), scheme) * scale[:, :, None]
    return wide.flatten(1)[:, : codes.shape[1]] + 0.0  # no negative zeros


def fake_quantise(weight: Tensor, scheme: Scheme) -> Tensor:
    """Q(w), in the shape of weight; the first axis is `out`, all others are inputs."""
    if scheme.bits == 32:
        return weight
    if scheme.transposed:
        return fake_quantise(weight.T, Scheme(scheme.bits, scheme.per, scheme.block)).T
    rows = weight.float().flatten(1)
    codes, scale = _codes(_in_blocks(rows, scheme), scheme)
    whole = (codes * scale).flatten(1)[:, : rows.shape[1]] + 0.0
    return whole.view(weight.shape).to(weight.dtype)


def _in_blocks(rows: Tensor, scheme: Scheme) -> Tensor:
    """(out, in) -> (out, blocks, width), filled up with zeros."""
    width = scheme.block if scheme.bits == 4 else rows.shape[1]
    return functional.pad(rows, (0, -rows.shape[1] % width)).unflatten(1, (-1, width))


def _codes(blocks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(out, blocks, width) -> codes as whole floats, scales (out, blocks, 1)."""
    scale = _scales(blocks, scheme)
    lowest = -8 if scheme.bits == 4 else -LARGEST[scheme.bits]
    highest = 7 if scheme.bits == 4 else LARGEST[scheme.bits]
    return (blocks / scale).round().clamp(lowest, highest), scale


def _scales(blocks: Tensor, scheme: Scheme) -> Tensor:
    sharing = blocks.reshape(1, 1, -1) if scheme.per == "tensor" else blocks
    low, high = sharing.aminmax(dim=2, keepdim=True)
    largest = torch.where(high >= -low, high, low)  # signed
    scale = -largest if scheme.bits == 4 else largest.abs()
    scale = _round_up(scale / LARGEST[scheme.bits], ROUNDED_AWAY[scheme.bits])
    return torch.where(largest.abs() > TINY, scale, 1.0).expand(*blocks.shape[:2], 1)


def _round_up(x: Tensor, away: int) -> Tensor:
    """Magnitudes to the next float whose bits `away` are zero: a carry goes to the exponent."""
    return ((x.view(torch.int32) + away) & ~away).view(torch.float32)


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """4-bit codes (out, in) -> (out, blocks, block / 2) uint8 as MatMulNBits reads them.

    Codes are stored plus 8, the earlier of two in the low half; inputs that fill up are zero.
    """
    shifted = (_in_blocks(codes.float(), scheme) + 8).to(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


# --------------------------------------------------------------------- what a checkpoint asks for


def schemes(model: nn.Module) -> dict[nn.Module, Scheme]:
    """How the weights of a model's modules are stored, as config.edgewhisper has it.

    Layers, token table and stem that it says nothing of are missing: the export's precision
    decides on them.
    """
    told = getattr(model.config, "edgewhisper", None) or {}
    common = {"per": told.get("scales", "channel"), "block": told.get("block", Scheme.block)}
    found: dict[nn.Module, Scheme] = {}
    for side in ("encoder", "decoder"):
        shapes = told.get(side, [])
        for layer, shape in zip(getattr(model.model, side).layers, shapes, strict=bool(shapes)):
            for name, bits in shape.get("bits", {}).items():
                module = layer.get_submodule(name)
                parts = [module.down, module.up] if hasattr(module, "down") else [module]
                found |= dict.fromkeys(parts, Scheme(bits, **common))
    table, encoder = model.model.decoder.embed_tokens, model.model.encoder
    if "token_bits" in told:
        scheme = Scheme(told["token_bits"], **common)
        if hasattr(table, "rows"):
            found |= {table.rows: scheme, table.up: Scheme(scheme.bits, transposed=True, **common)}
        else:
            found[table] = scheme
    if "stem_bits" in told:
        found |= dict.fromkeys((encoder.conv1, encoder.conv2), Scheme(told["stem_bits"], **common))
    return found


def is_quantised(model: nn.Module) -> bool:
    """Whether its weights stand on grids that removing rows or columns could shift."""
    return any(scheme.bits < 32 for scheme in schemes(model).values())


def noted(model: nn.Module) -> dict[str, Any]:
    """What config.edgewhisper says of precision beside the layers."""
    told = getattr(model.config, "edgewhisper", None) or {}
    keys = ("token_bits", "stem_bits", "block", "scales")
    return {key: told[key] for key in keys if key in told}
