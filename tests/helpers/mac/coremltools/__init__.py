"""Of coremltools what the runner uses. It runs packages in this project's interpreter, and notes in
the home folder what was compiled and what was opened on which units."""

import os
import platform
import shutil
import sys
from enum import Enum
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sitecustomize

ours = Path(__file__).parent
others = [place for place in sys.path if Path(place) != ours.parent]
real = PathFinder.find_spec("coremltools", others)
__spec__.submodule_search_locations[:] = real.submodule_search_locations  # for its schema
sys.path.append(str(ours.parents[3]))

ComputeUnit = Enum("ComputeUnit", ["ALL", "CPU_AND_GPU", "CPU_ONLY", "CPU_AND_NE"])


def note(*words):
    with Path(os.environ["HOME"], "coremltools").open("a") as file:
        file.write(" ".join(words) + "\n")


def load_spec(path):
    from export.coreml.package import _model_file, schema

    spec = schema().Model()
    spec.ParseFromString(_model_file(Path(path)).read_bytes())
    return spec


def open_package(path):
    """Where torch and Python have their parts depends on what they take the system for."""
    mac = sys.platform, platform.system
    sys.platform, platform.system = sitecustomize.here
    try:
        from export.coreml.interpreter import open_package

        return open_package(path)
    finally:
        sys.platform, platform.system = mac


def compile_model(path, destination_path):
    if Path(os.environ["HOME"], "refuses").exists():
        raise RuntimeError("Error compiling model: unknown opset \x1b[2J")
    note("compile", Path(path).name)
    shutil.copytree(path, destination_path)


class MLModel:
    def __init__(self, path, compute_units):
        note(type(self).__name__, Path(path).name, compute_units.name)
        self.package = open_package(Path(path))
        self.make_state = self.package.new_state

    def predict(self, given, **more):
        for name, array in given.items():  # as the real one does, in the caller's dictionary
            if array.dtype == np.float16:
                given[name] = array.astype(np.float32)
        return self.package.predict(given, **more)


class CompiledMLModel(MLModel):
    pass


utils = SimpleNamespace(load_spec=load_spec)
models = SimpleNamespace(
    MLModel=MLModel,
    CompiledMLModel=CompiledMLModel,
    utils=SimpleNamespace(compile_model=compile_model),
)
