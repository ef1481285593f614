"""Which language prompts OpenAI's models where none is named."""

from __future__ import annotations

import pytest
from real_models import model
from transcripts import transcripts

from benchmarks.gate import evenly
from benchmarks.speech.clips import read_manifest
from edgewhisper import decoding, whisper
from edgewhisper.shipped import COMMON_VOICE
from export.artifact import read_manifest as read_artifact

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def few():
    return evenly(read_manifest(COMMON_VOICE / "test.jsonl"), 8)


def test_a_multilingual_artifact_detects_english(artifact, few):
    base = artifact("base", "int8")
    manifest = read_artifact(base)
    assert (manifest["format"], manifest["decoding"]["language"]) == (3, "auto")
    recordings = [clip.pcm() for clip in few[:4]]
    found = list(transcripts(str(base), recordings))
    assert [one["language"] for one in found] == ["en"] * 4
    named = transcripts(str(base), recordings, language="en")
    assert [one["text"] for one in found] == [one["text"] for one in named]


def test_the_checkpoint_detects_it_too(few):
    loaded = whisper.load(model("base")), whisper.load_processor(model("base"))
    found = [code for code, _ in decoding.detect(*loaded, [clip.pcm() for clip in few])]
    assert found.count("en") >= 7  # one clip begins with a name that base hears as Maori


def test_english_only_models_take_english_auto_and_transcribe(artifact, few):
    source, place = str(model("tiny.en")), artifact("tiny.en", "fp32")
    pcm = few[0].pcm()
    texts = {
        next(iter(transcripts(each, [pcm], **options)))["text"]
        for each in (source, str(place))
        for options in ({}, {"language": "en"}, {"language": "auto"}, {"task": "transcribe"})
    }
    assert len(texts) == 1
    for each in (source, str(place)):
        with pytest.raises(ValueError, match="English only"):
            list(transcripts(each, [pcm], language="de"))
        with pytest.raises(ValueError, match="English only"):
            list(transcripts(each, [pcm], task="translate"))
