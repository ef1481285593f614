"""WSAP: coefficients of variation, their thirds, and the pruned model."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import variation as scipys_variation

from edgewhisper import decoding, whisper
from edgewhisper.compress import shrink, wsap
from edgewhisper.compress.masks import weights_of
from edgewhisper.compress.wsap import Options, bounds, keep_largest, ratios, variation
from edgewhisper.training import Training, train
from export.problem import Problem

BRIEF = Training(steps=2, batch_size=2, learning_rate=1e-3)
NONE = Training(steps=0)


# ----------------------------------------------------------------------------------- the arithmetic


def test_the_variation_of_a_small_matrix_by_hand():
    assert variation(torch.tensor([[1.0, 3.0], [1.0, 3.0]])) == pytest.approx(0.5)
    assert variation(torch.tensor([[-1.0, -3.0]])) == pytest.approx(0.5)
    assert variation(torch.tensor([[-1.0, 1.0]])) == math.inf
    assert variation(torch.full((2, 3), 4.0)) == 0


def test_the_variation_agrees_with_scipy(rng):
    weight = rng.standard_normal(tuple(rng.integers(1, 30, size=2))) + rng.uniform(-1, 1)
    expected = abs(scipys_variation(weight, axis=None))
    assert variation(torch.from_numpy(weight)) == pytest.approx(expected)


def test_bounds_and_ratios_of_four_matrices_by_hand():
    variations = {name: value for name, value in zip("abcd", (4.0, 1.0, 3.0, 2.0), strict=True)}
    a, b = bounds(variations, "percentiles")
    assert (a, b) == pytest.approx((1.99, 2.98))
    assert ratios(variations, Options()) == {"a": 0.7, "b": 0.3, "c": 0.7, "d": 0.5}


def test_an_infinite_variation_is_zero_in_percentiles_and_gets_the_high_ratio():
    variations = {"a": math.inf, "b": 10.0, "c": 20.0, "d": 30.0}
    assert bounds(variations, "percentiles") == pytest.approx((9.9, 19.8))
    assert ratios(variations, Options()) == {"a": 0.7, "b": 0.5, "c": 0.7, "d": 0.7}


def test_the_older_thresholds_are_150_and_600():
    variations = {"a": 150.0, "b": 150.1, "c": 600.0, "d": 601.0, "e": math.inf}
    result = ratios(variations, Options(thresholds="fixed", low=0.1, middle=0.2, high=0.4))
    assert list(result.values()) == [0.1, 0.2, 0.2, 0.4, 0.4]


def test_each_class_has_about_a_third_of_the_matrices(rng):
    variations = {str(n): v for n, v in enumerate(rng.uniform(0, 1000, size=300))}
    counts = np.unique(list(ratios(variations, Options()).values()), return_counts=True)
    assert counts[0].tolist() == [0.3, 0.5, 0.7]
    assert all(abs(count - 100) <= 3 for count in counts[1])


def test_keep_largest_of_a_small_matrix_by_hand():
    weight = torch.tensor([[1.0, -8.0, 0.1], [3.0, 0.5, -2.0]])
    assert keep_largest(weight, 0.5).tolist() == [[False, True, False], [True, False, True]]
    assert keep_largest(weight, 0.0).all()


def test_exactly_the_ratio_is_pruned_and_it_is_the_smallest(rng):
    weight = torch.from_numpy(rng.standard_normal(tuple(rng.integers(1, 30, size=2))))
    ratio = float(rng.uniform(0, 1))
    keep = keep_largest(weight, ratio)
    assert int((~keep).sum()) == round(ratio * weight.numel())
    if keep.any() and not keep.all():
        assert weight.abs()[~keep].max() <= weight.abs()[keep].min()


# ----------------------------------------------------------------------------------------- the step


def test_without_pruning_it_is_plain_fine_tuning(tiny_whisper, context, few, processor):
    plain = copy.deepcopy(tiny_whisper)
    train(plain, processor, few, BRIEF, run_dir=context.run_dir / "plain", seed=context.seed)
    wsap.apply(tiny_whisper, Options(low=0, middle=0, high=0, recovery=BRIEF), context)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tiny_whisper.state_dict()[name], tensor)


def test_every_matrix_is_pruned_by_its_ratio_and_stays_pruned(tiny_whisper, context):
    before = {name: w.clone() for name, w in weights_of(tiny_whisper).items()}
    wsap.apply(tiny_whisper, Options(recovery=BRIEF), context)
    record = context.record["wsap"]
    json.dumps(record, allow_nan=False)
    assert set(record["ratios"].values()) == {0.3, 0.5, 0.7}
    for name, weight in weights_of(tiny_whisper).items():
        zero = weight == 0
        assert int(zero.sum()) == round(record["ratios"][name] * weight.numel())
        assert before[name].abs()[zero].max() <= before[name].abs()[~zero].min()
        assert not torch.equal(weight, before[name] * ~zero)  # the remaining weights were trained


def test_a_pattern_without_a_match_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match=r"no linear layer matches '\*.fc3'"):
        wsap.apply(tiny_whisper, Options(layers="*.fc3"), context)


def test_a_recovery_is_not_resumed_after_other_ratios(tiny_whisper, context):
    wsap.apply(copy.deepcopy(tiny_whisper), Options(recovery=BRIEF), context)
    with pytest.raises(Problem, match="wsap-recovery holds the state of another training"):
        wsap.apply(tiny_whisper, Options(low=0.2, recovery=BRIEF), context)


@pytest.fixture
def sparse(tiny_whisper, context):
    """A pruned model whose timestamp tokens are suppressed."""
    generation = tiny_whisper.generation_config
    stamps = range(generation.no_timestamps_token_id + 1, tiny_whisper.config.vocab_size)
    generation.suppress_tokens = list(stamps)
    return wsap.apply(tiny_whisper, Options(recovery=NONE), context)


def test_a_pruned_model_survives_save_and_load(sparse, processor, tmp_path):
    whisper.save(sparse, processor, tmp_path / "sparse", {})
    loaded = whisper.load(tmp_path / "sparse").state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in sparse.state_dict().items())


def test_a_pruned_model_survives_shrinking_and_export(sparse, context, processor, few, tmp_path):
    from devices.runner.recognizer import Recognizer
    from export.onnx.to_onnx import export_onnx

    slim = shrink.apply(sparse, shrink.Options(), replace(context, record={}))
    (tmp_path / "artifact").mkdir()
    export_onnx(slim, processor, tmp_path / "artifact", precision="fp32")
    recognizer = Recognizer(tmp_path / "artifact", guards=False)
    pcm = few[0].pcm()
    assert recognizer.window(pcm) == decoding.greedy(sparse, processor, [pcm])[0]
