"""LiteASR: the whole step, recovery, saving, shrinking and export."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from dead_structure import kill
from low_rank_layers import FINE, draw_layer, low_rank_layers, split_layer
from torch import nn
from transformers import WhisperConfig

from edgewhisper import decoding, whisper
from edgewhisper.calibration import Moments, Point, Speech, collect, collect_together
from edgewhisper.compress import lite, output_statistics, shrink
from edgewhisper.compress.lite import Options
from edgewhisper.compress.low_rank import principal_axes, split
from edgewhisper.compress.output_statistics import OutputStatistics, calibrate, observation_points
from edgewhisper.training import Training
from edgewhisper.whisper import LowRank
from export.problem import Problem

ENCODER = "model.encoder.layers.0"


# --------------------------------------------------------------------------- flat spectra and sizes


def test_a_model_with_flat_spectra_does_not_change(make_whisper, context, rng, monkeypatch):
    """Orthogonal weights and white noise: only the full rank keeps 0.999 of the variance."""
    model = make_whisper(d_model=2 * int(rng.integers(17, 60)), ffn=int(rng.integers(33, 150)))

    def white(model, points, *_) -> dict[Point, Moments]:
        moments = {}
        for point in points:
            weight = model.get_submodule(point.module).weight
            width = weight.shape[0 if point.side == "output" else 1]
            moments[point] = Moments(width)
            moments[point].add(torch.cat([torch.eye(width), -torch.eye(width)]))
        return moments

    for layer in model.model.encoder.layers:
        torch.nn.init.orthogonal_(layer.fc1.weight)
    monkeypatch.setattr(output_statistics, "collect", white)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = Options(layers="*.encoder.*.fc1", theta_mlp=0.999, round_to=int(rng.integers(1, 17)))
    made = lite.apply(model, options, context)
    assert [layer["rank"] for layer in context.record["lite"]["layers"].values()] == [None, None]
    parameters = context.record["lite"]["parameters"]
    assert parameters["after"] == parameters["before"]
    assert not any(isinstance(module, LowRank) for module in made.modules())
    assert all(torch.equal(before[name], t) for name, t in made.state_dict().items())


def test_parameters_of_large_v3_are_counted_from_its_ranks():
    """The dense encoder has 635 M parameters; attention and feed-forward have one rank each."""
    config = WhisperConfig(
        d_model=1280,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        num_mel_bins=128,
        decoder_layers=1,
        decoder_attention_heads=20,
    )
    attention, mlp = 320, 512
    layer = {
        "self_attn": {"heads": 20, "qk_dim": 64, "v_dim": 64},
        "ffn": 5120,
        "ranks": {f"self_attn.{n}_proj": attention for n in ("q", "k", "v", "out")}
        | {"fc1": mlp, "fc2": mlp},
        "biases": ["self_attn.k_proj"],
    }
    decoder = {"heads": 20, "qk_dim": 64, "v_dim": 64}
    config.edgewhisper = {
        "format": 1,
        "encoder": [layer] * 32,
        "decoder": [{"self_attn": decoder, "encoder_attn": decoder, "ffn": config.decoder_ffn_dim}],
    }
    dense = copy.deepcopy(config)
    del dense.edgewhisper
    with torch.device("meta"):
        result, before = (
            sum(
                p.numel()
                for p in whisper.WhisperForConditionalGeneration(c).model.encoder.parameters()
            )
            for c in (config, dense)
        )
    assert before == pytest.approx(635e6, rel=0.005)
    saved = 4 * (1280**2 - attention * 2560) + 2 * (1280 * 5120 - mlp * 6400) - 1280
    assert result == before - 32 * saved


# ------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_budget_is_the_remaining_share_of_weights(share, narrow_whisper, context):
    options = replace(FINE, budget=share, round_to=1)
    before = narrow_whisper.model.encoder.layers
    dense = sum(p.numel() for p in before.parameters() if p.dim() == 2)
    slim = lite.apply(narrow_whisper, options, context)
    remaining = sum(p.numel() for p in slim.model.encoder.layers.parameters() if p.dim() == 2)
    assert share - 0.02 < remaining / dense <= share


def test_a_budget_in_macs_counts_positions_and_tokens(tiny_whisper, few, processor):
    """Layers run on 300 positions or 32 tokens; keys and values of cross-attention on positions."""
    names = lite.chosen(tiny_whisper, "*")
    outputs = calibrate(tiny_whisper, names, Speech(few[:1], processor))
    parameters, in_macs = (
        lite.budget_choices(tiny_whisper, outputs, replace(FINE, budget_of=kind))
        for kind in ("parameters", "macs")
    )
    for name in names:
        runs = 32 if "decoder" in name and "encoder_attn.k" not in name else 300
        runs = 300 if name.endswith("encoder_attn.v_proj") else runs
        assert parameters[name][0].cost == tiny_whisper.get_submodule(name).weight.numel()
        for one, other in zip(parameters[name], in_macs[name], strict=True):
            assert (one.rank, one.loss, one.cost * runs) == (other.rank, other.loss, other.cost)


# ----------------------------------------------------------------------------------- the whole step


@pytest.mark.parametrize("sequential", [False, True], ids=["at-once", "sequential"])
def test_thresholds_of_one_change_no_bit(sequential, tiny_whisper, context):
    before = copy.deepcopy(tiny_whisper.state_dict())
    options = Options(theta_attn=1.0, theta_mlp=1.0, round_to=1, sequential=sequential)
    same = lite.apply(tiny_whisper, options, context)
    assert all(torch.equal(same.state_dict()[name], before[name]) for name in before)
    assert not hasattr(same.config, "edgewhisper")
    assert {record["rank"] for record in context.record["lite"]["layers"].values()} == {None}


def test_only_the_encoder_changes_and_nothing_is_trained(narrow_whisper, context):
    before = copy.deepcopy(narrow_whisper.state_dict())
    slim = lite.apply(narrow_whisper, FINE, context)
    assert low_rank_layers(slim)
    layers = ("model.encoder.layers", *low_rank_layers(slim))
    for name, tensor in slim.state_dict().items():
        if not name.startswith(layers):
            assert torch.equal(tensor, before[name])
    assert all(name.startswith("model.encoder") for name in low_rank_layers(slim))
    record = context.record["lite"]
    assert record["recovery"]["steps"] == 0
    assert record["parameters"]["after"]["total"] < record["parameters"]["before"]["total"]
    assert record["macs"]["after"]["encoder"] < record["macs"]["before"]["encoder"]
    assert record["macs"]["after"]["cross"] == record["macs"]["before"]["cross"]


def test_split_layers_keep_the_mean_and_the_recorded_energy(
    narrow_whisper, context, few, processor
):
    """Measured on the calibration speech with the original inputs, also for key projections."""
    dense = copy.deepcopy(narrow_whisper)
    slim = lite.apply(narrow_whisper, FINE, context)
    speech = Speech(few, processor)
    split_up = low_rank_layers(slim)
    assert any(name.endswith("k_proj") for name in split_up)
    for name, layer in split_up.items():
        linear = dense.get_submodule(name)
        rows = []
        hook = linear.register_forward_pre_hook(lambda m, x, rows=rows: rows.append(x[0][0]))
        with torch.no_grad():
            for window in speech.windows(dense):
                dense.model.encoder(window.features)
            hook.remove()
            read = torch.cat(rows)
            expected, result = linear(read).double(), layer(read).double()
        centred = expected - expected.mean(dim=0)
        size = centred.square().mean().sqrt()
        torch.testing.assert_close(
            result.mean(dim=0), expected.mean(dim=0), rtol=0, atol=float(1e-4 * size + 1e-5)
        )
        lost = float((result - expected).square().sum() / centred.square().sum())
        record = context.record["lite"]["layers"][name]
        assert lost == pytest.approx(1 - record["energy"], abs=1e-4)
        assert record["rank"] == layer.down.out_features


def test_basis_weights_is_the_truncated_svd_and_keeps_the_bias(rng):
    """The error of W is at most that of the activations' axes."""
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, min(weight.shape) + 1))
    for own in (bias, None):
        mean, root = lite.white_noise(weight, own)
        factors = split(weight, own, mean, principal_axes(root, rank))
        u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
        expected = torch.from_numpy(u[:, :rank] * s[:rank] @ v[:rank])
        torch.testing.assert_close(factors.up @ factors.down, expected, rtol=0, atol=1e-9)
        kept = torch.zeros(len(weight)).double() if own is None else own
        torch.testing.assert_close(factors.shift, kept, rtol=0, atol=1e-12)
    by_activations, _ = split_layer(weight, bias, rows, rank)
    error = (by_activations.up @ by_activations.down - weight).norm()
    assert (expected - weight).norm() <= error + 1e-9


