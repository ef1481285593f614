"""Greedy decoding with scripted decoders, the loop stop, and the text of tokens."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.runner.decode.greedy import greedy
from devices.runner.decode.loops import loop_period
from devices.runner.decode.rules import Rules
from devices.runner.decode.text import join, read_tokens, to_text
from devices.runner.problem import RunnerProblem

# ---------------------------------------------------------------------------------- greedy decoding


def rules(**changes) -> Rules:
    fields = {
        "prompt": [7, 8],
        "eos": 9,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "timestamp_begin": None,
        "max_new_tokens": 200,
    }
    return Rules.from_manifest(fields | changes)


class Script:
    """A decoder whose best tokens are given; the second best is always the next id."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.fed = tokens, []

    def __call__(self, ids):
        token = self.tokens[min(len(self.fed), len(self.tokens) - 1)]
        self.fed.append(tuple(ids))
        return np.array([2.0 * (i == token) + (i == token + 1) for i in range(12)], np.float32)


def test_the_prompt_is_fed_at_once_and_then_every_token():
    script = Script([3, 4, 9])
    assert greedy(script, rules(), stop_loops=True) == [3, 4]
    assert script.fed == [(7, 8), (3,), (4,)]


def test_suppressed_tokens_are_replaced_by_the_next_best():
    assert greedy(Script([3, 5, 9]), rules(suppress_tokens=[5]), stop_loops=True) == [3, 6]


def test_timestamps_are_never_chosen():
    assert greedy(Script([3, 5, 6, 9]), rules(timestamp_begin=10), stop_loops=True) == [3, 5, 6]
    assert 5 not in greedy(Script([3, 5, 4]), rules(timestamp_begin=5, max_new_tokens=4), True)


def test_begin_suppression_holds_for_the_first_token_only():
    assert greedy(Script([3, 3, 9]), rules(begin_suppress_tokens=[3]), stop_loops=True) == [4, 3]
    assert greedy(Script([9, 3, 9]), rules(begin_suppress_tokens=[9]), stop_loops=True) == [10, 3]


def test_equal_logits_give_the_lower_id():
    assert greedy(lambda ids: np.zeros(12, np.float32), rules(max_new_tokens=1), True) == [0]


def test_decoding_ends_at_max_new_tokens():
    assert len(greedy(Script([1, 2, 3] * 9), rules(max_new_tokens=5), stop_loops=True)) == 5
    assert greedy(Script([1]), rules(max_new_tokens=0), stop_loops=True) == []


@pytest.mark.parametrize(
    ("phrase", "copies"),
    [
        pytest.param([1], 30, id="a-word-30-times"),
        pytest.param([1, 2, 3], 10, id="three-tokens-10-times"),
        pytest.param([1, 2, 3, 4, 5, 6, 1, 2], 5, id="eight-tokens-5-times"),
    ],
)
def test_a_loop_is_cut_to_one_copy(phrase, copies):
    said = [5, 6, *phrase * copies]
    assert greedy(Script(said * 3), rules(), stop_loops=True) == [5, 6, *phrase]
    assert greedy(Script([*said, 9]), rules(), stop_loops=False) == said


def test_a_loop_that_starts_inside_a_phrase_keeps_its_first_words():
    said = [2, 3, *[1, 2, 3] * 10]
    assert greedy(Script(said * 9), rules(), stop_loops=True) == [2, 3, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80))
def test_the_loop_stop_fires_only_on_repetition(tokens):
    period = loop_period(tokens)
    expected = [
        n
        for n in range(1, len(tokens) // 5 + 1)
        for copies in [max(5, -(-30 // n))]
        if len(tokens) >= n * copies and tokens[-n * copies :] == tokens[-n:] * copies
    ]
    assert period == (expected[0] if expected else 0)


def test_six_equal_digits_are_no_loop():
    assert loop_period([4] * 6) == 0
    assert loop_period([4, 5] * 6) == 0


# -------------------------------------------------------------------------------------------- text


def test_characters_that_span_tokens_are_joined_and_halves_replaced(tmp_path):
    parts = [b" na", "ï".encode()[:1], "ï".encode()[1:], b"ve"]
    rows = [base64.b64encode(part).decode() for part in parts]
    (tmp_path / "tokens.json").write_text(json.dumps({"bytes": [*rows, None]}))
    table = read_tokens(tmp_path / "tokens.json")
    assert to_text([0, 1, 2, 3, 4, 99], table) == "naïve"
    assert to_text([0, 1, 3], table) == "na�ve"
    assert join(["one", "", "two"]) == "one two"


def test_a_damaged_token_table_gets_an_error_message(tmp_path):
    (tmp_path / "tokens.json").write_text('{"bytes": [')
    with pytest.raises(RunnerProblem, match=r"tokens\.json cannot be read"):
        read_tokens(tmp_path / "tokens.json")
