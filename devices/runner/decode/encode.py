"""Converts text to tokens with the table of tokens.json, for prompts.

Whisper's vocabularies are byte-pair encodings whose ids are in the order of their merges. So the
table is sufficient: of all neighbours that form a token, those with the lowest id are merged first,
as in OpenAI's tiktoken. Words are split as in GPT-2.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

from ..problem import RunnerProblem
from .text import Tokens

CONTRACTIONS = re.compile("'(?:s|t|re|ve|m|ll|d)")
WORDS = re.compile(r" ?L+| ?N+| ?O+|[ S]+(?![LNO])|[ S]+")
"""GPT-2's pattern of words, for the classes of the characters instead of the characters."""


def encode(text: str, table: Tokens) -> list[int]:
    """Return the tokens of a text. Raises RunnerProblem if the vocabulary lacks one of its bytes.

    The text of special tokens, such as <|en|>, is encoded as ordinary text.
    """
    return [token for word in words(text) for token in merged(word, table.ids)]


def words(text: str) -> Iterator[str]:
    """Yield the words of a text, each with the space before it."""
    classes = "".join(map(class_of, text))
    place = 0
    while place < len(text):
        found = CONTRACTIONS.match(text, place) or WORDS.match(classes, place)
        assert found is not None
        yield text[place : found.end()]
        place = found.end()


def class_of(character: str) -> str:
    """Return " " for the space, S for other white space, L for letters, N for numbers, O for all
    other characters."""
    if character.isspace():
        return " " if character == " " else "S"
    first = unicodedata.category(character)[0]
    return first if first in "LN" else "O"


def merged(word: str, ids: dict[bytes, int]) -> list[int]:
    """Return the tokens of one word."""
    pieces = [bytes([byte]) for byte in word.encode()]
    if lacking := [piece for piece in pieces if piece not in ids]:
        raise RunnerProblem(
            f"the artifact's vocabulary has no token for byte {lacking[0][0]} of {word!r}",
            "leave this word out of the prompt and the hotwords",
        )
    while len(pieces) > 1:
        pairs = [ids.get(a + b) for a, b in pairwise(pieces)]
        lowest = min((token for token in pairs if token is not None), default=None)
        if lowest is None:
            break
        at = pairs.index(lowest)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [ids[piece] for piece in pieces]
