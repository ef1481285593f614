"""Letters to the user end without a period: the command line prints them as lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("edgewhisper", "export", "benchmarks", "devices")
LETTERS = {"Problem", "DeviceProblem", "RunnerProblem", "GateFailure", "Interrupted"}


def told(tree: ast.Module) -> Iterator[ast.expr]:
    """Messages and hints of the letters in a file; for a name, what the file assigns to it."""
    nodes = list(ast.walk(tree))
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in LETTERS]
    passed = [text for n in calls for text in (*n.args, *(word.value for word in n.keywords))]
    names = {text.id for text in passed if isinstance(text, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Assign) and names & set(map(ast.unparse, node.targets)):
            yield node.value
    yield from passed


def ends_with_period(text: ast.expr) -> bool:
    last = text.values[-1] if isinstance(text, ast.JoinedStr) else text
    return isinstance(last, ast.Constant) and str(last.value).endswith(".")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_letter_ends_with_a_period(folder):
    files = [*(ROOT / folder).rglob("*.py")]
    letters = [(f, text) for f in files for text in told(ast.parse(f.read_text(encoding="utf-8")))]
    assert letters
    wrong = [
        f"{f.name}:{text.lineno} {ast.unparse(text)}"
        for f, text in letters
        if ends_with_period(text)
    ]
    assert not wrong


def test_a_period_is_found_wherever_it_is_written():
    code = 'hint = f"{x} one."\nraise Problem("a. b", hint)\nraise Problem(f"{x} two.", "three.")'
    found = [ast.unparse(text) for text in told(ast.parse(code)) if ends_with_period(text)]
    assert found == ["f'{x} one.'", "f'{x} two.'", "'three.'"]
