"""Factors of one linear layer: exactness, optimality, and regression."""

import pytest
import torch
from low_rank_layers import draw_layer, split_layer, through

from edgewhisper.compress.low_rank import principal_axes, refit, spectrum, split, square_root
from edgewhisper.compress.ranks import (
    energy_at,
    rank_for,
)

# --------------------------------------------------------------------------- factorisation (2), (5)


def test_factors_of_a_small_layer_by_hand():
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64))
    bias = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    mean_x = torch.tensor([0.0, 5.0, 2.0], dtype=torch.float64)
    mean = weight @ mean_x + bias  # [1, 11, 1.2]
    axes = principal_axes(weight @ square_root(torch.eye(3, dtype=torch.float64)), 2)
    down, up, shift = split(weight, bias, mean, axes)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([3.0, 2.0, 0.0]).double()))
    torch.testing.assert_close(shift, torch.tensor([1.0, 1.0, 1.2]).double())


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "k_proj"])
def test_all_axes_reproduce_the_layer(biased, rng):
    weight, bias, rows = draw_layer(rng)
    factors, written = split_layer(weight, bias if biased else None, rows, len(weight))
    rank = min(weight.shape)
    assert factors.down.shape == (rank, weight.shape[1])
    torch.testing.assert_close(through(factors, rows), written, rtol=0, atol=1e-8)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "k_proj"])
def test_the_mean_is_kept_exactly(biased, rng):
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, len(weight) + 1))
    factors, written = split_layer(weight, bias if biased else None, rows, rank)
    torch.testing.assert_close(
        through(factors, rows).mean(dim=0), written.mean(dim=0), rtol=0, atol=1e-10
    )


def test_the_lost_variance_is_one_minus_the_energy(rng):
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, len(weight) + 1))
    factors, written = split_layer(weight, bias, rows, rank)
    centred = written - written.mean(dim=0)
    lost = (through(factors, rows) - written).square().sum() / centred.square().sum()
    variances = spectrum(weight @ square_root(rows.T.cov(correction=0)))
    assert lost.item() == pytest.approx(1 - energy_at(variances, rank), abs=1e-9)


def test_it_agrees_with_the_svd_of_stored_activations(rng):
    """(2) on the centred outputs, as in the paper, gives the same spectrum, rank and subspace."""
    weight, bias, rows = draw_layer(rng)
    written = rows @ weight.T + bias
    centred = written - written.mean(dim=0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    root = weight @ square_root(rows.T.cov(correction=0))
    variances = spectrum(root)
    expected = s.square() / len(rows)
    short = min(len(variances), len(expected))
    torch.testing.assert_close(variances[:short], expected[:short], rtol=1e-6, atol=1e-9)
    for theta in (0.5, 0.9, 0.99):
        assert rank_for(variances, len(weight), theta, 2) == rank_for(
            expected, len(weight), theta, 2
        )
    rank = max(1, int((expected > 1e-6 * expected[0]).sum()) // 2)
    cosines = torch.linalg.svdvals(principal_axes(root, rank).T @ v[:rank].T)
    assert cosines.min() > 1 - 1e-6


def test_it_agrees_with_svd_llm_whitening(rng):
    """SVD-LLM truncates the SVD of W S and multiplies by S^-1, with C_xx = S S^T by Cholesky.

    The weights are the same, and ||(W - W') S||^2 is the sum of the dropped sigma^2.
    """
    weight, bias, rows = draw_layer(rng)
    covariance = rows.T.cov(correction=0)
    root = torch.linalg.cholesky(covariance)
    u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
    rank = int(rng.integers(1, len(sigma) + 1))
    expected = (u[:, :rank] * sigma[:rank]) @ v[:rank] @ torch.linalg.inv(root)
    factors, _ = split_layer(weight, bias, rows, rank)
    result = factors.up @ factors.down
    size = float(weight.norm())
    lost = ((weight - result) @ root).square().sum()
    dropped = sigma[rank:].square().sum()
    assert float(lost - dropped) == pytest.approx(0, abs=1e-9 * float(sigma.square().sum()))
    gap = sigma[rank - 1] - (sigma[rank] if rank < len(sigma) else 0)
    if gap > 1e-3 * sigma[0]:  # with equal values, other axes are equally good
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 * size)


def test_no_other_subspace_of_the_same_rank_loses_less(rng):
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, len(weight) + 1))
    factors, written = split_layer(weight, bias, rows, rank)
    best = (through(factors, rows) - written).square().sum()
    mean = written.mean(dim=0)
    for size in (1.0, 1e-1, 1e-3):
        other = torch.linalg.qr(factors.up + size * torch.randn_like(factors.up)).Q
        assert (through(split(weight, bias, mean, other), rows) - written).square().sum() >= (
            best * (1 - 1e-9) - 1e-9
        )


# ---------------------------------------------------------------------------------- regression, (A)


def test_regression_on_the_original_inputs_keeps_the_weight(rng):
    weight, bias, rows = draw_layer(rng)
    written = rows @ weight.T + bias
    c_xx = rows.T.cov(correction=0)
    result, offset = refit(
        weight, rows.mean(dim=0), written.mean(dim=0), c_xx, weight @ c_xx, ridge=1e-4
    )
    torch.testing.assert_close(result, weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(offset, bias, rtol=0, atol=1e-8)


def test_regression_inverts_a_scaled_rotation_of_the_inputs(rng):
    """Inputs are doubled and rotated, so the weight must be halved and rotated back."""
    weight, bias, rows = draw_layer(rng)
    turn = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1]).double()).Q
    read, written = 2 * rows @ turn, rows @ weight.T + bias
    both = torch.cat([read, written], dim=1).T.cov(correction=0)
    width = rows.shape[1]
    c_xx, c_yx = both[:width, :width], both[width:, :width]
    means = read.mean(dim=0), written.mean(dim=0)
    result, offset = refit(weight, *means, c_xx, c_yx, ridge=1e-12)
    # outputs are compared, because the ridge determines weights of inputs without variance
    size = float(written.std())
    known = read @ (weight @ turn).T / 2 + bias
    torch.testing.assert_close(read @ result.T + offset, known, rtol=0, atol=1e-4 * size)


def test_regression_keeps_the_weight_of_constant_inputs():
    """Feature 0 is constant and keeps its weight; feature 1 is fitted."""
    weight = torch.tensor([[5.0, 1.0]], dtype=torch.float64)
    c_xx = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    c_yx = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    result, _ = refit(weight, torch.zeros(2).double(), torch.zeros(1).double(), c_xx, c_yx, 1e-9)
    torch.testing.assert_close(result, torch.tensor([[5.0, 3.0]]).double(), rtol=0, atol=1e-6)


def test_reduced_rank_regression_beats_projection_on_noisy_inputs(rng):
    """Its error is at most that of the axes of the original activations."""
    weight, bias, rows = draw_layer(rng)
    read = rows + 0.3 * torch.randn_like(rows)
    written = rows @ weight.T + bias
    rank = max(1, min(weight.shape) // 3)
    width = rows.shape[1]
    both = torch.cat([read, written], dim=1).T.cov(correction=0)
    c_xx, c_yx = both[:width, :width], both[width:, :width]
    means = read.mean(dim=0), written.mean(dim=0)
    better, offset = refit(weight, *means, c_xx, c_yx, ridge=1e-10)
    fitted = split(better, offset, means[1], principal_axes(better @ square_root(c_xx), rank))
    plain, _ = split_layer(weight, bias, rows, rank)
    errors = [(through(f, read) - written).square().sum().item() for f in (fitted, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
