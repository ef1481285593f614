"""Words that fine-tuning adds to the vocabulary, after the timestamps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speech.clips import read_manifest
from devices.runner.recognizer import Recognizer
from edgewhisper import decoding, whisper
from export.onnx.to_onnx import export_onnx
from export.prompt import timestamp_ids

CASES = {
    "one word": [("three", " THREE", False)],
    "two words": [("three", " THREE", False), ("one", " 一", False)],
    "a tag": [("three", "<three>", False)],
    "a special token": [("three", " THREE", True)],
}


@pytest.fixture
def spoken(clips) -> list:
    spoken = [clip for clip in read_manifest(clips) if {"three", "one"} <= set(clip.text.split())]
    assert len(spoken) > 1
    return spoken


def enlarged(digits: Path, processor, words, folder: Path) -> Path:
    """The embedded model with new tokens, each slightly more likely than the word it replaces."""
    model = whisper.load(digits)
    whisper.save(model, processor, folder, {})
    vocabulary = processor.tokenizer.get_vocab()
    table = model.model.decoder.embed_tokens.weight.detach()
    rows = torch.stack([table[vocabulary[f"Ġ{word}"]] * 1.05 for word, _, _ in words])
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    save_file(
        tensors | {name: torch.cat([tensors[name], rows])},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    stored = json.loads((folder / "tokenizer.json").read_text())
    for number, (_, content, special) in enumerate(words):
        stored["added_tokens"].append(
            dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            | {"id": len(table) + number, "content": content}
            | {"normalized": not special, "special": special}
        )
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = len(table) + len(words)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_added_words_are_transcribed(case, digits, processor, spoken, tmp_path):
    words = CASES[case]
    place = enlarged(digits, processor, words, tmp_path / "enlarged")
    model, own = whisper.load(place), whisper.load_processor(place)
    before = whisper.load(digits).config.vocab_size
    assert timestamp_ids(model.generation_config, model.config.vocab_size).stop == before
    pcms = [clip.pcm() for clip in spoken]
    tokens = decoding.greedy(model, own, pcms)
    for number, (word, _, _) in enumerate(words):
        for clip, row in zip(spoken, tokens, strict=True):
            assert row.count(before + number) == clip.text.split().count(word)
    texts = decoding.transcribe(model, own, pcms)
    for word, content, special in words:
        assert all((content.strip() in text) is not special for text in texts)
        assert not any(word in text.split() for text in texts)
    whisper.save(model, own, tmp_path / "again", {})
    assert whisper.load(tmp_path / "again").generation_config.timestamp_end == before
    export_onnx(model, own, tmp_path / "artifact", "fp32")
    recognizer = Recognizer(tmp_path / "artifact", threads=1)
    for pcm, expected, text in zip(pcms, tokens, texts, strict=True):
        assert recognizer.window(pcm) == expected
        assert recognizer.transcribe(pcm).text == text
        timed = recognizer.transcribe(pcm, timestamps=True)
        assert timed.text == text
        assert all(segment.end_s <= len(pcm) / 16_000 for segment in timed.segments)


@pytest.mark.parametrize("layout", ["single", "sherpa", "transformers"])
def test_other_layouts_suppress_only_the_timestamps(layout, digits, processor, spoken, tmp_path):
    from benchmarks.reference_runtimes import open_artifact

    place = enlarged(digits, processor, CASES["two words"], tmp_path / "enlarged")
    model, own = whisper.load(place), whisper.load_processor(place)
    export_onnx(model, own, tmp_path / "artifact", "fp32", layout=layout)
    pcm = spoken[0].pcm()
    (expected,) = decoding.greedy(model, own, [pcm])
    assert open_artifact(tmp_path / "artifact").window(pcm) == expected
