"""The Core ML packages, executed by the interpreter, match the torch model: features, states,
logits.
"""

from __future__ import annotations

import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from dead_structure import kill
from exported import irregular, low_rank, whole, window
from torch import nn

from benchmarks.speech.clips import read_manifest
from edgewhisper import alignment, decoding, whisper
from edgewhisper.compress.shrink import slimmed
from export.artifact import verify
from export.coreml.graph import TARGETS, toolbox
from export.coreml.interpreter import open_package
from export.coreml.to_coreml import export_coreml
from export.problem import Problem
from export.quantise import fake_quantise, schemes

FLOATS = {"fp32": np.float32}
ENGINE = pytest.mark.parametrize("engine", [False, True], ids=["plain", "neural-engine"])
SEEN = -1e4


class Packages:
    """An artifact's packages, called as WhisperKit calls them."""

    def __init__(self, folder, manifest):
        self.programs = {
            name: open_package(folder / f"{name}.mlpackage") for name in manifest["contract"]
        }
        self.manifest = manifest
        self.dtype = FLOATS.get(manifest["precision"], np.float16)
        self.room = self.spec("kv_cache_update_mask").shape[1]
        self.states = self.programs["TextDecoder"].new_state()
        self.caches = {
            spec.name: np.zeros(spec.shape, self.dtype)
            for spec in self.programs["TextDecoder"].inputs
            if spec.name in ("key_cache", "value_cache")
        }
        self.length = 0

    def spec(self, name):
        return next(s for s in self.programs["TextDecoder"].inputs if s.name == name)

    def features(self, pcm):
        result = self.programs["MelSpectrogram"].predict({"audio": pcm.astype(self.dtype)})
        return result["melspectrogram_features"][:, :, 0].astype(np.float32)

    def encode(self, features):
        fed = features.astype(self.dtype)[:, :, None]
        result = self.programs["AudioEncoder"].predict({"melspectrogram_features": fed})
        return result["encoder_output_embeds"]

    def step(self, token, states):
        """Decode one token; return every output except the cache updates."""
        here = np.zeros((1, self.room), self.dtype)
        here[0, self.length] = 1
        mask = np.where(np.arange(self.room) > self.length, SEEN, 0)[None].astype(self.dtype)
        feed = {
            "input_ids": np.array([token], np.int32),
            "cache_length": np.array([self.length], np.int32),
            "kv_cache_update_mask": here,
            "encoder_output_embeds": states,
            "decoder_key_padding_mask": mask,
            **self.caches,
        }
        result = self.programs["TextDecoder"].predict(feed, self.states)
        for name, cache in self.caches.items():
            cache[..., self.length] = result.pop(f"{name}_updates")[..., 0]
        self.length += 1
        return result

    def logits(self, tokens, states):
        return np.stack([self.step(token, states)["logits"][0, 0] for token in tokens])


def share_keys(layer):
    """Replace an encoder attention by one with a random key and value shared by all heads."""
    dense = layer.self_attn
    heads, dim, width = dense.num_heads, dense.head_dim, dense.embed_dim
    slim = whisper.SlimAttention(dense, heads, dim - 1, dim, shared=True)
    slim.q_proj, slim.out_proj = nn.Linear(width, heads * (dim - 1)), dense.out_proj
    slim.k_proj, slim.v_proj = (nn.Linear(width, n, bias=False) for n in (dim - 1, dim))
    layer.self_attn = slim


def factorised(make_whisper, rng):
    """A model with a factorised table, shared keys, low-rank layers with biases, and few layers."""
    model = make_whisper(d_model=40, heads=5, encoder_layers=1, decoder_layers=3)
    model.factorise_table(9)
    share_keys(model.model.encoder.layers[0])
    first, second = model.model.decoder.layers[:2]
    for attention, name in ((first.encoder_attn, "k_proj"), (second.encoder_attn, "v_proj")):
        down, up = nn.Linear(40, 6, bias=False), nn.Linear(6, 40)
        setattr(attention, name, whisper.LowRank(down, up))
    return model.eval()


MODELS = pytest.mark.parametrize("make", [whole, irregular, factorised])


@pytest.fixture
def make_packages(processor, tmp_path):
    def make(model, precision="fp32", name="artifact", **options):
        folder = tmp_path / name
        return Packages(folder, export_coreml(model, processor, folder, precision, **options))

    return make


