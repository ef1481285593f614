"""Microbenchmarks: times small graphs of fixed shapes on this machine.

Each graph holds one operator, or several of one kind. Inputs are set once: floats are noise, int8
codes random, other integers zero. Graphs whose names begin with "decoder" use the decoder's memory
settings, the others the encoder's. Caches are updated in place, as in the decoder.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.sessions import bind, open_session, session_options, value
from ..machine.host import return_large_blocks, usable_cores, versions
from ..problem import RunnerProblem

DECODER = "decoder"
WARM_UPS = 2
LEAST_RUNS, MOST_RUNS = 7, 200
ENOUGH_S = 0.05
"""Run a graph for at least this long."""
OTHERS_BYTES = 2**23
"""Memory that is read and written before each decoder run, like a token's other weights."""
TYPES = {
    "tensor(float)": np.float32,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def probe_all(folder: Path, threads: int | None = None) -> dict[str, Any]:
    """Return the seconds of every run of every graph in a folder, by the graph's name."""
    return_large_blocks()
    graphs = sorted(folder.glob("*.onnx"))
    if not graphs:
        raise RunnerProblem(f"{folder}: there are no graphs to time", "copy the graphs again")
    return {
        "threads": threads or usable_cores(),
        "probes": {path.stem: probe(path, threads) for path in graphs},
        "versions": versions(),
    }


def probe(path: Path, threads: int | None = None) -> list[float]:
    """Return the seconds of every run of a graph, after warm-up runs."""
    arena = not path.name.startswith(DECODER)
    session = open_session(path, session_options(threads, arena))
    state = {given.name: value(sample(path, given)) for given in session.get_inputs()}
    binding = bind(session, state)
    others = np.zeros(0 if arena else OTHERS_BYTES, np.uint8)
    for _ in range(WARM_UPS):
        session.run_with_iobinding(binding)
    times: list[float] = []
    while len(times) < MOST_RUNS and (len(times) < LEAST_RUNS or sum(times) < ENOUGH_S):
        others += 1
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - started)
    return times


def sample(path: Path, given: Any) -> np.ndarray:
    """Return values for one input."""
    if given.type not in TYPES or not all(isinstance(axis, int) for axis in given.shape):
        raise RunnerProblem(
            f"{path}: its input {given.name} is {given.type} of {given.shape}",
            "export the graph with inputs of fixed shape",
        )
    rng, dtype = np.random.default_rng(0), TYPES[given.type]
    if dtype is np.float32:
        return (0.1 * rng.standard_normal(given.shape)).astype(dtype)
    high = 127 if dtype is np.int8 else 1
    return rng.integers(1 - high, high, given.shape, dtype)
