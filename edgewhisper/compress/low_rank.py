"""Low-rank factorisation of one linear layer: y = W x + b becomes y = up (down x) + shift.

Equation numbers are those of lite.py. Everything is computed in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgewhisper.calibration import exact
from edgewhisper.whisper import GatherLinear, LowRank


class Factors(NamedTuple):
    """y = up down x + shift."""

    down: Tensor
    """(k, d_in)"""
    up: Tensor
    """(d_out, k)"""
    shift: Tensor
    """(d_out,)"""


# ------------------------------------------------------------------------------- the arithmetic


def square_root(covariance: Tensor) -> Tensor:
    """Return R (d, d) with R R^T = covariance (d, d)."""
    variances, axes = torch.linalg.eigh(covariance)
    return axes * variances.clamp_min(0).sqrt()


def spectrum(root: Tensor) -> Tensor:
    """Root (d_out, r) of Cov(Y) -> S^2 of (2), largest first; (min(d_out, r),), the rest are 0."""
    gram = root.T @ root if root.shape[1] < root.shape[0] else root @ root.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def principal_axes(root: Tensor, rank: int) -> Tensor:
    """Root (d_out, r) of Cov(Y) -> V_k of (2), (d_out, k)."""
    return torch.linalg.svd(root, full_matrices=False).U[:, :rank]


def split(weight: Tensor, bias: Tensor | None, mean: Tensor, axes: Tensor) -> Factors:
    """(5): weight (d_out, d_in), bias (d_out,) or None, mean (d_out,), axes (d_out, k)."""
    offset = -mean if bias is None else bias - mean
    return Factors(axes.T @ weight, axes, mean + axes @ (axes.T @ offset))


def refit(
    weight: Tensor, mean_x: Tensor, mean_y: Tensor, c_xx: Tensor, c_yx: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """(A): weight (d_out, d_in), C_xx (d_in, d_in), C_yx (d_out, d_in) -> W*, b*."""
    r = ridge * c_xx.diagonal().mean() + torch.finfo(c_xx.dtype).tiny
    damped = c_xx + r * torch.eye(len(c_xx), dtype=c_xx.dtype, device=c_xx.device)
    refitted = weight + torch.linalg.solve(damped, c_yx - weight @ c_xx, left=False)
    return refitted, mean_y - refitted @ mean_x


# ---------------------------------------------------------------------------- layers of a model


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a linear layer, (d_out, d_in) float64."""
    return exact(model.get_submodule(name).weight)


def inputs_of(linear: nn.Module, features: Tensor) -> Tensor:
    """Return the indices of the features (d,) that a layer reads."""
    inputs = getattr(linear, "inputs", torch.arange(len(features)))
    return inputs.to(features.device)


@torch.no_grad()
def set_dense(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Set weight and bias. A key projection has no bias and needs none: a softmax ignores it."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


@torch.no_grad()
def set_factors(model: nn.Module, name: str, factors: Factors) -> None:
    """Replace a linear layer by its factors; a layer that reads selected inputs still does."""
    dense = model.get_submodule(name)
    rank, d_in = factors.down.shape
    gathers = isinstance(dense, GatherLinear)
    down = type(dense)(d_in, rank, bias=False)
    up = (nn.Linear if gathers else type(dense))(rank, len(factors.up))
    if gathers:
        down.inputs.copy_(dense.inputs)
    down.weight.copy_(factors.down)
    up.weight.copy_(factors.up)
    up.bias.copy_(factors.shift)
    parent, _, part = name.rpartition(".")
    low_rank = LowRank(down, up).to(dense.weight.device, dense.weight.dtype)
    setattr(model.get_submodule(parent), part, low_rank.train(dense.training))
