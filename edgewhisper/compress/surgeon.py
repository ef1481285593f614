"""The arithmetic of `obs`: which inputs of a linear layer to remove, and how to refit the rest.

    here          shape          meaning
    weight        (d_out, d)     W of a layer y = W a + b with input features a
    H             (d, d)         damped covariance of a: Cov(a) + damping * mean variance * I
    inverse       (d, d)         H^-1 of the remaining features
    S                            features that are removed together

    loss of removing S    = tr(W_S ((H^-1)_SS)^-1 W_S^T)                                      (1)
    W                    <- W - W_S ((H^-1)_SS)^-1 (H^-1)_S,:                                 (2)
    H^-1                 <- H^-1 - (H^-1)_:,S ((H^-1)_SS)^-1 (H^-1)_S,:                       (3)

(1) and (2) are the optimal brain surgeon (Hassibi and Stork 1992) for groups of columns, as in
ZipLM (Kurtic et al. 2023, arXiv:2302.04089). (3) is the update of the inverse, which SparseGPT
(Frantar and Alistarh 2023, arXiv:2301.00774) uses too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Removal(NamedTuple):
    """The order in which groups of features are removed, and the loss after each number of
    groups."""

    order: list[Tensor]
    """Feature indices of each group, the first one to be removed first."""
    losses: list[float]
    """Sum of (1) after 0, 1, 2, ... groups."""


def damped(covariance: Tensor, damping: float) -> Tensor:
    """Return H (d, d). A constant input has variance 0; a tiny number keeps H invertible."""
    mean = covariance.diagonal().mean()
    tiny = torch.finfo(covariance.dtype).tiny ** 0.5
    return covariance + (damping * mean + tiny) * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def invert(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def remove_columns(weight: Tensor, h: Tensor, size: int, most: int) -> Removal:
    """Remove single columns greedily, `size` at a time, at most `most` in total.

    Scores are (1) for each column alone; the loss of a step is (1) of its columns together. With
    size = 1 this is the exact greedy order.
    """
    weight, inverse = weight.clone(), invert(h)
    left = torch.arange(len(h), device=h.device)
    order: list[Tensor] = []
    losses = [0.0]
    while len(left) > len(h) - most:
        count = min(size, len(left) - len(h) + most)
        scores = weight.square().sum(0) / inverse.diagonal()
        group = scores.argsort(stable=True)[:count].sort().values
        loss, weight, inverse, rest = eliminate(weight, inverse, group)
        order.append(left[group])
        losses.append(losses[-1] + loss)
        left = left[rest]
    return Removal(order, losses)


def remove_blocks(weight: Tensor, h: Tensor, width: int, most: int) -> Removal:
    """Remove blocks of `width` adjacent columns (attention heads) greedily, one at a time."""
    weight, inverse = weight.clone(), invert(h)
    left = torch.arange(len(h), device=h.device)
    order: list[Tensor] = []
    losses = [0.0]
    for _ in range(most):
        blocks = torch.arange(len(left), device=h.device).view(-1, width)
        scores = torch.stack([loss_of(weight, inverse, block) for block in blocks])
        loss, weight, inverse, rest = eliminate(weight, inverse, blocks[scores.argmin()])
        order.append(left[blocks[scores.argmin()]])
        losses.append(losses[-1] + loss)
        left = left[rest]
    return Removal(order, losses)


def loss_of(weight: Tensor, inverse: Tensor, group: Tensor) -> Tensor:
    """Return the loss of removing one group of columns, (1)."""
    columns = weight[:, group]  # (d_out, s)
    solved = torch.linalg.solve(inverse[group][:, group], columns.T)
    return (columns.T * solved).sum()


def eliminate(
    weight: Tensor, inverse: Tensor, group: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Apply (1), (2) and (3) to one group. Returns the loss, and weight, inverse and indices of the
    remaining columns."""
    kept = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    kept[group] = False
    rest = kept.nonzero().flatten()
    columns, cross = weight[:, group], inverse[group][:, rest]  # (d_out, s), (s, rest)
    pulled = torch.linalg.solve(inverse[group][:, group], cross)  # ((H^-1)_SS)^-1 (H^-1)_S,:
    loss = float(loss_of(weight, inverse, group))
    weight = weight[:, rest].addmm(columns, pulled, alpha=-1)
    inverse = inverse[rest][:, rest].addmm_(cross.T, pulled, alpha=-1)
    return loss, weight, inverse, rest


