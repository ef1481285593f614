"""The exported graphs, run in onnxruntime, match the torch model: logits, cache and greedy
tokens.
"""

from __future__ import annotations

import base64
import json
from copy import deepcopy
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from dead_structure import layers
from exported import export, irregular, session, torch_steps, whole, window
from onnx import numpy_helper
from torch import nn

from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper import decoding, whisper
from export.artifact import verify
from export.manifest import Spec, decoding_rules
from export.onnx import graph, save
from export.onnx.graph import Graph
from export.onnx.layers import quantise
from export.onnx.layouts.native import encoder_graph
from export.onnx.tables import column_scales, encoder_positions, sinusoid_rates
from export.onnx.tables import sinusoids as onnx_sinusoids
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.prompt import prompt_ids
from export.shrink import layer_shapes
from export.tokens import token_bytes

TOLERANCE = 1e-3


@pytest.mark.parametrize("make", [whole, irregular])
def test_logits_and_tokens_match_torch(make, make_whisper, processor, rng, tmp_path):
    model = make(make_whisper, rng)
    exported = export(model, processor, tmp_path)
    pcm = window(processor, rng)
    chunks = [rng.integers(0, 783, n).tolist() for n in (int(rng.integers(1, 6)), 1, 1, 4, 1)]
    past, cross = exported.no_past(), exported.encode(pcm)
    for chunk, want in zip(chunks, torch_steps(model, processor, pcm, chunks), strict=True):
        logits, past = exported.step(chunk, past, cross)
        assert np.abs(logits - want).max() < TOLERANCE
    assert exported.greedy(pcm) == decoding.greedy(model, processor, [pcm])[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_default_checkpoint_gives_the_same_tokens(
    precision, digits, processor, clips, tmp_path
):
    """Ten clips of real speech: all tokens agree in floats, most in int8 and int4 (gated on
    WER).
    """
    from benchmarks.speech.clips import read_manifest

    model = whisper.load(digits)
    exported = export(model, processor, tmp_path, precision)
    pcms = [clip.pcm() for clip in read_manifest(clips)[:10]]
    samples = processor.feature_extractor.n_samples
    result = [exported.greedy(np.pad(pcm[:samples], (0, samples - len(pcm)))) for pcm in pcms]
    want = decoding.greedy(model, processor, pcms)
    equal = sum(one == other for one, other in zip(result, want, strict=True))
    assert equal >= {"fp32": 10, "fp16": 10, "int8": 9, "int4": 7}[precision]
    assert any(want)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_contract_and_graphs_agree(precision, make_whisper, processor, rng, tmp_path):
    model = irregular(make_whisper, rng)
    exported = export(model, processor, tmp_path, precision)
    for name, opened in (("encoder", exported.encoder), ("decoder", exported.decoder)):
        contract = exported.manifest["contract"][name]
        for side, result in (("inputs", opened.get_inputs()), ("outputs", opened.get_outputs())):
            types = {"float32": "tensor(float)"}
            types |= {kind: f"tensor({kind})" for kind in ("int8", "int32", "int64")}
            assert [
                (spec["name"], spec["shape"], types[spec["dtype"]]) for spec in contract[side]
            ] == [(value.name, value.shape, value.type) for value in result]
    decoder = exported.manifest["contract"]["decoder"]
    shape = model.config.edgewhisper["decoder"][1]["self_attn"]
    by_name = {spec["name"]: spec["shape"] for spec in decoder["inputs"] + decoder["outputs"]}
    width = -(-max(shape["qk_dim"], shape["v_dim"]) // 8) * 8
    room = model.config.max_target_positions
    assert by_name["past.1.key"] == [1, "heads_dec_1", room, width]
    assert by_name["present.1.value"] == [1, shape["heads"], room, width]


def test_the_manifest_records_how_the_artifact_was_made(tiny_whisper, processor, tmp_path):
    manifest = export_onnx(tiny_whisper, processor, tmp_path, "int8", {"recipe": "x"})
    assert verify(tmp_path) == manifest
    assert manifest["provenance"] == {"recipe": "x"}
    assert manifest["gate"] is None
    assert manifest["parameters"] == sum(p.numel() for p in tiny_whisper.parameters())
    assert manifest["audio"] == {
        "sampling_rate": 16000,
        "window_samples": 96000,
        "windows_samples": [96000],
        "hop_samples": 160,
    }
    assert manifest["versions"]["onnxruntime"] == version("onnxruntime")
    assert manifest["files"].keys() == {
        "config.json",
        "decoder.onnx",
        "encoder.onnx",
        "generation_config.json",
        "preprocessor_config.json",
        "tokens.json",  # instead of the tokenizer's files
    }


def test_shapes_of_a_slim_model_match_its_config(make_whisper, rng):
    slim = irregular(make_whisper, rng)
    shapes = layer_shapes(slim)
    for side in ("encoder", "decoder"):
        for result, want in zip(shapes[side], slim.config.edgewhisper[side], strict=True):
            assert result | {"ranks": {}} == want
    assert shapes["encoder"][0]["ranks"] == {"fc2": 3}
    assert shapes["decoder"][1]["ranks"] == {"self_attn.out_proj": 2}


# --------------------------------------------------------------------------------------- storage


def stored(path):
    return [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


def test_int8_weights_are_those_of_quantise(tiny_whisper, processor, tmp_path):
    """The files hold every matrix of the blocks and the token table as quantise returns them."""
    export_onnx(tiny_whisper, processor, tmp_path, "int8")
    arrays = stored(tmp_path / "encoder.onnx") + stored(tmp_path / "decoder.onnx")
    result = {array.tobytes() for array in arrays if array.dtype == np.int8 and array.ndim == 2}

    def weights(*modules):
        return np.concatenate([module.weight.detach().numpy() for module in modules])

    table = weights(tiny_whisper.model.decoder.embed_tokens)
    table = table / column_scales(table)
    expected = []
    for layer in layers(tiny_whisper):
        own = layer.self_attn
        together = [own.q_proj, own.k_proj, own.v_proj]
        expected += [weights(own.out_proj), weights(layer.fc1), weights(layer.fc2)]
        if hasattr(layer, "encoder_attn"):
            cross = layer.encoder_attn
            expected += [weights(*together)]
            expected += [weights(getattr(cross, f"{name}_proj")) for name in ("q", "k", "v", "out")]
        else:
            expected += map(weights, together)
    columns = {quantise(weight)[0].T.tobytes() for weight in expected}
    assert result == columns | {quantise(table)[0].tobytes()}


def expected_bytes(model, precision):
    """Every parameter once, but for the encoder's positions, which are sinusoids and computed.
    int8: matrices with a scale a row, float16 positions and kernels. int4: float16 scales of 32."""
    total = 0
    for name, parameter in model.named_parameters():
        if name.endswith("encoder.embed_positions.weight"):
            continue
        rows, count = len(parameter), parameter.numel()
        if precision == "fp32" or parameter.dim() == 1:
            total += 4 * count
        elif precision == "fp16" or "conv" in name or "embed_positions" in name:
            total += 2 * count
        elif precision == "int4" and "embed_tokens" not in name:
            total += count // 2 + 2 * count // 32
        else:
            total += count + 4 * rows
    return total


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_nothing_is_stored_twice(precision, make_whisper, processor, tmp_path):
    model = make_whisper(d_model=64, ffn=256)
    export_onnx(model, processor, tmp_path, precision)
    arrays = stored(tmp_path / "encoder.onnx") + stored(tmp_path / "decoder.onnx")
    # no parameters: mel filters, a period of sine and cosine, windows, a zero bias for each k_proj
    extra = 4 * 202 * 80 + 8 * (400 + 400 + 400) + 4 * 64 * 6
    result = sum(array.nbytes for array in arrays)
    assert result == pytest.approx(expected_bytes(model, precision) + extra, abs=4000)
    table = model.model.decoder.embed_tokens.weight.shape
    assert sum(array.shape == table for array in arrays) == 1


def test_pieces_and_mapped_weights_change_nothing(
    make_whisper, processor, rng, tmp_path, monkeypatch
):
    """A small model is exported like a large one, and gives the same tokens and states in fp32."""
    model = make_whisper(d_model=64, ffn=256)
    pcm = window(processor, rng)
    export_onnx(model, processor, tmp_path / "whole", "fp32")
    monkeypatch.setattr(graph, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(save, "LARGE", 2**14)
    export_onnx(model, processor, tmp_path / "pieces", "fp32")
    files = verify(tmp_path / "pieces")["files"]
    assert {"encoder.weights", "decoder.weights"} <= set(files)
    nodes = onnx.load(tmp_path / "pieces/encoder.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "Split" for node in nodes) > len(model.model.encoder.layers)
    one, other = (Recognizer(tmp_path / name, 1, guards=False) for name in ("whole", "pieces"))
    tokens = one.window(pcm)
    assert other.window(pcm) == tokens
    assert np.abs(one.logits(pcm, tokens) - other.logits(pcm, tokens)).max() < 1e-4
    weights = tmp_path / "pieces/decoder.weights"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunnerProblem, match=r"decoder\.weights: damaged"):
        Recognizer(tmp_path / "pieces", 1)


def test_positions_that_are_not_sinusoids_are_stored(make_whisper, processor, rng, tmp_path):
    model = make_whisper()
    with torch.no_grad():
        model.model.encoder.embed_positions.weight += 0.01 * torch.randn(300, 32)
    exported = export(model, processor, tmp_path)
    assert sum(array.shape == (300, 32) for array in stored(tmp_path / "encoder.onnx")) == 1
    pcm = window(processor, rng)
    want = torch_steps(model, processor, pcm, [[375, 5]])[0]
    result, _ = exported.step([375, 5], exported.no_past(), exported.encode(pcm))
    assert np.abs(result - want).max() < TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_float16_sinusoids_are_computed_and_rounded(precision, tmp_path):
    """OpenAI's checkpoints hold sinusoids in float16. Only fp32 stores them."""
    from transformers.models.whisper.modeling_whisper import sinusoids

    table = sinusoids(1500, 384).half().float().numpy()
    g = Graph(precision)
    name = g.name(encoder_positions(g, table, g.constant([1500])), "positions")
    onnx.save(g.model("positions", [], [Spec(name, (1500, 384))]), tmp_path / "x.onnx")
    result = session(tmp_path / "x.onnx").run(None, {})[0]
    assert any(a.shape == table.shape for a in stored(tmp_path / "x.onnx")) == (precision == "fp32")
    assert (result == table).mean() > 0.98
    assert np.abs(result - table).max() <= 2**-11


@pytest.mark.parametrize("width", [2, 32, 384, 1280])
def test_computed_positions_match_whispers(width, tmp_path):
    from transformers.models.whisper.modeling_whisper import sinusoids

    g = Graph("fp32")
    name = g.name(onnx_sinusoids(g, g.constant([1500]), sinusoid_rates(width)), "positions")
    graph = g.model("positions", [], [Spec(name, (1500, width))])
    onnx.save(graph, tmp_path / "x.onnx")
    result = session(tmp_path / "x.onnx").run(None, {})[0]
    # a sine of up to 1500 radians; transformers' own table is not finite at width 2
    if width > 2:
        assert np.abs(result - sinusoids(1500, width).numpy()).max() < 1e-6
    assert np.isfinite(result).all()


def test_the_tokenizer_is_saved_without_indentation(tiny_whisper, processor, tmp_path):
    from transformers import AutoTokenizer, WhisperTokenizerFast

    export_onnx(tiny_whisper, processor, tmp_path / "out", layout="transformers")
    processor.tokenizer.save_pretrained(tmp_path / "before")
    small, large = (tmp_path / where / "tokenizer.json" for where in ("out", "before"))
    assert json.loads(small.read_text()) == json.loads(large.read_text())
    assert small.stat().st_size < 0.7 * large.stat().st_size
    for load in (AutoTokenizer, WhisperTokenizerFast):
        tokenizer = load.from_pretrained(tmp_path / "out")
        for text in (" one two three", "naïve café", "日本語 🙂"):
            assert tokenizer(text).input_ids == processor.tokenizer(text).input_ids


def test_the_encoder_graph_has_the_front_ends_tensor(tiny_whisper, processor, rng, tmp_path):
    """The tensor `log_mel` of the graph equals the features of the feature extractor."""
    graph, inputs, _ = encoder_graph(tiny_whisper, processor.feature_extractor, "int8")
    onnx.save(graph.model("mel", inputs, [Spec("log_mel", (1, 80, 600))]), tmp_path / "x.onnx")
    pcm = window(processor, rng)
    result = session(tmp_path / "x.onnx").run(None, {"pcm": pcm[None]})[0]
    assert (
        np.abs(result - decoding.log_mel(processor.feature_extractor, [pcm]).numpy()).max() < 2e-4
    )


# ---------------------------------------------------------------------------- tokens and decoding


def test_tokens_decode_without_a_tokenizer(processor):
    """Joined bytes equal the tokenizer's text; special tokens, timestamps and unused ids are
    null.
    """
    tokenizer = processor.tokenizer
    size = len(tokenizer) + 3
    table = token_bytes(tokenizer, size)
    assert len(table) == size
    for text in (" one two three", "naïve café", "日本語 🙂", "a\n\tb  c", ""):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(base64.b64decode(table[i]) for i in ids).decode() == text
    assert table[-3:] == [None] * 3
    null = [i for i, token in enumerate(table[:-3]) if token is None]
    assert null == sorted(tokenizer.added_tokens_decoder)
    every_byte = {base64.b64decode(token) for token in table if token is not None}
    assert {bytes([byte]) for byte in range(256)} <= every_byte


def test_tokens_json_is_that_table(tiny_whisper, processor, tmp_path):
    export_onnx(tiny_whisper, processor, tmp_path)
    table = json.loads((tmp_path / "tokens.json").read_text())["bytes"]
    assert table == token_bytes(processor.tokenizer, tiny_whisper.config.vocab_size)


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    vocabulary = {"good": 0, "schön—": 1}
    foreign = SimpleNamespace(added_tokens_decoder={}, get_vocab=lambda: vocabulary)
    with pytest.raises(Problem, match=r"token 1 .*represents no byte"):
        token_bytes(foreign, 2)


def test_the_prompt_is_the_one_generate_uses(tiny_whisper, processor):
    tokens = processor.tokenizer.convert_ids_to_tokens(prompt_ids(tiny_whisper.generation_config))
    assert tokens == ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


@pytest.mark.parametrize("language", ["de", "German", "<|de|>", None])
def test_the_prompt_names_the_language(language, tiny_whisper, processor):
    tiny_whisper.generation_config.language = language
    prompt = processor.tokenizer.convert_ids_to_tokens(prompt_ids(tiny_whisper.generation_config))
    assert prompt[1] == ("<|en|>" if language is None else "<|de|>")


def test_an_unknown_language_is_refused(tiny_whisper):
    tiny_whisper.generation_config.language = "klingon"
    with pytest.raises(Problem, match=r"lang_to_id has no entry '<\|klingon\|>'"):
        prompt_ids(tiny_whisper.generation_config)


def test_an_english_only_model_has_no_language_in_its_prompt(tiny_whisper):
    generation = tiny_whisper.generation_config
    generation.is_multilingual = False
    silent = generation.no_timestamps_token_id
    assert prompt_ids(generation) == [generation.decoder_start_token_id, silent]
    assert decoding_rules(tiny_whisper)["max_new_tokens"] == 62


def test_the_rules_of_decoding_come_from_the_generation_config(tiny_whisper):
    generation = tiny_whisper.generation_config
    generation.suppress_tokens, generation.begin_suppress_tokens = [5, 7], [220]
    generation.eos_token_id = [374]
    rules = decoding_rules(tiny_whisper)
    assert rules["suppress_tokens"] == [5, 7]
    assert rules["begin_suppress_tokens"] == [220]
    assert rules["eos"] == 374
    assert rules["timestamp_begin"] == generation.no_timestamps_token_id + 1
    assert rules["max_new_tokens"] == 64 - 4


# --------------------------------------------------------------------------------------- refusals


def test_an_unknown_precision_lists_the_known_ones(tiny_whisper, processor, tmp_path):
    with pytest.raises(Problem, match="unknown precision 'int3'") as problem:
        export_onnx(tiny_whisper, processor, tmp_path / "out", "int3")
    assert "fp32, fp16, int8, int4" in problem.value.hint
    assert not (tmp_path / "out").exists()


def test_a_feature_extractor_of_another_window_is_refused(tiny_whisper, processor, tmp_path):
    other = deepcopy(processor)
    other.feature_extractor.n_samples = 480000
    with pytest.raises(Problem, match="480000 samples, the model's 96000"):
        export_onnx(tiny_whisper, other, tmp_path / "out")
    other = deepcopy(processor)
    other.feature_extractor.feature_size = 128
    with pytest.raises(Problem, match="128 mel bins, the model reads 80"):
        export_onnx(tiny_whisper, other, tmp_path / "out")


def test_another_activation_is_refused(tiny_whisper, processor, tmp_path):
    tiny_whisper.config.activation_function = "relu"
    with pytest.raises(Problem, match="activation is 'relu'"):
        export_onnx(tiny_whisper, processor, tmp_path / "out")


def test_an_untied_output_table_is_refused(tiny_whisper, processor, tmp_path):
    table = tiny_whisper.model.decoder.embed_tokens.weight
    tiny_whisper.proj_out.weight = nn.Parameter(table.detach() + 1)
    with pytest.raises(Problem, match="differs from its token table"):
        export_onnx(tiny_whisper, processor, tmp_path / "out")


def test_a_graph_beyond_two_gigabytes_is_refused(tiny_whisper, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("export.onnx.save.PROTOBUF_LIMIT", 1000)
    with pytest.raises(Problem, match=r"encoder.onnx would take .* GB") as problem:
        export_onnx(tiny_whisper, processor, tmp_path, "fp32")
    assert "int8" in problem.value.hint


def test_dead_inputs_are_never_gathered_from_the_encoders_rows(make_whisper, processor, rng):
    """The weights are expanded at load instead, so every Gather of the encoder has stored
    operands.
    """
    graph, inputs, outputs = encoder_graph(
        irregular(make_whisper, rng), processor.feature_extractor, "int8"
    )
    nodes = graph.model("encoder", inputs, outputs).graph.node
    from_pcm = {"pcm"}
    for node in nodes:
        if from_pcm & {*node.input}:
            from_pcm |= {*node.output}
            assert node.op_type != "Gather"
    assert {"Gather"} <= {node.op_type for node in nodes}
