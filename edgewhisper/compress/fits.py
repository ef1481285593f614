"""Reduce a branch to a level: fewer units, heads or dimensions, and refitted remaining weights.

Removed weights become zeros; export/shrink.py then makes the matrices smaller.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgewhisper.calibration import Moments
from edgewhisper.compress.branches import FFN, Branch
from edgewhisper.compress.low_rank import principal_axes, set_factors, split, square_root
from edgewhisper.compress.surgeon import (
    balanced,
    damped,
    orthonormal_rows,
    refit,
    refit_columns,
    remove_blocks,
    remove_columns,
    score_directions,
    value_directions,
)
from edgewhisper.compress.walk import ScoreSums

GROUPS = 96
"""Units of a feed-forward branch are removed in at most so many groups."""


@dataclass(frozen=True)
class Fit:
    """The regression of a branch's last layer: statistics of its input and its target output."""

    weight: Tensor
    """(d_out, d) W."""
    h: Tensor
    """(d, d)"""
    wanted: Tensor
    """(d_out, d) W H."""
    mean_x: Tensor
    """(d,) mean of the input."""
    mean_y: Tensor
    """(d_out,) mean of the output."""


def fit_of(last: nn.Module, moments: Moments, damping: float) -> Fit:
    """Return the regression of a last layer on its own output."""
    weight, bias = last.weight.detach().double(), last.bias.detach().double()
    h, mean_x = damped(moments.covariance, damping), moments.mean
    return Fit(weight, h, weight @ h, mean_x, weight @ mean_x + bias)


@torch.no_grad()
def put(last: nn.Module, fit: Fit, weight: Tensor, mean_x: Tensor) -> None:
    """Set a weight (d_out, d), and the bias that keeps the mean of the output."""
    last.weight.copy_(weight)
    last.bias.copy_(fit.mean_y - weight @ mean_x)


def remove_branch(model: nn.Module, branch: Branch, fit: Fit) -> None:
    """Replace the output of a branch by its mean."""
    put(branch.last_of(model), fit, torch.zeros_like(fit.weight), fit.mean_x)


def root_of(fit: Fit) -> Tensor:
    """Return a root (d_out, d) of the covariance of a layer's output, W H W^T."""
    return fit.weight @ square_root(fit.h)


def put_product(linear: nn.Module, fit: Fit, axes: Tensor) -> None:
    """Restrict the output of a layer to axes (d_out, k), and keep its mean."""
    put(linear, fit, axes @ (axes.T @ fit.weight), fit.mean_x)


def factorise(model: nn.Module, name: str, fit: Fit, rank: int) -> None:
    """Replace a layer by the two factors of its best product of a rank, as lite.py does."""
    bias = model.get_submodule(name).bias.detach().double()
    axes = principal_axes(root_of(fit), rank)
    set_factors(model, name, split(fit.weight, bias, fit.mean_y, axes))