@torch.no_grad()
def torchs(model, processor, pcm, tokens):
    """Features, states and logits of the model."""
    features = decoding.log_mel(processor.feature_extractor, [pcm]).float()
    states = model.model.encoder(features).last_hidden_state
    logits = model(encoder_outputs=(states,), decoder_input_ids=torch.tensor([tokens])).logits
    return features.numpy(), states.mT.numpy(), logits[0].numpy()


def text(rng):
    return rng.integers(0, 783, 7).tolist()


# ----------------------------------------------------------------------------- the same function


@ENGINE
@MODELS
def test_states_and_logits_match_torch(make, engine, make_whisper, processor, rng, make_packages):
    model, pcm, tokens = make(make_whisper, rng), window(processor, rng), text(rng)
    packages = make_packages(model, neural_engine=engine)
    features, states, logits = torchs(model, processor, pcm, tokens)
    result = packages.encode(features)
    assert np.abs(result[:, :, 0] - states).max() < 1e-4
    assert np.abs(packages.logits(tokens, result) - logits).max() < 1e-4


@pytest.mark.parametrize("make", [irregular, factorised])
def test_both_forms_agree_in_float16_and_stay_close_to_torch(
    make, make_whisper, processor, rng, make_packages
):
    model, pcm, tokens = make(make_whisper, rng), window(processor, rng), text(rng)
    features, states, logits = torchs(model, processor, pcm, tokens)
    for engine in (False, True):
        packages = make_packages(model, "fp16", f"{engine}", neural_engine=engine)
        result = packages.encode(features)
        assert result.dtype == np.float16
        assert np.abs(result[:, :, 0] - states).max() < 0.03
        assert np.abs(packages.logits(tokens, result) - logits).max() < 0.03


def sounds(rng, clips, samples):
    speech = read_manifest(clips)[int(rng.integers(10))].pcm()[:samples]
    return {
        "speech": np.pad(speech, (0, samples - len(speech))),
        "silence": np.zeros(samples, np.float32),
        "loud": np.sign(rng.standard_normal(samples)).astype(np.float32),
        "soft": 1e-4 * rng.standard_normal(samples).astype(np.float32),
        "click": np.eye(1, samples, int(rng.integers(samples)), dtype=np.float32)[0],
    }


def test_features_match_the_feature_extractor(tiny_whisper, processor, rng, clips, make_packages):
    exact, halved = (make_packages(tiny_whisper, kind, kind) for kind in ("fp32", "fp16"))
    extractor = processor.feature_extractor
    for kind, pcm in sounds(rng, clips, extractor.n_samples).items():
        want = decoding.log_mel(extractor, [pcm]).float().numpy()
        assert np.abs(exact.features(pcm) - want).max() < 1e-4, kind
        # float16 samples and features, float32 between
        rounded = decoding.log_mel(extractor, [pcm.astype(np.float16).astype(np.float32)])
        assert np.abs(halved.features(pcm) - rounded.numpy()).max() < 2e-3, kind


@ENGINE
def test_a_stateful_package_gives_the_same_logits(
    engine, make_whisper, processor, rng, make_packages
):
    model, tokens = irregular(make_whisper, rng), text(rng)
    states = torchs(model, processor, window(processor, rng), tokens)[1]
    states = states[:, :, None].astype(np.float16)
    own = make_packages(model, "fp16", "own", neural_engine=engine)
    kept = make_packages(model, "fp16", "kept", neural_engine=engine, stateful=True)
    assert not kept.caches and kept.states.keys() == own.caches.keys()
    assert np.array_equal(kept.logits(tokens, states), own.logits(tokens, states))
    for name, cache in own.caches.items():
        assert np.array_equal(kept.states[name].numpy(), cache)


def pruned(make_whisper, rng):
    """Some heads are gone, and those that are left have other numbers."""
    model = kill(make_whisper(heads=4), "whole_heads", rng)
    heads = [[n, h] for n in range(2) for h in range(4)]
    model.generation_config.alignment_heads = [heads[i] for i in rng.permutation(8)[:5]]
    return slimmed(model)[0]


