"""Every form of OpenAI's weights gives the same text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from other_forms import ctranslate2_arrays, model_bin, write_pt

from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import score
from edgewhisper import decoding
from edgewhisper.checkpoints import fetch
from edgewhisper.whisper import load, load_processor
from export.prompt import prompt_ids

pytestmark = pytest.mark.real


def texts(source: Path, clips: list[Clip]) -> list[str]:
    pcms = [clip.pcm() for clip in clips]
    languages = [clip.lang for clip in clips]
    return decoding.transcribe(load(source), load_processor(source), pcms, languages)


@pytest.fixture(scope="module")
def clips(common_voice: Path) -> list[Clip]:
    return read_manifest(common_voice / "test.jsonl")


@pytest.fixture(scope="module")
def hub_texts(tiny_en: Path, clips: list[Clip]) -> list[str]:
    return texts(tiny_en, clips)


def ctranslate2(checkpoint: Path, out: Path) -> Path:
    out.mkdir()
    arrays = ctranslate2_arrays(load(checkpoint), "float16")
    (out / "model.bin").write_bytes(model_bin(arrays))
    return out


def pt(checkpoint: Path, out: Path) -> Path:
    write_pt(load(checkpoint), out.with_suffix(".pt"))
    return out.with_suffix(".pt")


def test_tiny_en_is_as_good_as_openai_says(hub_texts: list[str], clips: list[Clip]):
    found = score([clip.text for clip in clips], hub_texts, "whisper-basic")
    assert found.utterances == 80
    assert found.wer < 0.12


@pytest.mark.parametrize("form", [ctranslate2, pt], ids=["ctranslate2", "pt"])
def test_all_80_clips_get_the_same_text_from_every_form(
    form: Callable, tiny_en: Path, tmp_path: Path, hub_texts: list[str], clips: list[Clip]
):
    assert texts(form(tiny_en, tmp_path / "form"), clips) == hub_texts


@pytest.mark.parametrize("form", [ctranslate2, pt], ids=["ctranslate2", "pt"])
@pytest.mark.parametrize("name", ["tiny_en", "base"])
def test_every_form_has_the_weights_and_the_rules_of_the_hub_form(
    name: str, form: Callable, request: pytest.FixtureRequest, tmp_path: Path
):
    checkpoint = request.getfixturevalue(name)
    wanted, found = load(checkpoint), load(form(checkpoint, tmp_path / "form"))
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_base_without_a_generation_config_equals_base_with_it(
    base: Path, tmp_path: Path, clips: list[Clip]
):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    for name in ("generation_config.json", "tokenizer.json", "preprocessor_config.json"):
        (copy / name).unlink()
    config = json.loads((copy / "config.json").read_text())
    for key in ("suppress_tokens", "begin_suppress_tokens", "decoder_start_token_id"):
        del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    generation = load(copy).generation_config
    assert generation.to_dict() == load(base).generation_config.to_dict()
    assert prompt_ids(generation, "de") == [50258, 50261, 50359, 50363]
    assert texts(copy, clips[:12]) == texts(base, clips[:12])


def test_the_models_are_those_of_the_pinned_packages(tiny_en: Path, base: Path):
    """What `make models` wrote has the sizes of OpenAI's models."""
    for checkpoint, parameters in ((tiny_en, 37_760_256), (base, 72_593_920)):
        assert checkpoint.name in fetch.PINNED
        assert sum(p.numel() for p in load(checkpoint).parameters()) == parameters