def remove_units(model: nn.Module, branch: Branch, fit: Fit, units: int) -> None:
    """Reduce a feed-forward branch to a number of units."""
    d = len(fit.h)
    removal = remove_columns(fit.weight, fit.h, max(1, d // GROUPS), d - units)
    put_units(model, branch, fit, torch.cat([*removal.order, torch.empty(0).long()]))


def put_units(model: nn.Module, branch: Branch, fit: Fit, removed: Tensor) -> None:
    """Remove these units of a feed-forward branch and refit the others."""
    kept = torch.ones(len(fit.h), dtype=torch.bool)
    kept[removed] = False
    weight = torch.zeros_like(fit.weight)
    weight[:, kept] = refit_columns(fit.wanted, fit.h, kept.nonzero().flatten())
    put(branch.last_of(model), fit, weight, fit.mean_x)


@torch.no_grad()
def reduce_values(model: nn.Module, branch: Branch, fit: Fit, heads: int, dims: int) -> Tensor:
    """Reduce an attention to a number of heads and of value dimensions per head.

    Returns the weight (d_out, d) with which the last layer gives the new output from its old input.
    """
    attention = branch.attention_of(model)
    total = attention.num_heads
    width = len(fit.h) // total
    bases = value_bases(fit, total, heads, dims)  # head -> (dims, width)
    basis = placed(bases, len(fit.h))
    compact = refit(fit.wanted, fit.h, basis)  # (d_out, heads * dims)
    weight, mean = torch.zeros_like(fit.weight), torch.zeros_like(fit.mean_x)
    value = attention.v_proj
    for place, (head, rows) in enumerate(bases.items()):
        own, new = slice(head * width, (head + 1) * width), place * dims
        weight[:, own.start : own.start + dims] = compact[:, new : new + dims]
        mean[own.start : own.start + dims] = rows @ fit.mean_x[own]
        if dims < width:
            rotate(value, own, rows)
    put(attention.out_proj, fit, weight, mean)
    return (compact @ basis).to(attention.out_proj.weight.dtype)


def value_bases(fit: Fit, total: int, heads: int, dims: int) -> dict[int, Tensor]:
    """Return the remaining directions of values, (dims, width), of each remaining head."""
    width = len(fit.h) // total
    groups = remove_blocks(fit.weight, fit.h, width, total - heads).order
    removed = {int(group[0]) // width for group in groups}
    left = [head for head in range(total) if head not in removed]
    if dims == width:
        return {head: torch.eye(width, dtype=fit.h.dtype) for head in left}
    return first_directions(directions_of(fit, total, left), dims)


def directions_of(fit: Fit, total: int, heads: Sequence[int]) -> dict[int, Tensor]:
    """Return the directions of values, (width, width), of each of these heads by importance, if
    only these heads remain."""
    width = len(fit.h) // total
    columns = torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])
    weight = refit_columns(fit.wanted, fit.h, columns)
    directions, _ = value_directions(weight, fit.h[columns][:, columns], len(heads))
    return dict(zip(heads, directions, strict=True))


def first_directions(directions: dict[int, Tensor], dims: int) -> dict[int, Tensor]:
    """Return an orthonormal basis (dims, width) of each head's first directions."""
    return {head: orthonormal_rows(rows[:dims]) for head, rows in directions.items()}


def placed(bases: dict[int, Tensor], d: int) -> Tensor:
    """Return the directions of heads as rows over the features of all heads, (heads * dims, d)."""
    rows = []
    for head, basis in bases.items():
        dims, width = basis.shape
        row = basis.new_zeros(dims, d)
        row[:, head * width : (head + 1) * width] = basis
        rows.append(row)
    return torch.cat(rows)


@torch.no_grad()
def rotate(linear: nn.Module, own: slice, rows: Tensor) -> None:
    """Replace the outputs (width) of one head of a projection by rows @ outputs, padded with
    zeros."""
    end = own.start + len(rows)
    parameters = [linear.weight] + ([] if linear.bias is None else [linear.bias])
    for parameter in parameters:
        new = rows @ parameter[own].double()
        parameter[own] = 0
        parameter[own.start : end] = new.to(parameter.dtype)


def reduce_scores(
    model: nn.Module, branch: Branch, sums: ScoreSums, dims: int, damping: float
) -> None:
    """Reduce queries and keys to a number of dimensions per head."""
    attention = branch.attention_of(model)
    width = attention.head_dim
    if dims == width:
        return
    for head in range(attention.num_heads):
        queries, keys = damped(sums.queries[head], damping), damped(sums.keys[head], damping)
        left, right, _ = score_directions(queries, keys)
        left, right = balanced(left[:dims], right[:dims])
        own = slice(head * width, (head + 1) * width)
        rotate(attention.q_proj, own, left)
        rotate(attention.k_proj, own, right)


def whole_of(model: nn.Module, branch: Branch) -> tuple[int, ...]:
    """Return (units,) of a feed-forward branch; (heads, value dims, score dims) of an attention."""
    inputs = branch.last_of(model).weight.shape[1]
    if branch.kind == "ffn":
        return (inputs,)
    attention = branch.attention_of(model)
    return attention.num_heads, inputs // attention.num_heads, attention.head_dim


def branch_modules(model: nn.Module, branch: Branch) -> nn.Module:
    """Return the modules whose weights a level changes."""
    if branch.kind == "ffn":
        return nn.ModuleList(getattr(branch.layer_of(model), name) for name in FFN)
    return branch.attention_of(model)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Let the block change copies of the module's weights."""
    before = [(parameter, parameter.data) for parameter in module.parameters()]
    for parameter, data in before:
        parameter.data = data.clone()
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