@ENGINE
def test_word_timestamps_are_the_mean_of_the_alignment_heads(
    engine, make_whisper, processor, rng, make_packages
):
    model, tokens = pruned(make_whisper, rng), text(rng)
    chosen = model.generation_config.alignment_heads
    assert all(head < alignment.head_counts(model)[n] for n, head in chosen)
    model.generation_config.alignment_heads = [*chosen, [7, 0], [0, 90]]
    packages = make_packages(model, neural_engine=engine)
    said = packages.manifest["coreml"]
    assert said["word_timestamps"]
    assert said["said"][-1] == (
        "TextDecoder: fewer alignment heads: generation_config.json names "
        f"{len(chosen) + 2}, of which the model has {len(chosen)}"
    )
    states = torchs(model, processor, window(processor, rng), tokens)[1]
    with alignment.eager(model), torch.no_grad():
        record = model(
            encoder_outputs=(torch.from_numpy(states).mT,),
            decoder_input_ids=torch.tensor([tokens]),
            output_attentions=True,
        ).cross_attentions
    want = np.mean([record[n][0, h].numpy() for n, h in chosen], axis=0)  # (tokens, positions)
    for token, row in zip(tokens, want, strict=True):
        result = packages.step(token, states[:, :, None])["alignment_heads_weights"]
        assert result.shape == (1, 300)
        assert np.abs(result[0] - row).max() < 1e-6


def test_a_short_window_and_a_short_cache(tiny_whisper, processor, rng, make_packages):
    tiny_whisper.config.edgewhisper = {"format": 1, "windows": [50, 300]}
    packages = make_packages(tiny_whisper, window=1.0, max_tokens=20)
    decoder = packages.programs["TextDecoder"]
    shapes = {spec.name: spec.shape for spec in decoder.inputs}
    assert shapes["encoder_output_embeds"] == (1, 32, 1, 50)
    assert shapes["key_cache"] == (1, 64, 1, 20)
    assert packages.manifest["audio"]["windows_samples"] == [16000]
    prompt = packages.manifest["decoding"]["prompt"]
    assert packages.manifest["decoding"]["max_new_tokens"] == 20 - len(prompt)
    assert packages.manifest["macs_by_window"].keys() == {"50"}
    tokens, features = text(rng), torch.randn(1, 80, 100)
    with torch.no_grad():
        states = tiny_whisper.model.encoder(features).last_hidden_state
        ids = torch.tensor([tokens])
        logits = tiny_whisper(encoder_outputs=(states,), decoder_input_ids=ids).logits[0].numpy()
    result = packages.encode(features.numpy())
    assert np.abs(result[:, :, 0] - states.mT.numpy()).max() < 1e-4
    assert np.abs(packages.logits(tokens, result) - logits).max() < 1e-4


@ENGINE
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_whisper_cpps_encoder(precision, engine, make_whisper, processor, rng, tmp_path):
    """The states are float32 rows in every precision, because whisper.cpp copies them."""
    model = irregular(make_whisper, rng)
    model.generation_config.alignment_heads = [[0, 0]]
    options = {"layout": "encoder", "neural_engine": engine}
    manifest = export_coreml(model, processor, tmp_path / "out", precision, **options)
    assert verify(tmp_path / "out") == manifest
    assert manifest["coreml"]["said"] == [] and not manifest["coreml"]["word_timestamps"]
    assert {name.split("/")[0] for name in manifest["files"]} == {"coreml-encoder.mlpackage"}
    assert manifest["contract"] == {
        "coreml-encoder": {
            "inputs": [{"name": "logmel_data", "shape": [1, 80, 600], "dtype": "float32"}],
            "outputs": [{"name": "output", "shape": [1, 300, 32], "dtype": "float32"}],
        }
    }
    features, states, _ = torchs(model, processor, window(processor, rng), [1])
    program = open_package(tmp_path / "out/coreml-encoder.mlpackage")
    result = program.predict({"logmel_data": features})["output"]
    assert np.abs(result - states.swapaxes(1, 2)).max() < (1e-4 if precision == "fp32" else 0.03)


# ------------------------------------------------------------------------------- what is written


