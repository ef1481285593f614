"""Loading all forms of checkpoints: fine-tuned Hugging Face directories, CTranslate2, .pt files.

Also the generation config that is derived if it is missing.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from other_forms import ctranslate2_arrays, model_bin, write_pt
from transformers import WhisperConfig, WhisperFeatureExtractor

from devices.runner.recognizer import Recognizer
from edgewhisper import decoding
from edgewhisper.checkpoints import generation, huggingface, openai
from edgewhisper.checkpoints.openai import ENGLISH, MULTILINGUAL, WITH_CANTONESE
from edgewhisper.whisper import (
    WhisperForConditionalGeneration,
    as_directory,
    load,
    load_processor,
    load_with_processor,
    resolved,
    save,
)
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.prompt import prompt_ids

SMALL = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_source_positions=1500,
)


def random_of(vocab_size: int, **more: int) -> WhisperForConditionalGeneration:
    """Return a small random model with one of OpenAI's vocabularies."""
    torch.manual_seed(vocab_size)
    start = 50257 if vocab_size == ENGLISH else 50258
    values = SMALL | {"vocab_size": vocab_size, "decoder_start_token_id": start} | more
    return WhisperForConditionalGeneration(WhisperConfig(**values))


@pytest.fixture(scope="module")
def english() -> WhisperForConditionalGeneration:
    return random_of(ENGLISH)


@pytest.fixture(scope="module")
def multilingual() -> WhisperForConditionalGeneration:
    return random_of(MULTILINGUAL)


def bare(model: WhisperForConditionalGeneration, out: Path) -> Path:
    """Save weights and config.json only."""
    model.save_pretrained(out)
    (out / "generation_config.json").unlink()
    config = json.loads((out / "config.json").read_text())
    for key in ("suppress_tokens", "begin_suppress_tokens", "eos_token_id", "bos_token_id"):
        config.pop(key, None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def edit(path: Path, **values: object) -> None:
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(stored | values))


def folder_of(out: Path, content: bytes, **config: object) -> Path:
    """Write a CTranslate2 folder."""
    out.mkdir()
    (out / "model.bin").write_bytes(content)
    (out / "config.json").write_text(json.dumps(config))
    return out


def same_weights(actual, expected, tolerance: float = 0.0) -> bool:
    left, right = actual.state_dict(), expected.state_dict()
    return left.keys() == right.keys() and all(
        (left[name] - right[name]).abs().max() <= tolerance * right[name].abs().max()
        for name in left
    )


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


# ------------------------------------------------------------------------------ Hugging Face forms


def test_bare_weights_of_a_multilingual_model_get_language_and_task_prompts(multilingual, tmp_path):
    model = load(bare(multilingual, tmp_path / "bare"))
    generation = model.generation_config
    assert generation.is_multilingual and generation.lang_to_id["<|de|>"] == 50261
    assert prompt_ids(generation, "de") == [50258, 50261, 50359, 50363]
    assert generation.suppress_tokens[-1] == 50362
    assert generation.begin_suppress_tokens == [220, 50257]
    assert generation.prev_sot_token_id == 50361
    processor = load_processor(tmp_path / "bare")
    assert processor.feature_extractor.n_samples == 480_000
    assert processor.tokenizer.get_vocab()["<|de|>"] == 50261


def test_bare_weights_of_an_english_model_get_no_language_prompt(english, tmp_path):
    generation = load(bare(english, tmp_path / "bare")).generation_config
    assert not generation.is_multilingual
    assert prompt_ids(generation, "de") == [50257, 50362]
    assert not hasattr(generation, "lang_to_id") and not hasattr(generation, "language")


def test_a_config_generated_by_transformers_is_ignored(multilingual, tmp_path):
    multilingual.save_pretrained(tmp_path / "marked")
    edit(
        tmp_path / "marked/generation_config.json",
        _from_model_config=True,
        begin_suppress_tokens=[220, 50256],
    )
    generation = load(tmp_path / "marked").generation_config
    assert prompt_ids(generation, "hi")[1] == 50276
    assert not generation._from_model_config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_shards_load_in_float32(multilingual, tmp_path, dtype):
    half = random_of(MULTILINGUAL).to(dtype)
    half.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    model = load(tmp_path / "shards")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert same_weights(model, multilingual, tolerance=0.01)


