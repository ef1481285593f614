"""What benchmarks that are programs of their own share: `python -m benchmarks.NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from devices.device import DeviceProblem
from devices.runner.problem import RunnerProblem
from export.problem import Problem


def parser_of(program: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring."""
    summary, *rest = (doc or "").splitlines()
    return argparse.ArgumentParser(
        prog=program,
        description=summary,
        epilog="\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_code(
    work: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Do the work that was asked for; a letter is printed and ends with code 1."""
    given = parser.parse_args(argv)
    try:
        work(given)
    except (Problem, DeviceProblem, RunnerProblem) as letter:
        print(f"error: {letter}\ntry:   {letter.hint}", file=sys.stderr)
        return 1
    return 0
