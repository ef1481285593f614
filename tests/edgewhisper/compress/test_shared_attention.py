"""Attention with one key and value for all heads."""

import copy
from dataclasses import replace

import pytest
import torch
from dead_structure import kill
from low_rank_layers import FINE, low_rank_layers
from torch import nn

from edgewhisper import decoding, whisper
from edgewhisper.compress import lite, shrink
from edgewhisper.compress.shared_attention import (
    output_of_shared_value,
    queries_of_shared_key,
    share_attention,
)
from export.cost import macs
from export.problem import Problem
from export.shrink import layer_shapes

# ------------------------------------------------------- attention of reduced dimension, (12), (16)


def test_constant_terms_of_the_scores_can_be_dropped(rng):
    """Low-rank attention, (12) with all terms, and (12) without constant terms are equal."""
    heads, d, rank_q, rank_k, rank_v, frames, d_out = (int(n) for n in rng.integers(2, 7, size=7))
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape))  # noqa: E731
    a, b, c = draw(frames, rank_q), draw(frames, rank_k), draw(frames, rank_v)
    up_q, up_k, up_v = (draw(heads * d, rank) for rank in (rank_q, rank_k, rank_v))
    bias_q, bias_k, bias_v = draw(3, heads * d)
    out = draw(d_out, heads * d)

    def of_heads(x):
        return x.unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, frames, d)

    def mixed(scores, values):
        return (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)

    q, k, v = (
        of_heads(x @ up.T + bias)
        for x, up, bias in ((a, up_q, bias_q), (b, up_k, bias_k), (c, up_v, bias_v))
    )
    dense = q @ k.mT
    by_head = [x.unflatten(0, (heads, d)) for x in (up_q, up_k, bias_q, bias_k)]
    all_terms = torch.stack(
        [
            a @ uq.T @ uk @ b.T + (a @ uq.T @ bk)[:, None] + (bq @ uk @ b.T)[None] + bq @ bk
            for uq, uk, bq, bk in zip(*by_head, strict=True)
        ]
    )
    torch.testing.assert_close(all_terms, dense)
    narrow, bias = queries_of_shared_key(up_q, bias_q, up_k, heads)
    scores = of_heads(a @ narrow.T + bias) @ b.T
    torch.testing.assert_close(scores.softmax(-1), dense.softmax(-1))
    assert (scores - dense).abs().max() > 1e-3

    folded, constant = output_of_shared_value(out, up_v, bias_v, heads)
    torch.testing.assert_close(
        mixed(scores, c[None]) @ folded.T + constant, mixed(dense, v) @ out.T
    )


SHARED = replace(FINE, share=True)


@pytest.fixture
def pair(narrow_whisper, context) -> tuple[nn.Module, nn.Module]:
    """A low-rank model, and the same model with shared keys and values in the encoder."""
    stamps = range(
        narrow_whisper.generation_config.no_timestamps_token_id + 1,
        narrow_whisper.config.vocab_size,
    )
    narrow_whisper.generation_config.suppress_tokens = list(stamps)
    plain = lite.apply(copy.deepcopy(narrow_whisper), FINE, context)
    narrow = lite.apply(narrow_whisper, SHARED, context)
    assert context.record["lite"]["shared"] == [0, 1]
    return plain, narrow


def same_encoding(one, other, atol=1e-4):
    features = torch.randn(2, 80, 600)
    with torch.no_grad():
        expected, result = (m.model.encoder(features).last_hidden_state for m in (one, other))
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)


def test_sharing_keeps_the_outputs_and_costs_less(pair):
    plain, narrow = pair
    same_encoding(plain, narrow)
    before, after = macs(plain)["encoder"], macs(narrow)["encoder"]
    pairs = sum(
        2 * (16 + 16) - 2 * (shape["self_attn"]["qk_dim"] + shape["self_attn"]["v_dim"])
        for shape in narrow.config.edgewhisper["encoder"]
    )
    assert before - after > 300**2 * pairs > 0
    assert not any("k_proj.bias" in n or "v_proj.bias" in n for n in encoder_names(narrow))


def encoder_names(model) -> list[str]:
    return [name for name in model.state_dict() if name.startswith("model.encoder")]


@pytest.mark.parametrize("dense", ["q_proj", "out_proj"])
def test_keys_and_values_are_shared_next_to_dense_layers(dense, narrow_whisper, context):
    """Queries and outputs may be dense."""
    for parts in ("kv", "q"):
        if parts == "kv" or dense == "out_proj":
            options = replace(FINE, layers=f"model.encoder.*.self_attn.[{parts}]_proj")
            narrow_whisper = lite.apply(narrow_whisper, options, context)
    shared, numbers = share_attention(copy.deepcopy(narrow_whisper))
    assert numbers == [0, 1]
    same_encoding(narrow_whisper, shared)


def test_keys_and_values_are_shared_after_pruning(narrow_whisper, context, rng):
    pruned = shrink.apply(kill(narrow_whisper, "input_columns", rng), shrink.Options(), context)
    options = replace(FINE, theta_attn=0.5, round_to=1)
    slim = lite.apply(pruned, options, context)
    shared, numbers = share_attention(copy.deepcopy(slim))
    split_up = low_rank_layers(slim)
    assert (
        numbers
        == [  # a layer with very few inputs stays dense, because two factors would cost more
            n
            for n in (0, 1)
            if all(f"model.encoder.layers.{n}.self_attn.{part}_proj" in split_up for part in "kv")
        ]
    )
    same_encoding(slim, shared)


def test_high_ranks_are_not_shared(narrow_whisper, context):
    high = replace(SHARED, round_to=16)
    lite.apply(narrow_whisper, high, context)
    assert context.record["lite"]["shared"] == []


def test_shared_attention_survives_save_load_and_shrink(pair, processor, context, tmp_path):
    narrow = pair[1]
    whisper.save(narrow, processor, tmp_path / "narrow", {})
    loaded = whisper.load(tmp_path / "narrow")
    assert layer_shapes(loaded) == layer_shapes(narrow) == narrow.config.edgewhisper
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    same_encoding(narrow, shrink.apply(loaded, shrink.Options(), context))
    again, numbers = share_attention(loaded)
    assert again is loaded and numbers == []


def test_shared_attention_survives_export(pair, processor, few, tmp_path):
    from devices.runner.recognizer import Recognizer
    from export.onnx.to_onnx import export_onnx

    plain, narrow = pair
    (tmp_path / "artifact").mkdir()
    export_onnx(narrow, processor, tmp_path / "artifact", precision="fp32")
    recognizer = Recognizer(tmp_path / "artifact", guards=False)
    pcm = few[0].pcm()
    assert recognizer.window(pcm) == decoding.greedy(plain, processor, [pcm])[0]


@pytest.mark.parametrize(
    ("side", "shared"), [("encoder", 1), ("encoder", "yes"), ("decoder", True)], ids=str
)
def test_invalid_records_of_sharing_are_refused(side, shared, pair):
    shapes = copy.deepcopy(pair[1].config.edgewhisper)
    shapes[side][1]["self_attn"]["shared"] = shared
    with pytest.raises(Problem, match=rf"{side}\.layers\.1\.self_attn\.shared is {shared!r}"):
        whisper.check_shapes(shapes, pair[1].config)