ENGLISH_START, OTHER_START = 50257, 50258
RESIZED = {
    "multilingual + 1": (MULTILINGUAL + 1, 80, OTHER_START, MULTILINGUAL, 50359),
    "multilingual + 7": (MULTILINGUAL + 7, 80, OTHER_START, MULTILINGUAL, 50359),
    "large-v3": (WITH_CANTONESE, 128, OTHER_START, WITH_CANTONESE, 50360),
    "large-v3 + 4": (WITH_CANTONESE + 4, 128, OTHER_START, WITH_CANTONESE, 50360),
    "large-v3 + 4, default start": (WITH_CANTONESE + 4, 128, None, WITH_CANTONESE, 50360),
    "english + 1": (ENGLISH + 1, 80, ENGLISH_START, ENGLISH, None),
    "english + 2": (ENGLISH + 2, 80, ENGLISH_START, ENGLISH, None),
}
"""Tokens, mel bins, stored start token, the original vocabulary, the id of <|transcribe|>."""


@pytest.mark.parametrize("with_tokenizer", [False, True], ids=["bare", "tokenizer"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_is_recognised_by_mel_bins_and_start(case, with_tokenizer, tmp_path):
    size, mels, start, original, transcribe = RESIZED[case]
    out = bare(random_of(size, num_mel_bins=mels), tmp_path / "resized")
    edit_start(out / "config.json", start)
    if with_tokenizer:
        openai.tokenizer(original).save_pretrained(out)
    model, processor = load(out), load_processor(out)
    assert len(processor.tokenizer) == original
    prompt = prompt_ids(model.generation_config, "de")
    if transcribe is None:
        assert prompt == [50257, 50362] and not model.generation_config.is_multilingual
    else:
        assert prompt == [50258, 50261, transcribe, transcribe + 4]


def edit_start(config: Path, start: int | None) -> None:
    """Store a start token in config.json, or none."""
    stored = json.loads(config.read_text())
    del stored["decoder_start_token_id"]
    config.write_text(json.dumps(stored))
    if start is not None:
        edit(config, decoder_start_token_id=start)


def test_the_start_token_may_be_stored_in_the_generation_config(tmp_path):
    out = bare(random_of(MULTILINGUAL + 1), tmp_path / "resized")
    edit_start(out / "config.json", ENGLISH_START)  # the default of WhisperConfig
    edit(out / "generation_config.json", decoder_start_token_id=OTHER_START)
    assert prompt_ids(load(out).generation_config, "de") == [50258, 50261, 50359, 50363]


def test_a_resized_vocabulary_without_a_start_token_is_refused(tmp_path):
    out = bare(random_of(MULTILINGUAL + 1), tmp_path / "resized")
    edit_start(out / "config.json", None)
    with pytest.raises(Problem, match=r"51866 tokens .* 80 mel bins") as problem:
        load(out)
    assert "decoder_start_token_id" in problem.value.hint


def test_a_multilingual_model_with_the_default_start_token_uses_its_tokenizer(tmp_path):
    out = bare(random_of(MULTILINGUAL), tmp_path / "scratch")
    edit_start(out / "config.json", ENGLISH_START)
    openai.tokenizer(MULTILINGUAL).save_pretrained(out)
    assert prompt_ids(load(out).generation_config, "de") == [50258, 50261, 50359, 50363]


def test_a_resized_english_model_has_the_heads_of_its_original():
    size = openai.SIZES["tiny.en"]
    config = WhisperConfig(
        vocab_size=ENGLISH + 1,
        d_model=size.d_model,
        encoder_layers=size.encoder_layers,
        decoder_layers=size.decoder_layers,
    )
    assert openai.size_of(config, english=True) is size
    assert openai.size_of(config, english=False) is openai.SIZES["tiny"]


def test_underivable_values_are_refused(tmp_path):
    out = bare(random_of(1234, decoder_start_token_id=3, pad_token_id=0), tmp_path / "bare")
    with pytest.raises(Problem, match="1234 tokens is not one of OpenAI's") as problem:
        load(out)
    assert "is_multilingual" in str(problem.value) and "copy the tokenizer" in problem.value.hint


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("generation_config.json", {"forced_decoder_ids": [[1, 50261], [2, 50358], [3, 50363]]}),
        ("config.json", {"forced_decoder_ids": [[1, 50261], [2, 50358]]}),
        ("generation_config.json", {"language": "german", "task": "translate"}),
        ("generation_config.json", {"language": "<|de|>", "task": "translate"}),
    ],
    ids=["forced-ids", "forced-ids-in-config", "name", "token"],
)
def test_the_language_of_a_fine_tuned_model_is_its_prompt(multilingual, tmp_path, place, values):
    out = bare(multilingual, tmp_path / "tuned")
    edit(out / place, **values)
    generation = load(out).generation_config
    assert prompt_ids(generation) == [50258, 50261, 50358, 50363]


