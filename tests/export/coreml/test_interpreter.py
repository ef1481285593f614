"""The interpreter of Core ML packages: states, functions, inputs, and packages that no stranger
should get away with."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import hostile_packages
import numpy as np
import pytest
import torch
from built_packages import Builder, tensor, types, write
from hostile_packages import MODEL, WEIGHTS

from export.coreml.interpreter import Program, open_package
from export.problem import Problem

with contextlib.redirect_stderr(io.StringIO()):  # it tells what it lacks outside macOS
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction


# ---------------------------------------------------------------------- states, functions, feeds


@pytest.fixture(scope="module")
def remembers(tmp_path_factory) -> Program:
    """Writes a column into a cache at a place known when it runs; gives the whole cache, doubled,
    and the sum of another state that it adds to."""
    inputs = [tensor((1, 4, 1)), tensor((1,), types.int32)]
    inputs += [Builder.StateTensorSpec((1, 4, n), dtype=types.fp16) for n in (8, 1)]

    def build(column, at, cache, total):
        b, zero = Builder, np.int32([0, 0])
        end = b.concat(values=[np.int32([1, 4]), b.add(x=at, y=np.int32(1))], axis=0)
        begin = b.concat(values=[zero, at], axis=0)
        new = b.slice_update(x=b.read_state(input=cache), update=column, begin=begin, end=end)
        again = b.coreml_update_state(state=cache, value=new)
        summed = b.add(x=b.read_state(input=total), y=column)
        summed = b.coreml_update_state(state=total, value=summed)
        return b.mul(x=again, y=np.float16(2), name="doubled"), b.identity(x=summed, name="summed")

    folder = tmp_path_factory.mktemp("states")
    return open_package(write(folder / "states.mlpackage", inputs, build, "iOS18"))


def test_states_last_from_step_to_step(remembers, rng):
    state = remembers.new_state()
    cache, total = np.zeros((1, 4, 8), np.float16), np.zeros((1, 4, 1), np.float16)
    for at in rng.integers(0, 8, 12):
        column = rng.standard_normal((1, 4, 1)).astype(np.float16)
        result = remembers.predict({"column": column, "at": np.array([at])}, state)
        cache[:, :, at : at + 1], total = column, total + column
        assert np.array_equal(result["doubled"], cache * 2)
        assert np.array_equal(result["summed"], total)
        assert np.array_equal(state["cache"].numpy(), cache)
    assert not remembers.new_state()["cache"].any(), "a new text begins with nothing"


def test_inputs_and_outputs_belong_to_the_caller(remembers, rng):
    state, column = remembers.new_state(), rng.standard_normal((1, 4, 1)).astype(np.float16)
    feed = {"column": column.copy(), "at": np.array([3])}
    result = remembers.predict(feed, state)
    feed["column"][:] = result["summed"][:] = 7
    assert np.array_equal(state["total"].numpy(), column)


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "has the states .*cache.*, got none"),
        ({"cache": torch.zeros(1, 4, 8)}, "got {'cache'"),
        ({"cache": torch.zeros(1, 4, 9), "total": torch.zeros(1, 4, 1)}, "4, 9"),
    ],
    ids=["none", "one_missing", "another_shape"],
)
def test_states_that_a_program_does_not_have_are_refused(state, message, remembers):
    with pytest.raises(Problem, match=message) as caught:
        remembers.predict({"column": np.zeros((1, 4, 1)), "at": np.array([0])}, state)
    assert "new_state()" in caught.value.hint


def test_a_position_outside_the_cache_is_refused(remembers):
    with pytest.raises(Problem, match=r"slice_update\): updates shape \[1, 4, 0\]"):
        remembers.predict(
            {"column": np.zeros((1, 4, 1)), "at": np.array([8])}, remembers.new_state()
        )


@pytest.mark.parametrize(
    "change, message, hint",
    [
        ({"column": None}, "got the inputs at", "pass at, column"),
        ({"more": np.zeros(1)}, "got the inputs at, column, more", "pass at, column"),
        ({"column": np.zeros((4, 1))}, r"column has shape \[4, 1\]", r"float16 [1, 4, 1]"),
        ({"at": np.array([0.5])}, "at has dtype float64", "int32 [1]"),
        ({"column": np.full((1, 4, 1), "a")}, "column has dtype <U1", "float16 [1, 4, 1]"),
    ],
    ids=["missing", "unknown", "shape", "a_fraction_for_an_integer", "text"],
)
def test_inputs_that_do_not_match_are_refused(change, message, hint, remembers):
    feed = {"column": np.zeros((1, 4, 1)), "at": np.array([0])} | change
    feed = {name: value for name, value in feed.items() if value is not None}
    with pytest.raises(Problem, match=message) as caught:
        remembers.predict(feed, remembers.new_state())
    assert hint in caught.value.hint


def test_a_trace_names_every_result_and_spent_values_are_freed(tmp_path):
    def build(x):
        for _ in range(9):
            x = Builder.add(x=x, y=np.float16(1))
        return x

    program = open_package(write(tmp_path / "chain.mlpackage", [tensor((64,))], build))
    alive, most = [], []

    def trace(kind: str, name: str, value: torch.Tensor) -> None:
        assert kind == "add"
        alive.append(weakref.ref(value))
        most.append(sum(one() is not None for one in alive))

    result = program.predict({"x": np.zeros(64)}, trace=trace)
    assert next(iter(result.values())).tolist() == [9] * 64
    assert len(most) == 9 and max(most) == 2


def product(factor: int) -> Callable:
    return lambda x: Builder.mul(x=x, y=np.float16(factor), name="y")


@pytest.fixture(scope="module")
def two_functions(tmp_path_factory) -> Path:
    folder, functions = tmp_path_factory.mktemp("functions"), MultiFunctionDescriptor()
    for name, factor in (("twice", 2), ("thrice", 3)):
        single = write(folder / f"{name}.mlpackage", [tensor((3,))], product(factor))
        functions.add_function(str(single), "main", name)
    functions.default_function_name = "twice"
    with contextlib.redirect_stderr(io.StringIO()):
        save_multifunction(functions, str(folder / "both.mlpackage"))
    return folder / "both.mlpackage"


@pytest.mark.parametrize("function, factor", [(None, 2), ("twice", 2), ("thrice", 3)])
def test_one_of_several_functions_is_run(function, factor, two_functions):
    result = open_package(two_functions, function).predict({"x": np.arange(3)})
    assert result["y"].tolist() == [0, factor, 2 * factor]


def test_an_unknown_function_is_refused(two_functions):
    with pytest.raises(Problem, match=r"no function 'main', it has thrice, twice"):
        open_package(two_functions, "main")


def test_a_missing_coremltools_is_reported(two_functions, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("export._coreml_schema")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Problem, match="needs coremltools, which is not installed") as caught:
        open_package(two_functions)
    assert "pip install" in caught.value.hint


def test_reading_a_package_imports_no_coremltools(two_functions):
    code = "import sys; from export.coreml.package import read_package; from pathlib import Path\n"
    code += f"read_package(Path({str(two_functions)!r})); print('coremltools' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ----------------------------------------------------------------------- packages from a stranger


@pytest.fixture(scope="module")
def sound(tmp_path_factory, module_seed) -> Path:
    """A package to be spoiled: it holds weights, modes, small constants."""
    weight = np.random.default_rng(module_seed).standard_normal((8, 6)).astype(np.float16)

    def build(x):
        y = Builder.linear(x=x, weight=weight)
        y = Builder.gelu(x=Builder.pad(x=y, pad=[1, 1], mode="reflect"))
        return Builder.tile(x=y, reps=[2, 1], name="y")

    folder = tmp_path_factory.mktemp("sound")
    return write(folder / "sound.mlpackage", [tensor((3, 6))], build)


@pytest.fixture
def package(sound, tmp_path) -> Path:
    """A package to damage: it holds weights, modes and small constants."""
    return Path(shutil.copytree(sound, tmp_path / "spoiled.mlpackage"))


def test_the_package_damaged_below_is_valid(package, rng):
    x = rng.standard_normal((3, 6)).astype(np.float16)
    assert open_package(package).predict({"x": x})["y"].shape == (6, 10)


@pytest.mark.parametrize("spoil, message", hostile_packages.ALL.values(), ids=hostile_packages.ALL)
def test_an_untrusted_package_is_refused(spoil, message, package):
    spoil(package)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Problem, match=message) as caught:
        open_package(package)
    assert str(caught.value).startswith(str(package)), "it names the file"
    assert caught.value.hint
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 256 * 1024


@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
def test_a_package_with_damaged_bytes_runs_or_is_refused(file, package, rng):
    whole = np.frombuffer((package / file).read_bytes(), np.uint8)
    for _ in range(40):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=rng.integers(1, 4))] = rng.integers(256)
        (package / file).write_bytes(damaged.tobytes())
        with contextlib.suppress(Problem):
            program = open_package(package)
            program.predict({spec.name: np.zeros(spec.shape) for spec in program.inputs})