def test_basis_weights_has_the_same_ranks(narrow_whisper, context):
    ranks = []
    for basis in ("activations", "weights"):
        model = lite.apply(copy.deepcopy(narrow_whisper), replace(FINE, basis=basis), context)
        layers = context.record["lite"]["layers"]
        ranks.append({name: layer["rank"] for name, layer in layers.items()})
        assert any(ranks[-1].values())
        for name, module in narrow_whisper.named_modules():
            if ranks[-1].get(name) and basis == "weights" and module.bias is not None:
                assert torch.equal(model.get_submodule(name).up.bias, module.bias)
    assert ranks[0] == ranks[1]


def test_basis_weights_cannot_be_sequential(tiny_whisper, context):
    with pytest.raises(Problem, match="basis"):
        lite.apply(tiny_whisper, Options(basis="weights", sequential=True), context)


def test_full_ranks_do_not_change_the_outputs(narrow_whisper, context, few, processor):
    """Every layer is split with k = d_out."""
    dense = copy.deepcopy(narrow_whisper)
    names = lite.chosen(narrow_whisper, Options().layers)
    outputs = calibrate(narrow_whisper, names, Speech(few, processor))
    full = {name: len(narrow_whisper.get_submodule(name).weight) for name in names}
    lite.split_at_once(narrow_whisper, full, outputs)
    assert len(low_rank_layers(narrow_whisper)) == len(names) == 12
    features = torch.randn(1, 80, 600)
    with torch.no_grad():
        expected, result = (
            m.model.encoder(features).last_hidden_state for m in (dense, narrow_whisper)
        )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    pcms = [clip.pcm() for clip in few]
    assert decoding.greedy(narrow_whisper, processor, pcms) == decoding.greedy(
        dense, processor, pcms
    )


