"""Weight quantisers: one definition for fake quantisation in training and for exported weights.

Quantisation is symmetric. The rows of a matrix (out, in) are output channels. With w the weights
that share a scale s:

    bits   codes c           scale s                                   weights that share s
    8      -127 ... 127      max|w| / 127                              a row
    4      -8 ... 7          -x / 8, x the w of largest magnitude      a block of a row
    3      -4 ... 3          -x / 4, likewise                          a block of a row
    16     -32767 ... 32767  max|w| / 32767                            a row
    32     none: the weights are kept                                  none

    c = round(w / s), Q(w) = c s                                                          (1)

In 3 and 4 bits the scale carries the sign of x, so that all codes are used. With `per` = "tensor"
the whole matrix shares one scale.

With `steps`, the scale of a block is an integer multiple of a power of two, which all blocks of a
row share (as in QServe, arXiv:2405.04532, whose rows have a float). Such a scale is stored in 8
bits. On tiny.en, GPTQ's error of the token table is 0.0440 with 127 steps, and 0.0442 with float16
scales. Linear layers have 15 steps, so that a code times its scale is an integer of 8 bits, in
which the encoder multiplies. Their error is 1.03 times that of float16 scales.

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
LARGEST = {3: 4, 4: 8, 8: 127, 16: 32767}
"""Bits -> the largest magnitude of a code."""
BLOCKED = (3, 4)
"""Bits whose scales belong to blocks."""
LAYER_STEPS = 127 // LARGEST[4]
"""Most steps of a scale of a linear layer: codes times steps fit into 8 bits."""
TABLE_STEPS = 127
"""Most steps of a scale of a token table."""
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
    steps: int = 0
    """If not 0, the scale of a block is an integer multiple of its row's step, at most this many
    steps. A step is a power of two."""
    columns: tuple[int, ...] = ()
    """Exponents of two by which columns are divided before they are quantised: for a token table,
    whose columns differ in size."""
    rows_in_8_bits: int = 0
    """Number of first rows that have 8 bits, of a matrix in 4 bits: for a token table, whose first
    tokens are the most frequent."""
    rows_in_3_bits: tuple[int, int] | None = None
    """First and last row, plus one, that have 3 bits, of a matrix in 4 bits: for a token table,
    whose last tokens are the rarest."""
    transposed: bool = False
    """Whether columns are the channels, as in the basis of a factorised token table."""


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Quantise a weight (eq. 1): (out, in) -> codes (out, in) int8 or int16, scales (out, blocks)
    float32. A row is one block, except in 4 bits, where the last block may be shorter. A block of
    zeros has codes of zero and scale 1, or one step. 4-bit weights that lie on a grid keep it, also
    if the largest code of a block is not -8, as after error propagation. With `columns`, codes and
    scales are those of the divided weight."""
    if scheme.rows_in_3_bits:
        parts = [quantise(rows, part) for rows, part in row_parts(weight, scheme)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])
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
    if scheme.rows_in_8_bits or scheme.rows_in_3_bits:
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
    """Return the rows of each precision with their scheme: first those in 8 bits, then those in the
    scheme's own, and among these the ones in 3 bits."""
    begin, end = scheme.rows_in_3_bits or (len(weight), len(weight))
    pieces = weight.tensor_split([scheme.rows_in_8_bits, begin, end])
    rest = replace(scheme, rows_in_8_bits=0, rows_in_3_bits=None)
    bits = (8, scheme.bits, 3, scheme.bits)
    parts = zip(pieces, (replace(rest, bits=n) for n in bits), strict=True)
    return [(rows, part) for rows, part in parts if len(rows)]


def _in_blocks(rows: Tensor, scheme: Scheme) -> Tensor:
    """Reshape (out, in) to (out, blocks, width), padded with zeros."""
    width = scheme.block if scheme.bits in BLOCKED else rows.shape[1]
    return functional.pad(rows, (0, -rows.shape[1] % width)).unflatten(1, (-1, width))


