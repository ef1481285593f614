"""BaldWhisper, stage 1: merged decoder layers, distillation, and the search."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from bald_models import (
    BRIEF,
    MERGE,
    a_batch,
    keeping,
    logits,
    make_identity,
    pairs,
    same_tensors,
    without_units,
)
from exported import low_rank
from torch import nn

from edgewhisper import whisper
from edgewhisper.compress import merge
from edgewhisper.compress.context import Context
from edgewhisper.compress.decoder_layers import (
    LAYERS,
    head_moves,
    layer_tensors,
    merge_layers,
    merge_tensor,
    parse_groups,
    regroup,
)
from edgewhisper.compress.layer_scores import layer_scores, similarities
from edgewhisper.compress.teacher import divergence, forward
from export.problem import Problem


@pytest.fixture
def weights(rng) -> tuple[float, float]:
    """Random alpha and beta."""
    return tuple(float(x) for x in rng.uniform(0.01, 10, size=2))


# ------------------------------------------------------------------------------------------ merging


def test_merging_of_small_tensors_by_hand():
    lower, upper = torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([[5.0, 2.0], [8.0, 4.0]])
    expected = torch.tensor([[4.0, 2.0], [6.0, 2.0]])
    torch.testing.assert_close(merge_tensor(lower, upper, 1.0, 3.0), expected)


def test_merged_layers_agree_with_numpy(deep, weights):
    merged, _ = regroup(deep, pairs(deep), *weights)
    old, new = deep.state_dict(), merged.state_dict()
    alpha, beta = weights
    checked = 0
    for name, tensor in new.items():
        if ".decoder.layers." not in name:
            assert torch.equal(tensor, old[name])
            continue
        k, rest = name.removeprefix(LAYERS).split(".", 1)
        both = (old[f"{LAYERS}{2 * int(k) + i}.{rest}"].double().numpy() for i in (0, 1))
        lower, upper = both
        expected = (alpha * lower + beta * upper) / (alpha + beta)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6)
        checked += 1
    per_layer = sum(name.startswith(f"{LAYERS}0.") for name in new)
    assert checked == per_layer * merged.config.decoder_layers > 0


@pytest.mark.parametrize(
    ("alpha", "beta", "first"), [(1.0, 0.0, 0), (0.0, 1.0, 1)], ids=["lower", "upper"]
)
def test_a_weight_of_zero_keeps_the_other_layers(alpha, beta, first, deep, context):
    kept = keeping(deep, range(first, deep.config.decoder_layers, 2))
    merged, _ = regroup(deep, pairs(deep), alpha, beta)
    assert torch.equal(logits(merged), logits(kept))
    name = ("lower", "upper")[first]
    named = merge.apply(deep, replace(MERGE, start=name), context)
    assert same_tensors(named, merged)
    assert context.record["merge"]["layers"] == [
        [i] for i in range(first, len(kept.model.decoder.layers) * 2, 2)
    ]


def test_merging_a_layer_with_itself_changes_no_bit(deep, weights):
    layer = layer_tensors(deep.state_dict(), 0)
    merged = merge_layers(layer, layer, *weights)
    assert merged.keys() == layer.keys()
    assert all(torch.equal(merged[name], layer[name]) for name in layer)


def test_only_the_ratio_of_the_weights_matters(deep, weights, rng):
    factor = float(rng.uniform(0.01, 100))
    one, other = (
        regroup(deep, pairs(deep), *(f * x for x in weights))[0].state_dict() for f in (1, factor)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_merging_equal_layers_keeps_one_of_each(deep, weights):
    layers = deep.model.decoder.layers
    for lower, upper in pairs(deep):
        layers[upper].load_state_dict(layers[lower].state_dict())
    kept = keeping(deep, [lower for lower, _ in pairs(deep)])
    assert torch.equal(logits(regroup(deep, pairs(deep), *weights)[0]), logits(kept))


def test_single_layers_do_not_change(deep, context):
    groups = " ".join(str(i) for i in range(deep.config.decoder_layers))
    assert same_tensors(merge.apply(deep, replace(MERGE, groups=groups), context), deep)


def test_any_layers_may_be_grouped(make_whisper, weights):
    model = make_whisper(decoder_layers=5, encoder_layers=1)
    merged, record = regroup(model, parse_groups("1+4 0 2+3", 5), *weights)
    assert record["layers"] == [[1, 4], [0], [2, 3]]
    expected = layer_tensors(model.state_dict(), 0)
    result = layer_tensors(merged.state_dict(), 1)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_adjacent_layers_are_paired_by_default():
    assert parse_groups("", 6) == [(0, 1), (2, 3), (4, 5)]
    assert parse_groups("", 5) == [(0, 1), (2, 3), (4,)]
    assert parse_groups("", 1) == [(0,)]


@pytest.mark.parametrize(
    "groups", ["0+1 2", "0+1 1+2 3", "0+1 2+3 4", "1+0 2+3", "0+1+2 3", "0+1, 2+3", "a+b"]
)
def test_groups_that_miss_or_repeat_layers_are_refused(groups):
    with pytest.raises(Problem, match="each of the 4 decoder layers once") as problem:
        parse_groups(groups, 4)
    assert "'0+1 2+3'" in problem.value.hint


def test_two_weights_of_zero_are_refused(tiny_whisper, context):
    with pytest.raises(Problem, match="alpha 0 and beta 0 are both zero"):
        merge.apply(tiny_whisper, replace(MERGE, alpha=0.0, beta=0.0), context)


def test_a_search_without_merging_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match="start 'upper' has no weights to search"):
        merge.apply(tiny_whisper, replace(MERGE, start="upper", search="grid"), context)


# --------------------------------------------------------------------- slim models and their shapes


def test_layers_of_unequal_shapes_are_refused_before_training(tiny_whisper, context):
    slim = without_units(tiny_whisper, 1, 3)
    options = replace(MERGE, baseline=BRIEF)
    with pytest.raises(
        Problem, match=r"fc1.bias is \(48,\) in the lower and \(45,\) in"
    ) as problem:
        merge.apply(slim, options, context)
    assert "put the step merge before" in problem.value.hint
    assert not context.run_dir.exists()


@pytest.mark.parametrize("start", ["upper", "lower"])
def test_layers_of_unequal_shapes_can_be_kept(start, tiny_whisper, context):
    slim = without_units(tiny_whisper, 1, 3)
    kept = merge.apply(slim, replace(MERGE, start=start), context)
    assert [shape["ffn"] for shape in kept.config.edgewhisper["decoder"]] == [
        {"upper": 45, "lower": 48}[start]
    ]
    layer = {"upper": 1, "lower": 0}[start]
    assert torch.equal(logits(kept), logits(keeping(slim, [layer])))


def test_slim_layers_of_equal_shapes_merge(tiny_whisper, weights, processor, tmp_path):
    slim = without_units(tiny_whisper, 0, 5)
    slim = without_units(slim, 1, 5)
    merged, _ = regroup(slim, pairs(slim), *weights)
    assert len(merged.config.edgewhisper["decoder"]) == 1
    assert len(merged.config.edgewhisper["encoder"]) == 2
    whisper.save(merged, processor, tmp_path / "out", {})
    assert same_tensors(whisper.load(tmp_path / "out"), merged)


def test_factors_of_low_rank_layers_are_not_averaged(tiny_whisper):
    for layer in tiny_whisper.model.decoder.layers:
        low_rank(layer, "fc1", 3)
    with pytest.raises(Problem, match=r"fc1.down.weight is a factor of a low-rank layer"):
        regroup(tiny_whisper, pairs(tiny_whisper), 1.0, 1.0)


def test_layers_that_read_different_features_are_refused():
    layers = [
        {"fc1.weight": torch.ones(4, 2), "fc1.inputs": torch.tensor(inputs)}
        for inputs in ([0, 1], [0, 2])
    ]
    with pytest.raises(Problem, match=r"read different features \(fc1.inputs\)"):
        merge_layers(*layers, 1.0, 1.0)
    assert torch.equal(merge_layers(layers[0], layers[0], 1.0, 2.0)["fc1.inputs"], torch.arange(2))


# ---------------------------------------------------------------------- numbers of layers and heads


def test_merged_layers_are_renumbered(deep, weights):
    merged, _ = regroup(deep, pairs(deep), *weights)
    layers = merged.model.decoder.layers
    assert len(layers) == merged.config.decoder_layers == deep.config.decoder_layers // 2
    for i, layer in enumerate(layers):
        assert layer.self_attn.layer_idx == layer.encoder_attn.layer_idx == i


@pytest.mark.parametrize(
    ("plan", "alpha", "beta", "went"),
    [
        pytest.param([(0, 1), (2, 3)], 1.0, 1.0, [0, 0, 1, 1], id="equal weights"),
        pytest.param([(0, 1), (2, 3)], 1e-6, 1.0, [None, 0, None, 1], id="upper layer"),
        pytest.param([(0, 1), (2, 3)], 3.0, 2.9, [0, None, 1, None], id="lower layer"),
        pytest.param([(1,), (3,)], 0.0, 1.0, [None, 0, None, 1], id="removed layers"),
        pytest.param([(0,), (1, 2), (3,)], 0.1, 1.0, [0, None, 1, 2], id="single layers"),
    ],
)
def test_heads_move_with_the_layer_of_the_larger_weight(plan, alpha, beta, went):
    moved = head_moves(plan, alpha, beta, heads=[3, 3, 3, 3])
    for layer, number in enumerate(went):
        for head in range(3):
            assert moved.get((layer, head)) == (None if number is None else (number, head))


@pytest.mark.parametrize(
    ("named", "weights", "after", "dropped"),
    [
        ([[0, 1], [1, 0]], (1.0, 1.0), [[0, 0], [0, 1]], []),
        ([[0, 1], [1, 0]], (0.1, 1.0), [[0, 0]], [[0, 1]]),
        ([[0, 1], [1, 0]], (2.0, 1.0), [[0, 1]], [[1, 0]]),
        ([[0, 1]], (1e-6, 1.0), None, [[0, 1]]),
        ([[0, 1]], (0.0, 1.0), None, [[0, 1]]),
    ],
)
def test_the_record_lists_moved_and_dropped_alignment_heads(
    named, weights, after, dropped, tiny_whisper, context
):
    """If all heads are dropped, those of the upper half replace them."""
    tiny_whisper.generation_config.alignment_heads = named
    alpha, beta = weights
    merged = merge.apply(tiny_whisper, replace(MERGE, alpha=alpha, beta=beta), context)
    result = merged.generation_config.alignment_heads
    assert result == (after or [[0, 0], [0, 1]])
    assert context.record["merge"]["alignment_heads"] == {
        "before": named,
        "after": result,
        "stand_in": after is None,
        "dropped": dropped,
    }


def test_a_model_without_alignment_heads_gets_none(tiny_whisper, context):
    tiny_whisper.generation_config.alignment_heads = None
    merged = merge.apply(tiny_whisper, MERGE, context)
    assert merged.generation_config.alignment_heads is None
    assert context.record["merge"]["alignment_heads"] == {"dropped": []}


# ------------------------------------------------------------------------------------- distillation


def draw_logits(rng, tokens=4, vocabulary=9):
    return [torch.from_numpy(3 * rng.standard_normal((tokens, vocabulary))) for _ in range(2)]


def test_divergence_agrees_with_numpy(rng):
    teacher, student = draw_logits(rng)
    temperature = float(rng.uniform(0.5, 5))
    p, q = (np.exp(x.numpy() / temperature) for x in (teacher, student))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    result = divergence(teacher, student, torch.tensor(temperature))
    assert result.item() == pytest.approx(expected, rel=1e-4)


def test_divergence_of_equal_logits_is_zero(rng):
    teacher, _ = draw_logits(rng)
    assert divergence(teacher, teacher, torch.tensor(2.0)).item() == pytest.approx(0, abs=1e-6)


def test_t_squared_keeps_the_gradient_at_high_temperatures(rng):
    """In the limit, the gradient is the difference of the centred logits divided by V."""
    teacher, student = draw_logits(rng, tokens=1)
    student.requires_grad_()
    (1000.0**2 * divergence(teacher, student, 1000.0)).backward()
    gap = (student - teacher).detach()
    expected = (gap - gap.mean()) / gap.shape[1]
    torch.testing.assert_close(
        student.grad, expected, rtol=0.05, atol=0.02 * expected.abs().max().item()
    )


def test_the_loss_is_the_papers(make_whisper, rng):
    teacher, student = make_whisper(), make_whisper()
    batch = a_batch(student)
    ce, kl = (float(x) for x in rng.uniform(0.1, 3, size=2))
    options = merge.Options(ce=ce, kl=kl, temperature=3.0)
    term = merge.distillation(teacher, options)
    outputs = student(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
    labelled = batch.labels != -100
    cross = nn.functional.cross_entropy(outputs.logits[labelled], batch.labels[labelled])
    expected = forward(teacher, batch).logits[labelled]
    far = 9 * divergence(expected, outputs.logits[labelled], 3.0)
    with merge.temperature_in(student, options):
        result = cross + term(student, batch, outputs)
    torch.testing.assert_close(result, ce * cross + kl * far)
    assert merge.distillation(teacher, merge.Options(ce=1.0, kl=0.0)) is None


@pytest.mark.parametrize("learnt", [True, False], ids=["learnt", "fixed"])
def test_the_temperature_is_trained_and_then_removed(learnt, tiny_whisper, context):
    options = replace(MERGE, training=BRIEF, learn_temperature=learnt, temperature=3.0)
    student = merge.apply(tiny_whisper, options, context)
    result = context.record["merge"]["training"]["temperature"]
    assert (result != pytest.approx(3.0, rel=1e-6)) == learnt
    assert "log_temperature" not in student.state_dict()


def test_distillation_trains_the_student_and_not_the_teacher(tiny_whisper, context):
    before = copy.deepcopy(tiny_whisper)
    start, _ = regroup(tiny_whisper, pairs(tiny_whisper), MERGE.alpha, MERGE.beta)
    student = merge.apply(tiny_whisper, replace(MERGE, training=BRIEF), context)
    assert same_tensors(tiny_whisper, before)
    assert not same_tensors(student, start)
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, start.state_dict()[n])]
    assert any("encoder.layers" in name for name in moved)
    assert any("decoder.layers" in name for name in moved)


def test_stage_0_trains_the_model_that_is_merged(tiny_whisper, context):
    student = merge.apply(tiny_whisper, replace(MERGE, baseline=BRIEF), context)
    assert context.record["merge"]["baseline"]["steps"] == 2
    assert same_tensors(student, regroup(tiny_whisper, [(0, 1)], MERGE.alpha, MERGE.beta)[0])


# --------------------------------------------------------------------- similarity, and other starts


def test_an_identity_layer_is_similar_to_the_layer_before(make_whisper, context):
    model = make_whisper(decoder_layers=3, encoder_layers=1)
    make_identity(model.model.decoder.layers[1])
    result = np.array(similarities(model, merge.calibration(MERGE, context, model)))
    np.testing.assert_allclose(result.diagonal(), 1, atol=1e-5)
    np.testing.assert_allclose(result, result.T, atol=1e-6)
    assert result[0, 1] == pytest.approx(1, abs=1e-5)
    assert result[0, 2] < 0.999


def test_taylor_removes_an_identity_layer(make_whisper, context):
    model = make_whisper(decoder_layers=4, encoder_layers=1)
    make_identity(model.model.decoder.layers[2])
    options = replace(MERGE, start="taylor", groups="0+1 2 3")
    smaller = merge.apply(model, options, context)
    assert context.record["merge"]["layers"] == [[0], [1], [3]]
    assert context.record["merge"]["taylor"][0]["2"] == 0
    torch.testing.assert_close(logits(smaller), logits(model), rtol=0, atol=1e-5)


def test_scores_are_squared_slopes_of_the_loss_by_finite_differences(make_whisper):
    model = make_whisper(decoder_layers=2, encoder_layers=1).double()
    batch = a_batch(model)
    batch.input_features = batch.input_features.double()
    scores = layer_scores(model, [batch])
    labelled = batch.labels != -100

    def loss(number, gate):
        hook = model.model.decoder.layers[number].register_forward_hook(
            lambda module, args, output: args[0] + gate * (output - args[0])
        )
        with torch.no_grad():
            ids = batch.decoder_input_ids
            result = model(batch.input_features, decoder_input_ids=ids).logits[labelled]
        hook.remove()
        return nn.functional.cross_entropy(result, batch.labels[labelled]).item()

    for i in range(2):
        slope = (loss(i, 1.001) - loss(i, 0.999)) / 0.002
        assert scores[i].item() == pytest.approx(slope**2, rel=1e-3, abs=1e-12)


def test_random_layers_depend_only_on_the_seed(deep, context):
    options = replace(MERGE, start="random")
    kept = [merge.apply(deep, options, replace(context, seed=s)) for s in (3, 3)]
    assert same_tensors(*kept)
    layers = [i for (i,) in context.record["merge"]["layers"]]
    assert layers == sorted(set(layers)) and len(layers) == deep.config.decoder_layers // 2


# ---------------------------------------------------------------------------- searching the weights


SEARCH = replace(MERGE, search="bayes", trials=3, trial=replace(BRIEF, steps=1))


@pytest.fixture
def by_weights(monkeypatch):
    """Replace training and WER: WER is lowest if the lower layer has a quarter of the weight."""
    result = []

    def trained(student, teacher, options, training, context, place, label):
        result.append(label)
        return {}

    def regrouped(model, plan, alpha=1.0, beta=1.0, inner=regroup):
        student, record = inner(model, plan, alpha, beta)
        student.distance = abs(alpha / (alpha + beta) - 0.25)
        return student, record

    monkeypatch.setattr(merge, "distil", trained)
    monkeypatch.setattr(merge, "regroup", regrouped)
    monkeypatch.setattr(Context, "wer", lambda self, model: _Wer(model.distance))
    return result


class _Wer:
    def __init__(self, wer):
        self.wer = wer


def test_the_search_returns_the_weights_with_the_lowest_dev_wer(tiny_whisper, context, by_weights):
    merge.apply(tiny_whisper, replace(SEARCH, trials=12), context)
    record = context.record["merge"]
    tried = record["search"]["tried"]
    assert len(tried) == 12 == len({(t["alpha"], t["beta"]) for t in tried})
    assert [(t["alpha"], t["beta"]) for t in tried[:2]] == [(0, 1), (1, 0)]
    lowest = min(tried, key=lambda t: t["dev_wer"])
    assert (record["alpha"], record["beta"]) == (lowest["alpha"], lowest["beta"])
    assert all(0 <= t[name] <= 10 for t in tried for name in ("alpha", "beta"))
    assert by_weights[:2] == ["merge: trial 1 of 12", "merge: trial 2 of 12"]


def test_the_grid_tries_five_ratios(tiny_whisper, context, by_weights):
    merge.apply(tiny_whisper, replace(SEARCH, search="grid"), context)
    tried = context.record["merge"]["search"]["tried"]
    assert [(t["alpha"], t["beta"]) for t in tried] == [(a, 1) for a in (0, 0.1, 0.25, 0.5, 1)]
    assert context.record["merge"]["alpha"] == 0.25  # its share 0.2 is nearest to 0.25


def test_trials_use_a_share_of_the_clips(few, rng):
    clips = few * 20
    for part, count in ((0.3, 18), (0.6, 36), (1.0, 60), (1e-6, 1)):
        assert len(merge.share(clips, part, 1)) == count
    assert merge.share(range(100), 0.3, 1) == merge.share(range(100), 0.3, 1)
    assert merge.share(range(100), 0.3, 1) != merge.share(range(100), 0.3, 2)
    assert merge.share(range(9), 1.0, 1) == list(range(9))


def test_an_interrupted_search_resumes_its_current_trial(make_whisper, context, monkeypatch):
    model = make_whisper(d_model=16, ffn=16, encoder_layers=1)
    whole = merge.apply(model, SEARCH, replace(context, run_dir=context.run_dir / "whole"))
    expected = context.record.pop("merge")
    evaluated = []

    def stopped(self, model, inner=Context.wer):
        evaluated.append(model)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return inner(self, model)

    monkeypatch.setattr(Context, "wer", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge.apply(model, SEARCH, context)
    assert list((context.run_dir / "merge-trials").iterdir())  # the stopped trial's training
    resumed = merge.apply(model, SEARCH, context)
    assert len(evaluated) == 4  # three trials, one of them twice
    assert same_tensors(resumed, whole)
    assert context.record["merge"]["search"] == expected["search"]
    assert not list((context.run_dir / "merge-trials").iterdir())


def test_searches_share_a_name_only_if_their_trials_are_equal(tiny_whisper, context):
    plan = [(0, 1)]

    def name(options=SEARCH, model=tiny_whisper, plan=plan, context=context):
        return merge.search_name(model, plan, options, context)

    other = copy.deepcopy(tiny_whisper)
    with torch.no_grad():
        other.model.decoder.layers[0].fc1.bias[0] += 1
    same = [name(), name(replace(SEARCH, trials=9, training=BRIEF))]
    differ = [
        name(replace(SEARCH, kl=0.3)),
        name(replace(SEARCH, trial=replace(BRIEF, steps=7))),
        name(model=other),
        name(plan=[(0,), (1,)]),
        name(context=replace(context, dev=context.dev[:1])),
    ]
    assert len(set(same)) == 1 and len({*same, *differ}) == 6
