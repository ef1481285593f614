"""Removal of dead structure: a shrunk model has the outputs of the masked one."""

from __future__ import annotations

import copy

import pytest
import torch
from dead_structure import KINDS, attentions, kill, layers
from same_function import largest_difference
from torch import nn

from edgewhisper import whisper
from edgewhisper.compress.shrink import slimmed
from export.cost import count_parameters
from export.shrink import shrink

TOLERANCE = 1e-4


def rebuilt(model, **options):
    shrunk = shrink(model, **options)
    return whisper.rebuild(model, shrunk.tensors, shrunk.layers)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_removed_equals_masked(kind, make_whisper, rng):
    masked = kill(make_whisper(heads=int(rng.choice([1, 2, 4]))), kind, rng)
    slim = rebuilt(masked)
    assert largest_difference(masked, slim, rng) < TOLERANCE
    if kind != "whole_heads" or masked.config.encoder_attention_heads > 1:
        assert count_parameters(slim)["total"] < count_parameters(masked)["total"]


@pytest.mark.parametrize("draw", range(3))
def test_removed_equals_masked_on_random_shapes(draw, make_whisper, rng):
    heads = int(rng.integers(1, 5))
    masked = make_whisper(
        d_model=2 * heads * int(rng.integers(2, 7)),
        heads=heads,
        ffn=int(rng.integers(4, 70)),
        encoder_layers=int(rng.integers(1, 4)),
        decoder_layers=int(rng.integers(1, 4)),
    )
    for kind in rng.permutation(list(KINDS))[: rng.integers(1, 5)]:
        kill(masked, kind, rng)
    assert largest_difference(masked, rebuilt(masked), rng) < TOLERANCE


@pytest.mark.parametrize("kind", ["fc1_rows", "value_rows"])
def test_without_folded_biases_the_error_is_large(kind, tiny_whisper, rng):
    """Constant outputs of dead units must be folded into biases."""
    masked = kill(tiny_whisper, kind, rng)
    shrunk = shrink(masked)
    for name, tensor in masked.state_dict().items():
        if name.endswith(("fc2.bias", "out_proj.bias")):
            shrunk.tensors[name] = tensor
    unfolded = whisper.rebuild(masked, shrunk.tensors, shrunk.layers)
    assert largest_difference(masked, unfolded, rng) > 0.01


def test_a_model_without_dead_structure_does_not_change(tiny_whisper, rng):
    shrunk = shrink(tiny_whisper)
    assert same_tensors(shrunk.tensors, tiny_whisper.state_dict())
    attention = {"heads": 2, "qk_dim": 16, "v_dim": 16}
    rest = {"ffn": 48, "ranks": {}, "inputs": {}}
    assert shrunk.layers == {
        "format": 1,
        "encoder": [{"self_attn": attention} | rest] * 2,
        "decoder": [{"self_attn": attention, "encoder_attn": attention} | rest] * 2,
    }


def test_the_input_model_does_not_change(tiny_whisper, rng):
    kill(tiny_whisper, "all_kinds", rng)
    before = copy.deepcopy(tiny_whisper.state_dict())
    rebuilt(tiny_whisper)
    assert same_tensors(before, tiny_whisper.state_dict())


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shrinking_again_changes_nothing(kind, round_to, tiny_whisper, rng):
    kill(tiny_whisper, kind, rng)
    once = shrink(tiny_whisper, round_to)
    twice = shrink(whisper.rebuild(tiny_whisper, once.tensors, once.layers), round_to)
    assert twice.layers == once.layers
    assert same_tensors(twice.tensors, once.tensors)


def test_a_slim_model_is_shrunk_further(tiny_whisper, rng):
    slim = rebuilt(kill(tiny_whisper, "all_kinds", rng))
    for kind in ("fc1_rows", "input_columns", "key_rows"):
        if all(attention.k_proj.out_features > 2 for attention in attentions(slim)):
            kill(slim, kind, rng)
    slimmer = rebuilt(slim)
    assert largest_difference(slim, slimmer, rng) < TOLERANCE
    assert count_parameters(slimmer)["total"] <= count_parameters(slim)["total"]


