"""Weight quantisers: one definition for fake quantisation in training and for exported weights.

Quantisation is symmetric. The rows of a matrix (out, in) are output channels. With w the weights
that share a scale s:

    bits   codes c           scale s                                   weights that share s
    8      -127 ... 127      max|w| / 127                              a row
    4      -8 ... 7          -x / 8, x the w of largest magnitude      a block of a row
    16     -32767 ... 32767  max|w| / 32767                            a row
    32     none: the weights are kept                                  none

    c = round(w / s), Q(w) = c s                                                          (1)

In 4 bits the scale carries the sign of x, so that all sixteen codes are used. With `per` = "tensor"
the whole matrix shares one scale.

Scales are rounded up to 16 significant bits, those of 16-bit codes to a power of two. Then c s is
exact in float32, and the largest weight of Q(w) is an integer multiple of s. Its scale is therefore
s again, and Q(Q(w)) = Q(w) to the bit. A checkpoint can hold the floats Q(w) and the number of
bits, and export reproduces exactly these codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BITS = (4, 8, 16, 32)
SCALES = ("channel", "tensor")
BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that onnxruntime's MatMulNBits supports."""
LARGEST = {4: 8, 8: 127, 16: 32767}
"""Bits -> the largest magnitude of a code."""
ROUNDED_AWAY = {4: 0xFF, 8: 0xFF, 16: 0x7FFFFF}
"""Bits -> mask of the mantissa bits of a float32 scale that are set to zero."""
HALF_AWAY = 0x1FFF
"""The same for 4-bit scales that are stored as float16."""
TINY = 2.0**-100
"""A largest magnitude up to this counts as zero: its scale would have too few significant bits."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored."""

    bits: int = 8
    per: str = "channel"
    block: int = 32
    """Number of neighbouring inputs that share a scale in 4 bits."""
    half_scales: bool = False
    """Whether 4-bit scales are rounded up to float16."""
    columns: tuple[int, ...] = ()
    """Exponents of two by which columns are divided before they are quantised: for a token table,
    whose columns differ in size."""
    rows_in_8_bits: int = 0
    """Number of first rows that have 8 bits, of a matrix in 4 bits: for a token table, whose first
    tokens are the most frequent."""
    transposed: bool = False
    """Whether columns are the channels, as in the basis of a factorised token table."""


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Quantise a weight (eq. 1): (out, in) -> codes (out, in) int8 or int16, scales (out, blocks)
    float32. A row is one block, except in 4 bits, where the last block may be shorter. A block of
    zeros has codes of zero and scale 1. 4-bit weights that lie on a grid keep it, also if the
    largest code of a block is not -8, as after error propagation. With `columns`, codes and scales
    are those of the divided weight."""
    weight = weight / column_factors(scheme) if scheme.columns else weight
    codes, scale = _quantised(_in_blocks(weight.float(), scheme), scheme)
    whole = codes.flatten(1)[:, : weight.shape[1]]
    return whole.to(torch.int16 if scheme.bits == 16 else torch.int8), scale.squeeze(2)


def dequantise(codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return Q(w) (out, in) float32, exactly, from codes (out, in) and scales (out, blocks)."""
    wide = _in_blocks(codes.float(), scheme) * scale[:, :, None]
    whole = wide.flatten(1)[:, : codes.shape[1]] + 0.0  # turns -0.0 into 0.0
    return whole * column_factors(scheme) if scheme.columns else whole


def column_factors(scheme: Scheme) -> Tensor:
    """Return the powers of two of the columns, (in,)."""
    return torch.exp2(torch.tensor(scheme.columns, dtype=torch.float32))


