"""Fixtures: small real models, the shipped checkpoint and clips, random numbers and their seed."""

from __future__ import annotations

import gc
import os
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# a process for each core: several would wait for each other's threads, which spin
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})

# a shell that starts the tests in the background has them ignore Ctrl-C; some press it
signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = os.environ.get("EDGEWHISPER_SEED", "1")
"""The seed of all tests, or "random" for a new one in each test (make test-random)."""

settings.register_profile(
    "tests",
    deadline=None,  # a busy machine is slow, not wrong
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=SEED != "random",
)
settings.load_profile("tests")

gc.disable()  # imports leave little garbage; the first test enables it
frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Take imported modules out of garbage collection.

    coremltools collects garbage for each model. This takes 0.2 s if all modules are visited.
    """
    global frozen_modules
    if len(sys.modules) > frozen_modules + 100:
        gc.enable()
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)


ASSETS = Path(__file__).parent.parent / "edgewhisper" / "assets"


@pytest.fixture
def seed() -> int:
    """The seed of a test; it is printed if the test fails."""
    return chosen_seed()


@pytest.fixture(scope="module")
def module_seed() -> int:
    """The seed of what the tests of a module share."""
    return chosen_seed()


def chosen_seed() -> int:
    value = secrets.randbits(31) if SEED == "random" else int(SEED)
    print(f"seed: EDGEWHISPER_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    import torch

    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 300 kB, as on a disk that has filled up."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.fixture(scope="session")
def digits() -> Path:
    """The embedded default checkpoint."""
    return ASSETS / "whisper-digits"


@pytest.fixture(scope="session")
def clips() -> Path:
    """Manifest of the shipped test clips."""
    return ASSETS / "speech" / "test.jsonl"


@pytest.fixture
def make_whisper(rng: np.random.Generator, digits: Path) -> Callable:
    """A factory of random small Whispers; see small_whisper.random_whisper."""
    from small_whisper import random_whisper

    return partial(random_whisper, digits)


@pytest.fixture
def tiny_whisper(make_whisper: Callable):
    """A random two-layer Whisper, d_model 32."""
    return make_whisper()


@pytest.fixture(scope="session")
def processor(digits: Path):
    """Tokenizer and feature extractor of the embedded default."""
    from edgewhisper.whisper import load_processor

    return load_processor(digits)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, digits: Path, processor) -> Path:
    """The embedded default as an fp32 artifact."""
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    out = tmp_path_factory.mktemp("exported") / "fp32"
    export_onnx(load(digits), processor, out, "fp32")
    return out


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    """OpenAI's tiny.en, for tests marked `real`."""
    from real_models import model

    return model("tiny.en")


@pytest.fixture(scope="session")
def base() -> Path:
    """OpenAI's base, for tests marked `real`."""
    from real_models import model

    return model("base")


@pytest.fixture(scope="session")
def common_voice() -> Path:
    """The folder of the product's Common Voice manifests."""
    return ASSETS / "common-voice"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip finds, by its own configuration."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """An sshd on loopback that the tests of a module share; see sshd.Server."""
    import sshd

    server = sshd.Server(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture
def server(one_server, monkeypatch: pytest.MonkeyPatch):
    """The same as a new device."""
    one_server.fresh(monkeypatch)
    return one_server
