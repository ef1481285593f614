"""What `export`, `bench` and `verify` do with the gate: its clips, its modes and its prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_whisper import random_whisper
from some_clips import manifest_of_some

from benchmarks.gate import GateFailure
from benchmarks.speech.clips import read_manifest
from edgewhisper import pipeline, whisper
from edgewhisper.pipeline import COMMON_VOICE, SPEECH, Gating
from edgewhisper.verify import verify
from export.artifact import read_manifest as read_artifact
from export.problem import Problem


@pytest.fixture
def few(clips, tmp_path) -> Path:
    return manifest_of_some(clips, slice(10), tmp_path)


@pytest.fixture
def confused(few) -> Path:
    """Clips whose texts are those of other clips, so that the checkpoint itself is wrong."""
    rows = [json.loads(line) for line in few.read_text().splitlines()]
    texts = [row["text"] for row in rows]
    turned = [row | {"text": text} for row, text in zip(rows, texts[5:] + texts[:5], strict=True)]
    path = few.with_name("confused.jsonl")
    path.write_text("\n".join(map(json.dumps, turned)))
    return path


def exported(digits, speech, out, said=None, **options) -> Path:
    say = (lambda text: None) if said is None else said.append

    precision = options.pop("precision", "int8")
    return pipeline.export(str(digits), precision, speech, out, say, **options)


# ------------------------------------------------------------------------------------------ clips


def test_the_embedded_model_has_digits_and_every_other_one_sentences(digits, tmp_path):
    own = pipeline.vocabulary_of(digits)
    assert pipeline.default_speech(own) == SPEECH / "test.jsonl"
    assert pipeline.default_speech(51_864) == COMMON_VOICE / "test.jsonl"
    assert len(read_manifest(COMMON_VOICE / "test.jsonl")) == 80
    general = tmp_path / "general"
    general.mkdir()
    (general / "config.json").write_text(json.dumps({"vocab_size": 51_865}))
    assert pipeline.speech_for([digits]) == SPEECH / "test.jsonl"
    assert pipeline.speech_for([general, tmp_path / "nothing"]) == COMMON_VOICE / "test.jsonl"
    with pytest.raises(Problem, match="the models would need different ones") as letter:
        pipeline.speech_for([digits, general])
    assert "--speech" in letter.value.hint


def test_a_model_made_of_the_embedded_one_has_its_clips(digits, processor, tmp_path, seed):
    import torch

    torch.manual_seed(seed)
    whisper.save(random_whisper(digits), processor, tmp_path / "slim", {})
    assert pipeline.speech_for([tmp_path / "slim"]) == SPEECH / "test.jsonl"


def test_the_number_of_clips_is_limited_recorded_and_used_by_verify(digits, few, tmp_path):
    said: list[str] = []
    place = exported(digits, few, tmp_path / "out", said, gating=Gating(most_clips=4))
    gate = read_artifact(place)["gate"]
    assert (gate["clips"], gate["clips_available"], gate["result"]) == (4, 10, "passed")
    assert len(gate["clip_tokens"]) == len(gate["checkpoint_errors"]) == 4
    (line,) = [text for text in said if text.startswith("gate passed on 4 of 10 clips")]
    for part in (
        "with identical tokens",
        "word error rate is",
        "95 % interval",
        "normalizer",
        " s",
    ):
        assert part in line
    report = verify(place, few, threads=1)
    assert report.letter is None, report.letter
    assert "the tokens of all 4 clips are those of the gate" in report.rows[-1]["found"]
    assert "100% of 4 clips" in verify(place, few, str(digits), threads=1).rows[-1]["found"]


# ------------------------------------------------------------------------------------------ modes


def test_clips_that_are_not_the_models_fail_the_export_and_leave_nothing(
    digits, confused, tmp_path
):
    with pytest.raises(GateFailure, match="these clips are not this model's speech") as letter:
        exported(digits, confused, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(str(letter.value).splitlines()) == 4
    assert "--speech" in letter.value.hint


def test_a_warning_keeps_the_artifact_and_records_the_failure(digits, confused, tmp_path):
    said: list[str] = []
    place = exported(digits, confused, tmp_path / "out", said, gating=Gating("warn"))
    gate = read_artifact(place)["gate"]
    assert gate["result"] == "failed"
    assert "not this model's speech" in gate["error"]
    assert any(text.startswith("gate FAILED, and the artifact is kept") for text in said)
    report = verify(place, confused, threads=1)
    assert "failed its gate when it was exported (--gate warn)" in str(report.letter)
    assert "at the export: failed" in verify(place, threads=1).rows[-1]["found"]


def test_a_warning_of_lost_words_keeps_the_figures(digits, few, tmp_path, monkeypatch):
    from benchmarks import gate as gating

    monkeypatch.setattr(gating, "too_much", lambda lost, limit: True)
    with pytest.raises(GateFailure, match=r"at most 0\.5 points are allowed"):
        exported(digits, few, tmp_path / "none")
    place = exported(digits, few, tmp_path / "out", gating=Gating("warn"))
    gate = read_artifact(place)["gate"]
    assert (gate["result"], gate["clips"]) == ("failed", 10)
    assert gate["wer_loss_points"] <= 0.5
    assert "word error rate" in gate["error"]


def test_without_a_gate_the_manifest_says_so(digits, few, tmp_path):
    said: list[str] = []
    place = exported(digits, few, tmp_path / "out", said, gating=Gating("off"))
    assert read_artifact(place)["gate"] == {"result": "not run"}
    assert "the gate was not run (--gate off)" in said
    report = verify(place, few, threads=1)
    assert "was exported with --gate off" in str(report.letter)
    assert "100% of 10 clips" in verify(place, few, str(digits), threads=1).rows[-1]["found"]


# ----------------------------------------------------------------------------------------- verify


def test_without_clips_the_gate_is_not_asked(digits, few, tmp_path):
    place = exported(digits, few, tmp_path / "out")
    report = verify(place, threads=1)
    assert report.letter is None
    assert [row["result"] for row in report.rows] == [*["ok"] * 4, "not asked"]
    assert "add --speech" in report.rows[-1]["found"]
    assert "at the export: passed" in report.rows[-1]["found"]
    assert report.as_dict()["ok"] is True


# ---------------------------------------------------------------------------------------- prompts


@pytest.fixture
def nameless(digits, tmp_path) -> Path:
    """The embedded model, whose generation_config names no language."""
    place = Path(shutil.copytree(digits, tmp_path / "nameless"))
    path = place / "generation_config.json"
    config = json.loads(path.read_text())
    assert config.pop("language") == "en"
    path.write_text(json.dumps(config))
    return place


def test_a_checkpoint_without_a_language_gives_artifacts_that_detect_it(nameless, few, tmp_path):
    place = exported(nameless, few, tmp_path / "out", precision="fp32")
    manifest = read_artifact(place)
    assert (manifest["format"], manifest["decoding"]["language"]) == (3, "auto")
    assert manifest["gate"]["identical_tokens"] == 1
    pcm = read_manifest(few)[1].pcm()
    (found,) = pipeline.transcribe(str(place), [pcm])
    (torch_found,) = pipeline.transcribe(str(nameless), [pcm])
    assert found["language"] == torch_found["language"] is not None
    assert found["text"] == torch_found["text"]
    report = verify(place, few, str(nameless), threads=1)
    assert report.letter is None, report.letter


@pytest.mark.parametrize("layout", ["native", "sherpa", "single", "transformers"])
def test_a_language_can_be_chosen_for_every_layout(nameless, few, tmp_path, layout):
    asked = {"layout": layout, "gating": Gating("off"), "precision": "fp32"}
    place = exported(nameless, few, tmp_path / "out", language="de", **asked)
    decoding, ids = read_artifact(place)["decoding"], whisper.load(nameless).generation_config
    assert ids.lang_to_id["<|de|>"] in decoding["prompt"]
    assert "language" not in decoding
    report = verify(place, few, str(nameless), threads=1)
    assert "its prompt" not in str(report.letter)


@pytest.mark.parametrize("layout", ["sherpa", "single", "transformers"])
def test_layouts_with_one_prompt_say_that_they_take_english(nameless, few, tmp_path, layout):
    said: list[str] = []
    place = exported(nameless, few, tmp_path / "out", said, layout=layout, precision="fp32")
    assert any("is prompted for English; choose another with --language" in text for text in said)
    manifest = read_artifact(place)
    assert manifest["format"] == 2
    assert manifest["gate"]["identical_tokens"] == 1


def english_only(digits, place: Path) -> Path:
    """The embedded model, called English-only."""
    shutil.copytree(digits, place)
    path = place / "generation_config.json"
    config = json.loads(path.read_text()) | {"is_multilingual": False}
    for name in ("language", "task", "lang_to_id", "task_to_id"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    return place


def test_english_only_models_take_english_auto_and_transcribe(digits, few, tmp_path):
    source = str(english_only(digits, tmp_path / "english"))
    pcm, off = read_manifest(few)[1].pcm(), Gating("off")
    place = str(exported(source, few, tmp_path / "out", gating=off, precision="fp32"))
    both = (source, place)
    for options in ({}, {"language": "en"}, {"language": "auto"}, {"task": "transcribe"}):
        found = [next(iter(pipeline.transcribe(each, [pcm], **options))) for each in both]
        assert found[0]["text"] == found[1]["text"]
    for each in both:
        with pytest.raises(ValueError, match="English only"):
            list(pipeline.transcribe(each, [pcm], language="de"))
        with pytest.raises(ValueError, match="English only"):
            list(pipeline.transcribe(each, [pcm], task="translate"))
    with pytest.raises(Problem, match="--language de: the model knows English only"):
        exported(source, few, tmp_path / "no", language="de")
