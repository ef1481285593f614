"""The model of `transcribe`, `eval` and `bench` when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from some_clips import manifest_of_some

from edgewhisper.cli.transcribe_options import model_and_audio
from edgewhisper.shipped import COMMON_VOICE, ENGLISH, default_artifact, speech_for
from edgewhisper.transcription import evaluate
from edgewhisper.verify import verify
from export.problem import Problem


def test_the_embedded_artifact_is_whole_and_has_at_most_20_megabytes():
    assert verify(ENGLISH, threads=1).error is None
    assert sum(path.stat().st_size for path in ENGLISH.iterdir()) <= 20e6


def test_the_embedded_artifact_recognises_english_sentences(tmp_path):
    few = manifest_of_some(COMMON_VOICE / "test.jsonl", slice(8), tmp_path)
    score, rows = evaluate(str(ENGLISH), few)
    assert rows[1]["text"] == "I don't know where to go."
    assert score.wer < 0.15


def test_the_newest_artifact_precedes_the_embedded_one(empty, exported):
    assert default_artifact() == ENGLISH
    newest = empty / "edgewhisper-runs/artifact-20261130-120000-fp32"
    newest.parent.mkdir()
    newest.symlink_to(exported)
    assert default_artifact().resolve() == exported.resolve()
    assert speech_for([default_artifact()]).parent.name == "speech"
    packages = newest.with_name("artifact-20261130-120001-coreml-fp16")
    packages.mkdir()
    assert default_artifact().resolve() == exported.resolve()
    assert default_artifact(core_ml=True).resolve() == packages.resolve()


@pytest.mark.parametrize(
    ("inputs", "model"),
    [
        (["a.wav"], None),
        (["a.wav", "b.wav"], None),
        (["-"], None),
        (["recordings"], None),
        (["tiny.en", "a.wav"], "tiny.en"),
        (["artifact", "a.wav"], "artifact"),
        (["recordings", "a.wav"], "recordings"),
        (["model.pt", "a.wav"], "model.pt"),
    ],
)
def test_the_first_argument_is_the_model_unless_it_is_audio(empty, inputs, model):
    for name in ("a.wav", "b.wav", "model.pt"):
        Path(name).touch()
    Path("recordings").mkdir()
    Path("artifact").mkdir()
    Path("artifact/config.json").touch()
    audio = inputs if model is None else inputs[1:]
    assert model_and_audio(inputs) == (model or str(ENGLISH), [Path(name) for name in audio])


def test_a_missing_recording_without_a_model_is_named(empty):
    with pytest.raises(Problem, match=r"there is no audio file missing\.wav"):
        model_and_audio(["missing.wav"])


@pytest.mark.parametrize("only", ["tiny.en", "missing", "model.pt"])
def test_arguments_without_audio_give_an_error(empty, only):
    Path("model.pt").touch()
    with pytest.raises(Problem, match=f"{only} is not an audio file, and no audio file follows it"):
        model_and_audio([only])
