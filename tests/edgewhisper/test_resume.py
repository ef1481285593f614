"""Every step resumes bit for bit after it was killed."""

from __future__ import annotations

import pytest
import torch
from small_steps import STEPS, make_teacher, take

from edgewhisper.resume import State


class Killed(Exception):
    pass


def count_saves(patch: pytest.MonkeyPatch, last: int | None = None) -> list[int]:
    """Return the list of states saved from now on; the step is killed after state number `last`."""
    saved: list[int] = []

    def save(self, step, log, inner=State.save):
        inner(self, step, log)
        saved.append(step)
        if len(saved) == last:
            raise Killed

    patch.setattr(State, "save", save)
    return saved


@pytest.mark.parametrize("name", STEPS)
def test_a_killed_step_resumes_bit_for_bit(name, seed, rng, tmp_path, monkeypatch):
    """It is killed after a random state: in training, in recovery, or in a trial of a search."""
    make_teacher(seed, tmp_path)
    with monkeypatch.context() as patch:
        saved = count_saves(patch)
        whole, _ = take(name, seed, tmp_path / "whole")
    last = int(rng.integers(1, len(saved) + 1))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_saves(patch, last)
        take(name, seed, tmp_path / "killed")
    remaining = count_saves(monkeypatch)
    resumed, _ = take(name, seed, tmp_path / "killed")
    assert saved[last:] == remaining, "a state is saved after every step, and no step is repeated"
    assert getattr(resumed.config, "edgewhisper", None) == getattr(
        whole.config, "edgewhisper", None
    )
    actual, expected = resumed.state_dict(), whole.state_dict()
    assert actual.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert torch.equal(actual[tensor_name], tensor), tensor_name
