"""Texts for speech without texts: which transcripts are used, and what the user is informed of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import job, pseudo_labels, training_speech, whisper
from edgewhisper.pseudo_labels import defect, pseudo_labelled
from edgewhisper.recipe import Recipe
from edgewhisper.shipped import DEFAULT_MODEL
from export.problem import Problem


@pytest.fixture
def unlabelled(clips: Path) -> list[Clip]:
    return [replace(clip, text="") for clip in read_manifest(clips)[:6]]


@pytest.fixture(scope="module")
def model(digits: Path):
    return whisper.load(digits)


@pytest.mark.parametrize(
    ("text", "duration_s", "expected"),
    [
        pytest.param("The cat sat on the mat.", 2.0, None, id="plausible"),
        pytest.param(" ", 2.0, "empty", id="empty"),
        pytest.param("the cat " * 30, 20.0, "repetitive", id="loop"),
        pytest.param("I waited for the train.", 0.5, "rate", id="too fast"),
        pytest.param("you", 20.0, "rate", id="too slow"),
    ],
)
def test_implausible_transcripts_are_recognised(text, duration_s, expected):
    assert defect(text, duration_s) == expected


def test_clips_get_the_model_s_transcripts_once(
    model, processor, clips, unlabelled, tmp_path, monkeypatch
):
    cache = tmp_path / "run" / "transcripts.json"
    labelled, left_out = pseudo_labelled(model, processor, unlabelled, cache)
    assert [clip.text for clip in labelled] == [clip.text for clip in read_manifest(clips)[:6]]
    assert not left_out
    monkeypatch.setattr(pseudo_labels, "transcripts", None)  # a second transcription would fail
    again, _ = pseudo_labelled(model, processor, unlabelled, cache)
    assert again == labelled


def test_clips_with_implausible_transcripts_are_left_out(
    model, processor, unlabelled, tmp_path, monkeypatch
):
    texts = ["one two", "", "one two three four " * 40, "", "three", "four"]
    monkeypatch.setattr(pseudo_labels, "transcripts", lambda *rest: texts)
    labelled, left_out = pseudo_labelled(model, processor, unlabelled, tmp_path / "t.json")
    assert [clip.text for clip in labelled] == ["one two", "three", "four"]
    assert left_out == {"empty": 2, "repetitive": 1}
    monkeypatch.setattr(pseudo_labels, "transcripts", lambda *rest: [""] * 6)
    with pytest.raises(Problem, match=r"no plausible transcript of any of the 6 clips .*: 6 empty"):
        pseudo_labelled(model, processor, unlabelled, tmp_path / "other.json")


def test_either_all_clips_of_a_manifest_have_a_text_or_none(clips, tmp_path):
    rows = [json.loads(line) for line in clips.read_text().splitlines()[:2]]
    for row in rows:
        row["audio"] = str(clips.parent / row["audio"])
    del rows[1]["text"]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(Problem, match=r"line 2: `text` is None"):
        training_speech.clips_of(tmp_path / "mixed.jsonl")
    del rows[0]["text"]
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [clip.text for clip in training_speech.clips_of(tmp_path / "none.jsonl")] == ["", ""]


def test_a_compression_says_that_wer_is_judged_against_the_dense_model(clips, tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    for number, clip in enumerate(read_manifest(clips)[:20]):
        (folder / f"{number:02}.wav").symlink_to(clip.audio)
    request = job.Request(str(DEFAULT_MODEL), speech=folder, out=tmp_path / "out")
    prepared = job.prepare(request, Recipe("none", "", ()))
    assert prepared.context.dense_texts
    assert len(prepared.context.train) == 18
    assert prepared.before["dev"]["wer"] == 0
    texts = (
        "the uncompressed model's transcripts of 18 of 18 clips (left out: 0 empty, 0 repetitive, "
    )
    assert prepared.notes[0].startswith(f"note: the clips have no texts: training on {texts}")
    assert (
        "WER is measured against the uncompressed model's transcripts of 2 of 2"
        in prepared.notes[1]
    )
