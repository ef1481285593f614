"""Error messages and hints end without a period."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("edgewhisper", "export", "benchmarks", "devices")
ERRORS = {"Problem", "DeviceProblem", "RunnerProblem", "GateFailure", "Interrupted"}


def messages(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield messages and hints of the errors in a file; names are replaced by their values."""
    nodes = list(ast.walk(tree))
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in ERRORS]
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
def test_no_message_ends_with_a_period(folder):
    files = [*(ROOT / folder).rglob("*.py")]
    trees = [(f, ast.parse(f.read_text(encoding="utf-8"))) for f in files]
    texts = [(f, text) for f, tree in trees for text in messages(tree)]
    assert texts
    wrong = [
        f"{f.name}:{text.lineno} {ast.unparse(text)}" for f, text in texts if ends_with_period(text)
    ]
    assert not wrong


def test_periods_in_names_and_f_strings_are_detected():
    code = 'hint = f"{x} one."\nraise Problem("a. b", hint)\nraise Problem(f"{x} two.", "three.")'
    found = [ast.unparse(text) for text in messages(ast.parse(code)) if ends_with_period(text)]
    assert found == ["f'{x} one.'", "f'{x} two.'", "'three.'"]