def whisperkits(dtype, d_model, positions, width, room, vocab, n_mels):
    """Names, shapes and types as WhisperKit reads them."""
    audio, features = (320 * positions,), (1, n_mels, 1, 2 * positions)
    states, cache, row = (1, d_model, 1, positions), (1, width, 1, room), (1, room)
    update = (1, width, 1, 1)
    return {
        "MelSpectrogram": (
            [("audio", audio, dtype)],
            [("melspectrogram_features", features, dtype)],
        ),
        "AudioEncoder": (
            [("melspectrogram_features", features, dtype)],
            [("encoder_output_embeds", states, dtype)],
        ),
        "TextDecoder": (
            [
                ("input_ids", (1,), "int32"),
                ("cache_length", (1,), "int32"),
                ("key_cache", cache, dtype),
                ("value_cache", cache, dtype),
                ("kv_cache_update_mask", row, dtype),
                ("encoder_output_embeds", states, dtype),
                ("decoder_key_padding_mask", row, dtype),
            ],
            [
                ("logits", (1, 1, vocab), dtype),
                ("key_cache_updates", update, dtype),
                ("value_cache_updates", update, dtype),
                ("alignment_heads_weights", (1, positions), dtype),
            ],
        ),
    }


def describe_graph(features):
    """Of a package's own description: Core ML's names of types, by their numbers."""
    kinds = {65552: "float16", 65568: "float32", 131104: "int32"}
    held = [(f.name, f.type.stateType.arrayType, f.type.multiArrayType) for f in features]
    arrays = [(name, state if state.shape else array) for name, state, array in held]
    return [(name, tuple(array.shape), kinds[array.dataType]) for name, array in arrays]


def reloaded(package, target):
    """A package's inputs, outputs and states, after coremltools has read all of it, as it is and as
    a program again."""
    from coremltools.converters.mil.frontend.milproto import load

    model = toolbox().models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    assert spec.specificationVersion == TARGETS[target]
    load.load(spec, spec.specificationVersion, model.weights_dir)
    record = spec.description
    return [describe_graph(side) for side in (record.input, record.output, record.state)]


@pytest.mark.parametrize(
    ("precision", "target", "engine"),
    [
        ("fp32", "iOS16", False),
        ("fp16", "iOS17", False),
        ("fp16", "iOS16", True),
        ("int8", "iOS16", True),
        ("int8", "iOS18", False),
        ("int4", "iOS18", True),
        ("pal6", "iOS17", False),
        ("pal4", "iOS18", False),
    ],
)
def test_the_contract_is_whisperkits_and_coremltools_reads_it(
    precision, target, engine, tiny_whisper, processor, tmp_path
):
    tiny_whisper.generation_config.alignment_heads = [[0, 1], [1, 0]]
    options = {"deployment_target": target, "neural_engine": engine}
    manifest = export_coreml(tiny_whisper, processor, tmp_path / "out", precision, **options)
    record = manifest["coreml"]
    assert (record["deployment_target"], record["neural_engine"]) == (target, engine)
    assert record["specification_version"] == TARGETS[target]
    dtype = "float32" if precision == "fp32" else "float16"
    width = 2 * (64 if engine else 32)  # of two layers
    expected = whisperkits(dtype, 32, 300, width, 64, 783, 80)
    assert manifest["contract"].keys() == expected.keys()
    for name, (inputs, outputs) in expected.items():
        assert manifest["contract"][name] == {
            side: [{"name": n, "shape": list(s), "dtype": d} for n, s, d in specs]
            for side, specs in (("inputs", inputs), ("outputs", outputs))
        }
        package = tmp_path / f"out/{name}.mlpackage"
        assert reloaded(package, target) == [inputs, outputs, []]
    assert verify(tmp_path / "out") == manifest, "reading has changed a file"


@ENGINE
def test_the_contract_of_a_stateful_package(engine, tiny_whisper, processor, tmp_path):
    options = {"stateful": True, "neural_engine": engine}
    manifest = export_coreml(tiny_whisper, processor, tmp_path / "out", **options)
    width = 2 * (64 if engine else 32)
    inputs, (logits, *_) = whisperkits("float16", 32, 300, width, 64, 783, 80)["TextDecoder"]
    caches = [spec for spec in inputs if spec[0] in ("key_cache", "value_cache")]
    inputs = [spec for spec in inputs if spec not in caches]
    record = manifest["contract"]["TextDecoder"]
    assert [(s["name"], tuple(s["shape"]), s["dtype"]) for s in record["states"]] == caches
    result = reloaded(tmp_path / "out/TextDecoder.mlpackage", "iOS18")
    assert result == [inputs, [logits], caches]


