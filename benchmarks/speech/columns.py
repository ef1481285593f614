"""Which columns of other people's tables hold what a manifest calls text, lang and speaker."""

from __future__ import annotations

from collections.abc import Iterable

from export.problem import Problem
from export.prompt import language_code

TEXT = ("text", "sentence", "transcription", "transcript")
TEXT_BY_LANGUAGE = {"bam": "bm"}
"""Columns of transcripts that are called by their language, as jeli-asr's is, and its code."""
TEXTS = (*TEXT, *TEXT_BY_LANGUAGE)
LANG = ("lang", "locale", "language")
SPEAKER = ("speaker", "speaker_id")


def find(columns: Iterable[str], known: tuple[str, ...]) -> str | None:
    """The first of the known names that is among the columns."""
    there = set(columns)
    return next((name for name in known if name in there), None)


def text_column(columns: Iterable[str], where: str) -> str:
    """The column of transcripts. Raises Problem, with the names that were found."""
    columns = list(columns)
    found = find(columns, TEXTS)
    if found is None:
        raise Problem(
            f"{where}: no column holds the text; there are {listed(columns)}",
            hint=f"name the column of transcripts {', '.join(TEXT[:-1])} or {TEXT[-1]}",
        )
    return found


def listed(columns: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in columns) or "no columns"


def is_language(given: str) -> bool:
    """Whether a word, such as the name of a configuration, is the code of a language we know."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    from benchmarks.normalizers import BY_LANGUAGE

    return language_code(given) in LANGUAGES.keys() | BY_LANGUAGE.keys()
