"""LoRA adapters are merged as PEFT merges them, or raise an error with a hint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from edgewhisper import whisper
from export.problem import Problem

peft = pytest.importorskip("peft")

KINDS = {
    "queries": {"target_modules": ["q_proj"]},
    "attention": {"target_modules": ["q_proj", "v_proj", "out_proj"], "lora_alpha": 3},
    "all": {"target_modules": "all-linear", "r": 2, "use_rslora": True},
    "dora": {"target_modules": ["fc1", "k_proj"], "use_dora": True},
    "ranks": {"target_modules": ["q_proj", "fc2"], "rank_pattern": {"fc2": 2}},
}


def adapter(digits: Path, folder: Path, base: str | None = None, **options) -> Path:
    """Save an adapter with random weights in both factors with PEFT."""
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, **options})
    wrapped = peft.get_peft_model(whisper.load(digits), lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base or str(digits)}
    path.write_text(json.dumps(config))
    return folder


def logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 80, 600), decoder_input_ids=torch.tensor([[375, 1, 2]])).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_merges_it(kind, digits, tmp_path):
    folder = adapter(digits, tmp_path / "lora", **KINDS[kind])
    actual = logits(whisper.load(folder))
    reference = peft.PeftModel.from_pretrained(whisper.load(digits), str(folder)).merge_and_unload()
    torch.testing.assert_close(actual, logits(reference), rtol=0, atol=1e-5)
    assert (actual - logits(whisper.load(digits))).abs().max() > 0.01
    _, processor = whisper.load_with_processor(folder)
    assert len(processor.tokenizer) == len(whisper.load_processor(folder).tokenizer)
    assert len(processor.tokenizer) == len(whisper.load_processor(digits).tokenizer)


def test_a_merged_adapter_is_saved_as_a_checkpoint(digits, tmp_path):
    folder = adapter(digits, tmp_path / "lora", target_modules=["q_proj"])
    whole = whisper.as_directory(folder, tmp_path / "made")
    torch.testing.assert_close(logits(whisper.load(whole)), logits(whisper.load(folder)))


def test_a_model_saved_with_pefts_wrapper_loads(digits, tmp_path):
    model, processor = whisper.load(digits), whisper.load_processor(digits)
    whisper.save(model, processor, tmp_path / "wrapped", {})
    from safetensors.torch import load_file, save_file

    path = tmp_path / "wrapped/model.safetensors"
    tensors = {f"base_model.model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    torch.testing.assert_close(logits(whisper.load(tmp_path / "wrapped")), logits(model))


@pytest.mark.parametrize("base", ["/nowhere/whisper", "./gone"])
def test_a_missing_base_is_named(base, digits, tmp_path):
    folder = adapter(digits, tmp_path / "lora", base, target_modules=["q_proj"])
    with pytest.raises(Problem, match=f"a LoRA adapter of {base}, which cannot be loaded") as error:
        whisper.load(folder)
    assert "merge" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": "four"}, "does not fit its base"),
    ],
)
def test_an_unusable_config_is_an_error(changes, message, digits, tmp_path):
    folder = adapter(digits, tmp_path / "lora", target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(Problem, match=message):
        whisper.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_config_that_is_not_an_object_is_an_error(text, digits, tmp_path):
    folder = adapter(digits, tmp_path / "lora", target_modules=["q_proj"])
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(Problem, match=r"adapter_config\.json"):
        whisper.load(folder)


def test_weights_of_another_model_are_an_error(digits, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = adapter(digits, tmp_path / "lora", target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1" in name)
    save_file(tensors | {name.replace("layers.1", "layers.9"): tensors[name].clone()}, path)
    with pytest.raises(Problem, match=r"1 tensors of .* have no place in the base, such as .*\.9"):
        whisper.load(folder)
    save_file({key: tensor[:, :-1].contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(Problem, match="does not fit its base"):
        whisper.load(folder)


def test_a_pickled_adapter_is_not_read(digits, tmp_path):
    folder = adapter(digits, tmp_path / "lora", target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(Problem, match=r"adapter_model\.bin is a pickle and is not read"):
        whisper.load(folder)


def test_without_peft_the_error_says_how_to_install_it(digits, tmp_path, monkeypatch):
    folder = adapter(digits, tmp_path / "lora", target_modules=["q_proj"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Problem, match="PEFT is not installed") as error:
        whisper.load(folder)
    assert "pip install" in error.value.hint
