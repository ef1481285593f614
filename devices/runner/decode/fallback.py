"""Whisper's temperature fallback: failed windows are decoded again at higher temperatures.

A window fails if its text compresses too well, because it repeats itself, or if its mean
log-probability is too low. It has no text if the probability of no speech is also high.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..interfaces import Logits
from .greedy import MOST_NO_SPEECH, Filter, Step, say
from .loops import loop_period
from .rules import Rules
from .softmax import log_sum_exp

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MOST_COMPRESSION = 2.4
LEAST_LOGPROB = -1.0


@dataclass(frozen=True)
class Attempt:
    """Tokens, the mean log-probability of tokens and end token, whether the text ends in a loop,
    the sampling temperature, and the log-probability of each token."""

    tokens: list[int]
    logprob: float
    looped: bool = False
    temperature: float = 0.0
    logprobs: Sequence[float] = ()


class Sampler:
    """Samples tokens at a temperature (0 is greedy), and records their log-probabilities."""

    def __init__(self, rules: Rules, temperature: float, rng: np.random.Generator) -> None:
        self.filter, self.temperature, self.rng = Filter(rules), temperature, rng
        self.logprobs: list[float] = []

    def __call__(self, logits: Logits, tokens: Sequence[int]) -> int:
        """Return the next token. Log-probabilities are those at temperature 1."""
        scores = self.filter(logits, tokens)
        token = draw(scores / self.temperature, self.rng) if self.temperature else scores.argmax()
        self.logprobs.append(float(scores[token]) - log_sum_exp(scores))
        return int(token)


def draw(scores: Logits, rng: np.random.Generator) -> int:
    """Sample an index from the softmax of the scores."""
    shares = np.exp(scores - scores.max()).cumsum(dtype=np.float64)
    return int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))


def sample(
    step: Step, rules: Rules, temperature: float, rng: np.random.Generator, stop_loops: bool
) -> Attempt:
    """Decode once at a temperature and return the attempt."""
    sampler = Sampler(rules, temperature, rng)
    tokens = say(step, sampler, rules, stop_loops)
    looped = stop_loops and loop_period(tokens) > 0
    mean = sum(sampler.logprobs) / max(1, len(sampler.logprobs))
    return Attempt(tokens, mean, looped, temperature, sampler.logprobs[: len(tokens)])


def best_attempt(
    attempt: Callable[[float], Attempt],
    text_of: Callable[[list[int]], str],
    no_speech: Callable[[], float],
) -> Attempt:
    """Return the first attempt that does not fail, at increasing temperatures, or the last one.

    `no_speech()` returns the probability of no speech; it is called only if the text is unlikely.
    """
    silence = None
    for temperature in TEMPERATURES:
        found = attempt(temperature)
        unlikely = found.logprob < LEAST_LOGPROB
        if unlikely and silence is None:
            silence = no_speech()
        if unlikely and silence is not None and silence > MOST_NO_SPEECH:
            return Attempt([], found.logprob)
        repeats = found.looped or compression_ratio(text_of(found.tokens)) > MOST_COMPRESSION
        if not (unlikely or repeats):
            break
    return found


def compression_ratio(text: str) -> float:
    """Return how many times smaller zlib makes the text."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))
