"""The table of layouts agrees with the modules that use it and with the devices' copy."""

from __future__ import annotations

from importlib import import_module

import pytest

from benchmarks import reference_runtimes
from devices.runner.artifact import manifest, whisperkit
from export.coreml.programs import PROGRAMS
from export.layouts import LAYOUTS, PACKAGES, RUNNER, TARGETS, graph_files, layouts_of


def test_devices_run_the_layouts_that_the_table_gives_to_the_runner():
    runner = {layout.target: name for name, layout in LAYOUTS.items() if layout.runtime == RUNNER}
    assert runner == manifest.LAYOUTS


def test_devices_need_the_files_of_the_table():
    assert LAYOUTS["native"].files == manifest.NEEDED
    assert tuple(whisperkit.PACKAGES) == PACKAGES
    assert {*whisperkit.NEEDED} <= {*LAYOUTS["whisperkit"].files}


@pytest.mark.parametrize("target", TARGETS)
def test_defaults_of_a_target_are_its_own(target):
    assert TARGETS[target].precision in TARGETS[target].precisions
    assert TARGETS[target].layout in layouts_of(target)


@pytest.mark.parametrize("layout", layouts_of("onnx"))
def test_every_onnx_layout_has_a_module_that_writes_it(layout):
    assert callable(import_module(f"export.onnx.layouts.{layout}").write)


@pytest.mark.parametrize("layout", layouts_of("coreml"))
def test_every_core_ml_layout_has_the_packages_of_the_table(layout):
    assert [*PROGRAMS[layout]] == [*graph_files(layout, "fp16")]


def test_every_layout_has_a_loop_that_runs_it():
    own = {name for name, layout in LAYOUTS.items() if layout.runtime == RUNNER}
    assert own | {*reference_runtimes.LAYOUTS} | {"encoder"} == {*LAYOUTS}
    assert {*reference_runtimes.LIBRARIES} == {*LAYOUTS}
