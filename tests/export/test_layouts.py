"""Layouts of other runtimes have the names, shapes and types they expect, and torch's results."""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import irregular, torch_steps, whole, window
from some_clips import manifest_of_some
from torch import nn

from benchmarks.reference_runtimes import Sherpa, open_artifact
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper import decoding, pipeline, whisper
from export.artifact import verify
from export.layouts import layouts_of, needed_files, suffix_for
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.shrink import attention_shape

OTHERS = [layout for layout in layouts_of("onnx") if layout != "native"]
TOLERANCE = 1e-3


def factorised(make_whisper, rng):
    """A model with irregular layers, one decoder layer, and a token table of two factors."""
    model = irregular(make_whisper, rng)
    table = whisper.FactorisedTable(
        nn.Embedding(model.config.vocab_size, 8), nn.Linear(8, model.config.d_model, bias=False)
    )
    model.model.decoder.embed_tokens = table
    model.proj_out = whisper.TiedOutput(table)
    model.model.decoder.layers = model.model.decoder.layers[:1]
    model.config.decoder_layers = 1
    if getattr(model.config, "edgewhisper", None):
        model.config.edgewhisper["decoder"] = model.config.edgewhisper["decoder"][:1]
    return model


MODELS = [whole, irregular, factorised]


@pytest.fixture
def made(make_whisper, processor, rng, tmp_path):
    """make(model, layout, precision) -> the model and the loop that the gate runs its artifact
    with.
    """

    def make(kind, layout, precision="fp32"):
        model = kind(make_whisper, rng)
        export_onnx(model, processor, tmp_path / layout, precision, layout=layout)
        return model, open_artifact(tmp_path / layout, threads=1)

    return make


def sessions(folder, layout, precision="fp32"):
    """Return a layout's graphs by their names without the suffix of the precision."""
    suffix = suffix_for(layout, precision)
    return {
        name.split("/")[-1].removesuffix(f"{suffix}.onnx"): onnxruntime.InferenceSession(
            folder / name, providers=["CPUExecutionProvider"]
        )
        for name in needed_files(layout, precision)
        if name.endswith(".onnx")
    }


def shapes_and_types(values):
    """Name -> shape and type of a session's inputs or outputs."""
    return {value.name: (value.shape, value.type) for value in values}


# --------------------------------------------------------------------------------- every layout


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("kind", MODELS)
def test_tokens_match_torch(kind, layout, made, processor, rng):
    model, hearing = made(kind, layout)
    for seconds in (6, float(rng.uniform(0.5, 5))):
        pcm = window(processor, rng)[: round(16000 * seconds)]
        assert hearing.window(pcm) == decoding.greedy(model, processor, [pcm])[0]


@pytest.mark.parametrize("layout", OTHERS)
def test_suppressed_tokens_are_not_decoded(layout, make_whisper, processor, rng, tmp_path):
    model, pcm = make_whisper(), window(processor, rng)
    said = decoding.greedy(model, processor, [pcm])[0]
    model.generation_config.begin_suppress_tokens = said[:1] or [374]
    model.generation_config.suppress_tokens = sorted(set(said[1:4]))
    export_onnx(model, processor, tmp_path / "out", "fp32", layout=layout)
    expected = decoding.greedy(model, processor, [pcm])[0]
    assert open_artifact(tmp_path / "out", threads=1).window(pcm) == expected != said


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_contract_and_graphs_agree(precision, layout, made, tmp_path):
    made(irregular, layout, precision)
    manifest = verify(tmp_path / layout)
    assert (manifest["layout"], manifest["precision"]) == (layout, precision)
    for name, session in sessions(tmp_path / layout, layout, precision).items():
        contract = manifest["contract"][name.removeprefix("whisper-")]
        for side, result in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            types = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}
            expected = {x["name"]: (x["shape"], types[x["dtype"]]) for x in contract[side]}
            assert shapes_and_types(result) == expected
            assert [value.name for value in result] == list(expected), "some runtimes use the order"