def test_the_manifest_records_how_the_artifact_was_made(tiny_whisper, processor, tmp_path):
    manifest = export_coreml(tiny_whisper, processor, tmp_path, provenance={"recipe": "x"})
    assert verify(tmp_path) == manifest
    assert (manifest["target"], manifest["layout"]) == ("coreml", "whisperkit")
    assert manifest["precision"] == "fp16"
    assert manifest["provenance"] == {"recipe": "x"}
    assert manifest["gate"] is None
    assert manifest["versions"]["coremltools"] == version("coremltools")
    beside = {"config.json", "generation_config.json", "preprocessor_config.json", "tokens.json"}
    beside |= {"tokenizer.json", "tokenizer_config.json"}
    assert {name for name in manifest["files"] if "/" not in name} == beside
    record = manifest["coreml"]
    assert record["deployment_target"] == "iOS16" and not record["word_timestamps"]
    assert record["said"] == [
        "TextDecoder: its caches hold 64 tokens, so WhisperKit's DecodingOptions.sampleLength, 224 "
        "by default, must be at most 64",
        "TextDecoder: no word timestamps: generation_config.json names none",
    ]


@pytest.mark.parametrize("precision", ["fp16", "int8", "pal4"])
def test_the_same_checkpoint_gives_the_same_bytes(precision, tiny_whisper, processor, tmp_path):
    one, other = (
        export_coreml(tiny_whisper, processor, tmp_path / name, precision) for name in "ab"
    )
    assert one == other


@MODELS
def test_programs_have_the_macs_of_the_manifest(make, make_whisper, rng, processor, tmp_path):
    model = make(make_whisper, rng)
    manifest = export_coreml(model, processor, tmp_path)
    assert manifest["macs"] == {
        "encoder": multiplied(tmp_path / "AudioEncoder.mlpackage"),
        "cross": 0,
        "decoder_per_token": multiplied(tmp_path / "TextDecoder.mlpackage"),
    }


def multiplied(package):
    """Multiply-accumulates of a package's program, counted from the shapes that it declares."""
    spec = toolbox().models.MLModel(str(package), skip_model_load=True).get_spec()
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    shapes = {
        output.name: [axis.constant.size for axis in output.type.tensorType.dimensions]
        for op in block.operations
        for output in op.outputs
    }
    for given in spec.mlProgram.functions["main"].inputs:
        shapes[given.name] = [a.constant.size for a in given.type.tensorType.dimensions]
    total = 0
    for op in block.operations:
        inner = {"linear": "x", "matmul": "x", "conv": "weight"}.get(op.type)
        if inner is not None:
            shape = shapes[op.inputs[inner].arguments[0].name]
            depth = np.prod(shape[1:]) if op.type == "conv" else shape[-1]
            total += int(np.prod(shapes[op.outputs[0].name])) * int(depth)
    return total


# --------------------------------------------------------------------------------------- weights


