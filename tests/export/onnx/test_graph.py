"""Operators of the ONNX graphs, each run in onnxruntime and compared with numpy, torch or
transformers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention import attend, draw, in_heads
from onnx import TensorProto, checker, numpy_helper
from onnx_sessions import open_model
from transformers import WhisperFeatureExtractor

from devices.runner.engines.sessions import open_session, session_options
from export.layouts import TARGETS
from export.manifest import Spec
from export.onnx import save, tables
from export.onnx.attention import (
    cached_attention,
    cross_attention,
    encoder_cache,
    ends,
    self_attention,
    spare_mask,
)
from export.onnx.graph import INT8, Graph, in_pieces, pieces_of
from export.onnx.layers import (
    float_table,
    gelu,
    joint_linear,
    layer_norm,
    linear,
    quantise,
    row_scaled_linear,
    separate_linear,
)
from export.onnx.log_mel import log_mel
from export.onnx.tables import SplitTable, TokenTable, column_scales
from export.quantise import TABLE_STEPS, Scheme, fake_quantise
from export.weights import Heads, Linear


def run(graph, inputs, outputs):
    """Run a graph with these inputs (name -> array) and give these outputs back."""
    specs = [Spec(name, array.shape, str(array.dtype)) for name, array in inputs.items()]
    model = graph.model("test", specs, [Spec(name, shape) for name, shape in outputs.items()])
    checker.check_model(model)
    return open_model(model).run(list(outputs), inputs)


def test_equal_constants_are_stored_once():
    graph = Graph("fp32")
    assert graph.constant([1, 2]) == graph.constant(np.array([1, 2]))
    assert graph.constant(1) != graph.constant([1])
    assert graph.constant(0) != graph.constant(0.0)


# -------------------------------------------------------------------------------- linear layers


def test_quantised_weights_are_off_by_half_a_scale_at_most(rng):
    weight = draw(rng, 30, 50) * rng.uniform(0.01, 100, (30, 1)).astype(np.float32)
    q, scale = quantise(weight)
    assert (q.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (30,))
    assert (np.abs(q).max(axis=1) == 127).all()
    assert (np.abs(weight - q * scale[:, None]) <= scale[:, None] * 0.5001).all()


def test_quantising_a_hand_made_matrix_gives_the_known_answer():
    weight = np.array([[254, -127, 1.1], [0, 0, 0], [-1.27, 0.004, 0.006]], np.float32)
    q, scale = quantise(weight)
    assert q.tolist() == [[127, -64, 1], [0, 0, 0], [-127, 0, 1]]
    assert scale == pytest.approx([2, 1, 0.01], rel=2**-15)  # rounded up to 16 bits


def random_layers(rng, kind):
    inputs = np.sort(rng.permutation(20)[:13])
    bias = draw(rng, 11)
    return {
        "dense": [Linear(draw(rng, 11, 20), bias)],
        "no_bias": [Linear(draw(rng, 11, 20))],
        "some_inputs": [Linear(draw(rng, 11, 13), bias, inputs, 20)],
        "low_rank": [Linear(draw(rng, 4, 20)), Linear(draw(rng, 11, 4), bias)],
        "low_rank_of_some_inputs": [
            Linear(draw(rng, 4, 13), None, inputs, 20),
            Linear(draw(rng, 11, 4), bias),
        ],
    }[kind]


KINDS = ["dense", "no_bias", "some_inputs", "low_rank", "low_rank_of_some_inputs"]


def apply(x, layers):
    for layer in layers:
        x = x if layer.inputs is None else x[..., layer.inputs]
        x = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    return x


@pytest.mark.parametrize("gather", [False, True], ids=["spread", "gather"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_in_float(kind, gather, rng):
    layers, x, graph = random_layers(rng, kind), draw(rng, 1, 6, 20), Graph("fp32")
    y = linear(graph, "x", layers, gather)
    assert np.allclose(run(graph, {"x": x}, {y: (1, 6, 11)})[0], apply(x, layers), atol=1e-4)


@pytest.mark.parametrize("gather", [False, True], ids=["spread", "gather"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_in_int8_is_off_by_its_rounding(kind, gather, rng):
    layers, x, graph = random_layers(rng, kind), draw(rng, 1, 6, 20), Graph("int8")
    y = linear(graph, "x", layers, gather)
    want = apply(x, layers)
    error = run(graph, {"x": x}, {y: (1, 6, 11)})[0] - want
    assert 0 < np.abs(error).max() < 0.05 * np.abs(want).max()


def test_int8_multiplies_exactly_what_quantise_gives(rng):
    """With inputs that int8 represents exactly, the weights' rounding is the only error."""
    weight, graph = draw(rng, 9, 20), Graph("int8")
    x = rng.integers(-127, 128, (1, 5, 20)).astype(np.float32)
    x[0, 0, :2] = [-127, 128]  # a range of 255 steps: activations scale by exactly 1
    y = linear(graph, "x", [Linear(weight)])
    q, scale = quantise(weight)
    want = x @ (q * scale[:, None]).T
    assert np.allclose(run(graph, {"x": x}, {y: (1, 5, 9)})[0], want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", TARGETS["onnx"].precisions)
@pytest.mark.parametrize(
    "kinds",
    [
        ("dense", "no_bias", "some_inputs"),
        ("no_bias", "no_bias"),
        ("some_inputs", "some_inputs"),
        ("dense", "low_rank", "some_inputs"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("together", [joint_linear, separate_linear])
def test_joint_and_separate_linear_layers_match_single_ones(kinds, together, precision, rng):
    branches = [random_layers(rng, kind) for kind in kinds]
    x, graph = draw(rng, 1, 6, 20), Graph(precision)
    names = together(graph, "x", branches)
    result = run(graph, {"x": x}, dict.fromkeys(names, (1, 6, 11)))
    for got, branch in zip(result, branches, strict=True):
        want = apply(x, branch)
        tolerance = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.05, "int4": 0.3}[precision]
        assert np.abs(got - want).max() < tolerance * max(10, np.abs(want).max())


def test_layers_that_read_different_inputs_share_one_product(rng):
    graph = Graph("int8")
    joint_linear(graph, "x", [random_layers(rng, "some_inputs") for _ in range(3)])
    kinds = [node.op_type for node in graph.model("test", [], []).graph.node]
    assert kinds == ["Gather"] * 3 + ["Concat", "DynamicQuantizeMatMul", "Split"]


def test_only_the_inputs_that_are_read_are_stored(rng):
    for gather in (False, True):
        graph = Graph("int8")
        linear(graph, "x", random_layers(rng, "some_inputs"), gather)
        stored = graph.model("test", [], []).graph.initializer
        assert [len(t.raw_data) for t in stored if t.data_type == TensorProto.INT8] == [
            11 * 13 if gather else 11 * 14  # one row of zeros for all that is not read
        ]


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_computing_in_pieces_changes_nothing(pieces, rng):
    length = pieces * int(rng.integers(2, 9)) - int(rng.integers(2))  # no piece is empty
    x, layers = draw(rng, 1, length, 20), random_layers(rng, "dense")
    graph = Graph("fp32")
    y = in_pieces(graph, "x", pieces, lambda piece: linear(graph, piece, layers))
    result = run(graph, {"x": x}, {y: (1, x.shape[1], 11)})[0]
    assert np.abs(result - apply(x, layers)).max() < 1e-4


def test_no_piece_of_any_window_is_empty(rng):
    for _ in range(100):
        lengths = sorted({int(n) for n in rng.integers(1, 1501, 3)})
        pieces = pieces_of(int(rng.integers(1, 6000)), lengths)
        assert all(-(-n // pieces) * (pieces - 1) < n for n in lengths)
    assert pieces_of(1536, [1500]) == 5


# ------------------------------------------------------------------------------ tables and norms


@pytest.mark.parametrize("precision", TARGETS["onnx"].precisions)
def test_look_ups_and_logits_use_one_stored_table(precision, rng):
    weight, graph = draw(rng, 40, 8), Graph(precision)
    table = TokenTable(graph, weight)
    x, ids = draw(rng, 1, 1, 8), rng.integers(0, 40, (1, 5))
    rows, logits = table.look_up("ids"), table.logits("x")
    stored = graph.model("test", [], []).graph.initializer
    assert sum(len(tensor.raw_data) >= weight.size for tensor in stored) == 1
    result = run(graph, {"ids": ids, "x": x}, {rows: (1, 5, 8), logits: (1, 1, 40)})
    if precision in ("int8", "int4"):
        columns = column_scales(weight)
        q, scale = quantise(weight / columns)
        weight = q * scale[:, None] * columns
    if precision == "fp16":
        weight = weight.astype(np.float16).astype(np.float32)
    assert np.allclose(result[0], weight[ids], atol=1e-6)
    rounded = 0.02 * np.abs(x).max() * np.abs(weight).sum(1).max()
    tolerance = rounded if graph.quantises else 1e-5
    assert np.abs(result[1] - x @ weight.T).max() < tolerance


def test_the_pieces_of_a_mapped_table_are_stored_once_and_give_the_same_logits(
    rng, tmp_path, monkeypatch
):
    monkeypatch.setattr(tables, "PRODUCT_BYTES", 300)
    monkeypatch.setattr(save, "LARGE", 500)
    weight, results = draw(rng, 101, 8), []
    inputs = {"ids": np.array([[3, 100]]), "x": draw(rng, 1, 1, 8)}
    specs = [Spec(name, array.shape, str(array.dtype)) for name, array in inputs.items()]
    for name, mapped in (("whole", False), ("pieces", True)):
        graph = Graph("int8", mapped=mapped)
        table = TokenTable(graph, weight)
        outputs = {table.look_up("ids"): (1, 2, 8), table.logits("x"): (1, 1, 101)}
        parts = graph, specs, [Spec(*output) for output in outputs.items()]
        save.write_graph(parts, tmp_path, name)
        session = open_session(tmp_path / f"{name}.onnx", session_options(1))
        results.append(session.run(list(outputs), inputs))
    assert all(np.array_equal(*both) for both in zip(*results, strict=True))
    assert (tmp_path / "pieces.weights").stat().st_size == weight.size


def test_a_large_column_of_a_table_does_not_reduce_the_precision_of_others(rng):
    weight = draw(rng, 40, 8)
    weight[:, 3] *= 100
    scales = column_scales(weight)
    assert np.array_equal(np.exp2(np.round(np.log2(scales))), scales)
    errors = []
    for scheme in (None, INT8):  # a scheme that is named: codes are taken as they are
        graph = Graph("int8")
        table = TokenTable(graph, weight, scheme)
        rows = run(graph, {"ids": np.arange(40)[None]}, {table.look_up("ids"): (1, 40, 8)})[0]
        errors.append(np.abs(np.delete(rows[0] - weight, 3, axis=1)).max())
    q, scale = quantise(weight)
    assert np.allclose(rows[0], q * scale[:, None], atol=1e-6)
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("three", [None, (7, 40), (20, 31)])
@pytest.mark.parametrize("columns", [(), tuple(range(-4, 4)) * 8])
def test_rows_of_a_split_table_have_8_or_4_or_3_bits(columns, three, rng):
    scheme = Scheme(4, steps=TABLE_STEPS, columns=columns, rows_in_8_bits=7, rows_in_3_bits=three)
    weight = fake_quantise(torch.from_numpy(draw(rng, 40, 64)), scheme).numpy()
    graph = Graph("int4")
    table = SplitTable(graph, weight, scheme)
    x, ids = draw(rng, 1, 3, 64), rng.permutation(40).reshape(2, 20)
    outputs = {table.look_up("ids"): (2, 20, 64), table.logits("x"): (1, 3, 40)}
    rows, logits = run(graph, {"ids": ids, "x": x}, outputs)
    assert np.array_equal(rows, weight[ids])
    powers = np.exp2(columns) if columns else 1.0
    step = np.abs(x * powers).max() / 127  # of the activations in 8 bits
    assert np.abs(logits - x @ weight.T).max() < step * np.abs(weight / powers).sum(1).max()
    stored = [numpy_helper.to_array(t) for t in graph.model("test", [], []).graph.initializer]
    shapes = {(array.dtype.name, array.shape) for array in stored}
    begin, end = three or (40, 40)
    assert ("int8", (7, 64)) in shapes
    for bytes_, rows in ((16, begin - 7), (4, end - begin), (16, 40 - end)):
        assert not rows or ("uint8", (rows, 2, bytes_)) in shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", TARGETS["onnx"].precisions)
def test_row_scaled_linear_matches_linear(precision, kind, rng):
    layers, graph = random_layers(rng, kind), Graph(precision)
    x = np.maximum(draw(rng, 1, 6, 20), -0.17)
    y = row_scaled_linear(graph, "x", layers)
    error = run(graph, {"x": x}, {y: (1, 6, 11)})[0] - apply(x, layers)
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.05, "int4": 0.3}[precision]
    assert np.abs(error).max() < tolerance * np.abs(apply(x, layers)).max()


def test_a_large_row_does_not_reduce_the_precision_of_others(rng):
    layers, x = random_layers(rng, "dense"), np.maximum(draw(rng, 1, 6, 20), -0.17)
    x[0, 2] *= 100
    errors = []
    for product in (row_scaled_linear, linear):
        graph = Graph("int8")
        y = product(graph, "x", layers)
        error = run(graph, {"x": x}, {y: (1, 6, 11)})[0] - apply(x, layers)
        errors.append(np.abs(np.delete(error[0], 2, axis=0)).max())
    assert errors[0] < errors[1] / 5


def test_tables_of_an_int8_graph_take_half_the_bytes(rng):
    table = draw(rng, 7, 5)
    for precision, tolerance in (("fp32", 0), ("int8", 2e-3)):
        graph = Graph(precision)
        y = graph.op("Identity", float_table(graph, table))
        stored = sum(len(t.raw_data) for t in graph.model("test", [], []).graph.initializer)
        assert stored == table.size * {"fp32": 4, "int8": 2}[precision]
        assert np.abs(run(graph, {}, {y: (7, 5)})[0] - table).max() <= tolerance


def test_a_table_beyond_float16_is_stored_as_float32():
    graph = Graph("int8")
    y = graph.op("Identity", float_table(graph, np.array([1e5, 1.0], np.float32)))
    assert run(graph, {}, {y: (2,)})[0].tolist() == [1e5, 1.0]


def test_norm_and_gelu_match_torch(rng):
    x, weight, bias = draw(rng, 1, 4, 9), draw(rng, 9), draw(rng, 9)
    graph = Graph("fp32")
    y = gelu(graph, layer_norm(graph, "x", weight, bias, 1e-5))
    norm = torch.nn.functional.layer_norm(
        torch.tensor(x), (9,), torch.tensor(weight), torch.tensor(bias), 1e-5
    )
    want = torch.nn.functional.gelu(norm).numpy()
    assert np.allclose(run(graph, {"x": x}, {y: (1, 4, 9)})[0], want, atol=1e-5)


# ------------------------------------------------------------------------------------- attention

SHAPES = pytest.mark.parametrize(
    "heads",
    [
        Heads(2, 8, 8, 0.25),
        Heads(3, 5, 5, 0.3),
        Heads(1, 1, 1, 1.0),
        Heads(2, 7, 4, 0.25),
        Heads(3, 2, 9, 0.5),
    ],
    ids=lambda heads: f"{heads.count}_heads_qk{heads.qk_dim}_v{heads.v_dim}",
)


def projections(rng, heads, n):
    return {
        "q": draw(rng, 1, n, heads.count * heads.qk_dim),
        "k": draw(rng, 1, n, heads.count * heads.qk_dim),
        "v": draw(rng, 1, n, heads.count * heads.v_dim),
    }


@SHAPES
def test_self_attention(heads, rng):
    x, graph = projections(rng, heads, 11), Graph("fp32")
    y = self_attention(graph, "q", "k", "v", heads)
    want = attend(*(in_heads(x[name], heads.count) for name in "qkv"), heads.scale)
    assert np.allclose(run(graph, x, {y: want.shape})[0], want, atol=1e-5)


def cached(x, heads, room):
    """(1, heads, n, dim) with zeros up to the cache's width and room."""
    n, dim = x.shape[2:]
    return np.pad(x, [(0, 0), (0, 0), (0, room - n), (0, heads.cache_dim - dim)])


@SHAPES
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cross_attention_over_the_encoder_cache(heads, new, precision, rng):
    q = draw(rng, 1, new, heads.count * heads.qk_dim)
    keys = draw(rng, 1, 13, heads.count * heads.qk_dim) * rng.uniform(0.1, 10)
    values = draw(rng, 1, 13, heads.count * heads.v_dim) * rng.uniform(0.1, 10)
    graph = Graph(precision)
    both = [
        encoder_cache(graph, name, heads, dim)
        for name, dim in (("keys", heads.qk_dim), ("values", heads.v_dim))
    ]
    cache = list(sum(zip(*both, strict=True), ()))
    filled = graph.constant([13])
    lengths = ends(graph, "ids", graph.constant(np.array([13], np.int32)))
    bias = spare_mask(graph, "ids", filled)
    y = cross_attention(graph, "q", cache, ["a", "b"], lengths, heads, bias)
    want = attend(*(in_heads(x, heads.count) for x in (q, keys, values)), heads.scale)
    inputs = {"q": q, "keys": keys, "values": values, "ids": np.zeros((1, new), np.int64)}
    (result,) = run(graph, inputs, {y: want.shape})
    size = np.abs(values).max()
    # int8: a key is off by 1/254 of its channel's largest, and so is a value
    spread = heads.scale * np.abs(q).sum(-1).max() * np.abs(keys).max() / 254
    allowed = 1e-5 if precision == "fp32" else 1 / 254 + 2 * spread
    assert np.abs(result - want).max() < allowed * size


@SHAPES
@pytest.mark.parametrize(("past", "new"), [(0, 4), (6, 1), (5, 3)], ids=["prompt", "step", "both"])
def test_cached_attention(heads, past, new, rng):
    x, room = projections(rng, heads, new), past + new + int(rng.integers(0, 4))
    old = [draw(rng, 1, heads.count, past, dim) for dim in (heads.qk_dim, heads.v_dim)]
    keys, values = (
        np.concatenate([filled, in_heads(x[name], heads.count)], axis=2)
        for name, filled in zip("kv", old, strict=True)
    )
    x |= {"past_k": cached(old[0], heads, room), "past_v": cached(old[1], heads, room)}
    x |= {"length": np.array([past], np.int32), "ids": np.zeros((1, new), np.int64)}
    graph = Graph("fp32")
    lengths = ends(graph, "ids", "length")
    y = cached_attention(
        graph, ("q", "k", "v"), ("past_k", "past_v"), ("keys", "values"), lengths, heads
    )
    want = attend(in_heads(x["q"], heads.count), keys, values, heads.scale, first=past)
    shape = (1, heads.count, room, heads.cache_dim)
    result = run(graph, x, {y: want.shape, "keys": shape, "values": shape})
    assert np.allclose(result[0], want, atol=1e-5)
    for got, expected in zip(result[1:], (keys, values), strict=True):
        assert np.allclose(got[:, :, : past + new, : expected.shape[3]], expected, atol=1e-6)


# --------------------------------------------------------------------------------------- log-mel


def sounds(rng, samples):
    time = np.arange(samples) / 16000
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(50, 7900) * time)
    return {
        "noise": 0.1 * rng.standard_normal(samples),
        "tone_then_silence": np.where(time < 0.4 * time[-1], tone, 0),
        "silence": np.zeros(samples),
        "full_scale_square": np.sign(tone),
        "a_click_at_each_end": np.eye(1, samples)[0] + np.eye(1, samples, samples - 1)[0],
    }


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("seconds", [1, 6, 30])
def test_log_mel_matches_the_feature_extractor(n_mels, seconds, rng):
    extractor = WhisperFeatureExtractor(feature_size=n_mels, chunk_length=seconds)
    graph = Graph("int8")
    log_mel(graph, "pcm", extractor, [extractor.nb_max_frames])
    shape = (1, n_mels, extractor.nb_max_frames)
    for name, pcm in sounds(rng, extractor.n_samples).items():
        pcm = pcm.astype(np.float32)
        want = extractor(pcm, sampling_rate=16000, return_tensors="np").input_features
        result = run(graph, {"pcm": pcm[None]}, {"log_mel": shape})[0]
        assert result.shape == want.shape
        assert np.abs(result - want).max() < 1e-3, (
            name
        )  # float32 close to the clamp: 4e-4 was measured


def test_node_names_identify_the_front_end():
    graph = Graph("fp32")
    extractor = WhisperFeatureExtractor()
    log_mel(graph, "pcm", extractor, [3000])
    gelu(graph, "log_mel")
    names = [node.name for node in graph.model("test", [], []).graph.node]
    assert all(name.startswith("log_mel/") for name in names[:-1])
    assert not names[-1].startswith("log_mel/")
    assert len(set(names)) == len(names)
