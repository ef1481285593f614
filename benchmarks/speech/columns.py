"""Column names that datasets use for a manifest's `text`, `lang` and `speaker`."""

from __future__ import annotations

from collections.abc import Iterable

from export.problem import Problem
from export.prompt import language_code

TEXT = ("text", "sentence", "transcription", "transcript")
TEXT_BY_LANGUAGE = {"bam": "bm"}
"""Text columns named after their language, as in jeli-asr, and the language's code."""
TEXTS = (*TEXT, *TEXT_BY_LANGUAGE)
LANG = ("lang", "locale", "language")
SPEAKER = ("speaker", "speaker_id")


def find(columns: Iterable[str], known: tuple[str, ...]) -> str | None:
    """Return the first known name that is a column, or None."""
    names = set(columns)
    return next((name for name in known if name in names), None)


def text_column(columns: Iterable[str], where: str) -> str:
    """Return the column of transcripts. Raises Problem, with the columns, if there is none."""
    columns = list(columns)
    column = find(columns, TEXTS)
    if column is None:
        raise Problem(
            f"{where}: no column for the text; the columns are {listed(columns)}",
            hint=f"rename the column of transcripts to {', '.join(TEXT[:-1])} or {TEXT[-1]}",
        )
    return column


def listed(columns: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in columns) or "no columns"


def is_language(given: str) -> bool:
    """Return whether a word, such as a configuration's name, is the code of a known language."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    from benchmarks.normalizers import BY_LANGUAGE

    return language_code(given) in LANGUAGES.keys() | BY_LANGUAGE.keys()
