"""Error rates, their counts and intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.wer import score
from export.problem import Problem


def test_hand_counted_errors():
    found = score(["one two three four", "five", ""], ["one too three", "five six", "nine"])
    assert (found.substitutions, found.deletions, found.insertions) == (1, 1, 2)
    assert (found.words, found.utterances, found.exact) == (5, 3, 0)
    assert found.wer == pytest.approx(4 / 5)


def test_the_mean_per_utterance_weighs_clips_not_words():
    """The clips have 1 error in 3 words, 0 in 1, and 2 in 1; the clip without words is left out."""
    references, hypotheses = (
        ["one two three", "five", "six", ""],
        ["one too three", "five", "6 7", "8"],
    )
    found = score(references, hypotheses)
    assert found.wer_per_utterance_mean == pytest.approx((1 / 3 + 0 + 2) / 3)
    assert found.wer == pytest.approx((1 + 0 + 2 + 1) / 5)
    assert score(["a b", "c d"], ["a", "c d"]).wer_per_utterance_mean == 0.25


def test_hindi_vowel_errors_count_only_with_a_normalizer_that_keeps_vowels():
    references, hypotheses = ["किताबें की"], ["किताबों का"]
    assert score(references, hypotheses, "hindi-wer").wer == 1
    assert score(references, hypotheses, "whisper-basic").wer == 0


def test_character_errors_count_letters_and_spaces():
    assert score(["abcd"], ["abxd"]).cer == pytest.approx(1 / 4)


def test_equal_texts_have_no_errors_and_a_closed_interval():
    found = score(["one two", "three"], ["One, two!", "three"])
    assert (found.wer, found.cer, found.wer_interval, found.exact) == (0, 0, (0, 0), 2)


words = st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=6).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=8))
def test_the_interval_is_ordered_and_counts_add_up(pairs):
    references, hypotheses = zip(*pairs, strict=True)
    if not any(references):
        return
    found = score(references, hypotheses)
    low, high = found.wer_interval
    assert low <= high
    errors = found.substitutions + found.deletions + found.insertions
    assert found.wer == pytest.approx(errors / found.words)
    balance = sum(len(h.split()) - len(r.split()) for r, h in pairs)
    assert found.insertions - found.deletions == balance


def test_the_interval_is_wider_for_fewer_utterances():
    def width(copies: int) -> float:
        found = score(["one two"] * copies + ["one"] * copies, ["one"] * 2 * copies)
        return found.wer_interval[1] - found.wer_interval[0]

    assert width(5) > width(50) > 0


def test_no_reference_words_is_refused():
    with pytest.raises(Problem, match="no reference words"):
        score(["", "!"], ["one", ""])


def test_different_lengths_are_refused():
    with pytest.raises(Problem, match="2 references but 1 hypotheses"):
        score(["a", "b"], ["a"])