def test_forced_ids_without_a_language_set_none(multilingual, tmp_path):
    out = bare(multilingual, tmp_path / "tuned")
    edit(out / "generation_config.json", forced_decoder_ids=[[1, None], [2, 50359]])
    generation = load(out).generation_config
    assert getattr(generation, "language", None) is None
    assert generation.task == "transcribe"


def test_keys_that_decoding_ignores_have_no_effect(digits, clips, tmp_path):
    from benchmarks.speech.clips import read_manifest

    copy = tmp_path / "keys"
    shutil.copytree(digits, copy)
    edit(
        copy / "generation_config.json",
        return_timestamps=True,
        num_beams=4,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        length_penalty=0.1,
    )
    pcms = [clip.pcm() for clip in read_manifest(clips)[:4]]
    texts = [
        decoding.transcribe(load(place), load_processor(place), pcms) for place in (digits, copy)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decoder_start_token_id": 50257}, "decoder_start_token_id = 50257"),
        ({"no_timestamps_token_id": 50362}, "no_timestamps_token_id = 50362"),
        ({"lang_to_id": {"<|de|>": 50260}}, r"lang_to_id\['<\|de\|>'\] = 50260"),
        ({"task_to_id": {"transcribe": 50358}}, r"task_to_id\['transcribe'\] = 50358"),
        ({"eos_token_id": 50256}, "eos_token_id = 50256"),
        ({"suppress_tokens": [1, 51865]}, "51865 in suppress_tokens"),
        ({"begin_suppress_tokens": [-1]}, "-1 in begin_suppress_tokens"),
        ({"suppress_tokens": "all"}, "suppress_tokens = 'all'"),
        ({"alignment_heads": [[0, 1], [5, -1]]}, r"\[5, -1\] in alignment_heads"),
        ({"alignment_heads": 3}, "alignment_heads = 3"),
        ({"word_delay_s": 1.5}, "word_delay_s = 1.5"),
    ],
    ids=[
        *("start", "no-timestamps", "language", "task", "end", "too-high", "too-low", "no-list"),
        *("no-head", "no-heads", "delay"),
    ],
)
def test_ids_that_contradict_the_tokenizer_are_refused(multilingual, tmp_path, values, words):
    out = bare(multilingual, tmp_path / "shifted")
    edit(out / "generation_config.json", is_multilingual=True, **values)
    with pytest.raises(Problem, match=words) as problem:
        load(out)
    assert "generation_config.json" in str(problem.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"language": "hi",}', "generation_config.json is not valid JSON .* line 1 column 19"),
        ("[]", "generation_config.json holds a list"),
        ("", "generation_config.json is not valid JSON .* line 1 column 1"),
    ],
    ids=["comma", "list", "empty"],
)
def test_a_generation_config_that_is_no_json_object_is_refused(
    multilingual, tmp_path, content, words
):
    out = bare(multilingual, tmp_path / "damaged")
    (out / "generation_config.json").write_text(content)
    for read in (load, load_processor, partial(load, mapped=True)):
        with pytest.raises(Problem, match=words) as problem:
            read(out)
        assert "remove it" in problem.value.hint


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"language": "klingon"}, "language = 'klingon', .* tokens for en, zh, .* 94 others"),
        ({"language": "yue"}, "language = 'yue'"),
        ({"task": "summarize"}, "task = 'summarize', .* tokens for translate, transcribe"),
    ],
    ids=["unknown", "of-large-v3", "task"],
)
def test_a_language_or_task_without_a_token_is_refused(multilingual, tmp_path, values, words):
    out = bare(multilingual, tmp_path / "tuned")
    edit(out / "generation_config.json", **values)
    with pytest.raises(Problem, match=f"generation_config.json has {words}") as problem:
        load(out)
    assert "or remove it, then" in problem.value.hint


