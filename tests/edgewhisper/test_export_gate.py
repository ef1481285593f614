"""The gate in `export`, `bench` and `verify`: its clips, its modes and its prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_whisper import random_whisper
from some_clips import manifest_of_some
from transcripts import transcripts

from benchmarks.gate import GateFailure
from benchmarks.speech.clips import read_manifest
from devices.runner.recognizer import Recognizer
from edgewhisper import pipeline, shipped, whisper
from edgewhisper.gating import Gating
from edgewhisper.shipped import COMMON_VOICE, SPEECH
from edgewhisper.verify import verify
from export.artifact import read_manifest as read_artifact
from export.onnx import save
from export.problem import Problem


@pytest.fixture
def few(clips, tmp_path) -> Path:
    return manifest_of_some(clips, slice(10), tmp_path)


@pytest.fixture
def confused(few) -> Path:
    """Clips with the texts of other clips, so that the checkpoint itself has a high WER."""
    rows = [json.loads(line) for line in few.read_text().splitlines()]
    texts = [row["text"] for row in rows]
    shifted = [row | {"text": text} for row, text in zip(rows, texts[5:] + texts[:5], strict=True)]
    path = few.with_name("confused.jsonl")
    path.write_text("\n".join(map(json.dumps, shifted)))
    return path


def exported(digits, speech, out, lines=None, **options) -> Path:
    """Export the embedded model; printed lines are appended to `lines`."""
    say = (lambda text: None) if lines is None else lines.append
    precision = options.pop("precision", "int8")
    return pipeline.export(str(digits), precision, speech, out, say, **options)


# ------------------------------------------------------------------------------------------ clips


def test_default_clips_are_digits_for_the_embedded_model_and_sentences_for_others(digits, tmp_path):
    own = shipped.vocabulary_of(digits)
    assert shipped.default_speech(own) == SPEECH / "test.jsonl"
    assert shipped.default_speech(51_864) == COMMON_VOICE / "test.jsonl"
    assert len(read_manifest(COMMON_VOICE / "test.jsonl")) == 80
    general = tmp_path / "general"
    general.mkdir()
    (general / "config.json").write_text(json.dumps({"vocab_size": 51_865}))
    assert shipped.speech_for([digits]) == SPEECH / "test.jsonl"
    assert shipped.speech_for([general, tmp_path / "nothing"]) == COMMON_VOICE / "test.jsonl"
    with pytest.raises(Problem, match="the models need different default clips") as error:
        shipped.speech_for([digits, general])
    assert "--speech" in error.value.hint


def test_forms_without_a_config_of_hugging_face_get_sentences(tmp_path, monkeypatch):
    """The content of the files is not needed: their vocabulary is always OpenAI's."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.pt").touch()
    Path("ct2").mkdir()
    Path("ct2/model.bin").touch()
    Path("ct2/config.json").write_text(json.dumps({"suppress_ids": [1]}))
    for source in ("tiny.pt", "ct2", "tiny.en", "openai/whisper-base"):
        assert shipped.speech_for([Path(source)]) == COMMON_VOICE / "test.jsonl"


def test_an_adapter_gets_the_clips_of_its_base(digits, tmp_path):
    for base, clips in ((str(digits), SPEECH), ("openai/whisper-tiny", COMMON_VOICE)):
        config = json.dumps({"base_model_name_or_path": base})
        (tmp_path / "adapter_config.json").write_text(config)
        assert shipped.speech_for([tmp_path]) == clips / "test.jsonl"


@pytest.mark.parametrize("layout", ["sherpa", "single"])
def test_an_artifact_without_a_config_gets_the_clips_of_its_model(digits, few, layout, tmp_path):
    place = exported(digits, few, tmp_path / "out", layout=layout, gating=Gating("off"))
    assert not (place / "config.json").exists()
    assert shipped.speech_for([place]) == SPEECH / "test.jsonl"


