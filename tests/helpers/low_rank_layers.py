"""Linear layers to split, and models whose layers have low rank."""

import numpy as np
import torch
from torch import nn

from edgewhisper import whisper
from edgewhisper.compress.lite import Options
from edgewhisper.compress.low_rank import principal_axes, split, square_root
from edgewhisper.whisper import LowRank

FINE = Options(round_to=4, theta_attn=0.9, theta_mlp=0.95)

"""Options for a model of width 32."""


@torch.no_grad()
def narrowed(model: nn.Module) -> nn.Module:
    """Give all linear layers falling singular values, in place."""
    for _, linear in whisper.linears(model):
        u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
        linear.weight.copy_(u * (s * torch.logspace(0, -3, len(s))) @ v)
    return model


def draw_layer(rng):
    """Return a random weight, bias, and input rows with a nonzero mean, float64."""
    d_in, d_out = (int(n) for n in rng.integers(2, 40, size=2))
    mixing = rng.standard_normal((d_in, d_in)) * np.geomspace(1, 1e-2, d_in)
    rows = rng.standard_normal((400, d_in)) @ mixing.T + rng.standard_normal(d_in) * 2
    arrays = rng.standard_normal((d_out, d_in)), rng.standard_normal(d_out), rows
    return tuple(torch.from_numpy(array) for array in arrays)


def split_layer(weight, bias, rows, rank):
    """Return the factors for the rows' moments, and the outputs of the dense layer."""
    written = rows @ weight.T + (0 if bias is None else bias)
    root = weight @ square_root(rows.T.cov(correction=0))
    return split(weight, bias, written.mean(dim=0), principal_axes(root, rank)), written


def through(factors, rows):
    return rows @ factors.down.T @ factors.up.T + factors.shift


# --------------------------------------------------------------------------------- the whole step


def low_rank_layers(model) -> dict[str, LowRank]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRank)}
