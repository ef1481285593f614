"""Two processes give what one gives, whatever the step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_steps import RATE, STEPS, make_teacher, take

TESTS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def shared(module_seed: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have taken all steps, in one launch: starting takes longer than they."""
    place = tmp_path_factory.mktemp("two")
    make_teacher(module_seed, place)
    path = os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(TESTS / "small_steps.py"), str(module_seed), str(place)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.fixture(autouse=True)
def one_thread():
    """What comes before the training is then the same to the bit, here and there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_give_what_one_gives(name, shared, module_seed, tmp_path):
    weights, shapes, record = torch.load(shared / name / "rank-0.pt", weights_only=False)
    make_teacher(module_seed, tmp_path)
    model, told = take(name, module_seed, tmp_path / "one")
    assert getattr(model.config, "edgewhisper", None) == shapes
    assert of_any_number(record) == {
        path: pytest.approx(leaf, rel=1e-4, abs=1e-6) if isinstance(leaf, float) else leaf
        for path, leaf in of_any_number(told).items()
    }
    differences = torch.cat(
        [(weights[n].float() - t.float()).abs().flatten() for n, t in model.state_dict().items()]
    )
    # where a gradient is all but zero, Adam turns its rounding into a share of the rate; and a
    # weight may stand between two codes, or at a threshold, to the last bit
    far = differences > 0.05 * RATE
    assert far.float().mean() < 1e-3
    assert differences[~far].mean() < RATE / 1000


def of_any_number(record: Any) -> dict[str, Any]:
    return {p: leaf for p, leaf in leaves(record).items() if not p.endswith("processes")}


@pytest.mark.parametrize("name", STEPS)
def test_both_processes_end_with_the_same_bits(name, shared):
    (one, *told), (other, *told_too) = (
        torch.load(shared / name / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert leaves(told) == leaves(told_too)
    assert 2 in {leaf for path, leaf in leaves(told).items() if path.endswith("processes")}


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Path -> number or word, without the times."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = [leaves(value, f"{path}/{key}") for key, value in pairs]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {} if path.endswith("seconds") else {path: tree}
