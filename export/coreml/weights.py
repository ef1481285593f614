"""How a Core ML program stores its weights: a form for each, chosen when the program is built.

    precision          matrices        token table, stem    decompressed by
    fp32, fp16         floats          floats
    int8               int8            int8                 constexpr_affine_dequantize
    int4               int4            int8                 constexpr_blockwise_shift_scale, iOS18
    pal8, pal6         palette         palette              constexpr_lut_to_dense
    pal4               palette         int8

int8 has a scale per output channel, int4 one per 32 inputs, both as quantise.py defines them, with
scales rounded to float16 and codes rounded again with those. If 32 does not divide the inputs, the
block is the largest power of two that does, down to 8; below that int8 is smaller and is used. A
palette has 2**bits numbers for the whole weight, chosen by k-means; in 4 and 6 bits for iOS18, one
for every 16 output channels. Zeros stay zeros in every form.

If the checkpoint names bits for a layer, the table or the stem, the compressing precisions follow
it: 32 and 16 bits become float16, 8 int8, and 4 int4, or a palette in the palette precisions. If it
names bits, but none for the stem, the stem is float16. Nothing that a program computes with is
wider than its floats: biases, norms and positions are float16 in all precisions but fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.problem import Problem
from export.quantise import Scheme, quantise
from export.weights import Floats

SMALLEST_BLOCK = 8
"""Smallest int4 block: 4 bits and a float16 scale per 8 weights are 6 bits per weight."""
PALETTE_ROWS = 16
"""Output channels that share a palette for iOS18."""
STEPS = 30
"""Iterations of k-means; the numbers of a palette converge earlier."""
Halves = NDArray[np.float16]
INT8 = Scheme(8)
LARGEST = 65504.0
"""The largest float16."""


@dataclass(frozen=True)
class Form:
    """How one weight is stored."""

    kind: str
    """"float", "int" or "palette"."""
    bits: int
    scheme: Scheme = INT8
    note: str = ""
    """Why the weight is not stored as requested."""

    @property
    def name(self) -> str:
        return f"{self.kind}{self.bits}"


def form_of(precision: str, scheme: Scheme | None, table: bool, inputs: int) -> Form:
    """Return the form of a weight with `inputs` inputs per output. `table` marks the token table
    and the kernels of the stem."""
    form = _form(precision, scheme, table)
    scheme = form.scheme
    if form.name == "int4" and _block(scheme, inputs) < SMALLEST_BLOCK:
        note = f"no block of {SMALLEST_BLOCK} weights or more divides {inputs} inputs"
        return Form("int", 8, replace(scheme, bits=8), note)
    return form


def _form(precision: str, scheme: Scheme | None, table: bool) -> Form:
    bits = int(precision.strip("abcdefghijklmnopqrstuvwxyz"))
    low = Form("palette", bits) if precision.startswith("pal") else Form("int", 4, Scheme(4))
    if precision.startswith("fp"):
        return Form("float", bits)
    if scheme is None:  # 4 bits are too few for the token table
        return Form("int", 8) if precision == "int8" or (table and bits == 4) else low
    if scheme.bits == 4:
        return replace(low, scheme=scheme)
    return Form("int", 8, scheme) if scheme.bits == 8 else Form("float", 16)


def _block(scheme: Scheme, inputs: int) -> int:
    """Return the number of neighbouring weights that share an int4 scale; it must divide the
    inputs."""
    return inputs if scheme.per == "tensor" else math.gcd(scheme.block, inputs)


def needs_blocks(precision: str, schemes: Any) -> bool:
    """Return whether a program of that precision may hold int4, which iOS18 introduced."""
    if precision == "int4":
        return True
    return precision == "int8" and any(scheme.bits == 4 for scheme in schemes.values())


# ------------------------------------------------------------------------------------- the forms


def halved(weight: Floats, name: str) -> Halves:
    """Convert to float16; raise Problem if a number is out of range."""
    largest = float(np.abs(weight).max(initial=0))
    if largest > LARGEST:
        raise Problem(
            f"{name}: a weight of {largest:.3g} is beyond float16's largest number, {LARGEST:g}",
            hint="export with --precision fp32",
        )
    return weight.astype(np.float16)


def int8(rows: Floats, scheme: Scheme) -> tuple[NDArray[np.int8], Halves]:
    """Quantise rows (out, in) to codes (out, in) and scales (out,)."""
    scale = _halved_scale(quantise(torch.from_numpy(rows), scheme)[1].numpy())  # (out, 1)
    codes = np.rint(rows / scale.astype(np.float32)).clip(-127, 127)
    return codes.astype(np.int8), scale[:, 0].copy()


def int4(rows: Floats, scheme: Scheme) -> tuple[NDArray[np.int8], Halves]:
    """Quantise rows (out, in) to codes (out, in) and scales (out, in / block), with blocks that
    divide in. The grid is that of the scheme; if its blocks are longer, a scale is repeated."""
    inputs = rows.shape[1]
    block = _block(scheme, inputs)
    scale = _halved_scale(quantise(torch.from_numpy(rows), scheme)[1].numpy())
    wide = scale.repeat(scheme.block, axis=1)[:, :inputs]
    codes = np.rint(rows / wide.astype(np.float32)).clip(-8, 7)
    return codes.astype(np.int8), wide[:, ::block].copy()


def _halved_scale(scale: Floats) -> Halves:
    """Round scales to the nearest float16, or up where float16 is coarse (close to zero). Otherwise
    codes could exceed the range to which they are clipped."""
    nearest = scale.astype(np.float16)
    outward = np.copysign(np.float16(np.inf), nearest)
    short = np.abs(nearest) < np.abs(scale) * (1 - 2**-10)
    return np.where(short, np.nextafter(nearest, outward), nearest)


def palettes(rows: Floats, bits: int, groups: int = 1) -> tuple[NDArray[np.uint8], Halves]:
    """Return palette indices (out, in) for rows (out, in), and the palettes (groups, 2**bits),
    ascending. Each of the groups of rows has its own palette, from one-dimensional k-means, which
    is deterministic."""
    values = torch.from_numpy(np.sort(rows.reshape(groups, -1), axis=1))
    centres = _first_centres(values, 1 << bits)
    sums = torch.nn.functional.pad(values.double().cumsum(1), (1, 0))
    for _ in range(STEPS):
        ends = torch.searchsorted(values, _midpoints(centres))
        ends = torch.nn.functional.pad(ends, (1, 0))
        ends = torch.cat([ends, torch.full((groups, 1), values.shape[1])], 1)
        count = ends.diff()
        means = sums.gather(1, ends).diff() / count.clamp(min=1)
        centres = torch.where(count > 0, means.float(), centres)
    centres = _with_zero(centres, (values == 0).any(1)).half()
    whole = torch.from_numpy(np.ascontiguousarray(rows)).view(groups, -1)
    indices = torch.searchsorted(_midpoints(centres.float()), whole, out_int32=True)
    return indices.view(rows.shape).to(torch.uint8).numpy(), centres.numpy()


def _midpoints(centres: Tensor) -> Tensor:
    return (centres[:, 1:] + centres[:, :-1]) / 2


def _first_centres(values: Tensor, count: int) -> Tensor:
    """Return initial centres for k-means: values (groups, n) ascending -> (groups, count)
    ascending.

    The best quantiser with many levels has a level density proportional to the cube root of the
    density of the values (Panter and Dite, 1951), which is estimated from the gaps between
    quantiles.
    """
    places = torch.arange(1025) * (values.shape[1] - 1) // 1024
    quantiles = values[:, places]
    mass = quantiles.diff().pow(2 / 3)
    mass = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
    levels = ((torch.arange(count) + 0.5) / count).expand(len(values), -1).contiguous()
    chosen = torch.searchsorted(mass.cumsum(1), levels).clamp(max=1023)
    return (quantiles.gather(1, chosen) + quantiles.gather(1, chosen + 1)) / 2


def _with_zero(centres: Tensor, has_zeros: Tensor) -> Tensor:
    """Set the centre nearest to zero to zero in groups that have weights of zero."""
    nearest = centres.abs().argmin(1, keepdim=True)
    zeroed = centres.scatter(1, nearest, 0.0)
    return torch.where(has_zeros[:, None], zeroed, centres)


def packed(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack indices into bytes, least significant bit first: the form of a palette for iOS16."""
    single = np.unpackbits(indices.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(single, bitorder="little")
