"""Costs agree with hand counts for Whisper's published sizes and for slim models."""

from __future__ import annotations

import graph_macs
import pytest
import torch
from dead_structure import kill
from small_whisper import whisper_without_weights

from benchmarks.speech.clips import read_manifest
from edgewhisper import whisper
from edgewhisper.compress import lite, merge, shear
from edgewhisper.compress.context import Context
from edgewhisper.training import Training
from export.cost import artifact_bytes, count_parameters, macs, macs_by_window, window_macs
from export.onnx.to_onnx import export_onnx
from export.shrink import shrink


@pytest.mark.parametrize(
    ("d_model", "layers", "heads", "millions"),
    [(384, 4, 6, 37.76), (512, 6, 8, 72.59), (768, 12, 12, 241.73)],
    ids=["tiny", "base", "small"],
)
def test_parameter_counts_are_those_published(d_model, layers, heads, millions):
    result = count_parameters(whisper_without_weights(d_model, layers, heads))
    assert result["total"] == pytest.approx(millions * 1e6, abs=5000)
    assert result["token_table"] == 51865 * d_model
    assert result["rest"] == result["total"] - result["token_table"]


def test_macs_of_tiny_match_the_hand_count():
    d, layers, positions, vocab = 384, 4, 1500, 51865
    result = macs(whisper_without_weights(d, layers, 6))
    linear = layers * 12 * d**2 * positions
    attention = layers * 2 * positions**2 * d
    stem = 80 * 3 * d * 2 * positions + d * 3 * d * positions
    assert (linear / 1e9, attention / 1e9, stem / 1e9) == pytest.approx(
        (10.62, 6.91, 0.94), abs=0.005
    )
    assert result["encoder"] == linear + attention + stem
    assert result["cross"] == layers * 2 * d**2 * positions == pytest.approx(1.77e9, rel=0.001)
    step = layers * (14 * d**2 + 2 * 32 * d + 2 * positions * d)
    assert step / 1e6 == pytest.approx(13.0, abs=0.05)
    assert result["decoder_per_token"] == step + vocab * d


def test_a_longer_context_costs_more_attention():
    model = whisper_without_weights(384, 4, 6)
    more = macs(model, context=132)["decoder_per_token"] - macs(model)["decoder_per_token"]
    assert more == 100 * 4 * 2 * 384


@pytest.mark.parametrize(("seconds", "share"), [(10, 0.28), (5, 0.13)])
def test_a_short_window_of_small_costs_the_documented_share(seconds, share):
    model = whisper_without_weights(768, 12, 12)
    result = macs(model, positions=50 * seconds)
    assert result["encoder"] / macs(model)["encoder"] == pytest.approx(share, abs=0.005)
    assert result["cross"] * 30 == macs(model)["cross"] * seconds
    fewer = macs(model)["decoder_per_token"] - result["decoder_per_token"]
    assert fewer == 12 * 2 * 768 * (1500 - 50 * seconds)


def test_macs_are_given_for_every_window(tiny_whisper):
    assert macs_by_window(tiny_whisper) == {"300": macs(tiny_whisper)}
    whisper.set_windows(tiny_whisper.config, [50, 300])
    result = macs_by_window(tiny_whisper)
    assert result == {"50": macs(tiny_whisper, positions=50), "300": macs(tiny_whisper)}


