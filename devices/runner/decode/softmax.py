"""Probabilities of logits."""

import numpy as np

from ..interfaces import Logits


def log_sum_exp(scores: Logits) -> float:
    """Return the logarithm of the sum of exponentials; -inf if all scores are -inf."""
    highest = scores.max()
    if highest == -np.inf:
        return -np.inf
    return float(highest + np.log(np.exp(scores - highest).sum()))


def probability(logits: Logits, token: int) -> float:
    """Return the probability of one token."""
    return float(np.exp(logits[token] - log_sum_exp(logits)))
