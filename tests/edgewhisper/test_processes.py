"""Every step gives the same result with two processes as with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_steps import RATE, STEPS, make_teacher, take

pytestmark = pytest.mark.slow  # the processes import torch and train for most of a minute

TESTS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def shared(module_seed: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all steps with two processes, run in one launch because starting is slow."""
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
    """Use one thread, so that everything before the training is bit-identical."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_give_the_result_of_one(name, shared, module_seed, tmp_path):
    weights, shapes, record = torch.load(shared / name / "rank-0.pt", weights_only=False)
    make_teacher(module_seed, tmp_path)
    model, own_record = take(name, module_seed, tmp_path / "one")
    assert getattr(model.config, "edgewhisper", None) == shapes
    assert without_processes(record) == {
        path: pytest.approx(leaf, rel=1e-4, abs=1e-6) if isinstance(leaf, float) else leaf
        for path, leaf in without_processes(own_record).items()
    }
    differences = torch.cat(
        [(weights[n].float() - t.float()).abs().flatten() for n, t in model.state_dict().items()]
    )
    # Adam amplifies the rounding of gradients near zero to a share of the learning rate, and a
    # weight may be exactly between two codes or at a threshold
    far = differences > 0.05 * RATE
    assert far.float().mean() < 1e-3
    assert differences[~far].mean() < RATE / 1000


def without_processes(record: Any) -> dict[str, Any]:
    """Return the leaves of the record, except the number of processes."""
    return {p: leaf for p, leaf in leaves(record).items() if not p.endswith("processes")}


@pytest.mark.parametrize("name", STEPS)
def test_both_processes_end_with_the_same_bits(name, shared):
    (one, *record), (other, *other_record) = (
        torch.load(shared / name / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert leaves(record) == leaves(other_record)
    assert 2 in {leaf for path, leaf in leaves(record).items() if path.endswith("processes")}


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return path -> number or text, without times."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = [leaves(value, f"{path}/{key}") for key, value in pairs]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {} if path.endswith("seconds") else {path: tree}