@pytest.fixture(scope="module")
def few(clips, tmp_path_factory) -> Path:
    """A manifest of six shipped clips."""
    return manifest_of_some(clips, slice(6), tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_default_checkpoint_passes_its_gate(precision, layout, digits, few, tmp_path):
    place = pipeline.export(str(digits), precision, few, tmp_path / "out", layout=layout)
    gate = verify(place)["gate"]
    assert gate["clips"] == 6
    assert gate["exact"] == (precision == "fp32")
    assert gate["identical_texts"] >= (1 if precision == "fp32" else 5 / 6)
    assert (gate["max_logits_error"] is not None) == (layout == "transformers")


@pytest.mark.parametrize("layout", OTHERS)
def test_a_failing_gate_leaves_nothing_behind(layout, digits, few, tmp_path, monkeypatch):
    greedy = decoding.greedy
    monkeypatch.setattr(decoding, "greedy", lambda *given: [t[:-1] for t in greedy(*given)])
    with pytest.raises(Problem, match="clips get other tokens"):
        pipeline.export(str(digits), "fp32", few, tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", OTHERS)
def test_the_device_runner_refuses_other_layouts_by_name(layout, made, tmp_path):
    made(whole, layout)
    with pytest.raises(RunnerProblem, match=f"the layout is '{layout}'") as problem:
        Recognizer(tmp_path / layout)
    assert "--layout native" in problem.value.hint


@pytest.mark.parametrize("layout", OTHERS)
def test_a_missing_file_of_a_layout_is_named(layout, made, rng, tmp_path):
    made(whole, layout)
    name = str(rng.choice(needed_files(layout, "fp32")))
    (tmp_path / layout / name).unlink()
    with pytest.raises(Problem, match=f"{re.escape(name)}: missing from the artifact"):
        verify(tmp_path / layout)


def test_an_unknown_layout_lists_the_known_ones(tiny_whisper, processor, tmp_path):
    with pytest.raises(Problem, match="unknown layout 'whisperx'") as problem:
        export_onnx(tiny_whisper, processor, tmp_path / "out", layout="whisperx")
    assert "native, transformers, sherpa, single" in problem.value.hint
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_an_unknown_layout_is_refused(made, tmp_path):
    made(whole, "single")
    path = tmp_path / "single/manifest.json"
    path.write_text(path.read_text().replace('"layout": "single"', '"layout": "double"'))
    with pytest.raises(Problem, match="layout 'double'; this version knows native, "):
        verify(tmp_path / "single")


@pytest.mark.parametrize("layout", ["transformers", "sherpa"])
def test_a_runtime_with_one_window_gets_the_full_one(layout, digits, few, tmp_path):
    """The checkpoint has shorter windows too; the manifest and the graphs have one."""
    model, processor = whisper.load(digits), whisper.load_processor(digits)
    model.config.edgewhisper = {"format": 1, "windows": [150, 300]}
    whisper.save(model, processor, tmp_path / "two", {})
    place = pipeline.export(str(tmp_path / "two"), "fp32", few, tmp_path / "out", layout=layout)
    assert verify(place)["audio"]["windows_samples"] == [96000]


# --------------------------------------------------------------------------------- transformers


def past_names(layers):
    return [
        f"past_key_values.{i}.{side}.{kind}"
        for i in range(layers)
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    ]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_transformers_names_and_shapes(precision, kind, made, tmp_path):
    model, _ = made(kind, "transformers", precision)
    result = sessions(tmp_path / "transformers", "transformers", precision)
    past = past_names(model.config.decoder_layers)
    present = [name.replace("past_key_values", "present") for name in past]
    inputs = {name: shapes_and_types(session.get_inputs()) for name, session in result.items()}
    outputs = {name: shapes_and_types(session.get_outputs()) for name, session in result.items()}
    assert inputs["encoder_model"] == {
        "input_features": (["batch_size", 80, 600], "tensor(float)"),
    }
    assert outputs["encoder_model"] == {
        "last_hidden_state": (["batch_size", 300, model.config.d_model], "tensor(float)"),
    }
    first = ["input_ids", "encoder_hidden_states"]
    assert list(inputs["decoder_model_merged"]) == [*first, *past, "use_cache_branch"]
    assert list(inputs["decoder_model"]) == first
    assert list(inputs["decoder_with_past_model"]) == ["input_ids", *past]
    for name in ("decoder_model_merged", "decoder_model"):
        assert list(outputs[name]) == ["logits", *present]
    own = [name for name in present if ".decoder." in name]
    assert list(outputs["decoder_with_past_model"]) == ["logits", *own]
    assert inputs["decoder_model_merged"]["use_cache_branch"] == ([1], "tensor(bool)")
    for name in past:
        shape, kind_of = inputs["decoder_model_merged"][name]
        assert kind_of == "tensor(float)"
        assert isinstance(shape[1], str), "a past of no positions has the dense model's heads"
    for i, layer in enumerate(model.model.decoder.layers):
        for side, attention in (("decoder", layer.self_attn), ("encoder", layer.encoder_attn)):
            expected = attention_shape(attention)
            for kind_of, width in (("key", expected["qk_dim"]), ("value", expected["v_dim"])):
                shape, _ = outputs["decoder_model"][f"present.{i}.{side}.{kind_of}"]
                assert (shape[1], shape[3]) == (expected["heads"], width)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_decoders_match_torch_on_a_batch(kind, made, processor, rng, tmp_path):
    """Two clips at once, chunks of tokens, with a cache, in the merged and the separate decoders.

    The first past is as the runtimes create it: of the config's heads, or of none.
    """
    model, _ = made(kind, "transformers")
    result = sessions(tmp_path / "transformers", "transformers")
    pcms = [window(processor, rng) for _ in range(2)]
    chunks = [rng.integers(0, 783, n).tolist() for n in (int(rng.integers(2, 6)), 1, 1, 3)]
    expected = [torch_steps(model, processor, pcm, chunks) for pcm in pcms]
    features = decoding.log_mel(processor.feature_extractor, pcms).numpy()
    heard = result["encoder_model"].run(None, {"input_features": features})[0]
    heads = model.config.num_attention_heads
    width = model.config.d_model // heads
    for merged, dummy in itertools.product([True, False], [heads, 0]):
        none = np.zeros((2, dummy, 0, width), np.float32)
        for turn, logits in enumerate(batch_logits(result, heard, chunks, none, merged)):
            assert logits.shape == (2, len(chunks[turn]), 783)
            for row, steps in zip(logits, expected, strict=True):
                assert np.abs(row[-1] - steps[turn]).max() < TOLERANCE, (merged, dummy, turn)


def batch_logits(result, heard, chunks, none, merged):
    """Yield the logits of each chunk of tokens for both clips."""
    cache = {}
    for chunk in chunks:
        name = "decoder_model" if not cache else "decoder_with_past_model"
        session = result["decoder_model_merged" if merged else name]
        known = {
            "input_ids": np.array([chunk, chunk]),
            "encoder_hidden_states": heard,
            "use_cache_branch": np.array([bool(cache)]),
        }
        names = [value.name for value in session.get_inputs()]
        outputs = session.run(None, {n: known.get(n, cache.get(n, none)) for n in names})
        by_name = dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))
        yield by_name.pop("logits")
        new = {n.replace("present", "past_key_values"): x for n, x in by_name.items()}
        cache |= {n: x for n, x in new.items() if not (cache and ".encoder." in n)}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_transformers_decoders_share_their_weights(precision, make_whisper, processor, tmp_path):
    """Together, the three decoders are little larger than one, because constants are stored
    once.
    """
    model = make_whisper(d_model=64, ffn=256)
    export_onnx(model, processor, tmp_path, precision, layout="transformers")
    export_onnx(model, processor, tmp_path / "native", precision)
    suffix = suffix_for("transformers", precision)
    weights = tmp_path / f"onnx/decoder_model_merged{suffix}.onnx_data"
    cross = sum(
        linear.weight.numel() + 8 * 64
        for layer in model.model.decoder.layers
        for linear in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
    ) * (4 if precision == "fp32" else 1)
    native = sum(path.stat().st_size for path in (tmp_path / "native").glob("decoder.*"))
    assert weights.stat().st_size < native + cross
    graphs = [path for path in (tmp_path / "onnx").glob("decoder*.onnx")]
    assert len(graphs) == 3
    for path in graphs:
        graph = onnx.load(path, load_external_data=False).graph
        assert all(len(tensor.raw_data) < 1024 for tensor in graph.initializer)


