"""Export uses logits in two stages if no token changes, or if they are asked for."""

from __future__ import annotations

import json

import pytest

from devices.runner.recognizer import Recognizer
from edgewhisper import pipeline
from edgewhisper import two_stage as stages
from edgewhisper.gating import Gating
from export.artifact import read_manifest
from export.onnx import two_stage
from export.problem import Problem


@pytest.fixture
def export(digits, clips, monkeypatch, tmp_path):
    """Exports the embedded model with stages of a rank and a number of candidates."""
    monkeypatch.setattr(two_stage, "LEAST_VOCABULARY", 100)
    monkeypatch.setattr(two_stage, "LEAST_RATIO", 0)
    monkeypatch.setattr(two_stage, "is_multilingual", lambda generation: False)
    few = tmp_path / "few.jsonl"
    lines = [json.loads(line) for line in clips.read_text().splitlines()[:4]]
    absolute = [json.dumps(line | {"audio": str(clips.parent / line["audio"])}) for line in lines]
    few.write_text("\n".join(absolute) + "\n")
    monkeypatch.setattr(stages, "CALIBRATION", few)

    def run(rank, best, mode="warn", **options):
        monkeypatch.setattr(two_stage, "RANK", rank)
        monkeypatch.setattr(two_stage, "BEST", best)
        said: list[str] = []
        place = tmp_path / f"artifact-{rank}-{best}"
        pipeline.export(
            str(digits), speech=few, out=place, say=said.append, gating=Gating(mode, 4), **options
        )
        return place, "\n".join(said)

    return run


def test_stages_that_change_no_token_are_used(export):
    """All tokens are candidates."""
    place, said = export(rank=32, best=512, two_stage=True)
    assert "logits in two stages: 0 of 4 clips get other tokens in two stages" in said
    assert read_manifest(place)["logits"] == {"rank": 32, "candidates": 783}
    Recognizer(place)  # accepts the manifest


def test_stages_that_change_tokens_are_not_used(export):
    place, said = export(rank=1, best=1, two_stage=True)
    assert "logits in one stage: " in said
    assert "logits in one stage: 0 of" not in said
    assert "logits" not in read_manifest(place)


def test_the_default_is_one_stage(export):
    place, said = export(rank=32, best=64)
    assert "logits in" not in said
    assert "logits" not in read_manifest(place)


def test_asking_for_two_stages_in_floats_gives_an_error(export):
    with pytest.raises(Problem, match="--two-stage: precision fp32, layout native"):
        export(rank=32, best=64, precision="fp32", two_stage=True)