def test_covariances_of_inputs_and_outputs_agree(narrow_whisper, context, few, processor):
    """The outputs of fc2 are observed; its inputs give the same statistics."""
    name = f"{ENCODER}.fc2"
    model = narrow_whisper
    speech = Speech(few, processor)
    points = observation_points(model, lite.chosen(model, Options().layers))
    assert points[name] == Point(name, "output")
    assert points[f"{ENCODER}.self_attn.v_proj"] == Point(f"{ENCODER}.self_attn.q_proj")
    result = {}
    for point in (Point(name), Point(name, "output")):
        outputs = OutputStatistics(model, collect(model, [point], speech), {name: point})
        result[point.side] = outputs.of(model, name).mean, outputs.variances[name]
    torch.testing.assert_close(result["input"][0], result["output"][0], rtol=0, atol=1e-4)
    largest = float(result["input"][1][0])
    torch.testing.assert_close(
        result["input"][1], result["output"][1], rtol=1e-4, atol=1e-5 * largest
    )


def test_sequential_has_a_lower_error_at_the_same_size(narrow_whisper, context, few, processor):
    options = replace(FINE, theta_attn=0.7, theta_mlp=0.7, sequential=True)
    speech = Speech(few, processor)
    names = lite.chosen(narrow_whisper, options.layers)
    outputs = calibrate(narrow_whisper, names, speech)
    ranks = lite.choose_ranks(narrow_whisper, outputs, options)
    assert sum(map(bool, ranks.values())) > 3
    errors = {}
    for kind in ("at once", "in turn"):
        model = copy.deepcopy(narrow_whisper)
        if kind == "at once":
            lite.split_at_once(model, ranks, outputs)
        else:
            lite.split_in_turn(model, ranks, speech, options)
        errors[kind] = encoder_error(narrow_whisper, model, speech)
    assert errors["in turn"] < errors["at once"]


@torch.no_grad()
def encoder_error(dense, slim, speech) -> float:
    pairs = [
        [m.model.encoder(w.features).last_hidden_state for m in (dense, slim)]
        for w in speech.windows(dense)
    ]
    lost = sum((result - expected).square().sum() for expected, result in pairs)
    return float(lost / sum((expected - expected.mean()).square().sum() for expected, _ in pairs))