def fake_quantise(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return Q(w) in the shape of weight; the first axis is `out`, all others are inputs."""
    if scheme.bits == 32:
        return weight
    if scheme.rows_in_8_bits:
        parts = row_parts(weight, scheme)
        return torch.cat([fake_quantise(rows, part) for rows, part in parts])
    if scheme.columns:
        factors = column_factors(scheme)
        return fake_quantise(weight / factors, replace(scheme, columns=())) * factors
    if scheme.transposed:
        return fake_quantise(weight.T, replace(scheme, transposed=False)).T
    rows = weight.float().flatten(1)
    codes, scale = _quantised(_in_blocks(rows, scheme), scheme)
    whole = (codes * scale).flatten(1)[:, : rows.shape[1]] + 0.0
    return whole.view(weight.shape).to(weight.dtype)


def row_parts(weight: Tensor, scheme: Scheme) -> list[tuple[Tensor, Scheme]]:
    """Return the rows in 8 bits and all others, each with its scheme; all rows if none has 8."""
    first, rest = scheme.rows_in_8_bits, replace(scheme, rows_in_8_bits=0)
    parts = [(weight[:first], replace(rest, bits=8)), (weight[first:], rest)]
    return parts if first else parts[1:]


def _in_blocks(rows: Tensor, scheme: Scheme) -> Tensor:
    """Reshape (out, in) to (out, blocks, width), padded with zeros."""
    width = scheme.block if scheme.bits == 4 else rows.shape[1]
    return functional.pad(rows, (0, -rows.shape[1] % width)).unflatten(1, (-1, width))


def _codes(blocks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return codes as integer-valued floats, (out, blocks, width), and scales (out, blocks, 1)."""
    scale = block_scales(blocks, scheme)
    return _rounded(blocks, scale, scheme), scale


def _rounded(weights: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes as integer-valued floats."""
    lowest = -8 if scheme.bits == 4 else -LARGEST[scheme.bits]
    highest = 7 if scheme.bits == 4 else LARGEST[scheme.bits]
    return (weights / scale).round().clamp(lowest, highest)


def on_grid(weights: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest weights on the grid of a scale that broadcasts to them."""
    return _rounded(weights, scale, scheme) * scale


def _quantised(blocks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return codes and scales, those of the weights' own grid if they lie on one."""
    codes, scale = _codes(blocks, scheme)
    return _on_own_grid(blocks, codes, scale, scheme) if scheme.bits == 4 else (codes, scale)


def _on_own_grid(
    blocks: Tensor, codes: Tensor, scale: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Return codes and scales that reproduce blocks exactly, where the largest magnitude of a block
    has one of the codes 7 to 1. Other blocks are unchanged."""
    exact = (codes * scale == blocks).all(2)
    if scheme.per == "tensor" or not exact.any():  # the weights lie on no grid
        return codes, scale
    for largest in range(7, 0, -1):
        if exact.all():
            break
        others = blocks[~exact]  # (n, width)
        step = block_scales(others[None], scheme, largest)[0]
        tried = _rounded(others, step, scheme)
        fits = (tried * step == others).all(1)
        places = (~exact).nonzero()[fits]
        codes[places[:, 0], places[:, 1]] = tried[fits]
        scale = scale.clone()
        scale[places[:, 0], places[:, 1]] = step[fits]
        exact[places[:, 0], places[:, 1]] = True
    return codes, scale


def block_scales(blocks: Tensor, scheme: Scheme, code: int | None = None) -> Tensor:
    """Return the scales (out, blocks, 1) of (out, blocks, width), such that the largest magnitude
    of a block has the code of that magnitude; the default is the largest code."""
    sharing = blocks.reshape(1, 1, -1) if scheme.per == "tensor" else blocks
    low, high = sharing.aminmax(dim=2, keepdim=True)
    largest = torch.where(high >= -low, high, low)  # with its sign
    scale = -largest if scheme.bits == 4 else largest.abs()
    scale = scale / (code or LARGEST[scheme.bits])
    half = scheme.half_scales and scheme.bits == 4
    scale = _half_up(scale) if half else _round_up(scale, ROUNDED_AWAY[scheme.bits])
    return torch.where(largest.abs() > TINY, scale, 1.0).expand(*blocks.shape[:2], 1)


def _round_up(x: Tensor, away: int) -> Tensor:
    """Round magnitudes up to the next float whose bits `away` are zero; a carry increases the
    exponent."""
    return ((x.view(torch.int32) + away) & ~away).view(torch.float32)


def _half_up(x: Tensor) -> Tensor:
    """Round magnitudes up to the next float16, as float32. Larger magnitudes keep their
    exponent."""
    small = (x.abs() * 2.0**24).ceil() * 2.0**-24 * x.sign()
    return torch.where(x.abs() < 2.0**-14, small, _round_up(x, HALF_AWAY))


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Pack 4-bit codes (out, in) into (out, blocks, block / 2) uint8, as MatMulNBits reads them.
    Each code is stored plus 8, the earlier of two in the low half. Padding has the code zero."""
    shifted = (_in_blocks(codes.float(), scheme) + 8).to(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


# --------------------------------------------------------------------- what a checkpoint asks for


def schemes(model: nn.Module) -> dict[nn.Module, Scheme]:
    """Return how the weights of a model's modules are stored, as config.edgewhisper names it.
    Layers, token table and stem that the config does not name are missing from the result; the
    precision of the export decides for them."""
    config = getattr(model.config, "edgewhisper", None) or {}
    common = {
        "per": config.get("scales", "channel"),
        "block": config.get("block", Scheme.block),
        "half_scales": config.get("half_scales", False),
    }
    result: dict[nn.Module, Scheme] = {}
    for side in ("encoder", "decoder"):
        shapes = config.get(side, [])
        for layer, shape in zip(getattr(model.model, side).layers, shapes, strict=bool(shapes)):
            for name, bits in shape.get("bits", {}).items():
                module = layer.get_submodule(name)
                parts = [module.down, module.up] if hasattr(module, "down") else [module]
                result |= dict.fromkeys(parts, Scheme(bits, **common))
    table, encoder = model.model.decoder.embed_tokens, model.model.encoder
    if "token_bits" in config:
        scheme = Scheme(config["token_bits"], **common)
        if hasattr(table, "rows"):
            result |= {table.rows: scheme, table.up: Scheme(scheme.bits, transposed=True, **common)}
        else:
            rows = config.get("token_rows_in_8_bits", 0) if scheme.bits == 4 else 0
            columns = tuple(config.get("token_columns", ()))
            result[table] = replace(scheme, columns=columns, rows_in_8_bits=rows)
    if "stem_bits" in config:
        result |= dict.fromkeys(
            (encoder.conv1, encoder.conv2), Scheme(config["stem_bits"], **common)
        )
    return result


def is_quantised(model: nn.Module) -> bool:
    """Return whether some weights lie on quantisation grids, which removing rows or columns could
    shift."""
    return any(scheme.bits < 32 for scheme in schemes(model).values())


def precision_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of config.edgewhisper about precision that do not belong to a layer."""
    config = getattr(model.config, "edgewhisper", None) or {}
    token = ("token_bits", "token_columns", "token_rows_in_8_bits")
    keys = (*token, "stem_bits", "block", "scales", "half_scales")
    return {key: config[key] for key in keys if key in config}
