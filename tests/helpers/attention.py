"""Attention in numpy."""

import numpy as np


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def attend(q, k, v, scale, first=None):
    """softmax(q k^T scale) v by the book; query n sees keys up to first + n."""
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    if first is not None:
        n, keys = scores.shape[-2:]
        scores[..., np.arange(keys) > first + np.arange(n)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(1, q.shape[2], -1)


def in_heads(x, heads):
    return x.reshape(1, x.shape[1], heads, -1).transpose(0, 2, 1, 3)
