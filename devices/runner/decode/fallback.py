"""Whisper's temperature fallback: failed windows are decoded again at higher temperatures.

A window fails if its text compresses too well, because it repeats itself, or if its mean
log-probability is too low. With and without fallback, it has no text if the probability of no
speech is also high.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..interfaces import Logits
from .greedy import MOST_NO_SPEECH, Filter, Step, say
from .loops import loop_period
from .rules import Rules
from .softmax import log_sum_exp

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MOST_COMPRESSION = 2.4
LEAST_LOGPROB = -1.0

LIMITS = ((MOST_NO_SPEECH, LEAST_LOGPROB), (0.25, -1.5))
"""A text is invented above this probability of no speech and below this mean log-probability. The
first pair is Whisper's. The second is for tones: base invents texts for them with -1.8. Of 160
noisy clips, it removes five texts, with 4 of their 49 words right."""
SHORT_LIMIT, SHORT_PER_S = (0.8, -0.5), 1.5
"""The same for texts with fewer tokens for each second, which tiny.en and base invent for short
pieces of noise. Very quiet speech has such probabilities too, but more tokens."""
LEAST_LOOP_SILENCE, LEAST_LOOP_LOGPROB = 0.25, -0.7
"""A text that ends in a loop is invented above this probability of no speech, or below this mean
log-probability: copies are likely tokens. The loops of base for music have -0.72 to -1.05."""

SPARSE_WINDOW_S, SPARSE_PER_S = 8.0, 0.5
SPARSE_LIMITS = ((0.25, -0.8), (0.0, -1.1))
"""The same for texts with less than a token in 2 s of a long window. The first is for tiny.en:
single words in 20 s of noise had at most 0.21, and music at least 0.26. The second is for base,
which takes music for speech: its texts had at most -1.15, and single sentences in 26 s of faint
noise at least -0.84 (tiny.en: -1.01)."""

SEGMENT_LIMIT = (0.25, -1.0)
"""The same for the words of one segment of timestamps. Timestamps do not count, because models that
were not trained with timestamps give them low probabilities."""


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
    looped = stop_loops and loop_period(rules.words(tokens)) > 0
    mean = sum(sampler.logprobs) / max(1, len(sampler.logprobs))
    return Attempt(tokens, mean, looped, temperature, sampler.logprobs[: len(tokens)])


def best_attempt(
    attempt: Callable[[float], Attempt],
    text_of: Callable[[list[int]], str],
    invented: Callable[[Attempt], bool],
    temperatures: Sequence[float] = TEMPERATURES,
) -> Attempt:
    """Return the first attempt that does not fail, at increasing temperatures, or the last one. An
    invented text ends the search, and is left out."""
    for temperature in temperatures:
        found = attempt(temperature)
        if invented(found):
            return replace(found, tokens=[])
        repeats = found.looped or compression_ratio(text_of(found.tokens)) > MOST_COMPRESSION
        if not (found.logprob < LEAST_LOGPROB or repeats):
            break
    return found


def is_invented(found: Attempt, words: int, silence: float, window_s: float) -> bool:
    """Return whether a text was probably invented for a window without speech.

    `silence` is the probability of no speech, `words` the number of tokens without timestamps and
    loop. A text with few words for a long window needs more evidence: noise that fills only a part
    of the model's window has a lower probability of no speech, and its text is short or a loop.
    """
    sparse = is_sparse(words, window_s)
    if found.looped:
        unlikely = found.logprob < LEAST_LOOP_LOGPROB
        return sparse or unlikely or silence > LEAST_LOOP_SILENCE
    limits = [*LIMITS]
    limits += [SHORT_LIMIT] if words < SHORT_PER_S * window_s else []
    limits += SPARSE_LIMITS if sparse else []
    return any(silence > silent and found.logprob < likely for silent, likely in limits)


def is_dots(text: str) -> bool:
    """Return whether a text has dots and nothing else."""
    return bool(text) and not text.strip(" .…")


def is_sparse(words: int, window_s: float) -> bool:
    """Return whether a text has few tokens for a long window."""
    return window_s > SPARSE_WINDOW_S and words < SPARSE_PER_S * window_s


def compression_ratio(text: str) -> float:
    """Return how many times smaller zlib makes the text."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))
