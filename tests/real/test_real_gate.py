"""Exports of OpenAI's tiny.en on the product's sentences, and on speech that is not its own."""

from __future__ import annotations

import pytest
from real_models import model

from benchmarks.gate import GateFailure
from edgewhisper import pipeline, shipped
from edgewhisper.gating import Gating
from export.artifact import read_manifest
from export.problem import Problem

pytestmark = pytest.mark.real

CLIPS = Gating(most_clips=12)


def test_fp32_says_the_same_tokens(tmp_path):
    place = pipeline.export(str(model("tiny.en")), "fp32", out=tmp_path / "fp32", gating=CLIPS)
    gate = read_manifest(place)["gate"]
    assert (gate["clips"], gate["clips_available"], gate["result"]) == (12, 80, "passed")
    assert gate["identical_tokens"] == 1
    assert gate["max_logits_error"] < 1e-3
    assert gate["normalizer"] == "whisper-english"
    assert gate["checkpoint_wer"] < 0.25


def test_int8_loses_no_more_words_than_by_chance(tmp_path):
    place = pipeline.export(str(model("tiny.en")), "int8", out=tmp_path / "int8", gating=CLIPS)
    gate = read_manifest(place)["gate"]
    assert gate["result"] == "passed"
    assert gate["wer_loss_interval"][0] <= 0.5


def test_speech_of_another_language_is_refused(tmp_path):
    """Spoken digits have the words of sentences, but in other texts here."""
    clips = shipped.SPEECH / "test.jsonl"
    lines = clips.read_text().splitlines()[:6]
    manifest = tmp_path / "foreign.jsonl"
    manifest.write_text("\n".join(lines).replace("test/", f"{clips.parent}/test/"))
    with pytest.raises((GateFailure, Problem)) as letter:
        pipeline.export(
            str(model("tiny.en")), "fp32", manifest_of_nonsense(manifest), tmp_path / "out"
        )
    assert "not this model's speech" in str(letter.value)
    assert not (tmp_path / "out").exists()


def manifest_of_nonsense(manifest):
    """The same sounds with texts that nobody says in them."""
    import json

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    path = manifest.with_name("nonsense.jsonl")
    path.write_text("\n".join(json.dumps(row | {"text": "guten abend"}) for row in rows))
    return path
