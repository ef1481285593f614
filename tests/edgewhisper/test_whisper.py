"""Slim models and their checkpoints: loading, saving, per-layer shapes, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.speech.clips import read_manifest
from benchmarks.wer import score
from edgewhisper import load, save
from edgewhisper.decoding import greedy, log_mel, transcribe
from edgewhisper.whisper import load_processor, rebuild
from export.problem import Problem


def random_shapes(model, rng, inputs=True, ranks=True) -> dict:
    """Return random per-layer shapes within those of the dense model."""
    config = model.config
    layers: dict = {"format": 1}
    for side in ("encoder", "decoder"):
        heads = getattr(config, f"{side}_attention_heads")
        dim, ffn = config.d_model // heads, getattr(config, f"{side}_ffn_dim")

        def attention(heads=heads, dim=dim):
            draw = lambda limit: int(rng.integers(1, limit + 1))  # noqa: E731
            return {"heads": draw(heads), "qk_dim": draw(dim), "v_dim": draw(dim)}

        layers[side] = []
        for _ in range(getattr(config, f"{side}_layers")):
            layer = {"self_attn": attention(), "ffn": int(rng.integers(1, ffn + 1))}
            if side == "decoder":
                layer["encoder_attn"] = attention()
            if inputs:
                layer["inputs"] = {
                    "self_attn.q_proj": int(rng.integers(1, config.d_model)),
                    "fc1": 5,
                }
            if ranks:
                layer["ranks"] = {"fc2": 3, "self_attn.v_proj": 2, "fc1": 4}
            layers[side].append(layer)
    return layers


def slim(model, rng, **kinds):
    """Return a slim model with random shapes and weights."""
    dense = model.state_dict()
    config_only = rebuild_shapes(model, random_shapes(model, rng, **kinds))
    kept = {n: t for n, t in dense.items() if n in config_only and t.shape == config_only[n].shape}
    drawn = {n: kept.get(n, _fresh(n, t)) for n, t in config_only.items()}
    return rebuild(model, drawn, config_only.layers)


class rebuild_shapes(dict):
    """The names and shapes of the tensors for `layers`."""

    def __init__(self, model, layers):
        import copy

        from edgewhisper.whisper import WhisperForConditionalGeneration

        config = copy.deepcopy(model.config)
        config.edgewhisper = layers
        super().__init__(WhisperForConditionalGeneration(config).state_dict())
        self.layers = layers


def _fresh(name, tensor):
    return tensor if name.endswith(".inputs") else torch.randn_like(tensor) * 0.3


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_dense_checkpoint_loads_and_transcribes(digits, clips):
    model, processor = load(digits), load_processor(digits)
    spoken = read_manifest(clips)[:12]
    texts = transcribe(model, processor, [clip.pcm() for clip in spoken])
    assert score([clip.text for clip in spoken], texts).wer < 0.25


def test_loading_equals_loading_by_transformers(digits):
    import transformers

    reference = transformers.WhisperForConditionalGeneration.from_pretrained(digits)
    assert same_tensors(load(digits), reference)


@pytest.mark.parametrize("kind", ["dense", "slim", "slim-low-rank", "slim-gathered"])
def test_a_round_trip_is_bit_exact(kind, tiny_whisper, processor, tmp_path, rng):
    kinds = {"inputs": "gathered" in kind, "ranks": "rank" in kind}
    model = tiny_whisper if kind == "dense" else slim(tiny_whisper, rng, **kinds)
    save(model, processor, tmp_path / "out", {"recipe": "none"})
    again = load(tmp_path / "out")
    assert same_tensors(model, again)
    assert json.loads((tmp_path / "out/compression.json").read_text()) == {"recipe": "none"}
    save(again, processor, tmp_path / "twice", {})
    assert (
        load_file(tmp_path / "out/model.safetensors").keys()
        == load_file(tmp_path / "twice/model.safetensors").keys()
    )


def test_a_slim_model_generates_and_trains_and_saves_again(tiny_whisper, processor, tmp_path, rng):
    model = slim(tiny_whisper, rng)
    pcm = rng.standard_normal(16000).astype(np.float32)
    assert all(0 <= t < model.config.vocab_size for t in greedy(model, processor, [pcm])[0])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.randint(0, 300, (1, 5))
    losses = []
    for _ in range(5):
        loss = model(input_features=log_mel(processor.feature_extractor, [pcm]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save(model, processor, tmp_path / "trained", {})
    assert same_tensors(load(tmp_path / "trained"), model)


def test_a_slim_model_decodes_with_cache_as_without(tiny_whisper, processor, rng):
    model = slim(tiny_whisper, rng)
    features = log_mel(processor.feature_extractor, [rng.standard_normal(30000).astype(np.float32)])
    ids = torch.randint(0, 300, (1, 9))
    whole = model(input_features=features, decoder_input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for i in range(ids.shape[1]):
        output = model(
            input_features=features, decoder_input_ids=ids[:, i : i + 1], past_key_values=cache
        )
        cache = output.past_key_values
        steps.append(output.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4


def test_a_slim_model_works_in_the_pipeline_of_transformers(tiny_whisper, processor, rng):
    from transformers import pipeline

    recogniser = pipeline(
        "automatic-speech-recognition",
        model=slim(tiny_whisper, rng),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    assert isinstance(recogniser(rng.standard_normal(8000).astype(np.float32))["text"], str)


# --------------------------------------------------------------------------------- errors


@pytest.fixture
def copied(digits, tmp_path) -> Path:
    """A copy of the embedded checkpoint, for tests that damage it."""
    import shutil

    return Path(shutil.copytree(digits, tmp_path / "checkpoint"))


def edit_config(checkpoint: Path, **changes) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_truncated_file_is_refused(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Problem, match="cannot be read") as problem:
        load(copied)
    assert "cut short" in problem.value.hint


def test_another_architecture_is_refused(copied):
    edit_config(copied, model_type="bart")
    with pytest.raises(Problem, match="model_type 'bart', not 'whisper'"):
        load(copied)


def test_missing_tensors_are_an_error(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.encoder.layers.0.fc1.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Problem, match=r"lack 1 tensor.*encoder.layers.0.fc1.weight"):
        load(copied)


def test_a_wrong_shape_is_named(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.encoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Problem, match=r"wrong shape for 1 tensor.*encoder.layers.0.fc1.weight"):
        load(copied)


def test_pickled_weights_are_refused(copied):
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(Problem) as problem:
        load(copied)
    assert "pickled" in problem.value.hint


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(Problem, match="there is no such checkpoint"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny.enn", r"there is no such checkpoint; did you mean 'tiny\.en'\?"),
        ("klingon", "there is no such checkpoint$"),
    ],
)
def test_a_wrong_size_name_is_refused_without_a_request(name, message):
    with pytest.raises(Problem, match=message):
        load(name)


def test_a_file_and_an_artifact_are_not_checkpoints(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(Problem, match=r"a\.wav is a file, not a checkpoint"):
        load(tmp_path / "a.wav")
    (tmp_path / "manifest.json").touch()
    with pytest.raises(Problem, match="is an artifact, and this command needs a checkpoint"):
        load(tmp_path)


def test_a_directory_without_a_config_is_not_called_another_model(tmp_path):
    with pytest.raises(Problem, match=r"there is no config\.json, so it is not a checkpoint"):
        load(tmp_path)


def test_a_missing_tokenizer_is_an_error(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(Problem, match="no usable tokenizer"):
        load_processor(copied)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"format": 99}, "format 99"),
        ("yes", "format 'str'"),
        ({"format": 1, "encoder": [], "decoder": []}, "shapes for 0 of them"),
    ],
    ids=["unknown-format", "not-an-object", "no-layers"],
)
def test_invalid_shapes_are_refused(copied, shapes, words):
    edit_config(copied, edgewhisper=shapes)
    with pytest.raises(Problem, match=words):
        load(copied)


@pytest.mark.parametrize("count", [0, -3, 10**9, 2.5, "7", True, None])
def test_an_invalid_count_is_refused_with_its_place(tiny_whisper, processor, tmp_path, rng, count):
    save(slim(tiny_whisper, rng), processor, tmp_path / "slim", {})
    shapes = json.loads((tmp_path / "slim/config.json").read_text())["edgewhisper"]
    shapes["decoder"][1]["encoder_attn"]["heads"] = count
    edit_config(tmp_path / "slim", edgewhisper=shapes)
    with pytest.raises(Problem, match=r"decoder\.layers\.1\.encoder_attn\.heads"):
        load(tmp_path / "slim")


def test_saving_to_an_existing_directory_is_refused(tiny_whisper, processor, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(Problem, match="exists already"):
        save(tiny_whisper, processor, tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_and_leaves_no_files(digits, processor, tmp_path, full_disk):
    model = load(digits)
    with pytest.raises(Problem, match=r"out cannot be written: .*too large") as problem:
        save(model, processor, tmp_path / "out", {})
    assert "free space" in problem.value.hint
    assert not list(tmp_path.iterdir())
