"""Core ML's compressed constants, in both generations of its specification.

Programs for iOS 16 and 17 store packed bytes and a shape. From iOS 18 on the codes have a shape and
a type of their own (e.g. 4 bits), and scales and tables may be given for blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from export.coreml.package import LARGEST, Array, unpack


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """Apply one scale for all codes, or one for each index along an axis."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero, step = (x.reshape(shape) if x.ndim else x for x in (zero_point, scale))
    shifted = quantized_data.astype(np.float32) - zero.astype(np.float32)
    return (shifted * step.astype(np.float32)).astype(scale.dtype)


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Apply one scale per block; the number of scales determines the block size."""
    shifted = data.astype(np.float32)
    if offset is not None:
        shifted -= _spread(offset, data.shape).astype(np.float32)
    return (shifted * _spread(scale, data.shape).astype(np.float32)).astype(scale.dtype)


def lut_to_dense(
    indices: Array,
    lut: Array,
    shape: Array | None = None,
    vector_axis: Array | None = None,
) -> Array:
    """Look numbers up by their index in a table; with `shape`, indices are packed in bytes (iOS
    16)."""
    if shape is None:
        return _looked_up(indices, lut, vector_axis)
    sizes = shape.tolist()
    bits = int(lut.size).bit_length() - 1
    return lut[unpack(indices, math.prod(sizes), bits)].reshape(sizes)


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Fill zeros where the mask is zero; with `shape`, the mask is packed in bytes (iOS 16)."""
    if shape is not None:
        sizes = shape.tolist()
        mask = unpack(mask, math.prod(sizes), 1).reshape(sizes)
    return _dense(mask, nonzero_data)


def lut_to_sparse(
    indices_mask: Array,
    indices_nonzero_data: Array,
    lut: Array,
    vector_axis: Array | None = None,
) -> tuple[Array, Array]:
    """Look up the nonzero numbers by their index in a table; return the mask and the numbers."""
    dense = _looked_up(_dense(indices_mask, indices_nonzero_data), lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = mask.repeat(lut.shape[-1], int(vector_axis))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    dense = blockwise_shift_scale(_dense(data_mask, nonzero_data), scale, offset)
    return data_mask, dense[data_mask != 0]


def cast(source_val: Array, output_dtype: str) -> Array:
    if output_dtype != "fp32":
        raise ValueError(f"casts to {output_dtype}, only fp32 is known")
    return source_val.astype(np.float32)


FORMS: dict[str, Callable[..., Any]] = {
    f"constexpr_{form.__name__}": form
    for form in (
        affine_dequantize,
        blockwise_shift_scale,
        lut_to_dense,
        sparse_to_dense,
        lut_to_sparse,
        sparse_blockwise_shift_scale,
        cast,
    )
}


def _spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Expand one number per block to one per element (an axis of size 1 is kept and broadcast)."""
    if blocks.ndim != len(shape) or any(n % b for n, b in zip(shape, blocks.shape, strict=True)):
        raise ValueError(f"blocks {list(blocks.shape)} do not divide shape {list(shape)}")
    for axis, (size, count) in enumerate(zip(shape, blocks.shape, strict=True)):
        if 1 < count < size:
            blocks = blocks.repeat(size // count, axis)
    return blocks


def _dense(mask: Array, nonzero: Array) -> Array:
    there = mask != 0
    if nonzero.shape != (np.count_nonzero(there),):
        places = np.count_nonzero(there)
        raise ValueError(f"its mask selects {places} places for {list(nonzero.shape)} values")
    dense = np.zeros(mask.shape, nonzero.dtype)
    dense[there] = nonzero
    return dense


def _looked_up(indices: Array, lut: Array, vector_axis: Array | None) -> Array:
    """Look up indices in the table of their block; entries are numbers, or vectors along an
    axis."""
    groups, (count, width) = lut.shape[:-2], lut.shape[-2:]
    if indices.size * width > LARGEST:
        raise ValueError(f"its {indices.size} vectors of {width} are too many")
    if indices.size and int(indices.max()) >= count:
        raise ValueError(f"index {indices.max()} in a table of {count}")
    table = np.arange(math.prod(groups)).reshape(groups)
    entries = lut.reshape(-1, count, width)[_spread(table, indices.shape), indices]
    if width == 1:
        return entries[..., 0]
    if vector_axis is None:
        raise ValueError(f"a table of vectors of {width}, but no axis")
    axis = int(vector_axis) % indices.ndim
    sizes = list(indices.shape)
    sizes[axis] *= width
    return np.moveaxis(entries, -1, axis + 1).reshape(sizes)