def expected_bytes(model, precision):
    """Every parameter once. Vectors and positions in float16; int8 has a scale a row, int4 one for
    32 weights, a palette its numbers."""
    bits = {"fp16": 16, "int8": 8, "int4": 4, "pal4": 4, "pal6": 6, "pal8": 8}[precision]
    total = 0.0
    for name, parameter in model.named_parameters():
        rows, count = len(parameter), parameter.numel()
        if precision == "fp16" or parameter.dim() == 1 or "embed_positions" in name:
            total += 2 * count
        elif bits == 4 and ("embed_tokens" in name or "conv" in name):
            total += count + 2 * rows
        else:
            total += count * bits / 8
            total += {"int8": 2 * rows, "int4": 2 * count / 32}.get(precision, 2 * 2**bits)
    return total


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "pal4", "pal6", "pal8"])
def test_nothing_is_stored_twice(precision, make_whisper, processor, tmp_path):
    model = make_whisper(d_model=64, ffn=256)
    files = export_coreml(model, processor, tmp_path, precision)["files"]
    result = sum(
        files[f"{name}.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]["bytes"]
        for name in ("AudioEncoder", "TextDecoder")
    )
    # no parameters: masks that keep heads apart, zeros for biases that are none; every entry of
    # the file has a header and begins at a multiple of 64
    entries = 200
    assert (
        expected_bytes(model, precision) < result < expected_bytes(model, precision) + 160 * entries
    )


TOLERANCES = {"int8": 0.15, "int4": 1.5, "pal4": 1.5, "pal6": 0.5, "pal8": 0.15}


@pytest.mark.parametrize(
    ("precision", "engine"),
    [(kind, n % 2 == 1) for n, kind in enumerate(TOLERANCES)] + [("int8", True), ("pal4", True)],
)
def test_compressed_packages_stay_close_to_torch(
    precision, engine, make_whisper, processor, rng, make_packages
):
    """The gate measures the error of each form; this test finds only gross errors."""
    model, tokens = irregular(make_whisper, rng), text(rng)
    features, states, logits = torchs(model, processor, window(processor, rng), tokens)
    packages = make_packages(model, precision, neural_engine=engine)
    result = packages.encode(features)
    assert np.abs(result[:, :, 0] - states).mean() < TOLERANCES[precision] / 3
    assert np.abs(packages.logits(tokens, result) - logits).mean() < TOLERANCES[precision] / 3


def in_bits(model, encoder, decoder, table, stem):
    """Return a checkpoint as kdq leaves it: weights on their grids, bits in its config."""
    from edgewhisper.compress import qat

    options = qat.Precision(encoder=encoder, decoder=decoder, token_table=table, stem=stem)
    qat.note_bits(model, options)
    with torch.no_grad():
        for module, scheme in schemes(model).items():
            module.weight.copy_(fake_quantise(module.weight, scheme))
    return model


@ENGINE
def test_bits_of_the_checkpoint_are_followed(engine, make_whisper, processor, rng, make_packages):
    """The checkpoint's grids are stored, so the packages have no more error than float16."""
    model = in_bits(make_whisper(d_model=64, ffn=96), 4, 8, 16, 8)
    tokens = text(rng)
    features, states, logits = torchs(model, processor, window(processor, rng), tokens)
    packages = make_packages(model, "int8", neural_engine=engine)
    record = packages.manifest["coreml"]
    assert record["deployment_target"] == "iOS18"
    assert record["weights"]["AudioEncoder"].keys() == {"int4", "int8"}
    assert record["weights"]["TextDecoder"].keys() == {"int8", "float16"}
    assert record["weights"]["TextDecoder"]["float16"] == 783 * 64
    result = packages.encode(features)
    assert np.abs(result[:, :, 0] - states).max() < 0.03
    assert np.abs(packages.logits(tokens, result) - logits).max() < 0.03


def test_bits_of_low_rank_layers_and_of_layers_that_read_some_inputs(
    make_whisper, processor, rng, make_packages
):
    """Blocks of a checkpoint's grid lie along the inputs that a layer reads; the last one is
    short.
    """
    model = make_whisper(d_model=64, ffn=96)
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        low_rank(layer, "fc2", 24)
        layer.fc1 = whisper.GatherLinear(40, 96)
        layer.fc1.inputs.copy_(torch.randperm(64)[:40].sort().values)
    model = in_bits(model, 4, 4, 8, 32)
    tokens = text(rng)
    features, states, logits = torchs(model, processor, window(processor, rng), tokens)
    packages = make_packages(model, "int8")
    assert packages.manifest["coreml"]["weights"]["AudioEncoder"].keys() == {"int4", "float16"}
    result = packages.encode(features)
    assert np.abs(result[:, :, 0] - states).max() < 0.03
    assert np.abs(packages.logits(tokens, result) - logits).max() < 0.03


def test_blocks_that_do_not_divide_are_reported(make_whisper, processor, tmp_path):
    model = make_whisper(d_model=32, ffn=52)  # 4 divides 52, 8 does not
    record = export_coreml(model, processor, tmp_path, "int4")["coreml"]
    reason = "int8 instead of 4 bits, because no block of 8 weights or more divides 52 inputs"
    said = [s for s in record["said"] if reason in s]
    places = [s.split(":")[1].strip() for s in said]
    assert places == ["layers_0_feed_forward", "layers_1_feed_forward"] * 2
    assert record["weights"]["AudioEncoder"]["int8"] == 2 * 32 * 52 + 3 * 32 * (80 + 32)


def test_blocks_that_padding_would_split_are_reported(make_whisper, processor, tmp_path):
    """Three heads of 16 become three of 64."""
    model = in_bits(make_whisper(d_model=48, heads=3), 4, 8, 8, 8)
    record = export_coreml(model, processor, tmp_path, "int8", neural_engine=True)["coreml"]
    said = [s for s in record["said"] if "zeros stand between its inputs" in s]
    assert said == [
        f"AudioEncoder: layers_{i}: int8 instead of 4 bits, because zeros stand between its inputs"
        for i in range(2)
    ]


def test_a_weight_beyond_float16_is_refused(tiny_whisper, processor, tmp_path):
    with torch.no_grad():
        tiny_whisper.model.encoder.layers[1].fc1.weight[3, 4] = 7e4
    with pytest.raises(Problem, match=r"layers_1_feed_forward: a weight of 7e\+04 is beyond"):
        export_coreml(tiny_whisper, processor, tmp_path / "halves", "fp16")
    export_coreml(tiny_whisper, processor, tmp_path / "whole", "fp32")


# -------------------------------------------------------------------------------- what is refused

REFUSED = {
    "precision": (dict(precision="int3"), "unknown precision 'int3' for Core ML"),
    "layout": (dict(layout="native"), "unknown layout 'native' for Core ML"),
    "target": (dict(deployment_target="iOS12"), "unknown deployment target 'iOS12'"),
    "blocks": (
        dict(precision="int4", deployment_target="iOS17"),
        "target iOS17 does not support 4-bit weights in blocks, new in iOS18",
    ),
    "state": (
        dict(stateful=True, deployment_target="iOS16"),
        "target iOS16 does not support a stateful cache, new in iOS18",
    ),
    "float32 state": (dict(precision="fp32", stateful=True), "stores states as float16"),
    "window": (dict(window=2.5), r"no window of 2\.5 s; it was made for 6 s"),
    "cache": (dict(max_tokens=65), "max_tokens 65: the model has 64"),
    "no cache": (dict(max_tokens=0), "max_tokens 0: the model has 64"),
    "words": (
        dict(word_timestamps=True),
        "word timestamps need alignment heads; .* names none",
    ),
    "encoder": (
        dict(layout="encoder", stateful=True, window=6.0),
        "'encoder' does not support stateful and window",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_requests_are_refused(options, message, tiny_whisper, processor, tmp_path):
    with pytest.raises(Problem, match=message):
        export_coreml(tiny_whisper, processor, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bits_that_an_old_target_does_not_support_are_refused(tiny_whisper, processor, tmp_path):
    model = in_bits(tiny_whisper, 4, 8, 8, 8)
    with pytest.raises(Problem, match=r"\(the checkpoint names 4 bits for some layers\), new in"):
        export_coreml(model, processor, tmp_path, "int8", deployment_target="iOS16")
    record = export_coreml(model, processor, tmp_path, "pal4", deployment_target="iOS16")["coreml"]
    assert record["weights"]["AudioEncoder"].keys() == {"int8", "palette4"}


def test_missing_alignment_heads_are_reported(tiny_whisper, processor, tmp_path):
    tiny_whisper.generation_config.alignment_heads = [[4, 0]]
    record = export_coreml(tiny_whisper, processor, tmp_path / "out")["coreml"]
    assert not record["word_timestamps"]
    result = "generation_config.json names 1, of which the model has none"
    assert f"TextDecoder: no word timestamps: {result}" in record["said"]
    with pytest.raises(Problem, match=f"word timestamps need alignment heads; {result}"):
        export_coreml(tiny_whisper, processor, tmp_path / "words", word_timestamps=True)


def test_word_timestamps_can_be_left_out(tiny_whisper, processor, tmp_path):
    tiny_whisper.generation_config.alignment_heads = [[1, 0]]
    manifest = export_coreml(tiny_whisper, processor, tmp_path, word_timestamps=False)
    assert not manifest["coreml"]["word_timestamps"]
    names = [spec["name"] for spec in manifest["contract"]["TextDecoder"]["outputs"]]
    assert names == ["logits", "key_cache_updates", "value_cache_updates"]
    json.dumps(manifest)
