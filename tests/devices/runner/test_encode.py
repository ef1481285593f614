"""Text to tokens without a tokenizer library, compared with the tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.runner.decode.encode import encode, words
from devices.runner.decode.text import Tokens, read_tokens
from devices.runner.problem import RunnerProblem

TEXTS = [
    " three one four",
    "I'll  say they'VE it's",
    "naïve — “quoted” 🙂 ½ x²",
    "हिन्दी १२३ 中文 日本語",
    " \n\t two  \nlines ",
    "<|endoftext|><|en|>",
    "",
]


@pytest.fixture(scope="module")
def table(exported) -> Tokens:
    return read_tokens(exported / "tokens.json")


def wanted(processor, text: str) -> list[int]:
    tokenizer = processor.tokenizer
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_are_those_of_the_tokenizer(text, table, processor):
    assert encode(text, table) == wanted(processor, text)


@settings(max_examples=200)
@given(text=st.text(max_size=40))
def test_any_text_gives_the_tokens_of_the_tokenizer(text, table, processor):
    assert "".join(words(text)) == text
    assert encode(text, table) == wanted(processor, text)


def test_a_vocabulary_without_a_byte_is_an_error():
    with pytest.raises(RunnerProblem, match=r"no token for byte 98 of 'ab'"):
        encode("ab", Tokens([b"a"]))