def test_the_delay_of_word_timestamps_is_known_for_openai_s_heads_only():
    size = openai.SIZES["tiny.en"]
    dimensions = {
        "d_model": size.d_model,
        "encoder_layers": size.encoder_layers,
        "decoder_layers": size.decoder_layers,
    }
    config = WhisperConfig(vocab_size=ENGLISH, **dimensions)
    heads = [list(head) for head in size.alignment_heads]
    assert generation.word_delay_s(config, True, heads) == size.word_delay_s == 0.1
    assert generation.word_delay_s(config, True, heads[1:]) is None
    other = WhisperConfig(vocab_size=ENGLISH, d_model=96)
    assert generation.word_delay_s(other, True, heads) is None


def test_an_english_model_with_a_multilingual_config_is_refused(english, tmp_path):
    out = bare(english, tmp_path / "sibling")
    edit(out / "generation_config.json", is_multilingual=True)
    with pytest.raises(Problem, match="is_multilingual = True, but according to the tokenizer it"):
        load(out)


def test_a_multilingual_model_with_an_english_config_is_refused(multilingual, tmp_path):
    out = bare(multilingual, tmp_path / "sibling")
    edit(out / "generation_config.json", is_multilingual=False)
    words = "generation_config.json has is_multilingual = False, .* 51865 in config.json"
    with pytest.raises(Problem, match=words) as problem:
        load(out)
    assert "correct is_multilingual" in problem.value.hint


def test_a_vocabulary_of_its_own_may_be_used_without_a_language(digits, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(digits, own)
    edit(own / "generation_config.json", is_multilingual=False)
    assert prompt_ids(load(own).generation_config) == [375, 481]


def test_a_tokenizer_of_another_vocabulary_is_refused(english, tmp_path):
    out = bare(english, tmp_path / "sibling")
    openai.tokenizer(MULTILINGUAL).save_pretrained(out)
    with pytest.raises(
        Problem, match=r"<\|endoftext\|> is 50257; with vocab_size 51864"
    ) as problem:
        load(out)
    assert "another model" in problem.value.hint


def test_an_english_tokenizer_of_a_multilingual_model_is_refused(multilingual, tmp_path):
    out = bare(multilingual, tmp_path / "sibling")
    openai.tokenizer(ENGLISH).save_pretrained(out)
    words = r"is 50256; with vocab_size 51865, decoder_start_token_id 50258 .* must be 50257"
    with pytest.raises(Problem, match=words) as problem:
        load(out)
    assert "50257 if it is English-only, 50258 if multilingual" in problem.value.hint


# ----------------------------------------------------------------------------------- CTranslate2


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 1e-2)],
)
def test_a_ctranslate2_folder_has_the_weights_of_its_model(multilingual, tmp_path, kind, tolerance):
    content = model_bin(ctranslate2_arrays(multilingual, kind))
    heads = [[0, 1]]
    out = folder_of(tmp_path / "ct2", content, alignment_heads=heads, suppress_ids=[1, 2])
    model = load(out)
    assert same_weights(model, multilingual, tolerance)
    generation = model.generation_config
    assert generation.alignment_heads == heads and generation.suppress_tokens == [1, 2]
    assert prompt_ids(generation, "de") == [50258, 50261, 50359, 50363]
    assert load_processor(out).feature_extractor.feature_size == 80


