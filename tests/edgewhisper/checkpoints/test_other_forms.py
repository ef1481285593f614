"""CTranslate2 directories and .pt files."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from other_forms import ctranslate2_arrays, model_bin, write_pt
from small_checkpoints import folder_of, same_weights

from edgewhisper.whisper import load, load_processor
from export.problem import Problem
from export.prompt import prompt_ids

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
