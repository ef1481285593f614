"""GPTQ: what is rounded, what is corrected, and that export stores exactly these weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgewhisper import whisper
from edgewhisper.calibration import Moments
from edgewhisper.compress import gptq, lite, qat
from edgewhisper.compress.gptq import Options, loss, nearest, quantise_linear, round_inputs
from edgewhisper.compress.surgeon import damped
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.quantise import (
    LAYER_STEPS,
    TABLE_STEPS,
    Scheme,
    dequantise,
    fake_quantise,
    quantise,
    schemes,
)

FOUR = Scheme(4, half_scales=True)
QUICK = Options(clips=2, own_words=False, token_table=4)


@pytest.fixture
def layer(rng) -> tuple[torch.nn.Linear, torch.Tensor]:
    """A layer of 70 inputs (not a multiple of a block), and correlated inputs with a mean."""
    mixing = rng.standard_normal((70, 70)) * np.exp(rng.standard_normal(70))
    rows = torch.from_numpy(rng.standard_normal((500, 70)) @ mixing + rng.standard_normal(70))
    return torch.nn.Linear(70, 24), rows.float()


def moments_of(rows: torch.Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments


def test_the_error_of_the_output_is_less_than_that_of_rounding_to_nearest(layer):
    linear, rows = layer
    before = copy.deepcopy(linear)
    ours, to_nearest = quantise_linear(linear, moments_of(rows), FOUR, 0.01)
    assert ours < to_nearest
    rounded = copy.deepcopy(before)
    with torch.no_grad():
        rounded.weight.copy_(fake_quantise(before.weight, FOUR))
        missed = [(m(rows) - before(rows)).square().mean() for m in (linear, rounded)]
    assert missed[0] < missed[1]


def test_the_mean_of_the_output_is_kept(layer):
    linear, rows = layer
    before = linear(rows).mean(0)
    quantise_linear(linear, moments_of(rows), FOUR, 0.01)
    assert torch.allclose(linear(rows).mean(0), before, atol=1e-4)


def test_independent_inputs_are_rounded_to_nearest(rng, monkeypatch):
    """With a diagonal H there is nothing to correct."""
    monkeypatch.setattr(gptq, "SHRINKS", (1.0,))
    weight = torch.from_numpy(rng.standard_normal((12, 64)))
    h = torch.diag(torch.from_numpy(rng.uniform(0.5, 2, 64)))
    assert torch.equal(round_inputs(weight, h, FOUR), nearest(weight, FOUR))


def test_two_inputs_by_hand(monkeypatch):
    """The second input takes over the rounding error of the first, times their correlation."""
    monkeypatch.setattr(gptq, "SHRINKS", (1.0,))
    weight = torch.tensor([[-8.0, 3.4, 0.4]], dtype=torch.float64)  # the scale is 1
    h = torch.tensor([[9.0, 0, 0], [0, 4, 2], [0, 2, 3]], dtype=torch.float64)
    # 3.4 -> 3 leaves 0.4, and the best correction of the third input is 0.4 * 2 / 3
    rounded = round_inputs(weight, h, Scheme(4, block=16))
    assert rounded.tolist() == [[-8.0, 3.0, 1.0]]  # 0.4 + 0.267 -> 1


def test_it_is_rarely_worse_than_nearest_on_small_layers(rng):
    wins = 0
    for _ in range(20):
        weight = torch.from_numpy(rng.standard_normal((4, 16)))
        factor = torch.from_numpy(rng.standard_normal((16, 40)))
        h = damped(factor @ factor.T / 40, 0.01)
        scale = gptq.scales_of(weight, h, FOUR)
        plain = scale * (weight / scale).round().clamp(-8, 7)
        wins += loss(weight, round_inputs(weight, h, FOUR), h) <= loss(weight, plain, h)
    assert wins >= 15


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("steps", [0, LAYER_STEPS, TABLE_STEPS])
def test_export_recovers_the_codes_after_error_propagation(layer, block, bits, steps):
    linear, rows = layer
    scheme = replace(FOUR, block=block, bits=bits, steps=steps)
    quantise_linear(linear, moments_of(rows), scheme, 0.01)
    codes, scale = quantise(linear.weight.detach(), scheme)
    assert torch.equal(dequantise(codes, scale, scheme), linear.weight.detach() + 0.0)
    assert torch.equal(scale.half().float(), scale)
    limit = 2 ** (bits - 1)
    assert codes.min() >= -limit and codes.max() <= limit - 1


@pytest.mark.parametrize("exponent", [-30, -16, -3, 0, 12])
def test_half_scales_are_float16_and_hold_the_largest_weight(rng, exponent):
    weight = torch.from_numpy(rng.standard_normal((8, 64))).float() * 2.0**exponent
    codes, scale = quantise(weight, FOUR)
    if exponent > -25:
        assert torch.equal(scale.half().float(), scale)
        assert (codes.view(8, 2, 32).abs().amax(2) >= 7).all()
    assert torch.equal(
        fake_quantise(fake_quantise(weight, FOUR), FOUR), fake_quantise(weight, FOUR)
    )


def test_every_layer_is_on_its_grid_and_better_than_nearest(make_whisper, context):
    model = gptq.apply(make_whisper(), QUICK, context)
    assert any(scheme.columns for scheme in schemes(model).values())
    for module, scheme in schemes(model).items():
        rows = module.weight.detach().flatten(1)
        codes, scale = quantise(rows, scheme)
        assert torch.equal(dequantise(codes, scale, scheme), rows + 0.0)
    errors = context.record["gptq"]["error"]
    assert len(errors) == 2 * 6 + 2 * 10 + 1
    better = sum(error["gptq"] <= error["nearest"] for error in errors.values())
    assert better >= 0.9 * len(errors)


def test_chosen_layers_get_8_bits(make_whisper, context):
    options = replace(QUICK, in_8_bits="*.encoder.layers.0.* *.v_proj")
    model = gptq.apply(make_whisper(), options, context)
    encoder, decoder = (model.config.edgewhisper[side] for side in ("encoder", "decoder"))
    assert set(encoder[0]["bits"].values()) == {8}
    assert {n for n, bits in encoder[1]["bits"].items() if bits == 8} == {"self_attn.v_proj"}
    assert decoder[1]["bits"]["encoder_attn.v_proj"] == 8 and decoder[1]["bits"]["fc1"] == 4
    for module, scheme in schemes(model).items():
        rows = module.weight.detach().flatten(1)
        assert torch.equal(dequantise(*quantise(rows, scheme), scheme), rows + 0.0)
    with pytest.raises(Problem, match=r"in_8_bits has '\*\.fc3', which matches no linear layer"):
        gptq.apply(make_whisper(), replace(QUICK, in_8_bits="*.fc3"), context)


def test_the_artifact_stores_the_token_table_in_4_bits(make_whisper, context, tmp_path):
    model = gptq.apply(make_whisper(d_model=64, heads=2, ffn=96), QUICK, context)
    export_onnx(model, context.processor, tmp_path / "int4", "int4")
    decoder = onnx.load(tmp_path / "int4" / "decoder.onnx")
    arrays = [numpy_helper.to_array(tensor) for tensor in decoder.graph.initializer]
    (packed,) = [array for array in arrays if array.shape == (783, 2, 16)]  # blocks, bytes
    table = model.model.decoder.embed_tokens
    codes, _ = quantise(table.weight.detach(), schemes(model)[table])
    unpacked = np.stack([packed & 15, packed >> 4], axis=-1).reshape(783, 64).astype(int) - 8
    assert np.array_equal(unpacked, codes.numpy())


def test_the_first_rows_of_the_token_table_can_have_8_bits(make_whisper, context, tmp_path):
    dense, options = make_whisper(d_model=64, heads=2, ffn=96), replace(QUICK, token_table=4)
    plain = gptq.apply(copy.deepcopy(dense), options, context).model.decoder.embed_tokens.weight
    model = gptq.apply(copy.deepcopy(dense), replace(options, token_rows_in_8_bits=100), context)
    table, exact = model.model.decoder.embed_tokens, dense.model.decoder.embed_tokens.weight
    weights = context.record["gptq"]["weights"]
    assert weights["4"] + weights["8"] == sum(s.weight.numel() for s in schemes(model))
    error, coarse = ((rows - exact[:100]).abs().max() for rows in (table.weight[:100], plain[:100]))
    assert error < coarse / 5
    assert torch.equal(table.weight[100:], plain[100:])
    assert torch.equal(fake_quantise(table.weight, schemes(model)[table]), table.weight)

    whisper.save(model, context.processor, tmp_path / "saved", {})
    loaded = whisper.load(tmp_path / "saved")
    assert schemes(loaded)[loaded.model.decoder.embed_tokens].rows_in_8_bits == 100
    export_onnx(loaded, context.processor, tmp_path / "int4", "int4")
    decoder = onnx.load(tmp_path / "int4" / "decoder.onnx")
    shapes = {tuple(tensor.dims) for tensor in decoder.graph.initializer}
    assert {(100, 64), (683, 2, 16)} <= shapes
    small = gptq.apply(dense, replace(options, token_rows_in_8_bits=4096), context)
    assert schemes(small)[small.model.decoder.embed_tokens].bits == 8


def test_rare_tokens_can_have_3_bits(make_whisper, context, tmp_path):
    dense, options = make_whisper(d_model=64, heads=2, ffn=96), replace(QUICK, token_table=4)
    dense.config.eos_token_id = 700  # the specials and times after it keep their bits
    plain = gptq.apply(copy.deepcopy(dense), options, context).model.decoder.embed_tokens.weight
    options = replace(options, token_rows_in_8_bits=100, rare_token_rows=400)
    model = gptq.apply(dense, options, context)
    table = model.model.decoder.embed_tokens
    assert context.record["gptq"]["weights"]["3"] == 300 * 64
    assert torch.equal(table.weight[100:400], plain[100:400])
    assert torch.equal(table.weight[700:], plain[700:])
    whisper.save(model, context.processor, tmp_path / "saved", {})
    loaded = whisper.load(tmp_path / "saved")
    scheme = schemes(loaded)[loaded.model.decoder.embed_tokens]
    assert scheme.rows_in_3_bits == (400, 700)
    assert torch.equal(fake_quantise(table.weight, scheme), table.weight)
    export_onnx(loaded, context.processor, tmp_path / "int4", "int4")
    decoder = onnx.load(tmp_path / "int4" / "decoder.onnx")
    shapes = {tuple(tensor.dims) for tensor in decoder.graph.initializer}
    assert {(100, 64), (300, 2, 16), (300, 2, 4), (83, 2, 16)} <= shapes


@pytest.mark.parametrize("rows", [[3], [50, 400], [400, 400], [400, 784], [400.0, 500], 400])
def test_bad_rows_in_3_bits_are_refused(make_whisper, context, tmp_path, rows):
    model = gptq.apply(make_whisper(), replace(QUICK, token_rows_in_8_bits=100), context)
    model.config.edgewhisper["token_rows_in_3_bits"] = rows
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(Problem, match="must be two ascending integers between 100 and 783"):
        whisper.load(tmp_path / "bad")


def test_it_survives_save_and_load(make_whisper, context, tmp_path):
    model = gptq.apply(make_whisper(), QUICK, context)
    whisper.save(model, context.processor, tmp_path / "saved", {})
    loaded = whisper.load(tmp_path / "saved")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )
    steps = {scheme.steps for scheme in schemes(loaded).values() if scheme.bits == 4}
    assert steps == {LAYER_STEPS, TABLE_STEPS}


@pytest.mark.parametrize("exponents", [[0] * 31, [0.5] * 32, "none", [101] + [0] * 31])
def test_bad_column_exponents_are_refused(make_whisper, context, tmp_path, exponents):
    model = gptq.apply(make_whisper(), QUICK, context)
    model.config.edgewhisper["token_columns"] = exponents
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(Problem, match="token_columns must be 32 integers"):
        whisper.load(tmp_path / "bad")


def test_low_rank_layers_are_quantised_factor_by_factor(make_whisper, context):
    split = lite.apply(
        make_whisper(), lite.Options(theta_attn=0.5, theta_mlp=0.5, round_to=2), context
    )
    model = gptq.apply(split, QUICK, context)
    assert any(name.endswith(".down") for name in context.record["gptq"]["error"])
    assert all(scheme.bits in (4, 8) for scheme in schemes(model).values())


def test_what_cannot_be_quantised_is_refused(make_whisper, context):
    done = qat.apply(make_whisper(), qat.Options(), context)
    with pytest.raises(Problem, match="quantised already"):
        gptq.apply(done, QUICK, context)
    with pytest.raises(Problem, match="no clips to calibrate on"):
        gptq.apply(make_whisper(), QUICK, replace(context, train=[]))
    with pytest.raises(Problem, match="no linear layer matches"):
        gptq.apply(make_whisper(), replace(QUICK, layers="fc9"), context)