def test_macs_of_a_slim_model_follow_its_shapes(tiny_whisper, rng):
    shrunk = shrink(kill(tiny_whisper, "all_kinds", rng))
    slim = whisper.rebuild(tiny_whisper, shrunk.tensors, shrunk.layers)
    config, d = slim.config, slim.config.d_model
    positions = config.max_source_positions

    def attention(shape, name, reads):
        qk, v = (shape[name]["heads"] * shape[name][dim] for dim in ("qk_dim", "v_dim"))
        inputs = [shape["inputs"].get(f"{name}.{part}_proj", d) for part in "qkv"]
        sizes = dict(
            zip("qkvo", (qk * inputs[0], qk * inputs[1], v * inputs[2], d * v), strict=True)
        )
        return sum(sizes[part] for part in reads), qk + v

    def feed_forward(shape):
        return shape["ffn"] * (shape["inputs"].get("fc1", d) + d)

    encoder = positions * (2 * config.num_mel_bins * 3 * d + d * 3 * d)
    cross, step = 0, config.vocab_size * d
    for shape in config.edgewhisper["encoder"]:
        linear, pair = attention(shape, "self_attn", "qkvo")
        encoder += positions * (linear + feed_forward(shape)) + positions**2 * pair
    for shape in config.edgewhisper["decoder"]:
        linear, pair = attention(shape, "self_attn", "qkvo")
        step += linear + 32 * pair + feed_forward(shape)
        linear, pair = attention(shape, "encoder_attn", "qo")
        step += linear + positions * pair
        cross += positions * attention(shape, "encoder_attn", "kv")[0]
    assert macs(slim) == {"encoder": encoder, "cross": cross, "decoder_per_token": step}


def test_low_rank_layers_count_both_factors(tiny_whisper):
    before, parameters = macs(tiny_whisper), count_parameters(tiny_whisper)["total"]
    fc1 = tiny_whisper.model.encoder.layers[0].fc1
    rank = 4
    tiny_whisper.model.encoder.layers[0].fc1 = whisper.LowRank(
        torch.nn.Linear(fc1.in_features, rank, bias=False),
        torch.nn.Linear(rank, fc1.out_features),
    )
    saved = fc1.weight.numel() - rank * (fc1.in_features + fc1.out_features)
    assert count_parameters(tiny_whisper)["total"] == parameters - saved
    after = macs(tiny_whisper)
    assert after["encoder"] == before["encoder"] - 300 * saved
    assert after["decoder_per_token"] == before["decoder_per_token"]


def test_window_macs_add_encoder_cross_attention_and_tokens():
    counted = {"encoder": 1000, "cross": 100, "decoder_per_token": 1}
    assert window_macs(counted) == 1132
    assert window_macs(counted, tokens=0) == 1100


def test_graphs_of_lite_bald_and_tspar_models_cost_what_is_counted(
    make_whisper, processor, clips, rng, tmp_path
):
    """Count the operators of the graphs one by one, for models like those of LiteASR, BaldWhisper
    and TSPAR.
    """
    two = read_manifest(clips)[:2]
    context = Context(processor=processor, train=two, dev=two, run_dir=tmp_path / "run")
    d_model = 2 * int(rng.integers(10, 20))
    model = make_whisper(d_model=d_model, ffn=int(rng.integers(30, 60)), decoder_layers=4)
    none = Training(steps=0)
    dense = macs(model)
    slim = merge.apply(model, merge.Options(training=none, calibration=1), context)
    rank = int(rng.integers(2, d_model // 2))
    slim = shear.apply(slim, shear.Options(rank=rank, training=none, calibration=1), context)
    slim = lite.apply(slim, lite.Options(theta_attn=0.5, theta_mlp=0.5, round_to=2), context)
    context = int(rng.integers(2, 20))
    record = macs(slim, context)
    assert record["encoder"] < dense["encoder"] and record["cross"] == dense["cross"] // 2
    encoder, step = graph_macs.of_exported(slim, processor, tmp_path, context)
    assert encoder == record["encoder"] + record["cross"]
    assert step == record["decoder_per_token"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_predicted_bytes_are_those_of_the_weights(precision, digits, processor, tmp_path):
    model = whisper.load(digits)
    export_onnx(model, processor, tmp_path / "out", precision)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("??coder.*"))
    # the structure of the graphs takes 0.1 to 0.2 MB more; int4 has the most operators
    assert 80_000 < size - artifact_bytes(model, precision) < 220_000