def test_sequential_refits_layers_by_least_squares(narrow_whisper, context, few, processor):
    """The last layer agrees with least squares on the moments."""
    options = replace(FINE, theta_mlp=1.0, sequential=True, ridge=1e-8)
    dense = copy.deepcopy(narrow_whisper)
    slim = lite.apply(narrow_whisper, options, context)
    name = "model.encoder.layers.1.fc2"
    speech = Speech(few, processor)
    moments = collect_together([slim, dense], [[Point(name)], [Point(name, "output")]], speech)
    width = dense.get_submodule(name).in_features
    cov = moments.covariance
    solved = torch.linalg.lstsq(cov[:width, :width], cov[:width, width:], driver="gelsd").solution.T
    refitted = slim.get_submodule(name).weight.detach().double()

    def error(weight):
        both = torch.cat([-weight, torch.eye(len(weight)).double()], dim=1)
        return float((both @ cov @ both.T).trace())

    assert error(refitted) == pytest.approx(error(solved), rel=1e-2, abs=1e-9)
    assert error(refitted) <= error(dense.get_submodule(name).weight.detach().double())


def test_the_decoders_layers_can_be_split_too(narrow_whisper, context, few, processor):
    options = replace(
        FINE,
        layers="model.decoder.*",
        theta_attn=0.99,
        theta_mlp=0.99,
        round_to=1,
        sequential=True,
    )
    dense = copy.deepcopy(narrow_whisper)
    slim = lite.apply(narrow_whisper, options, context)
    assert low_rank_layers(slim)
    assert all(name.startswith("model.decoder") for name in low_rank_layers(slim))
    for window in Speech(few, processor).windows(dense, decoder=True):
        with torch.no_grad():
            expected, result = (
                m(window.features, decoder_input_ids=window.tokens).logits for m in (dense, slim)
            )
        assert (result - expected).norm() < 0.5 * expected.norm()


def test_mask_padding_uses_fewer_positions(narrow_whisper, context):
    lite.apply(copy.deepcopy(narrow_whisper), FINE, context)
    everything = context.record["lite"]["calibration"]["positions"]
    lite.apply(narrow_whisper, replace(FINE, mask_padding=True), context)
    assert context.record["lite"]["calibration"]["positions"] < everything == 900


def test_calibration_clips_are_drawn_by_the_seed(context):
    many = replace(context, train=list(range(50)))
    drawn = [
        lite.calibration_speech(Options(clips=10), replace(many, seed=seed)).clips
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert len(lite.calibration_speech(Options(clips=10**6), many).clips) == 50


def test_a_pattern_without_a_match_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match=r"'\*.fc3' matches none of the 32 linear layers"):
        lite.apply(tiny_whisper, replace(FINE, layers="*.fc3"), context)


def test_calibration_without_clips_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match="no clips to calibrate on"):
        lite.apply(tiny_whisper, FINE, replace(context, train=[]))


# ----------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("factors_only", [True, False], ids=["factors", "everything"])
def test_recovery_trains_the_factors_or_everything(factors_only, narrow_whisper, context):
    plain = lite.apply(copy.deepcopy(narrow_whisper), FINE, context)
    training = Training(steps=2, batch_size=2, learning_rate=1e-3)
    options = replace(FINE, recovery=training, factors_only=factors_only)
    trained = lite.apply(narrow_whisper, options, context)
    factors = low_rank_layers(trained)
    for name, tensor in plain.state_dict().items():
        inside = name.startswith(tuple(f"{factor}." for factor in factors))
        moved = not torch.equal(tensor, trained.state_dict()[name])
        if "embed_positions" not in name and not name.endswith("k_proj.up.bias"):
            assert moved == (inside or not factors_only), name
    assert context.record["lite"]["recovery"]["steps"] == 2
    assert all(p.requires_grad for n, p in trained.named_parameters() if "embed_positions" not in n)


def test_recovery_lowers_the_error_of_the_encoder(narrow_whisper, context, few, processor):
    dense = copy.deepcopy(narrow_whisper)
    rough = replace(FINE, theta_attn=0.0, theta_mlp=0.0, round_to=1)
    plain = lite.apply(copy.deepcopy(narrow_whisper), rough, context)
    options = replace(
        rough, keep=100.0, recovery=Training(steps=12, batch_size=3, learning_rate=3e-3)
    )
    trained = lite.apply(narrow_whisper, options, context)
    speech = Speech(few, processor)
    assert encoder_error(dense, trained, speech) < encoder_error(dense, plain, speech)


# ----------------------------------------------------------------------- save, shrink, export, cost


@pytest.fixture
def slim(narrow_whisper, context) -> nn.Module:
    stamps = range(
        narrow_whisper.generation_config.no_timestamps_token_id + 1,
        narrow_whisper.config.vocab_size,
    )
    narrow_whisper.generation_config.suppress_tokens = list(stamps)
    made = lite.apply(narrow_whisper, FINE, context)
    assert made.config.edgewhisper["encoder"][0]["biases"] == ["self_attn.k_proj"]
    return made


