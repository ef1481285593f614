"""Quantisers, training through them, and their codes in the artifact, to the bit."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import export, irregular, torch_steps, window
from onnx_sessions import open_model
from stored_weights import same_bits, stored_rows

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import pipeline, whisper
from edgewhisper.compress import METHODS, lite, qat, shear, short, shrink
from edgewhisper.compress.context import Context
from edgewhisper.compress.qat import StraightThrough, fake_quantised, settle
from edgewhisper.training import Training
from edgewhisper.whisper import GatherLinear, linears
from export.manifest import Spec
from export.onnx.graph import Graph
from export.onnx.layers import joint_linear, linear
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.quantise import (
    BLOCKS,
    LARGEST,
    LAYER_STEPS,
    SCALES,
    TABLE_STEPS,
    TINY,
    Scheme,
    dequantise,
    fake_quantise,
    in_steps,
    pack,
    pack_3_bits,
    quantise,
    schemes,
)
from export.shrink import layer_shapes
from export.weights import Linear

BRIEF = Training(steps=3, batch_size=2, learning_rate=1e-3)
KINDS = [Scheme(bits, per, block) for bits in (4, 8, 16) for per in SCALES for block in BLOCKS[:2]]
ALL_KINDS = pytest.mark.parametrize("scheme", KINDS, ids=lambda s: f"{s.bits}-{s.per}-{s.block}")
STEPS = [Scheme(4, steps=LAYER_STEPS), Scheme(4, steps=TABLE_STEPS), Scheme(3, steps=TABLE_STEPS)]
ALL_STEPS = pytest.mark.parametrize("scheme", STEPS, ids=lambda s: f"{s.bits}-{s.steps}")
LIMITS = {4: (-8, 7), 8: (-127, 127), 16: (-32767, 32767)}


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:3]


@pytest.fixture
def context(few, processor, tmp_path: Path) -> Context:
    return Context(processor=processor, train=few, dev=few, run_dir=tmp_path / "run")


def draw_weight(rng) -> torch.Tensor:
    """Of any shape and size, some rows zero, some values on a coarse grid, some tiny."""
    out, features = (int(n) for n in rng.integers(1, 80, size=2))
    weight = rng.standard_normal((out, features)) * 10.0 ** rng.uniform(-20, 10)
    if rng.random() < 0.3:
        weight[rng.integers(out)] = 0
    if rng.random() < 0.3:
        weight = np.rint(weight / np.abs(weight).max() * 7) if np.abs(weight).max() else weight
    if rng.random() < 0.3:
        weight[rng.integers(out)] *= 1e-35
    return torch.from_numpy(weight.astype(np.float32))


# -------------------------------------------------------------------------------- the quantisers


def test_int4_codes_of_a_row_match_the_hand_computed_ones():
    row = torch.tensor([[-8.0, 7, 3.4, 0.5, 1.5, -2.6] + [0.0] * 10 + [4.0, -1.0, 3.9]])
    codes, scale = quantise(row, Scheme(4, block=16))
    assert scale.tolist() == [[1.0, -0.5]]  # the largest of the second block is positive: code -8
    assert codes.tolist() == [[-8, 7, 3, 0, 2, -3] + [0] * 10 + [-8, 2, -8]]
    assert dequantise(codes, scale, Scheme(4, block=16))[0, -3:].tolist() == [4.0, -1.0, 4.0]


def test_scales_of_16_bit_codes_are_powers_of_two():
    codes, scale = quantise(torch.tensor([[32767.0, -1.0, 0.4], [0.6, 0.3, -0.6]]), Scheme(16))
    assert scale.flatten().tolist() == [1.0, 2.0**-15]
    assert codes[0].tolist() == [32767, -1, 0]


@ALL_KINDS
def test_quantising_twice_changes_no_bit(scheme, rng):
    for _ in range(30):
        weight = draw_weight(rng)
        codes, scale = quantise(weight, scheme)
        once = fake_quantise(weight, scheme)
        assert same_bits(dequantise(codes, scale, scheme), once)
        assert same_bits(fake_quantise(once, scheme), once)
        again = quantise(once, scheme)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scale)


@ALL_STEPS
def test_scales_with_steps_are_integers_times_a_power_of_two_per_row(scheme, rng):
    for _ in range(30):
        weight = draw_weight(rng)
        codes, scale = quantise(weight, scheme)
        once = fake_quantise(weight, scheme)
        assert same_bits(dequantise(codes, scale, scheme), once)
        assert same_bits(fake_quantise(once, scheme), once)
        assert same_bits(dequantise(*quantise(once, scheme), scheme), once)
        counts, step = in_steps(scale)
        assert torch.equal(counts.float() * step[:, None], scale)
        assert torch.equal(step.log2().round(), step.log2())
        assert counts.abs().min() >= 1 and counts.abs().max() <= scheme.steps
        if scheme.steps == LAYER_STEPS:
            assert (codes.abs().amax(1) * counts.abs().amax(1)).max() <= 127


@ALL_STEPS
def test_scales_with_steps_are_close_to_those_without(scheme, rng):
    weight = torch.from_numpy(rng.standard_normal((50, 64)).astype(np.float32))
    steps, plain = (
        (fake_quantise(weight, each) - weight).square().mean().sqrt()
        for each in (scheme, replace(scheme, steps=0, half_scales=True))
    )
    assert steps < plain * (1.1 if scheme.steps == LAYER_STEPS else 1.01)


@ALL_STEPS
@pytest.mark.parametrize("power", [-60, 0, 40])
def test_a_grid_with_steps_is_kept_whatever_its_largest_codes(scheme, power, rng):
    """As after error propagation, where a block need not have the largest code."""
    for _ in range(20):
        out, blocks = (int(n) for n in rng.integers(1, 6, 2))
        limit = LARGEST[scheme.bits]
        codes = rng.integers(-limit, limit, (out, blocks, scheme.block))
        codes = np.where(rng.random((out, blocks, 1)) < 0.5, codes // 2, codes)
        counts = rng.integers(1, scheme.steps + 1, (out, blocks, 1))
        weight = torch.from_numpy((codes * counts).reshape(out, -1) * 2.0**power).float()
        assert same_bits(fake_quantise(weight, scheme), weight + 0.0)


@ALL_KINDS
def test_codes_are_the_nearest_in_double_precision(scheme, rng):
    """Compare with an independent implementation in numpy's float64 that uses the same scales."""
    for _ in range(10):
        weight = draw_weight(rng)
        codes, scale = (x.numpy() for x in quantise(weight, scheme))
        if scheme.bits == 4:
            scale = scale.repeat(scheme.block, axis=1)[:, : weight.shape[1]]
        exact = weight.numpy().astype(np.float64) / scale
        low, high = LIMITS[scheme.bits]
        want = np.clip(np.rint(exact), low, high)
        undecided = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-5 * np.maximum(
            1, np.abs(exact)
        )
        assert ((codes == want) | (undecided & (np.abs(codes - exact) < 0.51))).all()
        assert low <= codes.min() and codes.max() <= high


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_exceed_the_exact_ones_by_at_most_one_bit_in_16(bits, rng):
    weight = torch.from_numpy(rng.standard_normal((200, 16)).astype(np.float32))
    _, scale = quantise(weight, Scheme(bits, block=16))
    exact = weight.abs().amax(1) / {4: 8, 8: 127}[bits]
    assert (scale[:, 0].abs() >= exact * (1 - 2**-23)).all()
    assert (scale[:, 0].abs() <= exact * (1 + 2**-15)).all()


