"""Ctrl-C in the middle of something: the real signal, before the n-th call of a method."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest


def count_calls(patch: pytest.MonkeyPatch, of: type, method: str) -> list[int]:
    """Numbers of the calls from now on, from 1."""
    return before_each(patch, of, method, lambda number: None)


def press_ctrl_c(patch: pytest.MonkeyPatch, of: type, method: str, call: int) -> list[int]:
    def press(number: int) -> None:
        if number == call:
            os.kill(os.getpid(), signal.SIGINT)

    return before_each(patch, of, method, press)


def before_each(
    patch: pytest.MonkeyPatch, of: type, method: str, act: Callable[[int], None]
) -> list[int]:
    calls: list[int] = []
    inner = getattr(of, method)

    def acting(self, *args):
        calls.append(len(calls) + 1)
        act(len(calls))
        return inner(self, *args)

    patch.setattr(of, method, acting)
    return calls