def test_eval_of_a_pt_file_uses_the_included_sentences(tmp_path, monkeypatch):
    from edgewhisper import transcription
    from edgewhisper.cli.eval import eval_cli

    asked = []

    def evaluate(source, speech, *options):
        asked.append(speech)
        raise Problem("stop", hint="it is a test")

    monkeypatch.setattr(transcription, "evaluate", evaluate)
    with pytest.raises(Problem, match="stop"):
        eval_cli(str(tmp_path / "tiny.pt"))
    assert asked == [COMMON_VOICE / "test.jsonl"]


def test_a_model_made_from_the_embedded_one_gets_digits(digits, processor, tmp_path, seed):
    import torch

    torch.manual_seed(seed)
    whisper.save(random_whisper(digits), processor, tmp_path / "slim", {})
    assert shipped.speech_for([tmp_path / "slim"]) == SPEECH / "test.jsonl"


def test_gate_clips_are_limited_recorded_and_used_by_verify(digits, few, tmp_path):
    lines: list[str] = []
    place = exported(digits, few, tmp_path / "out", lines, gating=Gating(most_clips=4))
    gate = read_artifact(place)["gate"]
    assert (gate["clips"], gate["clips_available"], gate["result"]) == (4, 10, "passed")
    assert len(gate["clip_tokens"]) == len(gate["checkpoint_errors"]) == 4
    (line,) = [text for text in lines if text.startswith("gate passed on 4 of 10 clips")]
    for part in (
        "with identical tokens",
        "word error rate is",
        "95 % interval",
        "normalizer",
        " s",
    ):
        assert part in line
    report = verify(place, few, threads=1)
    assert report.error is None, report.error
    assert "the tokens of all 4 clips are those of the gate" in report.rows[-1]["found"]
    assert "100% of 4 clips" in verify(place, few, str(digits), threads=1).rows[-1]["found"]


# ------------------------------------------------------------------------------------------ modes


