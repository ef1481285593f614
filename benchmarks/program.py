"""Shared parts of the benchmarks that run as programs: `python -m benchmarks.NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from devices.device import DeviceProblem
from devices.runner.problem import RunnerProblem
from export.problem import Problem

PROJECT = Path(__file__).resolve().parents[__name__.count(".")]
"""The folder from which the packages are imported: the checkout, or site-packages."""

OURS = {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
"""Environment variables of a child process that runs a module of this project on this machine."""


def parser_of(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help text is a module's docstring."""
    summary, *rest = (doc or "").splitlines()
    return argparse.ArgumentParser(
        prog=program,
        description=summary,
        epilog="\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_code(
    command: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Parse `argv` and run the command. Return 0, or 1 after printing an error message."""
    given = parser.parse_args(argv)
    try:
        command(given)
    except (Problem, DeviceProblem, RunnerProblem) as error:
        print(f"error: {error}\ntry:   {error.hint}", file=sys.stderr)
        return 1
    return 0