def test_16_bit_codes_are_off_by_less_than_their_range_over_two_to_the_15(rng):
    """The range is that of the weights that share a scale, max|W|, not the rounded scale."""
    for per in SCALES:
        weight = draw_weight(rng)
        error = (fake_quantise(weight, Scheme(16, per)) - weight).abs()
        largest = weight.abs().amax(dim=1, keepdim=True) if per == "channel" else weight.abs().max()
        assert ((error < largest / 2**15) | (largest <= TINY)).all()


def test_32_bits_keep_the_weights(rng):
    weight = draw_weight(rng)
    assert fake_quantise(weight, Scheme(32)) is weight


def test_a_scale_per_tensor_is_that_of_the_largest_weight(rng):
    weight = torch.from_numpy(rng.standard_normal((7, 40)).astype(np.float32))
    for bits in (4, 8, 16):
        _, scale = quantise(weight, Scheme(bits, "tensor", block=16))
        assert len(scale.unique()) == 1
        row = weight.abs().amax(1).argmax()
        assert scale[0, 0].abs() == quantise(weight[row : row + 1], Scheme(bits))[1].abs().max()


def test_weights_below_minus_the_largest_do_not_overflow():
    """The authors' signed maximum would give -9 a code of -1143."""
    codes, _ = quantise(torch.tensor([[1.0, -9.0]]), Scheme(8, "tensor"))
    assert codes.tolist() == [[14, -127]]