def test_version_5_and_aliases_are_read(multilingual, tmp_path):
    arrays = ctranslate2_arrays(multilingual)
    content = model_bin(arrays, version=5)[:-4]
    content += struct.pack("<I", 1) + b"\x06\0alias\0" + b"\x13\0decoder/num_heads\0\0\0"[:21]
    assert same_weights(load(folder_of(tmp_path / "ct2", content)), multilingual)


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda b: b"",
        "half": lambda b: b[: len(b) // 2],
        "last-byte": lambda b: b[:-1],
        "longer": lambda b: b + b"\0",
        "version": lambda b: struct.pack("<I", 99) + b[4:],
        "count": lambda b: b[:22] + struct.pack("<I", 2**32 - 1) + b[26:],
        "not-text": lambda b: b[:6] + b"\xff" * 11 + b[17:],
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_model_bin_is_refused(multilingual, tmp_path, damage):
    content = damages()[damage](model_bin(ctranslate2_arrays(multilingual)))
    with pytest.raises(Problem, match=r"model\.bin") as problem:
        load(folder_of(tmp_path / "ct2", content))
    assert problem.value.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("encoder/conv2/bias"), "no variable 'encoder/conv2/bias'"),
        (lambda a: a.pop("decoder/embeddings/weight"), "decoder/embeddings/weight"),
        (lambda a: a.update({"encoder/num_heads": np.array(5, np.int16)}), "num_heads is 5"),
        (lambda a: a.update({"encoder/activation": np.array(0, np.int8)}), "activation"),
        (lambda a: a.update({"encoder/conv1/bias": np.zeros(3, np.float32)}), "wrong shape"),
        (
            lambda a: a.update({"encoder/conv1/bias": np.zeros(16, np.int32)}),
            "without usable scales",
        ),
    ],
    ids=["missing", "no-table", "heads", "activation", "shape", "no-scale"],
)
def test_a_model_bin_of_another_model_is_refused(multilingual, tmp_path, change, words):
    arrays = ctranslate2_arrays(multilingual)
    change(arrays)
    with pytest.raises(Problem, match=words):
        load(folder_of(tmp_path / "ct2", model_bin(arrays)))


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    content = model_bin({}, specification="TransformerSpec")
    with pytest.raises(Problem, match="'TransformerSpec', not 'WhisperSpec'"):
        load(folder_of(tmp_path / "ct2", content))


def test_random_damage_raises_only_problems(multilingual, tmp_path, rng):
    """80 mutations of the bytes before the first weights."""
    content = bytearray(model_bin(ctranslate2_arrays(multilingual)))
    out = folder_of(tmp_path / "ct2", bytes(content))
    for _ in range(80):
        broken = content.copy()
        for place in rng.integers(0, 120, size=3):
            broken[place] = rng.integers(256)
        (out / "model.bin").write_bytes(broken)
        try:
            load(out)
        except Problem as problem:
            assert problem.hint


# ------------------------------------------------------------------------------------ .pt files


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pt_file_has_the_weights_of_its_model(english, tmp_path, legacy, monkeypatch):
    path = tmp_path / "model.pt"
    write_pt(english, path, torch.float32)
    if legacy:
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    model = load(path)
    assert same_weights(model, english)
    assert prompt_ids(model.generation_config) == [50257, 50362]
    assert load_processor(path).tokenizer.get_vocab()["<|notimestamps|>"] == 50362


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_code_in_a_pt_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"dims": {}, "model_state_dict": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(Problem, match="cannot be read as plain tensors") as found:
            load(tmp_path / name)
        assert "weights_only" not in str(found.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("dims"), "no `dims`"),
        (lambda c: c["dims"].update(n_vocab=10**12), "n_vocab"),
        (lambda c: c["dims"].update(n_audio_layer="4"), "n_audio_layer"),
        (lambda c: c["dims"].update(n_vocab=51865), "token table of"),
        (lambda c: c["dims"].update(n_text_layer=2), "lack"),
        (lambda c: c["model_state_dict"].update(extra=torch.zeros(1)), "also hold"),
        (lambda c: c["model_state_dict"].update(extra="text"), "not a tensor"),
    ],
    ids=["no-dims", "huge", "text", "other-table", "missing", "extra", "no-tensor"],
)
def test_an_inconsistent_pt_file_is_refused(english, tmp_path, change, words):
    path = tmp_path / "model.pt"
    write_pt(english, path)
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(Problem, match=words):
        load(path)


def test_a_truncated_pt_file_is_refused(english, tmp_path):
    path = tmp_path / "model.pt"
    write_pt(english, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Problem, match="cannot be read as plain tensors"):
        load(path)
    path.write_bytes(path.read_bytes()[:100])  # torch explains it in 337 characters
    with pytest.raises(Problem, match=r"failed finding central directory.*[a-z]\)$"):
        load(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is short.", "It is short"),
        (f"One. Two. {'three ' * 40}", "One. Two"),
        ("three " * 40, f"{'three ' * 33}..."),
        ("x" * 300, f"{'x' * 200} ..."),
    ],
    ids=["short", "sentences", "words", "one-word"],
)
def test_long_texts_of_errors_end_with_a_sentence_or_an_ellipsis(text, expected):
    assert huggingface.shortened(text) == expected


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