def test_a_low_rank_layer_loses_its_dead_outputs_and_inputs(tiny_whisper, rng):
    layer = tiny_whisper.model.encoder.layers[0]
    with torch.no_grad():
        for parent, name in (
            (layer, "fc1"),
            (layer, "fc2"),
            (layer.self_attn, "v_proj"),
            (layer.self_attn, "out_proj"),
        ):
            dense = getattr(parent, name)
            down = nn.Linear(dense.in_features, 5, bias=False)
            setattr(parent, name, whisper.LowRank(down, nn.Linear(5, dense.out_features)))
        layer.fc1.up.weight[:7] = 0
        layer.fc2.down.weight[:, 5:10] = 0
        layer.fc1.down.weight[:, 20:] = 0
        layer.self_attn.v_proj.up.weight[[0, 16]] = 0
    shrunk = shrink(tiny_whisper)
    slim = whisper.rebuild(tiny_whisper, shrunk.tensors, shrunk.layers)
    result = shrunk.layers["encoder"][0]
    assert (result["ffn"], result["self_attn"]["v_dim"]) == (38, 15)
    assert result["ranks"] == {
        name: 5 for name in ("self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    }
    assert result["inputs"] == {"fc1": 20}
    assert largest_difference(tiny_whisper, slim, rng) < TOLERANCE


def test_a_query_channel_with_a_bias_is_kept(tiny_whisper):
    """A zero query row is removable only with a zero bias, because q = bias multiplies the key."""
    attention = tiny_whisper.model.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight[[3, 20]] = 0
        attention.q_proj.bias[20] = 0
    assert shrink(tiny_whisper).layers["encoder"][0]["self_attn"]["qk_dim"] == 16
    with torch.no_grad():
        attention.q_proj.bias[3] = 0
    assert shrink(tiny_whisper).layers["encoder"][0]["self_attn"]["qk_dim"] == 15


def test_heads_keep_as_many_channels_as_the_largest_head(tiny_whisper):
    attention = tiny_whisper.model.decoder.layers[0].encoder_attn
    with torch.no_grad():
        attention.out_proj.weight[:, 0:10] = 0  # head 0 keeps 6 channels
        attention.out_proj.weight[:, 16:20] = 0  # head 1 keeps 12
        attention.v_proj.weight[:10] = torch.arange(10.0)[:, None]
        rows = attention.v_proj.weight.clone()
    shrunk = shrink(tiny_whisper)
    assert shrunk.layers["decoder"][0]["encoder_attn"] == {"heads": 2, "qk_dim": 16, "v_dim": 12}
    kept = shrunk.tensors["model.decoder.layers.0.encoder_attn.v_proj.weight"]
    assert torch.equal(kept, rows[[*range(4, 16), *range(20, 32)]])


@pytest.mark.parametrize("kind", ["fc1_rows", "fc2_columns", "value_rows", "key_rows"])
def test_counts_are_rounded_up_on_request(kind, tiny_whisper, rng):
    kill(tiny_whisper, kind, rng)
    plain, rounded = shrink(tiny_whisper).layers, shrink(tiny_whisper, round_to=8).layers
    for side in ("encoder", "decoder"):
        for before, after in zip(plain[side], rounded[side], strict=True):
            assert after["ffn"] == -(-before["ffn"] // 8) * 8
            for name in ("qk_dim", "v_dim"):
                assert after["self_attn"][name] == -(-before["self_attn"][name] // 8) * 8
    assert largest_difference(tiny_whisper, rebuilt(tiny_whisper, round_to=8), rng) < TOLERANCE


def test_one_of_everything_remains_when_all_is_dead(tiny_whisper, rng):
    with torch.no_grad():
        for layer in layers(tiny_whisper):
            layer.fc1.weight.zero_()
        for attention in attentions(tiny_whisper):
            attention.v_proj.weight.zero_()
            attention.k_proj.weight.zero_()
            attention.q_proj.weight.zero_()
    slim = rebuilt(tiny_whisper)
    shape = slim.config.edgewhisper["decoder"][1]
    one = {"heads": 1, "qk_dim": 1, "v_dim": 1}
    assert (shape["self_attn"], shape["encoder_attn"], shape["ffn"]) == (one, one, 1)
    assert shape["inputs"]["fc1"] == shape["inputs"]["encoder_attn.q_proj"] == 1
    assert largest_difference(tiny_whisper, slim, rng) < TOLERANCE


def test_inputs_of_removed_units_are_removed(tiny_whisper, rng):
    """fc2 ignores ten units, and only these read features 0 to 9."""
    layer = tiny_whisper.model.encoder.layers[1]
    with torch.no_grad():
        layer.fc1.weight[10:, :10] = 0
        layer.fc2.weight[:, :10] = 0
    shape = shrink(tiny_whisper).layers["encoder"][1]
    assert (shape["ffn"], shape["inputs"]) == (38, {"fc1": 22})


def test_a_gather_that_saves_little_is_not_made(tiny_whisper):
    fc1 = tiny_whisper.model.encoder.layers[0].fc1
    with torch.no_grad():
        fc1.weight[:, :3] = 0
    assert shrink(tiny_whisper).layers["encoder"][0]["inputs"] == {}
    assert shrink(tiny_whisper, min_saving=0).layers["encoder"][0]["inputs"] == {"fc1": 29}
    with torch.no_grad():
        fc1.weight[:, 31] = 0  # 4 of 32 columns are an eighth
    shrunk = shrink(tiny_whisper)
    assert shrunk.layers["encoder"][0]["inputs"] == {"fc1": 28}
    name = "model.encoder.layers.0.fc1.inputs"
    assert shrunk.tensors[name].tolist() == list(range(3, 31))


def test_the_parameter_count_follows_from_the_shapes(tiny_whisper, rng):
    slim = rebuilt(kill(tiny_whisper, "all_kinds", rng))
    d = slim.config.d_model
    expected = sum(
        parameter.numel() for name, parameter in slim.named_parameters() if ".layers." not in name
    )
    for side, norms in (("encoder", 2), ("decoder", 3)):
        for shape in slim.config.edgewhisper[side]:
            expected += norms * 2 * d
            read = {name: shape["inputs"].get(name, d) for name in _readers(shape)}
            expected += shape["ffn"] * (read["fc1"] + 1) + d * (shape["ffn"] + 1)
            for name in shape.keys() & {"self_attn", "encoder_attn"}:
                qk = shape[name]["heads"] * shape[name]["qk_dim"]
                v = shape[name]["heads"] * shape[name]["v_dim"]
                expected += qk * (read[f"{name}.q_proj"] + 1) + qk * read[f"{name}.k_proj"]
                expected += v * (read[f"{name}.v_proj"] + 1) + d * (v + 1)
    assert count_parameters(slim)["total"] == expected


def _readers(shape):
    names = [name for name in ("self_attn", "encoder_attn") if name in shape]
    return ["fc1", *(f"{name}.{part}_proj" for name in names for part in "qkv")]


def test_a_shrunk_model_survives_save_and_load(tiny_whisper, processor, rng, tmp_path):
    slim = rebuilt(kill(tiny_whisper, "all_kinds", rng))
    whisper.save(slim, processor, tmp_path / "slim", {})
    loaded = whisper.load(tmp_path / "slim")
    assert same_tensors(slim.state_dict(), loaded.state_dict())
    assert loaded.config.edgewhisper == slim.config.edgewhisper


@pytest.mark.parametrize(
    ("side", "dead", "left"), [("encoder", [1], 2), ("decoder", [1, 2], 1), ("decoder", [0, 1], 2)]
)
def test_layers_that_add_constants_are_removed_but_not_the_first(
    side, dead, left, make_whisper, processor, rng, tmp_path
):
    model = make_whisper(encoder_layers=3, decoder_layers=3)
    model.generation_config.alignment_heads = [[0, 0], [1, 1], [2, 0]]
    with torch.no_grad():
        for layer in (getattr(model.model, side).layers[number] for number in dead):
            for last in (layer.self_attn.out_proj, layer.fc2):
                last.weight.zero_()
                last.bias.normal_()
            if side == "decoder":
                layer.encoder_attn.out_proj.weight.zero_()
    slim, heads = slimmed(model)
    assert len(slim.config.edgewhisper[side]) == getattr(slim.config, f"{side}_layers") == left
    assert largest_difference(model, slim, rng) < TOLERANCE
    if side == "decoder":
        assert heads["after"][-1] == [left - 1, 0]
    whisper.save(slim, processor, tmp_path / "slim", {})
    assert largest_difference(slim, whisper.load(tmp_path / "slim"), rng) < TOLERANCE
    assert shrink(slim).layers == slim.config.edgewhisper | {"format": 1}
