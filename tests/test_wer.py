"""Error rates, their counts and intervals, and the normalizers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.normalizers import NORMALIZERS, normalizer
from benchmarks.wer import score
from export.problem import Problem


def test_hand_counted_errors():
    found = score(["one two three four", "five", ""], ["one too three", "five six", "nine"])
    assert (found.substitutions, found.deletions, found.insertions) == (1, 1, 2)
    assert (found.words, found.utterances, found.exact) == (5, 3, 0)
    assert found.wer == pytest.approx(4 / 5)


def test_character_errors_count_letters_and_spaces():
    assert score(["abcd"], ["abxd"]).cer == pytest.approx(1 / 4)


def test_equal_texts_have_no_errors_and_a_closed_interval():
    found = score(["one two", "three"], ["One, two!", "three"])
    assert (found.wer, found.cer, found.wer_interval, found.exact) == (0, 0, (0, 0), 2)


words = st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=6).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=8))
def test_the_interval_holds_the_rate_and_counts_add_up(pairs):
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


def test_an_unknown_normalizer_names_those_there_are():
    with pytest.raises(Problem) as problem:
        normalizer("vowels")
    assert "whisper-basic" in problem.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,   World!", "hello world"),
        ("it's <noise> [laughs] fine (he said)", "it s fine"),
        ("ﬁve ½", "five 1 2"),
        ("", ""),
    ],
)
def test_whisper_basic_on_examples(text, expected):
    assert NORMALIZERS["whisper-basic"](text) == expected


def test_whisper_basic_equals_transformers(rng):
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    theirs = BasicTextNormalizer()
    letters = list("abc ABC éñ !?.,'-()[]<> हिन्दी 你好 123 ½ﬁ\t")
    for _ in range(200):
        text = "".join(rng.choice(letters, size=20))
        assert NORMALIZERS["whisper-basic"](text).split() == theirs(text).split()


@given(st.text(max_size=40))
def test_normalizers_are_idempotent(text):
    for clean in NORMALIZERS.values():
        assert clean(clean(text)) == clean(text)
