"""MIL operations that move elements and compute no values: reshape, split, gather, slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Ints: TypeAlias = list[int]
Places: TypeAlias = Ints | Tensor
"""Positions that are constant, or known only when the program runs."""


class Unknown(ValueError):
    """An operation, mode or parameter that Core ML may support, but this interpreter does not."""


def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


def reshape(x: Tensor, shape: Ints) -> Tensor:
    if 0 in shape and len(shape) != x.dim():
        raise Unknown(f"shape {shape} keeps sizes of a shape that is not as long")
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    along = tuple(axes_of(x, axes)) if axes else tuple(i for i, n in enumerate(x.shape) if n == 1)
    if any(x.shape[axis] != 1 for axis in along):
        raise ValueError(f"squeezes axes {list(along)} of shape {list(x.shape)}")
    return x.squeeze(along)


def concat(values: list[Tensor], axis: int, interleave: Literal[False] = False) -> Tensor:
    return torch.cat(values, axis)


def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> list[Tensor]:
    if split_sizes is None:
        parts = num_splits or 1
        split_sizes = [x.shape[axis] // parts] * parts
    return list(x.split(split_sizes, axis))


def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(reps)


def gather(
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: Literal[0] = 0,
    validate_indices: bool | None = None,
) -> Tensor:
    axis %= x.dim()
    if validate_indices is None:  # before iOS 17 negative indices count from the end
        indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    rows = x.index_select(axis, indices.reshape(-1))
    return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def slice_by_index(
    x: Tensor,
    begin: Places,
    end: Places,
    stride: Ints | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    return x[_part(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_by_size(x: Tensor, begin: Places, size: Ints) -> Tensor:
    first = _ints(begin)
    rows = zip(first, size, x.shape, strict=True)
    return x[_part(x, first, [whole if n == -1 else b + n for b, n, whole in rows])]


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Places,
    end: Places,
    stride: Ints | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    part = _part(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    y = x.clone()
    if y[part].shape != update.shape:
        raise ValueError(f"updates shape {list(y[part].shape)} with shape {list(update.shape)}")
    y[part] = update
    return y


def axes_of(x: Tensor, axes: Ints | None) -> Ints:
    return [axis % x.dim() for axis in (range(x.dim()) if axes is None else axes)]


def _ints(places: Places) -> Ints:
    return places.reshape(-1).tolist() if isinstance(places, Tensor) else places


def _part(
    x: Tensor,
    begin: Places,
    end: Places,
    stride: Ints | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> tuple[slice | int, ...]:
    none = [False] * x.dim()
    rows = zip(
        _ints(begin),
        _ints(end),
        stride or [1] * x.dim(),
        begin_mask or none,
        end_mask or none,
        squeeze_mask or none,
        strict=True,
    )
    return tuple(
        first if squeezed else slice(None if from_0 else first, None if to_end else last, step)
        for first, last, step, from_0, to_end, squeezed in rows
    )


def identity(x: Tensor) -> Tensor:
    return x


MOVES: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        transpose,
        reshape,
        expand_dims,
        squeeze,
        concat,
        stack,
        split,
        tile,
        gather,
        slice_by_index,
        slice_by_size,
        slice_update,
        identity,
    )
}
"""Name in the MIL specification -> function."""
