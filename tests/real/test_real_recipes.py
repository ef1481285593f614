"""Recipes on OpenAI's tiny.en with the clips that come along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgewhisper import pipeline, shipped, whisper
from edgewhisper.guard import AccuracyLoss

pytestmark = pytest.mark.real

DEV_CLIPS = 12

AS_IT_WAS = """
[[step]]
method = "tspar"
layers = "*.fc2"
reg_mode = "proximal"
encoder_element = 0.0
decoder_element = 0.0
encoder_column = 10.0
decoder_column = 10.0
c1 = 0.1
c2 = -1.0
rho = 0.1
search = false
min_removed = 0.355
[step.training]
steps = 1
batch_size = 2
learning_rate = 3e-4
[step.recovery]
steps = 1
batch_size = 2
learning_rate = 5e-4
"""


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some of the dev clips, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    lines = (shipped.COMMON_VOICE / "dev.jsonl").read_text("utf-8").splitlines()[:DEV_CLIPS]
    rows = [json.loads(line) for line in lines]
    text = "\n".join(
        json.dumps(r | {"audio": str(shipped.COMMON_VOICE / r["audio"])}) for r in rows
    )
    (tmp_path / "dev.jsonl").write_text(text)
    return tmp_path / "dev.jsonl"


def test_the_default_recipe_keeps_the_error_rate_and_names_its_speech(tiny_en, dev):
    place = pipeline.compress(pipeline.Request(str(tiny_en), dev=dev, out=Path("slim")))
    record = json.loads((place / "compression.json").read_text())
    assert record["recipe"]["name"] == "oneshot"
    assert record["after"]["parameters"]["total"] < record["before"]["parameters"]["total"]
    assert record["dev_wer"]["losses"][-1]["points"] <= record["dev_wer"]["max_wer_loss"]
    for text in (record["speech"]["source"], (place / "README.md").read_text()):
        assert "Common Voice (CC0 1.0)" in text


def test_pruning_a_third_at_once_is_refused_and_kept_apart(tiny_en, dev):
    Path("mine.toml").write_text(AS_IT_WAS)
    with pytest.raises(AccuracyLoss, match=r"step 1 \(tspar\) raised dev WER") as found:
        pipeline.compress(pipeline.Request(str(tiny_en), "mine.toml", dev=dev, out=Path("slim")))
    place = Path("slim-failed-step-1-tspar")
    assert str(place) in str(found.value)
    assert "min_removed = 0.355" in found.value.hint or "learning rate" in found.value.hint
    assert not Path("slim").exists()
    assert whisper.load(place).config.d_model == 384
