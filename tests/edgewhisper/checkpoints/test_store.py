"""Names of checkpoints, OpenAI's vocabularies, saved directories and feature extractors."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from other_forms import ctranslate2_arrays, model_bin
from small_checkpoints import bare, folder_of, random_of, same_weights
from transformers import WhisperFeatureExtractor

from devices.runner.recognizer import Recognizer
from edgewhisper import decoding
from edgewhisper.checkpoints import openai
from edgewhisper.checkpoints.openai import ENGLISH, MULTILINGUAL, WITH_CANTONESE
from edgewhisper.whisper import (
    as_directory,
    load,
    load_processor,
    load_with_processor,
    resolved,
    save,
)
from export.onnx.to_onnx import export_onnx
from export.problem import Problem

# ------------------------------------------------------------------------------------ size names


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("tiny.en", "openai/whisper-tiny.en"),
        ("base", "openai/whisper-base"),
        ("large", "openai/whisper-large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large-v3-turbo", "openai/whisper-large-v3-turbo"),
        ("someone/whisper-tiny-bambara", "someone/whisper-tiny-bambara"),
    ],
)
def test_size_names_resolve_to_openais_hub_ids(name, hub):
    assert resolved(name) == hub


def test_a_folder_takes_precedence_over_a_size_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert resolved("base") == "base"


def test_an_unknown_name_lists_the_sizes(tmp_path):
    with pytest.raises(Problem, match="no such checkpoint") as problem:
        load("./tiny.fr")
    assert "large-v3-turbo" in problem.value.hint


@pytest.mark.parametrize("name", ["nowhere/", "my models/whisper", "a/b/c"])
def test_a_name_that_is_no_hub_id_is_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (load, load_processor, lambda source: as_directory(source, tmp_path / "made")):
        with pytest.raises(Problem, match=f"{name}: there is no such checkpoint"):
            read(name)


# ----------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(
    ("vocab_size", "end", "silent", "languages"),
    [
        (ENGLISH, 50256, 50362, 99),
        (MULTILINGUAL, 50257, 50363, 99),
        (WITH_CANTONESE, 50257, 50364, 100),
    ],
    ids=["english", "multilingual", "with-cantonese"],
)
def test_the_packaged_tokenizers_have_openais_ids(vocab_size, end, silent, languages):
    tokenizer = openai.tokenizer(vocab_size)
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == vocab_size
    assert (vocabulary["<|endoftext|>"], vocabulary["<|notimestamps|>"]) == (end, silent)
    assert vocabulary["<|30.00|>"] == vocab_size - 1
    first, last = vocabulary["<|startoftranscript|>"], vocabulary["<|translate|>"]
    assert last - first - 1 == languages
    text = " Hello there, it's 5 o'clock: naïve 日本語 हिन्दी"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids[:3] == ([18435, 612, 11] if vocab_size == ENGLISH else [2425, 456, 11])


def test_suppressed_tokens_match_openais():
    tokenizer = openai.tokenizer(ENGLISH)
    tokens = openai.suppressed_tokens(tokenizer, tokenizer.get_vocab())
    assert tokens[:12] == [1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29]
    assert tokens[-6:] == [50257, 50357, 50358, 50359, 50360, 50361]
    assert len(tokens) == 90


# -------------------------------------------------------------------------- saved directories


def test_other_forms_are_written_as_complete_directories(multilingual, tmp_path):
    folder = folder_of(tmp_path / "ct2", model_bin(ctranslate2_arrays(multilingual)))
    out = as_directory(folder, tmp_path / "made")
    assert out == tmp_path / "made/ct2"
    assert same_weights(load(out), multilingual)
    assert not (out / "compression.json").exists()
    assert as_directory(out, tmp_path / "again") == out


@pytest.mark.parametrize(
    "missing", ["is_multilingual", "decoder_start_token_id", "lang_to_id", "task_to_id"]
)
def test_a_directory_without_a_key_of_the_prompt_is_completed(missing, multilingual, tmp_path):
    folder = as_directory(bare(multilingual, tmp_path / "bare"), tmp_path / "made")
    path = folder / "generation_config.json"
    before = json.loads(path.read_text()) | {"language": "hi"}
    path.write_text(json.dumps({key: value for key, value in before.items() if key != missing}))
    completed = as_directory(folder, tmp_path / "again")
    assert completed == tmp_path / "again/bare"
    assert json.loads((completed / path.name).read_text()) == before


def test_an_english_directory_needs_no_languages(english, tmp_path):
    folder = as_directory(bare(english, tmp_path / "bare"), tmp_path / "made")
    assert "lang_to_id" not in (folder / "generation_config.json").read_text()
    assert as_directory(folder, tmp_path / "again") == folder


def test_a_saved_model_keeps_its_generation_config(multilingual, tmp_path):
    bare(multilingual, tmp_path / "bare")
    first = load(tmp_path / "bare")
    save(first, load_processor(tmp_path / "bare"), tmp_path / "saved")
    second = load(tmp_path / "saved")
    assert second.generation_config.to_dict() == first.generation_config.to_dict()
    stored = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert stored["is_multilingual"] is True and not stored.get("_from_model_config")


def test_model_and_processor_are_loaded_with_one_read_of_the_tokenizer(
    multilingual, tmp_path, monkeypatch
):
    bare(multilingual, tmp_path / "bare")
    reads, read = [], openai.tokenizer
    monkeypatch.setattr(openai, "tokenizer", lambda size: reads.append(size) or read(size))
    model, processor = load_with_processor(tmp_path / "bare")
    assert reads == [MULTILINGUAL]
    assert model.generation_config.to_dict() == load(tmp_path / "bare").generation_config.to_dict()
    assert processor.to_dict() == load_processor(tmp_path / "bare").to_dict()


# ------------------------------------------------------------------------------- feature extractors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_size": 128}, "feature_size = 128, and config.json has num_mel_bins = 80"),
        ({"feature_size": 40}, "feature_size = 40, and config.json has num_mel_bins = 80"),
        ({"chunk_length": 15}, r"nb_max_frames = 1500, .* 2 \* max_source_positions = 3000"),
    ],
)
def test_mismatched_features_name_both_files(changes, message, multilingual, tmp_path):
    multilingual.save_pretrained(tmp_path)
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    assert load_processor(tmp_path).feature_extractor.feature_size == 80
    WhisperFeatureExtractor(**changes).save_pretrained(tmp_path)
    with pytest.raises(Problem, match=message):
        load_processor(tmp_path)


@pytest.mark.parametrize(("prompt", "size"), [("english", ENGLISH), ("multilingual", MULTILINGUAL)])
def test_checkpoint_and_artifact_have_the_same_token_limit(prompt, size, tmp_path):
    """The limit depends on the length of the prompt, two or four tokens."""
    bare(random_of(size, max_target_positions=64), tmp_path / "bare")
    model, processor = load(tmp_path / "bare"), load_processor(tmp_path / "bare")
    generation = model.generation_config = copy.deepcopy(model.generation_config)
    generation.language, generation.task = (
        ("en", "transcribe") if prompt != "english" else (None,) * 2
    )
    generation.suppress_tokens = [*generation.suppress_tokens, generation.eos_token_id]
    pcm = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10
    (expected,) = decoding.greedy(model, processor, [pcm])
    export_onnx(model, processor, tmp_path / "artifact", "fp32")
    actual = Recognizer(tmp_path / "artifact", threads=1, guards=False).window(pcm)
    length = 2 if prompt == "english" else 4
    assert len(actual) == len(expected) == model.config.max_target_positions - length
    assert actual[:20] == expected[:20]
