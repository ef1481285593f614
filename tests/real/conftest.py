"""Fixtures of the tests on OpenAI's models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from real_models import model

from edgewhisper import pipeline
from edgewhisper.gating import Gating


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that exports a model in a precision, without a gate. It exports each pair once."""
    folder = tmp_path_factory.mktemp("artifacts")

    @cache
    def exported(name: str, precision: str) -> Path:
        out = folder / f"{name}-{precision}"
        return pipeline.export(str(model(name)), precision, out=out, gating=Gating("off"))

    return exported
