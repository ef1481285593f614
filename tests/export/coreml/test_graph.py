"""Operators of the Core ML programs, each executed from its package and compared with numpy and
torch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention import attend, draw, in_heads

from export.coreml import tables
from export.coreml.attention import (
    cached_attention,
    cross_attention,
    mean_weights,
    self_attention,
    updated_cache,
)
from export.coreml.graph import Graph, program, save
from export.coreml.interpreter import open_package
from export.coreml.layers import conv, gelu, layer_norm, linear
from export.coreml.padding import aligned, aligned_dim, more_inputs, more_outputs
from export.coreml.tables import FactorisedTable, TokenTable
from export.manifest import Spec
from export.weights import Heads, Linear

ENGINE = pytest.mark.parametrize("engine", [False, True], ids=["plain", "channels-first"])


@pytest.fixture
def run(tmp_path):
    """run(g, inputs, build) -> the executed results of what `build` makes of the inputs by name."""

    def run(g, inputs, body):
        specs = [Spec(name, array.shape, str(array.dtype)) for name, array in inputs.items()]
        outputs = []

        def made(given):
            values = body(given)
            kinds = {"fp32": "float32", "fp16": "float16"}
            outputs.extend(
                Spec(f"y{n}", tuple(v.shape), kinds[v.dtype.__name__]) for n, v in enumerate(values)
            )
            return values

        path = tmp_path / "x.mlpackage"
        save(program(g, specs, outputs, made), g.target, path, "operators")
        result = open_package(path).predict(inputs)
        return [result[spec.name] for spec in outputs]

    return run


def arranged(x, engine):
    """Return (1, n, d) in the arrangement of the graph."""
    return np.ascontiguousarray(x.swapaxes(1, 2)[:, :, None]) if engine else x


def plain(y, engine):
    return y[:, :, 0].swapaxes(1, 2) if engine else y


def test_equal_constants_are_stored_once(run):
    g = Graph("fp32", "iOS16")

    def body(given):
        same = [g.constant(np.array([1, 2])), g.constant(np.array([1.0, 2.0]))]
        assert same[0] is same[1]
        assert g.constant(1.0) is not g.constant(np.array([1]))
        return [g.add(given["x"], same[0])]

    assert run(g, {"x": np.zeros(2, np.float32)}, body)[0].tolist() == [1, 2]


@ENGINE
def test_linear_layers_that_are_dense_low_rank_or_read_some_inputs(engine, rng, run):
    kept = np.sort(rng.permutation(20)[:13])
    x, down, up, bias = draw(rng, 1, 7, 20), draw(rng, 5, 13), draw(rng, 9, 5), draw(rng, 9)
    layers = [Linear(down, None, kept, 20), Linear(up, bias)]
    g = Graph("fp32", "iOS16", channels_first=engine)
    chosen = aligned(g, layers) if engine else layers
    assert not engine or chosen[0].weight.shape == (64, 20)
    (result,) = run(g, {"x": arranged(x, engine)}, lambda given: [linear(g, given["x"], chosen)])
    assert np.allclose(plain(result, engine), x[..., kept] @ down.T @ up.T + bias, atol=1e-4)


@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (2, 33), (3, 5), (6, 64), (4, 17), (20, 64)])
def test_aligned_heads_are_the_smallest_multiple_of_64(heads, dim):
    wide = aligned_dim(heads, dim)
    assert wide >= dim and heads * wide % 64 == 0
    assert all(heads * smaller % 64 for smaller in range(dim, wide))


def test_padding_is_zero_and_ignored(rng):
    g = Graph("fp32", "iOS16", channels_first=True)
    first, second = Linear(draw(rng, 6, 8), draw(rng, 6)), Linear(draw(rng, 5, 6))
    (wide,) = more_outputs([first], 3, 4)  # two groups of three
    assert np.array_equal(wide.weight[[0, 1, 2, 4, 5, 6]], first.weight)
    assert not wide.weight[[3, 7]].any() and not wide.bias[[3, 7]].any()
    (reader,) = more_inputs(g, [second], 3, 4)
    x = draw(rng, 8)
    before = second.weight @ (first.weight @ x + first.bias)
    assert np.allclose(reader.weight @ (wide.weight @ x + wide.bias), before, atol=1e-5)


@ENGINE
def test_layer_norm_gelu_and_convolution_match_torch(engine, rng, run):
    x, kernel = draw(rng, 1, 10, 6), draw(rng, 4, 6, 3)
    weight, bias, shift = draw(rng, 4), draw(rng, 4), draw(rng, 4)
    g = Graph("fp32", "iOS16", channels_first=engine)

    def body(given):
        x = given["x"] if engine else g.transpose(given["x"], 0, 2, 1)
        y = gelu(g, conv(g, x, kernel, bias, 2, None))
        y = y if engine else g.transpose(y, 0, 2, 1)
        return [layer_norm(g, y, weight, shift, 1e-5)]

    (result,) = run(g, {"x": arranged(x, engine)}, body)
    t = torch.from_numpy
    y = torch.nn.functional.conv1d(t(x).mT, t(kernel), t(bias), stride=2, padding=1)
    y = torch.nn.functional.gelu(y).mT
    want = torch.nn.functional.layer_norm(y, (4,), t(weight), t(shift))
    assert np.allclose(plain(result, engine), want.numpy(), atol=1e-5)


@ENGINE
@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared-keys"])
def test_self_attention_matches_numpy(shared, engine, rng, run):
    heads = Heads(3, 4, 5, 0.3)
    count = 1 if shared else 3
    q, k, v = (draw(rng, 1, 11, width) for width in (12, count * 4, count * 5))
    g = Graph("fp32", "iOS16", channels_first=engine)
    inputs = {name: arranged(x, engine) for name, x in zip("qkv", (q * 0.3, k, v), strict=True)}
    (result,) = run(g, inputs, lambda x: [self_attention(g, x["q"], x["k"], x["v"], heads)])
    want = attend(in_heads(q, 3), in_heads(k, count), in_heads(v, count), heads.scale)
    assert np.allclose(plain(result, engine), want, atol=1e-5)


@ENGINE
def test_cached_attention_matches_numpy(engine, rng, run):
    heads, room, here = Heads(2, 3, 3, 0.5), 9, int(rng.integers(9))
    q, caches = draw(rng, 1, 1, 6), draw(rng, 2, 1, 6, 1, room)
    new = draw(rng, 2, 1, 6, 1, 1)
    mask = np.where(np.arange(room) > here, -1e4, 0).astype(np.float32)[None]
    place = (np.arange(room) == here).astype(np.float32)[None, None, None]
    g = Graph("fp32", "iOS16", channels_first=engine)

    def body(x):
        keys = updated_cache(g, x["keys"], x["key"], x["place"])
        values = updated_cache(g, x["values"], x["value"], x["place"])
        return [cached_attention(g, x["q"], keys, values, x["mask"], heads), keys]

    inputs = {"q": arranged(q * 0.5, engine), "mask": mask, "place": place}
    inputs |= dict(zip(("keys", "values", "key", "value"), (*caches, *new), strict=True))
    result, keys = run(g, inputs, body)
    caches[..., here] = new[..., 0]
    assert np.array_equal(keys, caches[0])
    visible = [cache[:, :, 0, : here + 1].swapaxes(1, 2) for cache in caches]
    want = attend(in_heads(q, 2), in_heads(visible[0], 2), in_heads(visible[1], 2), heads.scale)
    assert np.allclose(plain(result, engine), want, atol=1e-5)


@ENGINE
def test_cross_attention_equals_attention_over_keys_and_values(engine, rng, run):
    """Low-rank keys have a bias, which a softmax ignores, and values read only some features."""
    heads, d_model, positions = Heads(3, 4, 5, 0.3), 10, 13
    q, states = draw(rng, 1, 1, 12), draw(rng, 1, positions, d_model)
    kept = np.sort(rng.permutation(d_model)[:6])
    key = [Linear(draw(rng, 7, d_model)), Linear(draw(rng, 12, 7), draw(rng, 12))]
    value = [Linear(draw(rng, 15, 6), draw(rng, 15), kept, d_model)]
    g = Graph("fp32", "iOS16", channels_first=engine)
    used = [aligned(g, part) if engine else part for part in (key, value)]

    def body(x):
        mixed, weights = cross_attention(g, x["q"], x["states"], *used, heads)
        return [mixed, mean_weights(g, [weights, weights], [[0, 2], [1]])]

    inputs = {"q": arranged(q * 0.3, engine), "states": states.swapaxes(1, 2)[:, :, None].copy()}
    result, mean = run(g, inputs, body)
    keys = states @ key[0].weight.T @ key[1].weight.T + key[1].bias
    values = states[..., kept] @ value[0].weight.T + value[0].bias
    want = attend(in_heads(q, 3), in_heads(keys, 3), in_heads(values, 3), heads.scale)
    assert np.allclose(plain(result, engine), want, atol=1e-4)
    every = np.eye(positions)[None, :, None].repeat(3, axis=2).reshape(1, positions, -1)
    record = attend(in_heads(q, 3), in_heads(keys, 3), in_heads(every, 3), heads.scale)
    assert np.allclose(mean, record.reshape(3, positions).mean(0), atol=1e-6)


@ENGINE
@pytest.mark.parametrize("factorised", [False, True])
def test_every_token_has_its_embedding_and_its_logit(factorised, engine, rng, run, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 8)
    rows, basis, x = draw(rng, 23, 5), draw(rng, 5, 6), draw(rng, 1, 1, 6 if factorised else 5)
    table = rows @ basis if factorised else rows
    token = int(rng.integers(23))
    g = Graph("fp32", "iOS16", channels_first=engine)

    def body(given):
        made = FactorisedTable(g, rows, basis) if factorised else TokenTable(g, rows)
        parts = made.rows.chunks if factorised else made.chunks
        assert [part.shape[0] < 8 for part in parts] == ([True] * 4 if engine else [False])
        return [made.look_up(given["ids"]), made.logits(given["x"])]

    result, logits = run(g, {"ids": np.array([token], np.int32), "x": x}, body)
    assert np.allclose(result, table[[token]], atol=1e-5)
    assert np.allclose(logits, x @ table.T, atol=1e-4)


def test_a_program_that_violates_its_contract_is_not_written(rng):
    g = Graph("fp16", "iOS16")
    specs = [Spec("x", (1, 3), "float16")], [Spec("y", (1, 4), "float16")]
    with pytest.raises(AssertionError, match="shape=\\(1, 4\\)"):
        program(g, *specs, lambda given: [g.mul(given["x"], 2.0)])