def test_transformers_configuration_has_what_runtimes_need(made, processor, tmp_path):
    made(irregular, "transformers", "int8")
    folder = tmp_path / "transformers"
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert read["config.json"]["transformers.js_config"] == {
        "dtype": "q8",
        "use_external_data_format": {"decoder_model_merged": 1},
    }
    assert read["config.json"]["model_type"] == "whisper"
    assert read["preprocessor_config.json"]["feature_extractor_type"] == "WhisperFeatureExtractor"
    assert read["preprocessor_config.json"]["n_samples"] == 96000
    assert read["vocab.json"] == read["tokenizer.json"]["model"]["vocab"]
    assert read["added_tokens.json"]["<|endoftext|>"] == 374
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    assert [line.split(" ") for line in merges] == [
        list(pair) for pair in read["tokenizer.json"]["model"]["merges"]
    ]
    again = whisper.load_processor(folder).tokenizer
    for text in (" one two three", "naïve café", "日本語 🙂"):
        assert again(text).input_ids == processor.tokenizer(text).input_ids


# --------------------------------------------------------------------------------------- sherpa


REQUIRED = {
    *("n_mels", "n_text_layer", "n_text_ctx", "n_text_state", "n_vocab", "sot", "eot", "blank_id"),
    *("translate", "transcribe", "is_multilingual", "no_timestamps", "no_speech", "sot_sequence"),
    *("all_language_tokens", "all_language_codes"),
}


