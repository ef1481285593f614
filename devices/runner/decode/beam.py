"""Beam search with the scores and the stopping rule of transformers' generate().

The score of a finished text is the sum of its log-probabilities divided by its length to the power
of `length_penalty`; the end token counts in both. Log-probabilities are normalised over all tokens,
before forbidden ones are masked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..interfaces import Decoder, Logits
from .fallback import Attempt
from .greedy import Filter
from .rules import Rules
from .softmax import log_sum_exp

Advance = Callable[[Sequence[int], Sequence[int]], Logits]
"""parents, tokens -> logits (beams, vocab): each new beam extends its parent by its token."""

NEVER = -1e9
"""The score of an unused beam, as in transformers."""


@dataclass(frozen=True)
class Beam:
    """A text and its score: a sum of log-probabilities, divided by the length penalty at the
    end; and the sum after each token."""

    tokens: tuple[int, ...]
    score: float
    parent: int = 0
    sums: tuple[float, ...] = ()


def beam_search(
    first: Logits, advance: Advance, rules: Rules, beams: int, length_penalty: float = 1.0
) -> Attempt:
    """Return the best text of a beam search; `first` are the logits (vocab,) after the prompt."""
    filters = Filter(rules)
    running = [Beam((), 0.0 if i == 0 else NEVER) for i in range(beams)]
    finished: list[Beam] = []
    logits = np.repeat(first[None], beams, axis=0)
    for length in range(1, rules.max_new_tokens + 1):
        candidates = best_candidates(logits, running, filters, 2 * beams)
        last = length == rules.max_new_tokens
        ended = [last or beam.tokens[-1] == rules.eos for beam in candidates]
        for beam, over in list(zip(candidates, ended, strict=True))[:beams]:
            if over and beam.score > -np.inf:
                score = beam.score / length**length_penalty
                finished.append(replace(beam, score=score))
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        running = [b for b, over in zip(candidates, ended, strict=True) if not over][:beams]
        if last or not can_improve(running, finished, beams, length**length_penalty):
            break
        parents = [0 if length == 1 else beam.parent for beam in running]
        logits = advance(parents, [beam.tokens[-1] for beam in running])
    return attempt_of(finished[0], rules) if finished else Attempt([], 0.0)


def best_candidates(
    logits: Logits, running: Sequence[Beam], filters: Filter, count: int
) -> list[Beam]:
    """Return the best continuations of all beams by one token, best first."""
    totals = np.empty_like(logits)  # (beams, vocab)
    for row, beam in enumerate(running):
        logprobs = filters(logits[row], beam.tokens)
        np.add(logprobs, np.float32(beam.score) - log_sum_exp(logits[row]), out=totals[row])
    flat = totals.ravel()
    best = np.argpartition(flat, -count)[-count:]
    best = best[np.lexsort((best, -flat[best]))]
    vocab = logits.shape[1]
    return [
        extended(running[i // vocab], int(i % vocab), float(flat[i]), int(i // vocab)) for i in best
    ]


def extended(beam: Beam, token: int, score: float, parent: int) -> Beam:
    """Return the beam with another token and its new score."""
    return Beam((*beam.tokens, token), score, parent, (*beam.sums, score))


def can_improve(
    running: Sequence[Beam], finished: Sequence[Beam], beams: int, divisor: float
) -> bool:
    """Return whether the best running beam, ended now, would beat the worst finished one."""
    if len(finished) < beams:
        return True
    return running[0].score / divisor > finished[-1].score


def attempt_of(beam: Beam, rules: Rules) -> Attempt:
    """Return a finished beam without its end token; the score is the mean log-probability."""
    tokens = list(beam.tokens[:-1] if beam.tokens[-1] == rules.eos else beam.tokens)
    logprobs = [b - a for a, b in pairwise((0.0, *beam.sums))]
    return Attempt(tokens, beam.score, logprobs=logprobs[: len(tokens)])


# ------------------------------------------------------------------------------ decoder branches


class Branches:
    """One decoder per beam over the same window. `decoder` has been fed the prompt."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        self.branches = list(decoder.branches(count))
        self.branches[0].follow(decoder)

    def __call__(self, parents: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Extend each parent by its token; return the logits (beams, vocab)."""
        self.fork(parents)
        return np.stack([d((token,)) for d, token in zip(self.branches, tokens, strict=True)])

    def fork(self, parents: Sequence[int]) -> None:
        """Reorder the branches so that branch i continues parents[i]. The first child of a branch
        takes it over. Its other children copy its state into branches that have no children."""
        free = [i for i in range(len(parents)) if i not in parents]
        order: list[int] = []
        for parent in parents:
            child = free.pop() if parent in order else parent
            if child != parent:
                self.branches[child].follow(self.branches[parent])
            order.append(child)
        self.branches = [self.branches[i] for i in order]