def test_a_convolution_has_one_scale_for_all_taps_of_an_output(rng):
    kernel = torch.from_numpy(rng.standard_normal((5, 4, 3)).astype(np.float32))
    result = fake_quantise(kernel, Scheme(8))
    assert same_bits(result.flatten(1), fake_quantise(kernel.flatten(1), Scheme(8)))


def test_transposed_weights_have_their_scales_on_the_columns(rng):
    weight = draw_weight(rng)
    result = fake_quantise(weight, Scheme(8, transposed=True))
    assert same_bits(result.T.contiguous(), fake_quantise(weight.T, Scheme(8)))


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("steps", [0, LAYER_STEPS])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_runtime_reads_packed_codes_correctly(block, steps, few_rows, rng):
    """Includes inputs that do not fill the last block; int8 represents the inputs exactly."""
    for _ in range(3):
        out, features = (int(n) for n in rng.integers(1, 90, size=2))
        weight = rng.standard_normal((out, features)).astype(np.float32)
        scheme = Scheme(4, block=block, steps=steps)
        x = rng.integers(-127, 128, (1, 5, features)).astype(np.float32)
        x[..., 0::block] = 127  # so that activations scale by 1 in every block
        graph = Graph("int8")
        y = linear(graph, "x", [Linear(weight, scheme=scheme)], few_rows)
        specs = [Spec("x", x.shape)], [Spec(y, (1, 5, out))]
        session = open_model(graph.model("test", *specs))
        want = x @ fake_quantise(torch.from_numpy(weight), scheme).numpy().T
        result = session.run(None, {"x": x})[0]
        # one scale for all activations: 254 codes from -127 to 127, and zero
        coarse = 0.6 * np.abs(weight).sum(1).max() if steps and not few_rows else 0
        assert np.abs(result - want).max() <= 1e-4 * np.abs(want).max() + coarse


def test_packing_puts_two_codes_in_a_byte_the_earlier_one_low():
    packed = pack(torch.tensor([[-8, 7, 0] + [1] * 14], dtype=torch.int8), Scheme(4, block=16))
    assert packed.shape == (1, 2, 8)
    assert packed[0, 0, :2].tolist() == [0xF0, 0x98]
    assert packed[0, 1].tolist() == [0x89] + [0x88] * 7  # filled up with zeros


def test_packing_in_3_bits_fills_three_bytes_with_eight_codes():
    codes = torch.tensor([[-4, 3, -3, 2, 0, 1, -1, -2] * 2], dtype=torch.int8)
    first, second, third = pack_3_bits(codes, Scheme(3, block=16))
    assert first.shape == (1, 1, 2)
    # bytes of two codes plus 4: 70 61 54 23, twice; the last two are 54 and 23 again
    stored = [part[0, 0].tolist() for part in (first, second, third)]
    assert [[byte & 0x77 for byte in part] for part in stored] == [
        [0x70, 0x61],
        [0x54, 0x23],
        [0x70, 0x61],
    ]
    spare = [sum((part[i] >> 3 & 0x11) << k for k, part in enumerate(stored)) for i in (0, 1)]
    assert spare == [0x54, 0x23]


# ----------------------------------------------------------------------------- straight through


@ALL_KINDS
def test_the_gradient_is_taken_at_the_quantised_weight(scheme, rng):
    weight = draw_weight(rng).requires_grad_()
    target = torch.randn_like(weight)
    quantised = StraightThrough.apply(weight, scheme)
    (quantised * target).square().sum().backward()
    at = fake_quantise(weight.detach(), scheme).requires_grad_()
    (at * target).square().sum().backward()
    assert torch.equal(weight.grad, at.grad)


def in_bits(model, **options):
    qat.note_bits(model, qat.Precision(**options))
    return schemes(model)


