"""A field of the manifest with its path, for error messages."""

from pathlib import Path
from typing import Any

from ..problem import RunnerProblem
from .files import AGAIN

MOST_TENSORS = 4096
MOST = 2**53
"""Larger whole numbers are not exact in every JSON parser."""


class Field:
    """A value of the manifest with its path, for error messages."""

    def __init__(self, path: Path, value: Any, where: str = "") -> None:
        self.path, self.value, self.where = path, value, where

    def wrong(self, expected: str, hint: str = AGAIN) -> RunnerProblem:
        return RunnerProblem(
            f"{self.path}: {self.where or 'it'} is {short(self.value)}, not {expected}", hint
        )

    def at(self, key: str) -> "Field":
        """Return the value under a key; raise RunnerProblem if it is missing."""
        plain = key if key.isidentifier() and len(key) <= 60 else short(key)
        where = f"{self.where}.{plain}" if self.where else plain
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if key not in self.value:
            raise RunnerProblem(f"{self.path}: {where} is missing", AGAIN)
        return Field(self.path, self.value[key], where)

    def get(self, key: str) -> "Field | None":
        """Return the value under a key, or None if it is missing or null."""
        if isinstance(self.value, dict) and self.value.get(key) is None:
            return None
        return self.at(key)

    def each(self, most: int = MOST_TENSORS) -> list["Field"]:
        """Return the elements of a list of at most `most`; raise RunnerProblem otherwise."""
        if not isinstance(self.value, list) or len(self.value) > most:
            raise self.wrong(f"a list of at most {most}")
        return [Field(self.path, v, f"{self.where}[{i}]") for i, v in enumerate(self.value)]

    def items(self) -> dict[str, "Field"]:
        """Return the members of an object; raise RunnerProblem for other types."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {key: self.at(key) for key in self.value}

    def count(self, low: int = 0, high: int = MOST) -> int:
        """Return a whole number from `low` to `high`; raise RunnerProblem otherwise."""
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.wrong(f"a whole number from {low} to {high}")
        return self.value

    def text(self) -> str:
        """Return a string of at most 1000 characters; raise RunnerProblem otherwise."""
        if not isinstance(self.value, str) or len(self.value) > 1000:
            raise self.wrong("a short text")
        return self.value


def short(value: Any) -> str:
    """Return a short form of any value for an error message."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
