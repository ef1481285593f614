"""Word and character error rates with their counts and a bootstrap interval.

`wer` is errors summed over all utterances by all reference words (corpus WER): utterances whose
reference is empty count by the words put in, which is how invented text shows. The mean of every
utterance's own WER stands beside it, because some papers report that (LiteASR: its average over
data sets of such means): short utterances weigh more there, those without reference words nothing.
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
    """Error rates as fractions (0.05 is 5 %), counts in words, the normalizer that was used."""

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
    """Compare texts pairwise; `languages` are those of the texts, for a by-language normalizer.

    Raises Problem: different lengths, or no reference word at all.
    """
    if len(references) != len(hypotheses):
        raise Problem(f"{len(references)} references but {len(hypotheses)} hypotheses")
    pairs = normalized(references, hypotheses, normalizer, languages)
    counts = np.array([count(r, h) for r, h in pairs]).reshape(-1, 4)
    substitutions, deletions, insertions, words = (int(total) for total in counts.sum(axis=0))
    if words == 0:
        raise Problem(
            "the clips hold no reference words, so there is no error rate",
            hint="score clips without speech together with clips that have some",
        )
    letters = np.array([count(r, h, characters=True) for r, h in pairs]).sum(axis=0)
    return Score(
        wer=(substitutions + deletions + insertions) / words,
        wer_per_utterance_mean=_utterance_mean(counts[:, :3].sum(axis=1), counts[:, 3]),
        cer=float(letters[:3].sum() / letters[3]),
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
    """Substitutions, deletions, insertions, and the reference's length, in words or characters."""
    import jiwer

    if not reference:  # jiwer wants at least one reference word
        return 0, 0, len(hypothesis if characters else hypothesis.split()), 0
    process = jiwer.process_characters if characters else jiwer.process_words
    found = process(reference, hypothesis)
    length = found.hits + found.substitutions + found.deletions
    return found.substitutions, found.deletions, found.insertions, length


def normalized(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str,
    languages: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Pairs of texts after normalisation."""
    spoken = [None] * len(references) if languages is None else languages
    cleaners = [normalizer_named(normalizer, language) for language in spoken]
    texts = zip(cleaners, references, hypotheses, strict=True)
    return [(clean(reference), clean(hypothesis)) for clean, reference, hypothesis in texts]


def word_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str,
    languages: Sequence[str] | None = None,
) -> list[tuple[int, int]]:
    """Word errors and reference words of each pair."""
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
    """The word counts of each pair, under the names of Score."""
    names = ("substitutions", "deletions", "insertions", "words")
    pairs = normalized(references, hypotheses, normalizer, languages)
    return [dict(zip(names, count(*pair), strict=True)) for pair in pairs]


def _utterance_mean(errors: np.ndarray, words: np.ndarray) -> float:
    """(utterances,) each: the mean of errors / words where there are words."""
    spoken = words > 0
    return float((errors[spoken] / words[spoken]).mean())


def interval(errors: np.ndarray, words: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of errors / words, by percentile bootstrap over utterances (Bisani and Ney
    2004); the seed is fixed. Differences of errors between two systems give the paired interval."""
    totals = resampled_sums(np.stack([errors, words]))
    spoken = totals[:, 1] > 0
    rates = totals[spoken, 0] / totals[spoken, 1]
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(rates, [tail, 100 - tail])
    return float(low), float(high)


def resampled_sums(counts: np.ndarray) -> np.ndarray:
    """Sums of (kinds, utterances) counts over RESAMPLES draws of the utterances with replacement:
    (RESAMPLES, kinds). The seed is fixed. Draws are not kept, so that memory does not grow with
    the number of utterances."""
    rng, number = np.random.default_rng(0), counts.shape[1]
    return np.stack([counts[:, rng.integers(number, size=number)].sum(1) for _ in range(RESAMPLES)])
