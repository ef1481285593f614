"""Fixtures: small real models, the shipped checkpoint and clips, fresh randomness with its seed."""

from __future__ import annotations

import os
import resource
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# a busy machine is slow, not wrong
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ASSETS = Path(__file__).parent.parent / "edgewhisper" / "assets"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Drawn anew for every test and shown when it fails; EDGEWHISPER_SEED=n repeats a run."""
    value = int(os.environ.get("EDGEWHISPER_SEED", secrets.randbits(31)))
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
    """A factory of random small Whispers that go with the embedded default's tokenizer.

    The window is the default's (300 positions), so that its feature extractor fits.
    """
    import torch
    from transformers import GenerationConfig, WhisperConfig

    from edgewhisper.whisper import WhisperForConditionalGeneration

    def make(
        d_model: int = 32,
        heads: int = 2,
        ffn: int = 48,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
    ):
        config = WhisperConfig.from_pretrained(digits)
        config.update(
            dict(
                d_model=d_model,
                encoder_layers=encoder_layers,
                decoder_layers=decoder_layers,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=ffn,
                decoder_ffn_dim=ffn,
                dropout=0.0,
            )
        )
        model = WhisperForConditionalGeneration(config).eval()
        with torch.no_grad():  # far from zero, so that a wrong fold or scale shows
            for name, parameter in model.named_parameters():
                if "embed_positions" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.generation_config = GenerationConfig.from_pretrained(digits)
        return model

    return make


@pytest.fixture
def tiny_whisper(make_whisper: Callable):
    """A random two-layer Whisper, d_model 32."""
    return make_whisper()


@pytest.fixture(scope="session")
def processor(digits: Path):
    """Tokenizer and feature extractor of the embedded default."""
    from edgewhisper.whisper import load_processor

    return load_processor(digits)
