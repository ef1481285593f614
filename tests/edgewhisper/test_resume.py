"""Every step, killed and taken again, gives the bits of one that was not."""

from __future__ import annotations

import pytest
import torch
from small_steps import STEPS, make_teacher, take

from edgewhisper.resume import State


class Killed(Exception):
    pass


def count_saves(patch: pytest.MonkeyPatch, last: int | None = None) -> list[int]:
    """The states that are saved from now on; where a last one is named, the step dies after it."""
    saved: list[int] = []

    def save(self, step, log, inner=State.save):
        inner(self, step, log)
        saved.append(step)
        if len(saved) == last:
            raise Killed

    patch.setattr(State, "save", save)
    return saved


@pytest.mark.parametrize("name", STEPS)
def test_a_killed_step_goes_on_to_the_same_bits(name, seed, rng, tmp_path, monkeypatch):
    """It dies after any of its states: in training, in recovery, inside a trial of a search."""
    make_teacher(seed, tmp_path)
    with monkeypatch.context() as patch:
        saved = count_saves(patch)
        whole, _ = take(name, seed, tmp_path / "whole")
    last = int(rng.integers(1, len(saved) + 1))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_saves(patch, last)
        take(name, seed, tmp_path / "killed")
    left = count_saves(monkeypatch)
    resumed, _ = take(name, seed, tmp_path / "killed")
    assert saved[last:] == left, "a state is saved after every step, and none is done again"
    assert getattr(resumed.config, "edgewhisper", None) == getattr(
        whole.config, "edgewhisper", None
    )
    found, wanted = resumed.state_dict(), whole.state_dict()
    assert found.keys() == wanted.keys()
    for tensor_name, tensor in wanted.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name
