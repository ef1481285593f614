"""int8 artifacts on x86 without VNNI, where pairs of products are added in 16 bits and saturate.

The processor is emulated, and the runner's own functions open and run the artifact. See
export/onnx/constants.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.onnx.to_onnx import export_onnx

PROJECT = Path(__file__).parents[3]
QEMU = "qemu-x86_64"
RUN = """
import sys
from pathlib import Path
import numpy as np
from devices.runner.engines.sessions import bind, empty_cache, encode, open_session, session_options

folder, exact = Path(sys.argv[1]), sys.argv[2] == "exact"
encoder = open_session(folder / "encoder.onnx", session_options(1, exact=exact))
decoder = open_session(folder / "decoder.onnx", session_options(1, arena=False, exact=exact))
samples = encoder.get_inputs()[0].shape[1]
pcm = np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32) / 10
binding = bind(decoder, encode(encoder, pcm) | empty_cache(decoder))
binding.bind_cpu_input("input_ids", np.array([[3, 1, 4, 1, 5]]))
binding.bind_cpu_input("past_length", np.array([0], np.int32))
decoder.run_with_iobinding(binding)
np.save(sys.argv[3], binding.get_outputs()[0].numpy())
"""
pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates x86 on x86"),
    pytest.mark.skipif(not shutil.which(QEMU), reason=f"{QEMU} is missing: make test-devices"),
]


def logits(artifact: Path, exact: str, emulated: bool, out: Path) -> np.ndarray:
    emulator = [QEMU, "-cpu", "Haswell"] if emulated else []
    argv = [*emulator, sys.executable, "-c", RUN, str(artifact), exact, str(out)]
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, env=env, check=True, capture_output=True, timeout=600)
    return np.load(out)


@pytest.fixture
def artifact(make_whisper, processor, tmp_path) -> Path:
    """A model wide enough for hidden units in several pieces, with saturating products."""
    model = make_whisper(ffn=3600)
    export_onnx(model, processor, tmp_path / "int8", "int8")
    return tmp_path / "int8"


def test_int8_products_are_exact_in_the_runner(artifact, tmp_path):
    want = logits(artifact, "exact", False, tmp_path / "here.npy")
    found = logits(artifact, "exact", True, tmp_path / "there.npy")
    loose = logits(artifact, "not exact", True, tmp_path / "loose.npy")
    # floats are summed in another order there, so the rounding of an activation may differ
    assert np.abs(found - want).max() < 0.02 * np.abs(want).max()
    assert np.abs(loose - want).max() > 10 * np.abs(found - want).max()
