"""Rivals on OpenAI's weights: their texts are the checkpoint's, in the language of each clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from installed_rivals import needs_rivals
from real_models import model

from benchmarks.bench import BenchOptions, Candidate, bench_all
from benchmarks.candidates import in_own_form
from benchmarks.program import PROJECT
from benchmarks.result import MOST_POINTS, RATIO, remarks, table_rows
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import word_errors
from devices.device import open_device

pytestmark = [pytest.mark.real, needs_rivals]

CLIPS = PROJECT / "edgewhisper/assets/common-voice/test.jsonl"
NAMES = ("faster-whisper", "whisper.cpp", "sherpa-onnx", "transformers")


def run_rivals(model: Path, ours: Path, clips: list[Clip], folder: Path) -> list[dict[str, Any]]:
    """The results of one round of all rivals, and of our artifact."""
    rivals = [in_own_form(Candidate(model, name), folder, lambda text: None) for name in NAMES]
    options = BenchOptions(repeats=1, threads=1)  # other tests use the other core
    with open_device("local") as device:
        return bench_all([*rivals, Candidate(ours)], device, clips, options)


def test_each_rival_is_within_a_point_of_tiny_en_or_gets_no_ratio_and_a_reason(artifact, tmp_path):
    ours = artifact("tiny.en", "int8")
    results = run_rivals(model("tiny.en"), ours, read_manifest(CLIPS), tmp_path)
    *rivals, _ = results
    points = {one["rival"]: 100 * (one["wer"] - one["checkpoint_wer"]) for one in rivals}
    assert points.keys() == set(NAMES)
    assert points["transformers"] == 0
    assert max(map(abs, points.values())) <= 3, points  # none is prompted wrongly
    *ratios, own = [row[RATIO] for row in table_rows(results)]
    reasons = [line for line in remarks(results) if line.startswith("!")]
    for one, ratio in zip(rivals, ratios, strict=True):
        if abs(points[one["rival"]]) <= MOST_POINTS:
            assert float(ratio.lstrip("~")) > 0
        else:
            assert ratio == "-"
            assert any(one["name"] in line and "no speed ratio" in line for line in reasons)
    assert own == ""
    (build,) = [one["build"] for one in rivals if one["rival"] == "whisper.cpp"]
    assert "CPU" in build


def test_each_rival_of_base_is_prompted_in_the_language_of_each_clip(artifact, tmp_path):
    """English clips that are given as German: Whisper then writes German. Texts of a rival with
    another prompt are closer to those of the checkpoint with that prompt; a text that repeats
    itself changes this for one clip at most."""
    english = read_manifest(CLIPS)[:5]
    german = [replace(clip, lang="de") for clip in english]
    ours = artifact("base", "int8")
    results = run_rivals(model("base"), ours, [*english, *german], tmp_path)
    (own,) = [one["texts"] for one in results if one["rival"] == "transformers"]
    for one in results:
        texts = one["texts"]
        assert closer(texts[:5], own[:5], own[5:]) >= 4, one["name"]
        assert closer(texts[5:], own[5:], own[:5]) >= 4, one["name"]


def closer(texts: list[str], first: list[str], second: list[str]) -> int:
    """How many texts differ from those of `first` in fewer words than from those of `second`."""
    errors = [word_errors(one, texts, "whisper-basic") for one in (first, second)]
    return sum(wrong < otherwise for (wrong, _), (otherwise, _) in zip(*errors, strict=True))