def sounds(model):
    torch.manual_seed(3)
    features = torch.randn(2, 80, 2 * model.config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": torch.randint(700, (2, 5))}


def slim_of_every_kind(make_whisper, rng, context):
    """Gathered inputs, low-rank layers, heads that differ, a factorised token table."""
    model = irregular(make_whisper, rng)
    model = whisper.rebuild(model, model.state_dict(), layer_shapes(model))
    options = shear.Options(rank=8, calibration=2, training=Training(steps=0))
    return shear.apply(model, options, context)


def shared_keys(make_whisper, rng, context):
    """Attention with one key and one value for all heads."""
    options = lite.Options(theta_attn=0.5, theta_mlp=0.5, round_to=1, share=True, clips=2)
    return lite.apply(make_whisper(d_model=64, heads=4), options, context)


def dense(make_whisper, rng, context):
    return make_whisper()


MODELS = pytest.mark.parametrize("make", [dense, slim_of_every_kind, shared_keys])


@MODELS
def test_passes_use_quantised_weights_and_gradients_reach_the_float_weights(
    make, make_whisper, context, rng
):
    model = make(make_whisper, rng, context)
    chosen = in_bits(model, encoder=4, decoder=8, stem=8)
    rounded = copy.deepcopy(model)
    settle(schemes(rounded))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = sounds(model)
    with fake_quantised(model, lambda: chosen):
        quantised = model(**inputs).logits
    expected = rounded(**inputs).logits
    assert torch.equal(quantised, expected)
    for logits in (quantised, expected):
        logits.square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one, before[name])
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert not torch.equal(model(**inputs).logits, expected), "outside, nothing is rounded"


def test_a_failing_pass_keeps_the_weights(tiny_whisper):
    before = dict(tiny_whisper.named_parameters())
    chosen = in_bits(tiny_whisper)
    with pytest.raises(ValueError), fake_quantised(tiny_whisper, lambda: chosen):
        tiny_whisper(input_features=torch.zeros(1, 80, 7), decoder_input_ids=torch.zeros(1, 1))
    assert all(p is before[name] for name, p in tiny_whisper.named_parameters())


# ------------------------------------------------------------------------------------- the step


def test_32_bits_and_no_steps_change_no_bit(tiny_whisper, context):
    before = copy.deepcopy(tiny_whisper.state_dict())
    options = qat.Options(encoder=32, decoder=32, token_table=32)
    after = qat.apply(tiny_whisper, options, context).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@MODELS
def test_without_steps_training_rounds_to_nearest(make, make_whisper, context, rng):
    model = make(make_whisper, rng, context)
    slim = shrink.slimmed(model)[0]
    result = qat.apply(model, qat.Options(encoder=4, decoder=8, stem=8), context)
    for module, expected in zip(schemes(result).items(), schemes_like(result, slim), strict=True):
        assert same_bits(module[0].weight, fake_quantise(expected.weight, module[1]))
    told = context.record["qat"]
    assert told["weights"].keys() == {"4", "8"}
    assert 0 < told["error"]["8"] < told["error"]["4"] < 0.2


def schemes_like(quantised, other):
    """The modules of another model of the same shapes, in the order of schemes()."""
    names = {module: name for name, module in quantised.named_modules()}
    return [other.get_submodule(names[module]) for module in schemes(quantised)]


@pytest.mark.parametrize("scales", SCALES)
def test_trained_weights_lie_on_their_grids_and_the_loss_falls(scales, tiny_whisper, context):
    options = qat.Options(
        encoder=4,
        decoder=4,
        scales=scales,
        keep=0.5,
        training=Training(steps=8, batch_size=2, learning_rate=3e-3),
    )
    before = copy.deepcopy(tiny_whisper)
    model = qat.apply(tiny_whisper, options, context)
    for module, scheme in schemes(model).items():
        assert same_bits(fake_quantise(module.weight, scheme), module.weight)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    told = context.record["qat"]["training"]
    assert told["last_loss"] < told["first_loss"]
    rounded = qat.apply(before, replace(options, training=Training(steps=0)), context)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(model.parameters(), rounded.parameters(), strict=True)
    )


def test_training_stays_close_to_the_recipes_first_model(make_whisper, context, monkeypatch):
    calls = []
    monkeypatch.setattr(qat, "distance_term", lambda *given: calls.append(given[:2]))
    original, model = make_whisper(), make_whisper()
    options = qat.Options(keep=0.7, training=Training(steps=1, batch_size=2))
    qat.apply(model, options, replace(context, original=original))
    assert calls[0] == (original, 0.7)


