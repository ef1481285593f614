"""compression.json: the base model of a checkpoint, for all forms of checkpoints."""

from __future__ import annotations

import hashlib

import pytest

from edgewhisper.card import card_of
from edgewhisper.provenance import base_record, file_hashes

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FORMS = {
    "one file": ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    "shards": ("config.json", "model.safetensors.index.json", *SHARDS),
    "CTranslate2": ("config.json", "model.bin", "tokenizer.json"),
    "LoRA": ("adapter_config.json", "adapter_model.safetensors"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_of_each_form_are_hashed(form, tmp_path):
    for name in (*FORMS[form], "training_args.bin", "README.md"):
        (tmp_path / name).write_text(name)
    hashes = file_hashes(tmp_path)
    assert set(hashes) == set(FORMS[form])
    for name, value in hashes.items():
        assert value == hashlib.sha256(name.encode()).hexdigest()


def test_nothing_is_hashed_for_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("tiny.en", "openai/whisper-tiny"):
        record = base_record(source, "abc")
        assert record == {"source": source, "revision": "abc", "files": {}, "compression": {}}


def test_only_the_last_part_of_a_path_is_recorded(tmp_path, monkeypatch):
    folder = tmp_path / "private" / "mine"
    folder.mkdir(parents=True)
    (folder / "tiny.pt").write_bytes(b"weights")
    assert base_record(str(folder), None)["source"] == "mine"
    record = base_record(str(folder / "tiny.pt"), None)
    assert record["source"] == "tiny.pt"
    assert record["files"] == {"tiny.pt": hashlib.sha256(b"weights").hexdigest()}
    monkeypatch.chdir(folder)
    assert base_record(".", None)["source"] == "mine"


def test_the_card_of_a_pt_file_names_the_file(tmp_path):
    (tmp_path / "tiny.pt").write_bytes(b"weights")
    dev = {"wer": 0.05, "words": 100, "normalizer": "whisper-english"}
    measured = {"parameters": {"total": 9}, "dev": dev}
    record = {
        "base": base_record(str(tmp_path / "tiny.pt"), None),
        "recipe": {"name": "mine"},
        "before": measured,
        "after": measured,
        "speech": {"train": {"clips": 2}, "dev": {"clips": 3}},
    }
    assert "# tiny.pt, compressed with the recipe mine\n" in card_of(record)