# --------------------------------------------------------------------------- refitting the rest


def refit(wanted: Tensor, h: Tensor, basis: Tensor) -> Tensor:
    """Return W' (d_out, r) that minimises tr((W - W' B) H (W - W' B)^T).

    `wanted` is W H (d_out, d), the covariance of output and input. The rows of `basis` B (r, d) are
    the remaining directions. Rows of an identity matrix give the result
    of (2), without its rounding.
    """
    inside = basis @ h @ basis.T  # (r, r)
    return torch.cholesky_solve(basis @ wanted.T, torch.linalg.cholesky(inside)).T


def refit_columns(wanted: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """The same as `refit` for remaining single columns: W' (d_out, kept)."""
    inside = h[kept][:, kept]
    return torch.cholesky_solve(wanted[:, kept].T, torch.linalg.cholesky(inside)).T


def fitted_loss(weight: Tensor, wanted: Tensor, h: Tensor, basis: Tensor) -> float:
    """Return tr((W - W' B) H (W - W' B)^T) at the W' of `refit`."""
    whole = (wanted * weight).sum()  # tr(W H W^T)
    return float(whole - (refit(wanted, h, basis) * (wanted @ basis.T)).sum())


# ------------------------------------------------------------------------------- fewer dimensions


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a positive definite matrix, and its inverse."""
    values, axes = torch.linalg.eigh(matrix)
    values = values.clamp_min(torch.finfo(matrix.dtype).eps * values[-1]).sqrt()
    return (axes * values) @ axes.T, (axes / values) @ axes.T


def value_directions(weight: Tensor, h: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return directions of each head's values by their share of the output, largest first.

    weight (d_out, heads * v), h (heads * v, heads * v) -> directions (heads, v, v) as rows, and the
    loss (heads, v) of removing each. The covariance of a head is conditional on the other
    heads, ((H^-1)_SS)^-1. Truncation to the first rows is the best possible for one
    head (Eckart and Young): removal of channels after a rotation never loses more than without.
    """
    inverse, width = invert(h), len(h) // heads
    directions, losses = [], []
    for head in torch.arange(len(h), device=h.device).view(heads, width):
        root, unroot = roots(invert(inverse[head][:, head]))
        _, sizes, axes = torch.linalg.svd(weight[:, head] @ root, full_matrices=False)
        directions.append(axes @ unroot)
        losses.append(sizes.square())
    return torch.stack(directions), torch.stack(losses)


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Return an orthonormal basis (r, d) of the row space. Channels keep their usual sizes, which
    low-bit grids need."""
    return torch.linalg.qr(rows.T).Q.T


def score_directions(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best directions for the scores q^T k of one head.

    Covariances of queries and keys (d, d) -> L (d, d), R (d, d), losses (d,): with the first r rows
    of U and V of L = U and R = V, q^T k is nearly (U q)^T (V k), and the loss is the variance of
    the score that the dropped directions carry, E[(q^T k)^2] for independent q and k.
    """
    root_q, unroot_q = roots(queries)
    root_k, unroot_k = roots(keys)
    left, sizes, right = torch.linalg.svd(root_q @ root_k)
    scale = sizes.sqrt()[:, None]
    return scale * (left.T @ unroot_q), scale * (right @ unroot_k), sizes.square()


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return other factors (r, d) of left^T right (d, d), with orthogonal rows of equal size."""
    u, r_left = torch.linalg.qr(left.T)
    v, r_right = torch.linalg.qr(right.T)
    x, sizes, y = torch.linalg.svd(r_left @ r_right.T)
    scale = sizes.sqrt()
    return (u @ x * scale).T, (v @ y.T * scale).T


def identity_rows(width: int, rows: Sequence[int] | Tensor, like: Tensor) -> Tensor:
    """(rows, width): those rows of the identity matrix."""
    return torch.eye(width, dtype=like.dtype, device=like.device)[rows]