def test_two_steps_share_the_layers(tiny_whisper, context):
    """The layers of the second step get its bits; the others keep those of the first."""
    model = qat.apply(tiny_whisper, qat.Options(encoder=8, decoder=8), context)
    only = qat.Options(layers="*.decoder.*.fc?", decoder=4, training=BRIEF)
    model = qat.apply(model, only, context)
    record = model.config.edgewhisper
    assert set(record["encoder"][0]["bits"].values()) == {8}
    assert {n for n, bits in record["decoder"][1]["bits"].items() if bits == 4} == {"fc1", "fc2"}
    for module, scheme in schemes(model).items():
        assert same_bits(fake_quantise(module.weight, scheme), module.weight)


def test_a_pattern_that_matches_no_layer_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match=r"no linear layer matches 'fc3'"):
        qat.apply(tiny_whisper, qat.Options(layers="fc3"), context)


def test_dead_structure_is_removed_before_quantisation_and_not_after(make_whisper, context):
    model = make_whisper()
    with torch.no_grad():
        model.model.encoder.layers[0].fc2.weight[:, :5] = 0
    model = qat.apply(model, qat.Options(encoder=4), context)
    assert model.config.edgewhisper["encoder"][0]["ffn"] == 43
    with pytest.raises(Problem, match=r"shrink: \d+ weights of the model are quantised") as problem:
        shrink.apply(model, shrink.Options(), context)
    assert "before" in problem.value.hint


def test_bits_survive_later_methods(tiny_whisper, context):
    model = qat.apply(tiny_whisper, qat.Options(encoder=4, stem=8, block=16), context)
    model = short.apply(model, short.Options(training=Training(steps=0)), context)
    result = model.config.edgewhisper
    assert (result["block"], result["stem_bits"], result["encoder"][1]["bits"]["fc2"]) == (16, 8, 4)
    assert result["windows"] == [100, 200, 300]


MOVING = ["tspar", "imp", "wsap", "obs", "lite", "merge", "shear", "short", "recover", "shrink"]
"""Methods that take weights off their grids, by default."""


@pytest.mark.parametrize("method", MOVING)
def test_no_step_changes_quantised_input(method, tiny_whisper, context):
    model = qat.apply(tiny_whisper, qat.Options(encoder=32, decoder=32), context)  # the token table
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = importlib.import_module(METHODS[method])
    with pytest.raises(Problem, match=f"{method}: 1 weights of the model are quantised") as problem:
        module.apply(model, module.Options(), context)
    assert f"put the step {method} before the one that quantises" in problem.value.hint
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert set(context.record) == {"qat"}


@pytest.mark.parametrize("after", ["qat", "kdq"])
@pytest.mark.parametrize("first", ["qat", "kdq"])
def test_quantised_weights_stay_on_their_grid_if_quantised_training_follows(
    first, after, tiny_whisper, context
):
    """Also weights that the second step is not about; the order rule lets it pass for that."""
    some = qat.Precision(encoder=4, decoder=8, block=16)
    others = qat.Precision(layers="*.fc1", decoder=4, block=16, token_table=16)
    model = tiny_whisper
    for method, record in ((first, some), (after, others)):
        own = replace(context, run_dir=context.run_dir / f"{method}-{record.decoder}")
        fields = {"quantise": record} if method == "kdq" else vars(record)
        module = importlib.import_module(METHODS[method])
        model = module.apply(model, module.Options(training=BRIEF, **fields), own)
    assert model.config.edgewhisper["decoder"][0]["bits"]["fc2"] == 8
    for module, scheme in schemes(model).items():
        assert same_bits(fake_quantise(module.weight, scheme), module.weight)


# --------------------------------------------------------------------------- save, load, export