def test_clips_that_the_model_does_not_know_fail_the_export(digits, confused, tmp_path):
    with pytest.raises(GateFailure, match="these clips are not this model's speech") as error:
        exported(digits, confused, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(str(error.value).splitlines()) == 4
    assert "--speech" in error.value.hint


def test_gate_warn_keeps_the_artifact_and_records_the_failure(digits, confused, tmp_path):
    lines: list[str] = []
    place = exported(digits, confused, tmp_path / "out", lines, gating=Gating("warn"))
    gate = read_artifact(place)["gate"]
    assert gate["result"] == "failed"
    assert "not this model's speech" in gate["error"]
    assert any(text.startswith("gate FAILED, and the artifact is kept") for text in lines)
    report = verify(place, confused, threads=1)
    assert "failed its gate when it was exported (--gate warn)" in str(report.error)
    assert "at the export: failed" in verify(place, threads=1).rows[-1]["found"]


def test_gate_warn_records_the_figures_of_lost_words(digits, few, tmp_path, monkeypatch):
    from benchmarks import gate as gating

    monkeypatch.setattr(gating, "too_much", lambda lost, limit: True)
    with pytest.raises(GateFailure, match=r"at most 0\.5 points are allowed"):
        exported(digits, few, tmp_path / "none")
    place = exported(digits, few, tmp_path / "out", gating=Gating("warn"))
    gate = read_artifact(place)["gate"]
    assert (gate["result"], gate["clips"]) == ("failed", 10)
    assert gate["wer_loss_points"] <= 0.5
    assert "word error rate" in gate["error"]


def test_gate_off_is_recorded_in_the_manifest(digits, few, tmp_path):
    lines: list[str] = []
    place = exported(digits, few, tmp_path / "out", lines, gating=Gating("off"))
    assert read_artifact(place)["gate"] == {"result": "not run"}
    assert "the gate was not run (--gate off)" in lines
    report = verify(place, few, threads=1)
    assert "was exported with --gate off" in str(report.error)
    assert "100% of 10 clips" in verify(place, few, str(digits), threads=1).rows[-1]["found"]


def test_an_export_stopped_in_its_gate_leaves_no_artifact(digits, few, tmp_path, monkeypatch):
    files: list[str] = []

    def stop(recognizer, *arguments, **options):
        files.extend(path.name for path in recognizer.folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(Recognizer, "window", stop)
    with pytest.raises(KeyboardInterrupt):
        exported(digits, few, tmp_path / "new" / "out")
    assert "encoder.onnx" in files
    assert "manifest.json" not in files, "a killed export would leave what looks like an artifact"
    assert not list((tmp_path / "new").iterdir())


def test_the_gate_runs_on_graphs_with_weights_in_files(digits, few, tmp_path, monkeypatch):
    """The weights of large models are in files next to the graphs."""
    monkeypatch.setattr(save, "LARGE", 2**10)
    place = exported(digits, few, tmp_path / "out")
    assert {"encoder.weights", "decoder.weights"} <= read_artifact(place)["files"].keys()
    assert read_artifact(place)["gate"]["result"] == "passed"


# ----------------------------------------------------------------------------------------- verify


def test_verify_without_clips_skips_the_gate(digits, few, tmp_path):
    place = exported(digits, few, tmp_path / "out")
    report = verify(place, threads=1)
    assert report.error is None
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


def test_artifacts_of_a_checkpoint_without_a_language_detect_the_language(nameless, few, tmp_path):
    place = exported(nameless, few, tmp_path / "out", precision="fp32")
    manifest = read_artifact(place)
    assert (manifest["format"], manifest["decoding"]["language"]) == (3, "auto")
    assert manifest["gate"]["identical_tokens"] == 1
    pcm = read_manifest(few)[1].pcm()
    (actual,) = transcripts(str(place), [pcm])
    (expected,) = transcripts(str(nameless), [pcm])
    assert actual["language"] == expected["language"] is not None
    assert actual["text"] == expected["text"]
    report = verify(place, few, str(nameless), threads=1)
    assert report.error is None, report.error


@pytest.mark.parametrize(
    "layout",
    # test_verify.py checks the layouts whose runtime takes seconds to import
    [
        "native",
        "single",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("sherpa", "transformers")),
    ],
)
def test_a_language_can_be_chosen_for_every_layout(nameless, few, tmp_path, layout):
    options = {"layout": layout, "gating": Gating("off"), "precision": "fp32"}
    place = exported(nameless, few, tmp_path / "out", language="de", **options)
    decoding, ids = read_artifact(place)["decoding"], whisper.load(nameless).generation_config
    assert ids.lang_to_id["<|de|>"] in decoding["prompt"]
    assert "language" not in decoding
    report = verify(place, few, str(nameless), threads=1)
    assert "its prompt" not in str(report.error)


@pytest.mark.parametrize("layout", ["sherpa", "single", "transformers"])
def test_layouts_with_one_prompt_default_to_english_with_a_note(nameless, few, tmp_path, layout):
    lines: list[str] = []
    place = exported(nameless, few, tmp_path / "out", lines, layout=layout, precision="fp32")
    assert any("is prompted for English; choose another with --language" in text for text in lines)
    manifest = read_artifact(place)
    assert manifest["format"] == 2
    assert manifest["gate"]["identical_tokens"] == 1


def english_only(digits, place: Path) -> Path:
    """The embedded model, with a generation_config that declares it English-only."""
    shutil.copytree(digits, place)
    path = place / "generation_config.json"
    config = json.loads(path.read_text()) | {"is_multilingual": False}
    for name in ("language", "task", "lang_to_id", "task_to_id"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    return place


def test_english_only_models_accept_english_auto_and_transcribe(digits, few, tmp_path):
    source = str(english_only(digits, tmp_path / "english"))
    pcm, off = read_manifest(few)[1].pcm(), Gating("off")
    place = str(exported(source, few, tmp_path / "out", gating=off, precision="fp32"))
    both = (source, place)
    for options in ({}, {"language": "en"}, {"language": "auto"}, {"task": "transcribe"}):
        texts = [next(iter(transcripts(s, [pcm], **options)))["text"] for s in both]
        assert texts[0] == texts[1]
    for each in both:
        with pytest.raises(ValueError, match="English only"):
            list(transcripts(each, [pcm], language="de"))
        with pytest.raises(ValueError, match="English only"):
            list(transcripts(each, [pcm], task="translate"))
    with pytest.raises(Problem, match="--language de: the model knows English only"):
        exported(source, few, tmp_path / "no", language="de")