def test_sherpa_metadata_have_what_it_reads(made, processor):
    model, hearing = made(irregular, "sherpa")
    result = hearing.encoder.get_modelmeta().custom_metadata_map
    assert result.keys() >= REQUIRED
    vocab = processor.tokenizer.get_vocab()
    for name, token in {
        "sot": "<|startoftranscript|>",
        "eot": "<|endoftext|>",
        "no_timestamps": "<|notimestamps|>",
        "blank_id": "Ġ",
    }.items():
        assert int(result[name]) == vocab[token]
    ids = [vocab[t] for t in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>")]
    assert result["sot_sequence"] == ",".join(map(str, ids))
    codes, tokens = (result[f"all_language_{x}"].split(",") for x in ("codes", "tokens"))
    assert len(codes) == len(tokens) == 100
    assert int(tokens[codes.index("de")]) == vocab["<|de|>"]
    assert result["n_text_layer"] == str(model.config.decoder_layers)
    widths = [
        shape["heads"] * max(shape["qk_dim"], shape["v_dim"])
        for shape in (attention_shape(layer.self_attn) for layer in model.model.decoder.layers)
    ]
    assert result["n_text_state"] == str(max(widths))


@pytest.mark.parametrize("kind", MODELS)
def test_sherpa_shapes(kind, made):
    model, hearing = made(kind, "sherpa")
    layers, room = model.config.decoder_layers, model.config.max_target_positions
    assert shapes_and_types(hearing.encoder.get_inputs()) == {
        "mel": (["n_audio", 80, "n_frames"], "tensor(float)")
    }
    names = [
        "tokens",
        "in_n_layer_self_k_cache",
        "in_n_layer_self_v_cache",
        "n_layer_cross_k",
        "n_layer_cross_v",
        "offset",
    ]
    result = shapes_and_types(hearing.decoder.get_inputs())
    assert list(result) == names, "sherpa-onnx uses the order"
    assert result["tokens"] == (["n_audio", "n_tokens"], "tensor(int64)")
    assert result["offset"] == ([1], "tensor(int64)")
    own, cross = result[names[1]][0], result[names[3]][0]
    assert own[:3] == [layers, "n_audio", room]
    assert cross[:3] == [layers, "n_audio", 300]
    outputs = shapes_and_types(hearing.decoder.get_outputs())
    assert list(outputs) == ["logits", "out_n_layer_self_k_cache", "out_n_layer_self_v_cache"]
    assert outputs["out_n_layer_self_k_cache"][0] == own
    assert outputs["logits"][0] == ["n_audio", "n_tokens", 783]
    assert [v.name for v in hearing.encoder.get_outputs()] == names[3:5]


@pytest.mark.parametrize("kind", MODELS)
def test_sherpa_logits_match_torch_except_suppressed_tokens(kind, made, processor, rng):
    model, hearing = made(kind, "sherpa")
    pcm = window(processor, rng)[: int(rng.integers(8000, 96000))]
    chunks = [hearing.prompt, *([int(i)] for i in rng.integers(0, 374, 4))]
    step = hearing.steps(hearing.mel(pcm))
    for chunk, want in zip(chunks, torch_steps(model, processor, pcm, chunks), strict=True):
        logits = step(chunk)
        stamps = model.generation_config.no_timestamps_token_id + 1
        assert np.abs(logits[:stamps] - want[:stamps]).max() < TOLERANCE
        assert (logits[stamps:] == -np.inf).all()


def test_sherpa_ignores_tail_padding(made, processor, rng):
    """Zeros after the clip count as silence, however many, and so do missing frames."""
    _, hearing = made(irregular, "sherpa")
    pcm = window(processor, rng)[: int(rng.integers(8000, 80000))]
    mel = hearing.mel(pcm)
    heard = mel.shape[2] - Sherpa.TAIL
    expected = hearing.encoder.run(None, {"mel": mel})
    for tail in (0, int(rng.integers(1, 100)), 600, 2500):
        other = np.concatenate([mel[..., :heard], np.zeros((1, 80, tail), np.float32)], axis=2)
        for result, want in zip(hearing.encoder.run(None, {"mel": other}), expected, strict=True):
            assert np.abs(result - want).max() < 1e-5


def test_sherpa_silence_is_whispers_silence(made, processor):
    """For a clip without any sound, silence is the floor of the log-mel, not eight below its
    maximum.
    """
    model, hearing = made(whole, "sherpa")
    silence = np.zeros(16000, np.float32)
    assert hearing.window(silence) == decoding.greedy(model, processor, [silence])[0]


def test_sherpa_tokens_are_the_ordinary_ones_in_base64(made, processor, tmp_path):
    made(whole, "sherpa")
    rows = [line.split() for line in (tmp_path / "sherpa/whisper-tokens.txt").open()]
    assert [int(i) for _, i in rows] == list(range(374))
    ids = processor.tokenizer(" one two", add_special_tokens=False).input_ids
    assert b"".join(base64.b64decode(rows[i][0]) for i in ids) == b" one two"


# --------------------------------------------------------------------------------------- single


def run_single(hearing, pcm, prompt=None, most=60):
    feed = {
        "pcm": pcm[None],
        "prompt": np.array([hearing.rules.prompt if prompt is None else prompt]),
        "max_new_tokens": np.array(most),
    }
    return hearing.session.run(None, feed)[0].tolist()


def test_single_decodes_at_most_max_new_tokens(made, processor, rng):
    _, hearing = made(irregular, "single")
    pcm = window(processor, rng)
    whole_text = run_single(hearing, pcm)
    for most in (0, 1, int(rng.integers(2, 30))):
        assert run_single(hearing, pcm, most=most) == whole_text[:most]
    assert len(run_single(hearing, pcm, most=10_000)) <= 60, "there is room for no more"


def test_single_follows_its_prompt(made, processor, rng):
    model, hearing = made(whole, "single")
    pcm = window(processor, rng)
    german = [375, model.generation_config.lang_to_id["<|de|>"], 477, 481]
    expected = decoding.greedy(model, processor, [pcm], ["de"])[0]
    assert run_single(hearing, pcm, german) == expected


def test_single_cuts_audio_at_its_window(made, processor, rng):
    _, hearing = made(whole, "single")
    pcm = window(processor, rng)
    longer = np.concatenate([pcm, pcm[: int(rng.integers(1, 50_000))]])
    assert run_single(hearing, longer) == run_single(hearing, pcm)


def test_single_chooses_the_shortest_window_that_holds_the_audio(
    make_whisper, processor, rng, tmp_path
):
    model = make_whisper()
    model.config.edgewhisper = {"format": 1, "windows": [100, 300]}
    export_onnx(model, processor, tmp_path / "out", "fp32", layout="single")
    hearing = open_artifact(tmp_path / "out", threads=1)
    for samples in (int(rng.integers(1, 32_001)), int(rng.integers(32_001, 96_001))):
        pcm = window(processor, rng)[:samples]
        assert hearing.window(pcm) == decoding.greedy(model, processor, [pcm])[0]


def test_single_stores_its_weights_once(make_whisper, processor, tmp_path):
    model = make_whisper(d_model=64, ffn=256)
    for layout in ("single", "native"):
        export_onnx(model, processor, tmp_path / layout, "int8", layout=layout)
    native = sum((tmp_path / f"native/{x}.onnx").stat().st_size for x in ("encoder", "decoder"))
    assert (tmp_path / "single/whisper.onnx").stat().st_size < native + 20_000


# ---------------------------------------------------------------------------------- older runtimes


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("runtime", [None, "1.22", "1.26.0", "1.27", "1.40"])
def test_an_artifact_names_the_oldest_runtime(
    precision, runtime, tiny_whisper, processor, tmp_path
):
    from devices.runner.recognizer import Recognizer

    quantised = precision != "fp32"
    old = runtime in ("1.22", "1.26.0")
    manifest = export_onnx(tiny_whisper, processor, tmp_path / "a", precision, runtime=runtime)
    expected = "1.27" if quantised and not old else "1.22"
    assert manifest["runtime"] == {"onnxruntime": expected}
    caches = {s["name"]: s["dtype"] for s in manifest["contract"]["decoder"]["inputs"]}
    assert caches["cross.0.key"] == ("int8" if quantised and not old else "float32")
    pcm = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10
    assert Recognizer(tmp_path / "a", threads=1).window(pcm) is not None


@pytest.mark.parametrize(
    ("layout", "runtime", "message"),
    [
        ("native", "1.21", "the layout 'native' needs onnxruntime 1.22 or newer"),
        ("sherpa", "1.19.2", "the layout 'sherpa' needs onnxruntime 1.21 or newer"),
        ("native", "new", "--runtime new: no version"),
        ("native", "1", "--runtime 1: no version"),
        ("native", "", "--runtime : no version"),
    ],
)
def test_a_runtime_that_is_too_old_is_an_error(
    layout, runtime, message, tiny_whisper, processor, tmp_path
):
    with pytest.raises(Problem, match=message):
        export_onnx(tiny_whisper, processor, tmp_path, "int8", layout=layout, runtime=runtime)


@pytest.mark.parametrize("installed", ["1.20.1", "1.26.0", "0.9"])
def test_an_installed_runtime_that_is_too_old_is_named(
    installed, tiny_whisper, processor, tmp_path, monkeypatch
):
    from devices.runner.engines import sessions
    from devices.runner.problem import RunnerProblem
    from devices.runner.recognizer import Recognizer

    export_onnx(tiny_whisper, processor, tmp_path / "a", "int8")
    monkeypatch.setattr(sessions.ort, "__version__", installed)
    with pytest.raises(RunnerProblem, match=f"need onnxruntime 1.27 or newer, and {installed}"):
        Recognizer(tmp_path / "a")