def _rounded(weights: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes as integer-valued floats."""
    largest = LARGEST[scheme.bits]
    highest = largest - 1 if scheme.bits in BLOCKED else largest
    return (weights / scale).round().clamp(-largest, highest)


def on_grid(weights: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest weights on the grid of a scale that broadcasts to them."""
    return _rounded(weights, scale, scheme) * scale


def _quantised(blocks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return codes as integer-valued floats, (out, blocks, width), and scales (out, blocks, 1),
    those of the weights' own grid if they lie on one."""
    step = row_steps(blocks, scheme)
    scale = block_scales(blocks, scheme, step)
    codes = _rounded(blocks, scale, scheme)
    if scheme.bits not in BLOCKED:
        return codes, scale
    return _on_own_grid(blocks, codes, scale, step, scheme)


def _on_own_grid(
    blocks: Tensor, codes: Tensor, scale: Tensor, step: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Return codes and scales that reproduce blocks exactly, where the largest magnitude of a block
    has a code below the largest. Other blocks are unchanged."""
    exact = (codes * scale == blocks).all(2)
    if scheme.steps:
        left = ~exact & (blocks.remainder(step) == 0).all(2)
    elif scheme.per == "tensor" or not exact.any():  # the weights lie on no grid
        return codes, scale
    else:
        left = ~exact
    for largest in range(LARGEST[scheme.bits] - 1, 0, -1):
        if not left.any():
            break
        others = blocks[left]  # (n, width)
        finer = block_scales(others[None], scheme, step.expand_as(scale)[left][None], largest)[0]
        tried = _rounded(others, finer, scheme)
        fits = (tried * finer == others).all(1)
        places = left.nonzero()[fits]
        codes[places[:, 0], places[:, 1]] = tried[fits]
        scale = scale.clone()
        scale[places[:, 0], places[:, 1]] = finer[fits]
        left[places[:, 0], places[:, 1]] = False
    return codes, scale


def block_scales(
    blocks: Tensor, scheme: Scheme, step: Tensor | None = None, code: int | None = None
) -> Tensor:
    """Return the scales (out, blocks, 1) of (out, blocks, width), such that the largest magnitude
    of a block has the code of that magnitude; the default is the largest code. `step` is that of
    the rows, see row_steps; None: computed from these blocks."""
    sharing = blocks.reshape(1, 1, -1) if scheme.per == "tensor" else blocks
    low, high = sharing.aminmax(dim=2, keepdim=True)
    largest = torch.where(high >= -low, high, low)  # with its sign
    blocked = scheme.bits in BLOCKED
    scale = -largest if blocked else largest.abs()
    scale = scale / (code or LARGEST[scheme.bits])
    if blocked and scheme.steps:
        step = row_steps(blocks, scheme) if step is None else step
        count = (scale.abs() / step).ceil().clamp(1, scheme.steps)
        return torch.where(scale < 0, -count, count) * step
    half = scheme.half_scales and blocked
    scale = _half_up(scale) if half else _round_up(scale, ROUNDED_AWAY[scheme.bits])
    return torch.where(largest.abs() > TINY, scale, 1.0).expand(*blocks.shape[:2], 1)


def row_steps(blocks: Tensor, scheme: Scheme) -> Tensor:
    """Return the step of each row (out, 1, 1) of blocks (out, blocks, width); 1 without steps.

    If all weights of a row are integer multiples of a power of two that is large enough, as on a
    grid, the step is the largest such power. Otherwise it is the smallest power of two at which the
    largest weight of the row can be stored.
    """
    rows = blocks.flatten(1)
    if not (scheme.bits in BLOCKED and scheme.steps) or rows.shape[1] == 0:
        return torch.ones(len(blocks), 1, 1)
    most = LARGEST[scheme.bits] * scheme.steps
    largest = rows.abs().amax(1)
    _, exponent = torch.frexp(largest / most)
    step = torch.ldexp(torch.ones_like(largest), exponent)
    own = common_powers(rows)
    step = torch.where(largest <= own * most, own, step)
    return torch.where(largest > TINY, step, 1.0)[:, None, None]


def common_powers(rows: Tensor) -> Tensor:
    """Return the largest power of two of which all numbers of a row are integer multiples: (n, k)
    float32 -> (n,). It is 1 for a row of zeros."""
    mantissa, exponent = torch.frexp(rows)
    digits = (mantissa * 2.0**24).to(torch.int32)  # exact: a float32 has 24 digits
    lowest = torch.ldexp((digits & -digits).float(), exponent - 24)
    power = torch.where(rows == 0, torch.inf, lowest).amin(1)
    return torch.where(power.isinf(), 1.0, power)


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


def pack_3_bits(codes: Tensor, scheme: Scheme) -> list[Tensor]:
    """Pack 3-bit codes (out, in) into three parts (out, blocks, block / 8) uint8.

    Each code is stored plus 4. Two codes fill a byte except its bits 3 and 7. The bytes of a block
    are cut into quarters. The parts are the first three quarters, and the six bits of a byte of the
    last quarter are the free bits of the three bytes at its place.
    """
    shifted = (_in_blocks(codes.float(), scheme) + 4).to(torch.uint8)
    *parts, last = (shifted[..., 0::2] | shifted[..., 1::2] << 4).chunk(4, -1)
    return [part | (last >> bit & 0x11) << 3 for bit, part in enumerate(parts)]


def in_steps(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales (out, blocks) of a scheme with steps as integers (out, blocks) int8 and
    steps (out,) float32."""
    step = common_powers(scales)
    return (scales / step[:, None]).to(torch.int8), step


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
    integers = config.get("integer_scales", False) and common["per"] == "channel"
    in_layers, in_table = (LAYER_STEPS, TABLE_STEPS) if integers else (0, 0)
    result: dict[nn.Module, Scheme] = {}
    for side in ("encoder", "decoder"):
        shapes = config.get(side, [])
        for layer, shape in zip(getattr(model.model, side).layers, shapes, strict=bool(shapes)):
            for name, bits in shape.get("bits", {}).items():
                module = layer.get_submodule(name)
                parts = [module.down, module.up] if hasattr(module, "down") else [module]
                result |= dict.fromkeys(parts, Scheme(bits, steps=in_layers, **common))
    table, encoder = model.model.decoder.embed_tokens, model.model.encoder
    if "token_bits" in config:
        scheme = Scheme(config["token_bits"], **common)
        if hasattr(table, "rows"):
            result |= {table.rows: scheme, table.up: Scheme(scheme.bits, transposed=True, **common)}
        else:
            result[table] = replace(scheme, steps=in_table, **_table_fields(config))
    if "stem_bits" in config:
        result |= dict.fromkeys(
            (encoder.conv1, encoder.conv2), Scheme(config["stem_bits"], **common)
        )
    return result


def _table_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the columns and rows of a dense token table's scheme."""
    fields: dict[str, Any] = {"columns": tuple(config.get("token_columns", ()))}
    if config["token_bits"] == 4:
        fields["rows_in_8_bits"] = config.get("token_rows_in_8_bits", 0)
        three = config.get("token_rows_in_3_bits")
        fields["rows_in_3_bits"] = tuple(three) if three else None
    return fields


def is_quantised(model: nn.Module) -> bool:
    """Return whether some weights lie on quantisation grids, which removing rows or columns could
    shift."""
    return any(scheme.bits < 32 for scheme in schemes(model).values())


def precision_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of config.edgewhisper about precision that do not belong to a layer."""
    config = getattr(model.config, "edgewhisper", None) or {}
    token = ("token_bits", "token_columns", "token_rows_in_8_bits", "token_rows_in_3_bits")
    keys = (*token, "stem_bits", "block", "scales", "half_scales", "integer_scales")
    return {key: config[key] for key in keys if key in config}