@MODELS
def test_bits_survive_save_and_load(make, make_whisper, context, rng, tmp_path):
    options = qat.Options(encoder=4, decoder=16, token_table=16, stem=8)
    model = qat.apply(make(make_whisper, rng, context), options, context)
    whisper.save(model, context.processor, tmp_path / "out", {})
    again = whisper.load(tmp_path / "out")
    assert again.config.edgewhisper == model.config.edgewhisper
    assert list(schemes(again).values()) == list(schemes(model).values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


PRECISIONS = [
    qat.Precision(encoder=8, decoder=8),
    qat.Precision(encoder=4, decoder=8, stem=8, block=16),
    qat.Precision(encoder=8, decoder=4, scales="tensor", stem=8),
    qat.Precision(encoder=16, decoder=32, token_table=16),
    qat.Precision(encoder=32, decoder=16, token_table=32),
]


def named(precision: qat.Precision) -> str:
    return f"encoder{precision.encoder}-decoder{precision.decoder}-{precision.scales}"


@pytest.mark.parametrize("precision", PRECISIONS, ids=named)
@MODELS
def test_the_artifact_holds_the_checkpoints_weights_to_the_bit(
    make, precision, make_whisper, context, processor, rng, tmp_path
):
    """Save, load, export; then read the graphs from disk, unpack the codes and multiply."""
    model = make(make_whisper, rng, context)
    model = qat.apply(model, qat.Options(**vars(precision)), context)
    whisper.save(model, processor, tmp_path / "checkpoint", {})
    model = whisper.load(tmp_path / "checkpoint")
    (tmp_path / "artifact").mkdir()
    manifest = export_onnx(model, processor, tmp_path / "artifact", "int8")
    rows = stored_rows(*(tmp_path / f"artifact/{n}.onnx" for n in ("encoder", "decoder")))
    operators = {4: "MatMulNBits", 8: "int8", 16: "MatMul", 32: "MatMul"}
    for side in ("encoder", "decoder"):
        for name, module in linears(model):
            if f".{side}." in name:
                wide, plain = rows_of(module, model.config.d_model)
                pairs = zip(wide, plain, strict=True)
                expected = operators[getattr(precision, side)]
                assert all(expected in rows[one] | rows[other] for one, other in pairs), name
    table = model.model.decoder.embed_tokens
    factors = [table.rows.weight, table.up.weight.T] if hasattr(table, "rows") else [table.weight]
    for factor in factors:
        assert all((row + 0.0).numpy().tobytes() in rows for row in factor.detach().contiguous())
    if precision.stem == 8:
        for conv in (model.model.encoder.conv1, model.model.encoder.conv2):
            kernels = conv.weight.detach().flatten(1)
            assert all("Conv" in rows[(row + 0.0).numpy().tobytes()] for row in kernels)
    assert manifest["layers"]["encoder"][0]["bits"]["fc1"] == precision.encoder
    assert manifest["layers"]["token_bits"] == precision.token_table


def rows_of(module, d_model) -> tuple[list[bytes], list[bytes]]:
    """Rows of a weight with zeros for inputs that are not read, and without: a graph has one of
    the two."""
    plain = wide = module.weight.detach() + 0.0
    if isinstance(module, GatherLinear):
        wide = plain.new_zeros(len(plain), d_model)
        wide[:, module.inputs] = plain
    return [row.numpy().tobytes() for row in wide], [row.numpy().tobytes() for row in plain]


@MODELS
def test_logits_of_the_artifact_are_close_to_the_checkpoints(
    make, make_whisper, context, processor, rng, tmp_path
):
    """The runtime rounds activations, but the weights are equal: the logits are much closer than
    those of the float model.
    """
    model = make(make_whisper, rng, context)
    model = qat.apply(model, qat.Options(encoder=4, decoder=4, stem=8, block=16), context)
    pcm, ids = window(processor, rng), rng.integers(0, 700, 4).tolist()
    want = torch_steps(model, processor, pcm, [ids])[0]
    for precision, tolerance in (("fp32", 1e-3), ("int8", 0.1 * np.abs(want).max())):
        exported = export(model, processor, tmp_path / precision, precision)
        result, _ = exported.step(ids, exported.no_past(), exported.encode(pcm))
        assert np.abs(result - want).max() < tolerance


def test_layers_of_one_input_stored_alike_share_a_product(rng):
    x = rng.standard_normal((1, 6, 20)).astype(np.float32)
    weights = [rng.standard_normal((n, 20)).astype(np.float32) for n in (3, 4, 5, 6)]
    kinds = [Scheme(8), Scheme(4, block=16), Scheme(8, block=64), Scheme(32)]
    graph = Graph("int8")
    branches = [
        [Linear(weight, scheme=scheme)] for weight, scheme in zip(weights, kinds, strict=True)
    ]
    names = joint_linear(graph, "x", branches)
    nodes = graph.model("test", [], []).graph.node
    assert sorted(node.op_type for node in nodes) == [
        "DynamicQuantizeMatMul",
        "MatMul",
        "MatMulNBits",
        "Split",
    ]
    outputs = [Spec(name, (1, 6, len(w))) for name, w in zip(names, weights, strict=True)]
    session = open_model(graph.model("test", [Spec("x", x.shape)], outputs))
    for result, weight, scheme in zip(session.run(names, {"x": x}), weights, kinds, strict=True):
        want = x @ fake_quantise(torch.from_numpy(weight), scheme).numpy().T
        assert np.abs(result - want).max() < 0.05 * np.abs(want).max()


def test_a_checkpoint_in_int4_has_the_documented_size(make_whisper, context, processor, tmp_path):
    model = make_whisper(d_model=64, ffn=256)
    sizes = {}
    for bits in (32, 16, 8, 4):
        options = qat.Options(encoder=bits, decoder=bits)
        quantised = qat.apply(copy.deepcopy(model), options, context)
        (tmp_path / str(bits)).mkdir()
        export_onnx(quantised, processor, tmp_path / str(bits), "int8")
        sizes[bits] = sum(path.stat().st_size for path in (tmp_path / str(bits)).glob("*.onnx"))
    weights = sum(module.weight.numel() for _, module in linears(model))
    rows = sum(len(module.weight) for _, module in linears(model))
    assert sizes[32] - sizes[16] == pytest.approx(2 * weights - 4 * rows, abs=12_000)
    assert sizes[32] - sizes[8] == pytest.approx(3 * weights - 4 * rows, abs=12_000)
    assert sizes[32] - sizes[4] == pytest.approx((4 - 0.5 - 4 / 32) * weights, abs=12_000)


def test_export_removes_nothing_from_a_quantised_model(
    make_whisper, context, processor, clips, tmp_path
):
    """Rounding made columns of zeros; without them, the other weights would get other scales."""
    model = make_whisper()
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            layer.fc2.weight[:, :9] *= 1e-3
    model = qat.apply(model, qat.Options(encoder=4, decoder=4), context)
    assert (model.model.encoder.layers[0].fc2.weight == 0).all(dim=0).sum() >= 9
    whisper.save(model, processor, tmp_path / "checkpoint", {})
    manifest = tmp_path / "clips.jsonl"
    lines = [json.loads(line) for line in clips.read_text().splitlines()[:1]]
    record = [line | {"audio": str(clips.parent / line["audio"])} for line in lines]
    manifest.write_text("\n".join(map(json.dumps, record)) + "\n")
    off = pipeline.Gating("off")  # a random model transcribes nothing
    given = str(tmp_path / "checkpoint"), "fp32", manifest, tmp_path / "artifact"
    out = pipeline.export(*given, gating=off)
    layers = json.loads((out / "manifest.json").read_text())["layers"]
    assert layers["encoder"][0]["ffn"] == 48


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "record"),
    [
        ({"token_bits": 3}, r"token_bits is 3; it must be one of 4, 8, 16, 32"),
        ({"token_rows_in_8_bits": -1}, r"token_rows_in_8_bits is -1; it must be between 1 and 782"),
        ({"stem_bits": 16}, r"stem_bits is 16; it must be one of 8, 32"),
        ({"block": 24}, r"block is 24; it must be one of 16, 32, 64, 128, 256"),
        ({"block": True}, r"block is True"),
        ({"scales": "row"}, r"scales is 'row'; it must be one of channel, tensor"),
        ({"bits": {"fc1": 3}}, r"encoder.layers.0.bits.fc1 is 3; it must be one of 4, 8, 16, 32"),
        ({"bits": {"fc3": 8}}, r"encoder.layers.0.bits is {'fc3': 8}; it must be a table of"),
        ({"bits": {"encoder_attn.q_proj": 8}}, r"encoder.layers.0.bits is .*; it must be a table"),
        ({"bits": [8]}, r"encoder.layers.0.bits is \[8\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_damaged_precisions_are_refused(change, record, tiny_whisper, context, tmp_path):
    model = qat.apply(tiny_whisper, qat.Options(), context)
    whisper.save(model, context.processor, tmp_path / "out", {})
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    own = config["edgewhisper"]
    (own["encoder"][0] if "bits" in change else own).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(Problem, match=record) as problem:
        whisper.load(tmp_path / "out")
    assert "damaged" in problem.value.hint
