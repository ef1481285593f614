"""Word and character error rates with their counts and a bootstrap interval.

`wer` is the corpus WER: the errors of all utterances divided by all reference words. Words inserted
into utterances with an empty reference count as errors, so hallucinated text raises it.

`wer_per_utterance_mean` is the mean of the utterances' own WERs, which some papers report (LiteASR
averages it over datasets). Short utterances weigh more in it, and utterances without reference
words are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.normalizers import normalizer as normalizer_named
from export.problem import Problem

RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Score:
    """Error rates as fractions (0.05 is 5 %), counts in words, and the normalizer."""

    wer: float
    wer_per_utterance_mean: float
    cer: float
    wer_interval: tuple[float, float]
    substitutions: int
    deletions: int
    insertions: int
    words: int
    utterances: int
    exact: int
    normalizer: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str = "whisper-basic",
    languages: Sequence[str] | None = None,
) -> Score:
    """Score hypotheses against references; a by-language normalizer needs their `languages`.

    Raises Problem for lists of different lengths and if there is no reference word.
    """
    if len(references) != len(hypotheses):
        raise Problem(f"{len(references)} references but {len(hypotheses)} hypotheses")
    pairs = normalized(references, hypotheses, normalizer, languages)
    counts = np.array([count(r, h) for r, h in pairs]).reshape(-1, 4)
    substitutions, deletions, insertions, words = (int(total) for total in counts.sum(axis=0))
    if words == 0:
        raise Problem(
            "the clips have no reference words, so there is no error rate",
            hint="score clips without speech together with clips that have speech",
        )
    characters = np.array([count(r, h, characters=True) for r, h in pairs]).sum(axis=0)
    return Score(
        wer=(substitutions + deletions + insertions) / words,
        wer_per_utterance_mean=_utterance_mean(counts[:, :3].sum(axis=1), counts[:, 3]),
        cer=float(characters[:3].sum() / characters[3]),
        wer_interval=interval(counts[:, :3].sum(axis=1), counts[:, 3]),
        substitutions=substitutions,
        deletions=deletions,
        insertions=insertions,
        words=words,
        utterances=len(pairs),
        exact=sum(r == h for r, h in pairs),
        normalizer=normalizer,
    )


def count(reference: str, hypothesis: str, characters: bool = False) -> tuple[int, int, int, int]:
    """Return substitutions, deletions, insertions and reference length, in words or characters."""
    import jiwer

    if not reference:  # jiwer needs at least one reference word
        return 0, 0, len(hypothesis if characters else hypothesis.split()), 0
    process = jiwer.process_characters if characters else jiwer.process_words
    output = process(reference, hypothesis)
    length = output.hits + output.substitutions + output.deletions
    return output.substitutions, output.deletions, output.insertions, length


def normalized(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str,
    languages: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Return the pairs of texts after normalisation."""
    codes = [None] * len(references) if languages is None else languages
    cleaners = [normalizer_named(normalizer, code) for code in codes]
    texts = zip(cleaners, references, hypotheses, strict=True)
    return [(clean(reference), clean(hypothesis)) for clean, reference, hypothesis in texts]


def word_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str,
    languages: Sequence[str] | None = None,
) -> list[tuple[int, int]]:
    """Return the word errors and reference words of each pair."""
    return [
        (row["substitutions"] + row["deletions"] + row["insertions"], row["words"])
        for row in word_counts(references, hypotheses, normalizer, languages)
    ]


def word_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str,
    languages: Sequence[str] | None = None,
) -> list[dict[str, int]]:
    """Return the word counts of each pair, named as in Score."""
    names = ("substitutions", "deletions", "insertions", "words")
    pairs = normalized(references, hypotheses, normalizer, languages)
    return [dict(zip(names, count(*pair), strict=True)) for pair in pairs]


def _utterance_mean(errors: np.ndarray, words: np.ndarray) -> float:
    """Return the mean of errors / words, (utterances,) each, over utterances with words."""
    spoken = words > 0
    return float((errors[spoken] / words[spoken]).mean())


def interval(errors: np.ndarray, words: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of errors / words by a percentile bootstrap over utterances (Bisani
    and Ney 2004) with a fixed seed.

    With the differences of two systems' errors it is the paired interval.
    """
    totals = resampled_sums(np.stack([errors, words]))
    spoken = totals[:, 1] > 0
    rates = totals[spoken, 0] / totals[spoken, 1]
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(rates, [tail, 100 - tail])
    return float(low), float(high)


def resampled_sums(counts: np.ndarray) -> np.ndarray:
    """Return (RESAMPLES, kinds) sums of counts (kinds, utterances) over utterances drawn with
    replacement.

    The seed is fixed. One draw is in memory at a time, so memory does not grow with RESAMPLES.
    """
    rng, number = np.random.default_rng(0), counts.shape[1]
    return np.stack([counts[:, rng.integers(number, size=number)].sum(1) for _ in range(RESAMPLES)])