def test_it_survives_save_and_load(slim, processor, tmp_path):
    whisper.save(slim, processor, tmp_path / "slim", {})
    loaded = whisper.load(tmp_path / "slim")
    assert loaded.state_dict().keys() == slim.state_dict().keys()
    for name, tensor in slim.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "biases",
    ["self_attn.k_proj", ["fc1"], ["self_attn.q_proj"], [3], {"self_attn.k_proj": 1}],
    ids=str,
)
def test_recorded_biases_of_other_layers_are_refused(biases, slim):
    shapes = copy.deepcopy(slim.config.edgewhisper)
    shapes["encoder"][1]["biases"] = biases
    with pytest.raises(Problem, match=r"encoder\.layers\.1\.biases is .*\(self_attn\.k_proj\)"):
        whisper.check_shapes(shapes, slim.config)


def test_a_recorded_bias_of_a_dense_key_projection_is_refused(slim):
    shapes = copy.deepcopy(slim.config.edgewhisper)
    shapes["decoder"][0]["biases"] = ["self_attn.k_proj"]
    with pytest.raises(Problem, match=r"decoder\.layers\.0\.biases is .*this layer has none"):
        whisper.check_shapes(shapes, slim.config)


def test_shrink_removes_key_biases_and_keeps_the_outputs(slim, context):
    with torch.no_grad():
        for name, layer in low_rank_layers(slim).items():
            if name.endswith("k_proj"):
                layer.up.bias.add_(3.0)  # large enough to change outputs that depend on it
    smaller = shrink.apply(slim, shrink.Options(), context)
    assert not any(name.endswith("k_proj.up.bias") for name in smaller.state_dict())
    assert "biases" not in smaller.config.edgewhisper["encoder"][0]
    features, ids = torch.randn(2, 80, 600), torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        expected, result = (m(features, decoder_input_ids=ids).logits for m in (slim, smaller))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shrunk", [False, True], ids=["with-biases", "shrunk"])
def test_it_survives_export(shrunk, slim, context, processor, few, tmp_path):
    from devices.runner.recognizer import Recognizer
    from export.onnx.to_onnx import export_onnx

    made = shrink.apply(slim, shrink.Options(), context) if shrunk else slim
    (tmp_path / "artifact").mkdir()
    manifest = export_onnx(made, processor, tmp_path / "artifact", precision="fp32")
    layer = manifest["layers"]["encoder"][0]
    assert layer.get("biases") == (None if shrunk else ["self_attn.k_proj"])
    assert layer["ranks"] == made.config.edgewhisper["encoder"][0]["ranks"]
    recognizer = Recognizer(tmp_path / "artifact", guards=False)
    pcm = few[0].pcm()
    assert recognizer.window(pcm) == decoding.greedy(slim, processor, [pcm])[0]


def test_layers_with_gathered_inputs_are_split(narrow_whisper, context, rng):
    """The factor `down` then reads the selected inputs."""
    pruned = shrink.apply(kill(narrow_whisper, "input_columns", rng), shrink.Options(), context)
    dense = copy.deepcopy(pruned)
    slim = lite.apply(pruned, replace(FINE, theta_attn=0.999, theta_mlp=0.999, round_to=1), context)
    gathered = [n for n, m in slim.named_modules() if isinstance(m, whisper.GatherLinear)]
    assert any(name.endswith(".down") for name in gathered)
    features = torch.randn(1, 80, 600)
    with torch.no_grad():
        expected, result = (m.model.encoder(features).last_hidden_state for m in (dense, slim))
    assert (result - expected).norm() < 0.3 * (expected - expected.mean()).norm()


@pytest.mark.parametrize("sequential", [False, True], ids=["at-once", "sequential"])
def test_layers_that_are_already_split_do_not_change(sequential, narrow_whisper, context):
    slim = lite.apply(narrow_whisper, replace(FINE, layers="model.encoder.*.fc1"), context)
    before = {name: copy.deepcopy(m.state_dict()) for name, m in low_rank_layers(slim).items()}
    assert set(before) == {f"model.encoder.layers.{n}.fc1" for n in (0, 1)}
    again = lite.apply(slim, replace(FINE, theta_attn=0.3, sequential=sequential), context)
    assert len(low_rank_layers(again)) == 12
    for name, tensors in before.items():
        result = low_rank_layers(again)[name].state_dict()
        assert all(torch.equal(result[key], tensor) for key, tensor in tensors.items())
