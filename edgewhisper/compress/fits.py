"""Write a branch at a level: fewer units, heads or dimensions, and the rest refitted.

Weights that are removed become zeros; export/shrink.py then makes the matrices smaller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgewhisper.calibration import Moments
from edgewhisper.compress.branches import Branch
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
    """What the last layer of a branch writes (wanted, mean_y), and what it reads."""

    weight: Tensor
    """(d_out, d) W."""
    h: Tensor
    """(d, d)"""
    wanted: Tensor
    """(d_out, d) W H."""
    mean_x: Tensor
    """(d,) mean of what the layer reads."""
    mean_y: Tensor
    """(d_out,) mean of what it writes."""


def fit_of(last: nn.Module, moments: Moments, damping: float) -> Fit:
    """The regression of a last layer on its own outputs."""
    weight, bias = last.weight.detach().double(), last.bias.detach().double()
    h, mean_x = damped(moments.covariance, damping), moments.mean
    return Fit(weight, h, weight @ h, mean_x, weight @ mean_x + bias)


@torch.no_grad()
def put(last: nn.Module, fit: Fit, weight: Tensor, mean_x: Tensor) -> None:
    """Write a weight (d_out, d) and the bias that keeps the mean of the output."""
    last.weight.copy_(weight)
    last.bias.copy_(fit.mean_y - weight @ mean_x)


def remove_units(model: nn.Module, branch: Branch, fit: Fit, units: int) -> None:
    """Leave so many units of a feed-forward branch."""
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
def reduce_values(model: nn.Module, branch: Branch, fit: Fit, heads: int, dims: int) -> None:
    """Leave so many heads of an attention, and so many value dimensions of each."""
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


def value_bases(fit: Fit, total: int, heads: int, dims: int) -> dict[int, Tensor]:
    """Head that remains -> the directions of its values that remain, (dims, width)."""
    width = len(fit.h) // total
    gone = remove_blocks(fit.weight, fit.h, width, total - heads).order
    removed = {int(group[0]) // width for group in gone}
    left = [head for head in range(total) if head not in removed]
    if dims == width:
        return {head: torch.eye(width, dtype=fit.h.dtype) for head in left}
    columns = torch.cat([torch.arange(head * width, (head + 1) * width) for head in left])
    weight = refit_columns(fit.wanted, fit.h, columns)
    directions, _ = value_directions(weight, fit.h[columns][:, columns], heads)
    return {
        head: orthonormal_rows(rows[:dims]) for head, rows in zip(left, directions, strict=True)
    }


def placed(bases: dict[int, Tensor], d: int) -> Tensor:
    """Directions of heads -> rows over the features of all heads, (heads * dims, d)."""
    rows = []
    for head, basis in bases.items():
        dims, width = basis.shape
        row = basis.new_zeros(dims, d)
        row[:, head * width : (head + 1) * width] = basis
        rows.append(row)
    return torch.cat(rows)


@torch.no_grad()
def rotate(linear: nn.Module, own: slice, rows: Tensor) -> None:
    """One head's outputs (width) of a projection become rows @ outputs, and zeros behind them."""
    end = own.start + len(rows)
    parameters = [linear.weight] + ([] if linear.bias is None else [linear.bias])
    for parameter in parameters:
        new = rows @ parameter[own].double()
        parameter[own] = 0
        parameter[own.start : end] = new.to(parameter.dtype)


def reduce_scores(
    model: nn.Module, branch: Branch, sums: ScoreSums, dims: int, damping: float
) -> None:
    """Leave so many dimensions of queries and keys in each head."""
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
    """(units,) of a feed-forward branch; (heads, value dims, score dims) of an attention."""
    inputs = branch.last_of(model).weight.shape[1]
    if branch.kind == "ffn":
        return (inputs,)
    attention = branch.attention_of(model)
    return attention.num_heads, inputs // attention.num_heads, attention.head_dim


def branch_modules(model: nn.Module, branch: Branch) -> nn.Module:
    """The module whose weights a level changes."""
    return branch.last_of(model) if branch.kind == "ffn" else branch.attention_of(model)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards the module has the weights that it had before."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(before)
