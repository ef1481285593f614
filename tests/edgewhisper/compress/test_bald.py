"""BaldWhisper: merged decoder layers and their distillation, the factorised token table, export."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import export, low_rank, torch_steps, window
from onnx import numpy_helper
from onnx_sessions import open_model
from torch import nn
from transformers import WhisperConfig

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import decoding, whisper
from edgewhisper.compress import merge, shear, shrink
from edgewhisper.compress.merge import (
    divergence,
    head_moves,
    layer_scores,
    merge_layers,
    merge_tensor,
    parse_groups,
    regroup,
    similarities,
)
from edgewhisper.compress.shear import (
    balanced,
    enough,
    factorise,
    feature_distance,
    weighted_error,
)
from edgewhisper.compress.work import Work
from edgewhisper.examples import Batch
from edgewhisper.recipe import load_recipe
from edgewhisper.training import Training
from export.cost import count_parameters, macs
from export.manifest import Spec
from export.onnx.graph import INT8, Graph
from export.onnx.layers import quantise
from export.onnx.tables import FactorisedTable, column_scales
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.shrink import layer_shapes

NONE = Training(steps=0)
BRIEF = Training(steps=2, batch_size=2, learning_rate=1e-3)
MERGE = merge.Options(training=NONE, calibration=2)
SHEAR = shear.Options(rank=8, training=NONE, calibration=2)
STARTS = ["svd", "frequency", "activation", "both", "mix"]


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:3]


@pytest.fixture
def work(few, processor, tmp_path: Path) -> Work:
    return Work(processor=processor, train=few, dev=few, run_dir=tmp_path / "run")


@pytest.fixture
def deep(make_whisper, rng):
    """A random Whisper with an even number of decoder layers, two pairs or three."""
    return make_whisper(decoder_layers=2 * int(rng.integers(2, 4)), encoder_layers=1)


@pytest.fixture
def weights(rng) -> tuple[float, float]:
    """alpha, beta."""
    return tuple(float(x) for x in rng.uniform(0.01, 10, size=2))


@torch.no_grad()
def logits(model, ids=None):
    """Logits of the same two sounds and texts, whatever the model."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 80, 600, generator=generator)
    ids = torch.randint(0, 300, (2, 7), generator=generator) if ids is None else ids
    return model(features, decoder_input_ids=ids, use_cache=False).logits


def keeping(model, layers):
    """The model with some of its decoder layers, by the shortest way; it cannot use a cache."""
    model = copy.deepcopy(model)
    model.model.decoder.layers = nn.ModuleList(model.model.decoder.layers[i] for i in layers)
    return model


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pairs(model):
    return parse_groups("", model.config.decoder_layers)


def silent(layer) -> None:
    """A layer that hands on what it is given."""
    for linear in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


# ------------------------------------------------------------------------------------- merging


def test_a_merger_whose_answer_is_known():
    lower, upper = torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([[5.0, 2.0], [8.0, 4.0]])
    wanted = torch.tensor([[4.0, 2.0], [6.0, 2.0]])
    torch.testing.assert_close(merge_tensor(lower, upper, 1.0, 3.0), wanted)


def test_merged_layers_are_numpys_weighted_average(deep, weights):
    merged, _ = regroup(deep, pairs(deep), *weights)
    old, new = deep.state_dict(), merged.state_dict()
    alpha, beta = weights
    checked = 0
    for name, tensor in new.items():
        if ".decoder.layers." not in name:
            assert torch.equal(tensor, old[name])
            continue
        k, rest = name.removeprefix(merge.LAYERS).split(".", 1)
        both = (old[f"{merge.LAYERS}{2 * int(k) + i}.{rest}"].double().numpy() for i in (0, 1))
        lower, upper = both
        wanted = (alpha * lower + beta * upper) / (alpha + beta)
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-6)
        checked += 1
    per_layer = sum(name.startswith(f"{merge.LAYERS}0.") for name in new)
    assert checked == per_layer * merged.config.decoder_layers > 0


@pytest.mark.parametrize(
    ("alpha", "beta", "first"), [(1.0, 0.0, 0), (0.0, 1.0, 1)], ids=["lower", "upper"]
)
def test_a_weight_of_zero_keeps_the_other_layers(alpha, beta, first, deep, work):
    kept = keeping(deep, range(first, deep.config.decoder_layers, 2))
    merged, _ = regroup(deep, pairs(deep), alpha, beta)
    assert torch.equal(logits(merged), logits(kept))
    name = ("lower", "upper")[first]
    named = merge.apply(deep, replace(MERGE, start=name), work)
    assert same_tensors(named, merged)
    assert work.record["merge"]["layers"] == [
        [i] for i in range(first, len(kept.model.decoder.layers) * 2, 2)
    ]


def test_merging_a_layer_with_itself_changes_no_bit(deep, weights):
    layer = merge.layer_tensors(deep.state_dict(), 0)
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


def test_mergers_of_twins_are_the_model_with_one_of_each(deep, weights):
    layers = deep.model.decoder.layers
    for lower, upper in pairs(deep):
        layers[upper].load_state_dict(layers[lower].state_dict())
    kept = keeping(deep, [lower for lower, _ in pairs(deep)])
    assert torch.equal(logits(regroup(deep, pairs(deep), *weights)[0]), logits(kept))


def test_layers_that_stay_alone_are_left_as_they_are(deep, work):
    groups = " ".join(str(i) for i in range(deep.config.decoder_layers))
    assert same_tensors(merge.apply(deep, replace(MERGE, groups=groups), work), deep)


def test_any_layers_may_be_grouped(make_whisper, weights):
    model = make_whisper(decoder_layers=5, encoder_layers=1)
    merged, told = regroup(model, parse_groups("1+4 0 2+3", 5), *weights)
    assert told["layers"] == [[1, 4], [0], [2, 3]]
    wanted = merge.layer_tensors(model.state_dict(), 0)
    found = merge.layer_tensors(merged.state_dict(), 1)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adjacent_layers_are_paired_where_nothing_is_said():
    assert parse_groups("", 6) == [(0, 1), (2, 3), (4, 5)]
    assert parse_groups("", 5) == [(0, 1), (2, 3), (4,)]
    assert parse_groups("", 1) == [(0,)]


@pytest.mark.parametrize(
    "groups", ["0+1 2", "0+1 1+2 3", "0+1 2+3 4", "1+0 2+3", "0+1+2 3", "0+1, 2+3", "a+b"]
)
def test_groups_that_miss_or_repeat_layers_are_a_letter(groups):
    with pytest.raises(Problem, match="each of the 4 decoder layers once") as problem:
        parse_groups(groups, 4)
    assert "'0+1 2+3'" in problem.value.hint


def test_two_weights_of_zero_are_a_letter(tiny_whisper, work):
    with pytest.raises(Problem, match="alpha 0 and beta 0 leave nothing"):
        merge.apply(tiny_whisper, replace(MERGE, alpha=0.0, beta=0.0), work)


def test_a_search_without_merging_is_a_letter(tiny_whisper, work):
    with pytest.raises(Problem, match="nothing to search where start is 'upper'"):
        merge.apply(tiny_whisper, replace(MERGE, start="upper", search="grid"), work)


# ------------------------------------------------------------------- slim models and their shapes


def without_units(model, layer: int, count: int):
    """The model with fewer units in one decoder layer."""
    with torch.no_grad():
        model.model.decoder.layers[layer].fc2.weight[:, :count] = 0
    return shrink.apply(model, shrink.Options(), Work(None, [], [], Path()))


def test_layers_of_unequal_shapes_are_a_letter_before_anything_is_trained(tiny_whisper, work):
    slim = without_units(tiny_whisper, 1, 3)
    options = replace(MERGE, baseline=BRIEF)
    with pytest.raises(
        Problem, match=r"fc1.bias is \(48,\) in the lower and \(45,\) in"
    ) as problem:
        merge.apply(slim, options, work)
    assert "put the step merge before" in problem.value.hint
    assert not work.run_dir.exists()


@pytest.mark.parametrize("start", ["upper", "lower"])
def test_layers_of_unequal_shapes_can_be_kept(start, tiny_whisper, work):
    slim = without_units(tiny_whisper, 1, 3)
    kept = merge.apply(slim, replace(MERGE, start=start), work)
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


def test_layers_that_read_different_features_are_a_letter():
    layers = [
        {"fc1.weight": torch.ones(4, 2), "fc1.inputs": torch.tensor(inputs)}
        for inputs in ([0, 1], [0, 2])
    ]
    with pytest.raises(Problem, match=r"read different features \(fc1.inputs\)"):
        merge_layers(*layers, 1.0, 1.0)
    assert torch.equal(merge_layers(layers[0], layers[0], 1.0, 2.0)["fc1.inputs"], torch.arange(2))


# ------------------------------------------------------------------------ the new layers' numbers


def test_layers_are_numbered_anew(deep, weights):
    merged, _ = regroup(deep, pairs(deep), *weights)
    layers = merged.model.decoder.layers
    assert len(layers) == merged.config.decoder_layers == deep.config.decoder_layers // 2
    for i, layer in enumerate(layers):
        assert layer.self_attn.layer_idx == layer.encoder_attn.layer_idx == i


@pytest.mark.parametrize(
    ("plan", "alpha", "beta", "went"),
    [
        pytest.param([(0, 1), (2, 3)], 1.0, 1.0, [0, 0, 1, 1], id="equal shares"),
        pytest.param([(0, 1), (2, 3)], 1e-6, 1.0, [None, 0, None, 1], id="the upper one's"),
        pytest.param([(0, 1), (2, 3)], 3.0, 2.9, [0, None, 1, None], id="the lower one's"),
        pytest.param([(1,), (3,)], 0.0, 1.0, [None, 0, None, 1], id="layers left out"),
        pytest.param([(0,), (1, 2), (3,)], 0.1, 1.0, [0, None, 1, 2], id="layers alone"),
    ],
)
def test_heads_go_with_their_layer_where_it_has_the_larger_share(plan, alpha, beta, went):
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
def test_the_record_says_what_became_of_the_alignment_heads(
    named, weights, after, dropped, tiny_whisper, work
):
    """Where none is left the upper half stands in, as wherever heads are lost."""
    tiny_whisper.generation_config.alignment_heads = named
    alpha, beta = weights
    merged = merge.apply(tiny_whisper, replace(MERGE, alpha=alpha, beta=beta), work)
    found = merged.generation_config.alignment_heads
    assert found == (after or [[0, 0], [0, 1]])
    assert work.record["merge"]["alignment_heads"] == {
        "before": named,
        "after": found,
        "stand_in": after is None,
        "dropped": dropped,
    }


def test_a_model_without_alignment_heads_stays_without(tiny_whisper, work):
    tiny_whisper.generation_config.alignment_heads = None
    merged = merge.apply(tiny_whisper, MERGE, work)
    assert merged.generation_config.alignment_heads is None
    assert work.record["merge"]["alignment_heads"] == {"dropped": []}


def both_stages(model, work):
    merged = merge.apply(model, MERGE, work)
    return shear.apply(merged, SHEAR, work)


STAGES = {
    "merged": lambda model, work: merge.apply(model, MERGE, work),
    "sheared": lambda model, work: shear.apply(model, SHEAR, work),
    "both": both_stages,
}


@pytest.fixture(params=STAGES)
def bald(request, deep, work):
    """A random model after either stage, or both."""
    return STAGES[request.param](deep, work)


def test_greedy_decoding_with_the_cache_is_that_without(bald, processor, rng):
    pcm = window(processor, rng)
    features = decoding.log_mel(processor.feature_extractor, [pcm])
    found = []
    for cached in (True, False):
        with torch.no_grad():
            found.append(
                bald.generate(
                    features, do_sample=False, num_beams=1, max_new_tokens=12, use_cache=cached
                ).tolist()
            )
    assert found[0] == found[1]


def test_logits_with_the_cache_are_those_without(bald, processor, rng):
    pcm, ids = window(processor, rng), rng.integers(0, 783, 9).tolist()
    steps = np.stack(torch_steps(bald, processor, pcm, [[i] for i in ids]))
    np.testing.assert_allclose(steps, decoding.logits(bald, processor, pcm, ids), atol=1e-3)


def test_a_round_trip_is_bit_exact(bald, processor, tmp_path):
    whisper.save(bald, processor, tmp_path / "out", {})
    loaded = whisper.load(tmp_path / "out")
    assert same_tensors(loaded, bald)
    assert torch.equal(logits(loaded), logits(bald))
    for key in ("edgewhisper", "decoder_layers"):
        assert getattr(loaded.config, key, None) == getattr(bald.config, key, None)


def test_onnx_logits_and_tokens_are_torchs(bald, processor, rng, tmp_path):
    exported = export(bald, processor, tmp_path)
    pcm = window(processor, rng)
    chunks = [rng.integers(0, 783, n).tolist() for n in (int(rng.integers(1, 6)), 1, 3)]
    past, cross = exported.no_past(), exported.encode(pcm)
    for chunk, want in zip(chunks, torch_steps(bald, processor, pcm, chunks), strict=True):
        found, past = exported.step(chunk, past, cross)
        assert np.abs(found - want).max() < 1e-3
    assert exported.greedy(pcm) == decoding.greedy(bald, processor, [pcm])[0]


# --------------------------------------------------------------------------------- distillation


def draw_logits(rng, tokens=4, vocabulary=9):
    return [torch.from_numpy(3 * rng.standard_normal((tokens, vocabulary))) for _ in range(2)]


@pytest.mark.parametrize("t_squared", [True, False])
def test_the_divergence_is_that_of_its_definition(t_squared, rng):
    teacher, student = draw_logits(rng)
    temperature = float(rng.uniform(0.5, 5))
    p, q = (np.exp(x.numpy() / temperature) for x in (teacher, student))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    wanted = (p * np.log(p / q)).sum(axis=1).mean() * (temperature**2 if t_squared else 1)
    found = divergence(teacher, student, torch.tensor(temperature), t_squared)
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_a_model_does_not_diverge_from_itself(rng):
    teacher, _ = draw_logits(rng)
    assert divergence(teacher, teacher, torch.tensor(2.0), True).item() == pytest.approx(
        0, abs=1e-6
    )


def test_the_factor_keeps_the_gradient_as_the_temperature_grows(rng):
    """Towards the difference of centred logits, over V: distillation by plain regression."""
    teacher, student = draw_logits(rng, tokens=1)
    student.requires_grad_()
    divergence(teacher, student, torch.tensor(1000.0), True).backward()
    gap = (student - teacher).detach()
    wanted = (gap - gap.mean()) / gap.shape[1]
    torch.testing.assert_close(
        student.grad, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item()
    )


def a_batch(model) -> Batch:
    prompt = torch.randint(0, 300, (2, 6))
    labels = torch.randint(0, 300, (2, 6))
    labels[:, 0] = -100
    labels[1, 4:] = -100
    return Batch(torch.randn(2, 80, 600), prompt, labels)


def test_training_adds_up_to_the_papers_loss(make_whisper, rng):
    teacher, student = make_whisper(), make_whisper()
    batch = a_batch(student)
    ce, kl = (float(x) for x in rng.uniform(0.1, 3, size=2))
    options = merge.Options(ce=ce, kl=kl, temperature=3.0)
    term = merge.distillation(teacher, options)
    outputs = student(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
    told = batch.labels != -100
    cross = nn.functional.cross_entropy(outputs.logits[told], batch.labels[told])
    wanted = merge.logits_of(teacher, batch)[told]
    far = divergence(wanted, outputs.logits[told], torch.tensor(3.0), True)
    with merge.temperature_in(student, options):
        found = cross + term(student, batch, outputs)
    torch.testing.assert_close(found, ce * cross + kl * far)
    assert merge.distillation(teacher, merge.Options(ce=1.0, kl=0.0)) is None


@pytest.mark.parametrize("learnt", [True, False], ids=["learnt", "fixed"])
def test_the_temperature_is_learnt_and_leaves_no_trace(learnt, tiny_whisper, work):
    options = replace(MERGE, training=BRIEF, learn_temperature=learnt, temperature=3.0)
    student = merge.apply(tiny_whisper, options, work)
    found = work.record["merge"]["training"]["temperature"]
    assert (found != pytest.approx(3.0, rel=1e-6)) == learnt
    assert "log_temperature" not in student.state_dict()


def test_distillation_trains_the_student_and_not_the_teacher(tiny_whisper, work):
    before = copy.deepcopy(tiny_whisper)
    start, _ = regroup(tiny_whisper, pairs(tiny_whisper), MERGE.alpha, MERGE.beta)
    student = merge.apply(tiny_whisper, replace(MERGE, training=BRIEF), work)
    assert same_tensors(tiny_whisper, before)
    assert not same_tensors(student, start)
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, start.state_dict()[n])]
    assert any("encoder.layers" in name for name in moved)
    assert any("decoder.layers" in name for name in moved)


def test_stage_0_trains_what_becomes_start_and_teacher(tiny_whisper, work):
    student = merge.apply(tiny_whisper, replace(MERGE, baseline=BRIEF), work)
    assert work.record["merge"]["baseline"]["steps"] == 2
    assert same_tensors(student, regroup(tiny_whisper, [(0, 1)], MERGE.alpha, MERGE.beta)[0])


# ------------------------------------------------------------------- similarity, and other starts


def test_a_layer_that_does_nothing_is_like_the_one_before(make_whisper, work):
    model = make_whisper(decoder_layers=3, encoder_layers=1)
    silent(model.model.decoder.layers[1])
    found = np.array(similarities(model, MERGE, work))
    np.testing.assert_allclose(found.diagonal(), 1, atol=1e-5)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[0, 2] < 0.999


def test_taylor_removes_the_layer_that_does_least(make_whisper, work):
    model = make_whisper(decoder_layers=4, encoder_layers=1)
    silent(model.model.decoder.layers[2])
    options = replace(MERGE, start="taylor", groups="0+1 2 3")
    left = merge.apply(model, options, work)
    assert work.record["merge"]["layers"] == [[0], [1], [3]]
    assert work.record["merge"]["taylor"][0]["2"] == 0
    torch.testing.assert_close(logits(left), logits(model), rtol=0, atol=1e-5)


def test_scores_are_squared_slopes_of_the_loss_in_each_layers_gate(make_whisper, work, monkeypatch):
    model = make_whisper(decoder_layers=2, encoder_layers=1).double()
    batch = a_batch(model)
    batch.input_features = batch.input_features.double()
    monkeypatch.setattr(merge, "calibration", lambda model, options, work: [batch])
    scores = layer_scores(model, MERGE, work)
    told = batch.labels != -100

    def loss(number, gate):
        hook = model.model.decoder.layers[number].register_forward_hook(
            lambda module, args, output: args[0] + gate * (output - args[0])
        )
        with torch.no_grad():
            ids = batch.decoder_input_ids
            found = model(batch.input_features, decoder_input_ids=ids).logits[told]
        hook.remove()
        return nn.functional.cross_entropy(found, batch.labels[told]).item()

    for i in range(2):
        slope = (loss(i, 1.001) - loss(i, 0.999)) / 0.002
        assert scores[i].item() == pytest.approx(slope**2, rel=1e-3, abs=1e-12)


def test_random_layers_follow_from_the_seed(deep, work):
    options = replace(MERGE, start="random")
    kept = [merge.apply(deep, options, replace(work, seed=s)) for s in (3, 3)]
    assert same_tensors(*kept)
    layers = [i for (i,) in work.record["merge"]["layers"]]
    assert layers == sorted(set(layers)) and len(layers) == deep.config.decoder_layers // 2


# ---------------------------------------------------------------------------- searching the weights

SEARCH = replace(MERGE, search="bayes", trials=3, trial=replace(BRIEF, steps=1))


@pytest.fixture
def by_weights(monkeypatch):
    """Dev WER falls as the merged layer nears a quarter of the lower one; no training."""
    found = []

    def trained(student, teacher, options, training, work, place, label):
        found.append(label)
        return {}

    def regrouped(model, plan, alpha=1.0, beta=1.0, inner=regroup):
        student, told = inner(model, plan, alpha, beta)
        student.distance = abs(alpha / (alpha + beta) - 0.25)
        return student, told

    monkeypatch.setattr(merge, "distil", trained)
    monkeypatch.setattr(merge, "regroup", regrouped)
    monkeypatch.setattr(Work, "wer", lambda self, model: _Wer(model.distance))
    return found


class _Wer:
    def __init__(self, wer):
        self.wer = wer


def test_the_search_takes_the_weights_with_the_lowest_dev_wer(tiny_whisper, work, by_weights):
    merge.apply(tiny_whisper, replace(SEARCH, trials=12), work)
    record = work.record["merge"]
    tried = record["search"]["tried"]
    assert len(tried) == 12 == len({(t["alpha"], t["beta"]) for t in tried})
    assert [(t["alpha"], t["beta"]) for t in tried[:2]] == [(0, 1), (1, 0)]
    lowest = min(tried, key=lambda t: t["dev_wer"])
    assert (record["alpha"], record["beta"]) == (lowest["alpha"], lowest["beta"])
    assert all(0 <= t[name] <= 10 for t in tried for name in ("alpha", "beta"))
    assert by_weights[:2] == ["merge: trial 1 of 12", "merge: trial 2 of 12"]


def test_the_grid_tries_five_ratios(tiny_whisper, work, by_weights):
    merge.apply(tiny_whisper, replace(SEARCH, search="grid"), work)
    tried = work.record["merge"]["search"]["tried"]
    assert [(t["alpha"], t["beta"]) for t in tried] == [(a, 1) for a in (0, 0.1, 0.25, 0.5, 1)]
    assert work.record["merge"]["alpha"] == 0.25  # 0.2 of the lower layer is nearest


def test_trials_see_a_share_of_the_clips(few, rng):
    clips = few * 20
    for part, count in ((0.3, 18), (0.6, 36), (1.0, 60), (1e-6, 1)):
        assert len(merge.share(clips, part, 1)) == count
    assert merge.share(range(100), 0.3, 1) == merge.share(range(100), 0.3, 1)
    assert merge.share(range(100), 0.3, 1) != merge.share(range(100), 0.3, 2)
    assert merge.share(range(9), 1.0, 1) == list(range(9))


def test_an_interrupted_search_goes_on_with_the_trial_it_was_in(make_whisper, work, monkeypatch):
    model = make_whisper(d_model=16, ffn=16, encoder_layers=1)
    whole = merge.apply(model, SEARCH, replace(work, run_dir=work.run_dir / "whole"))
    wanted = work.record.pop("merge")
    evaluated = []

    def stopped(self, model, inner=Work.wer):
        evaluated.append(model)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return inner(self, model)

    monkeypatch.setattr(Work, "wer", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge.apply(model, SEARCH, work)
    assert list((work.run_dir / "merge-trials").iterdir())  # the stopped trial's training
    resumed = merge.apply(model, SEARCH, work)
    assert len(evaluated) == 4  # three trials, one of them twice
    assert same_tensors(resumed, whole)
    assert work.record["merge"]["search"] == wanted["search"]
    assert not list((work.run_dir / "merge-trials").iterdir())


def test_searches_share_trials_only_where_they_measure_the_same(tiny_whisper, work):
    plan = [(0, 1)]

    def name(options=SEARCH, model=tiny_whisper, plan=plan, work=work):
        return merge.search_name(model, plan, options, work)

    other = copy.deepcopy(tiny_whisper)
    with torch.no_grad():
        other.model.decoder.layers[0].fc1.bias[0] += 1
    same = [name(), name(replace(SEARCH, trials=9, training=BRIEF))]
    differ = [
        name(replace(SEARCH, kl=0.3)),
        name(replace(SEARCH, trial=replace(BRIEF, steps=7))),
        name(model=other),
        name(plan=[(0,), (1,)]),
        name(work=replace(work, dev=work.dev[:1])),
    ]
    assert len(set(same)) == 1 and len({*same, *differ}) == 6


# ------------------------------------------------------------------------ the token table's start


@pytest.fixture
def drawn(rng):
    """A table of freshly drawn shape, token frequencies with some at the floor, and a metric."""
    vocabulary, width = int(rng.integers(12, 60)), int(rng.integers(4, 12))
    table = torch.from_numpy(rng.standard_normal((vocabulary, width)))
    frequencies = torch.from_numpy(rng.dirichlet(np.full(vocabulary, 0.3))).clamp_min(1e-6)
    states = torch.from_numpy(
        rng.standard_normal((3 * width, width)) @ np.diag(rng.uniform(0.1, 3, width))
    )
    return table, frequencies, states.T @ states / len(states)


def test_factors_of_a_table_whose_answer_is_known():
    # rank one kept of diag(3, 1): the larger value stays, and is split evenly by mean squares
    table = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    rows, basis = factorise(table, 1, torch.ones(2), torch.eye(2))
    torch.testing.assert_close(rows @ basis, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert rows.abs().max().item() == basis.abs().max().item() == pytest.approx(3**0.5)
    # the first token is rare: the second's row is what counts now
    rows, basis = factorise(table, 1, torch.tensor([1e-6, 1.0]), torch.eye(2))
    torch.testing.assert_close(rows @ basis, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_factors_agree_with_numpys_cholesky_form(drawn, rng):
    """(6) as it is printed, S from Cholesky's decomposition; ours takes the symmetric root."""
    table, frequencies, metric = (x.numpy() for x in drawn)
    rank = int(rng.integers(1, table.shape[1]))
    root = np.linalg.cholesky(metric)
    scale = np.sqrt(frequencies)[:, None]
    u, sigma, v = np.linalg.svd(scale * table @ root, full_matrices=False)
    wanted = (u[:, :rank] / scale) @ (sigma[:rank, None] * v[:rank] @ np.linalg.inv(root))
    rows, basis = factorise(drawn[0], rank, *drawn[1:])
    np.testing.assert_allclose((rows @ basis).numpy(), wanted, atol=1e-6)
    error = weighted_error(drawn[0], rows @ basis, *drawn[1:])
    assert error == pytest.approx((sigma[rank:] ** 2).sum() / (sigma**2).sum(), rel=1e-6)


def test_no_other_factors_of_that_rank_are_nearer_where_it_counts(drawn, rng):
    table, frequencies, metric = drawn
    rank = int(rng.integers(1, table.shape[1]))
    rows, basis = factorise(table, rank, frequencies, metric)
    least = weighted_error(table, rows @ basis, frequencies, metric)
    plain = factorise(table, rank, torch.ones(len(table)), torch.eye(table.shape[1]))
    assert least <= weighted_error(table, plain[0] @ plain[1], frequencies, metric) + 1e-12
    for size in (1e-1, 1e-3):
        for _ in range(100):
            near = (rows + size * torch.randn_like(rows)) @ (basis + size * torch.randn_like(basis))
            assert weighted_error(table, near, frequencies, metric) >= least - 1e-12


def test_balancing_leaves_the_product_and_evens_the_factors(rng):
    rows, basis = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((20, 3), (3, 6)))
    rows[:, 1] *= 100
    even, level = balanced(rows, basis)
    torch.testing.assert_close(even @ level, rows @ basis)
    torch.testing.assert_close(even.square().mean(0), level.square().mean(1))


def test_a_table_of_lower_rank_than_asked_for_gives_no_nan(rng):
    table = torch.zeros(9, 4)
    table[:, 0] = 1
    rows, basis = factorise(table, 3, torch.ones(9), torch.eye(4))
    torch.testing.assert_close(rows @ basis, table)


@pytest.mark.parametrize("start", STARTS)
def test_the_full_rank_changes_neither_embeddings_nor_logits(start, tiny_whisper, work):
    config = tiny_whisper.config
    options = replace(SHEAR, start=start, rank=min(config.vocab_size, config.d_model))
    frequencies = shear.token_frequencies(tiny_whisper, work, options.floor)
    metric = shear.second_moment(tiny_whisper, options, work)
    factors = shear.factors_of(tiny_whisper, options, frequencies, metric)
    full = shear.sheared(tiny_whisper, *factors)  # the step itself refuses it: nothing is saved
    ids = torch.arange(config.vocab_size)
    old, new = (m.model.decoder.embed_tokens(ids) for m in (tiny_whisper, full))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)
    wanted = logits(tiny_whisper)
    torch.testing.assert_close(logits(full), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    errors = shear.start_errors(tiny_whisper, full, frequencies, metric)
    assert max(errors.values()) < 1e-9


def test_theta_is_the_share_that_the_rank_must_exceed():
    sigma = torch.cat([torch.full((16,), 3.0), torch.full((16,), 1.0), torch.zeros(4)])
    assert [enough(sigma, theta) for theta in (0.1, 0.89, 0.91)] == [16, 16, 32]
    assert enough(sigma, 1.0) == 36  # nothing exceeds all


def test_theta_chooses_the_rank_by_what_the_start_weighs(make_whisper, work, rng):
    model = make_whisper(d_model=48)
    theta = rng.uniform(0.3, 0.99)
    found = shear.apply(model, replace(SHEAR, start="svd", theta=theta), work)
    rank = work.record["shear"]["rank"]
    if rank is None:  # 48 is all of it
        assert found is model
        rank = work.record["shear"]["kept_dense"]["rank_needed"]
    else:
        assert rank == found.config.edgewhisper["token_rank"] < 48
    squares = np.linalg.svd(model.model.decoder.embed_tokens.weight.detach().numpy())[1] ** 2
    share = np.cumsum(squares) / squares.sum()
    assert rank % 16 == 0 and share[rank - 1] > theta
    assert rank == 16 or share[rank - 17] <= theta


def test_each_start_is_best_by_its_own_measure(tiny_whisper, work):
    table = tiny_whisper.model.decoder.embed_tokens.weight.detach()
    frequencies = shear.token_frequencies(tiny_whisper, work, SHEAR.floor)
    metric = shear.second_moment(tiny_whisper, SHEAR, work)
    products = {}
    for start in STARTS:
        model = shear.apply(tiny_whisper, replace(SHEAR, start=start), work)
        factors = model.model.decoder.embed_tokens
        products[start] = (factors.rows.weight @ factors.up.weight.T).detach()
    for start in STARTS:
        f, m = shear.powers(replace(SHEAR, start=start))
        by = frequencies**f, shear.power(metric, m)
        errors = {name: weighted_error(table, found, *by) for name, found in products.items()}
        assert min(errors, key=errors.__getitem__) == start


@pytest.mark.parametrize(("mix", "start"), [(1.0, "frequency"), (0.0, "activation")])
def test_the_mix_ends_in_the_pure_starts(mix, start, tiny_whisper, work):
    one = shear.apply(tiny_whisper, replace(SHEAR, start="mix", mix=mix), work)
    assert same_tensors(one, shear.apply(tiny_whisper, replace(SHEAR, start=start), work))


def test_tokens_are_counted_as_decoding_reads_them(tiny_whisper, work):
    found = shear.token_frequencies(tiny_whisper, work, 1e-6)
    begin = tiny_whisper.config.decoder_start_token_id
    assert found.min().item() == pytest.approx(1e-6)
    assert found[tiny_whisper.config.eos_token_id].item() == pytest.approx(1e-6)
    spoken = [
        work.processor.tokenizer(" " + c.text, add_special_tokens=False).input_ids
        for c in work.train
    ]
    total = sum(4 + len(ids) for ids in spoken)
    assert found[begin].item() == pytest.approx(len(work.train) / total)


def test_the_second_moment_is_that_of_the_states_before_the_logits(tiny_whisper, work):
    found = shear.second_moment(tiny_whisper, SHEAR, work)
    batch = next(shear.batches(work.train[:2], tiny_whisper, work.processor, 2))
    with torch.no_grad():
        decoded = tiny_whisper.model(
            batch.input_features, decoder_input_ids=batch.decoder_input_ids
        )
    states = decoded.last_hidden_state[batch.labels != -100].double()
    wanted = states.T @ states / len(states)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert torch.linalg.eigvalsh(found).min() > 0


# ------------------------------------------------------------------------ feature distillation


def test_the_distance_is_that_of_its_definition(rng):
    a, b = (rng.standard_normal((5, 7)) for _ in range(2))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    wanted = np.abs(a - b).mean(axis=1) + np.log(1 + np.exp(-cosine))
    found = feature_distance(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


def test_equal_features_are_nearest(rng):
    a = torch.from_numpy(rng.standard_normal((5, 7)))
    nearest = float(np.log(1 + np.exp(-1)))
    torch.testing.assert_close(feature_distance(a, a), torch.full((5,), nearest), rtol=0, atol=1e-5)
    assert (feature_distance(a, a + 0.1) > nearest).all()


@pytest.fixture
def sheared(make_whisper, work):
    """A factorised model and the dense one it was made of."""
    teacher = make_whisper()
    return shear.apply(teacher, SHEAR, work), teacher


def term_of(student, teacher, batch, options, steps=10, done=0):
    with shear.watched(student.proj_out) as seen, shear.step_counter(student):
        student.shear_steps += done
        outputs = student(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
        distillation = shear.Distillation(teacher, seen, options, steps)
        return distillation.term(student, batch, outputs)


def test_the_term_is_the_two_distances_of_the_paper(sheared):
    student, teacher = sheared
    batch = a_batch(student)
    batch.labels[0, 5] = -100  # clips of unequal length
    factors, dense = student.model.decoder.embed_tokens, teacher.model.decoder.embed_tokens.weight
    product = factors.rows.weight @ factors.up.weight.T
    states = shear.states_of(teacher, batch)
    told = batch.labels != -100
    near = far = torch.zeros(())
    for clip, length in enumerate((5, 4)):
        ids = batch.decoder_input_ids[clip, :length]
        share = told[clip].sum() / told.sum()
        near = near + share * feature_distance(dense[ids], product[ids]).mean()
        h = states[clip][told[clip]]
        far = far + share * feature_distance(h @ dense.T, h @ product.T).mean()
    options = replace(SHEAR, input_weight=0.7, logit_weight=1.3)
    found = term_of(student, teacher, batch, options)
    torch.testing.assert_close(found, 0.7 * near + 1.3 * far, rtol=1e-4, atol=1e-5)


def test_a_batch_split_over_processes_adds_up(sheared):
    student, teacher = sheared
    batch = a_batch(student)
    options = replace(SHEAR, states="student")
    whole = term_of(student, teacher, batch, options)
    told = (batch.labels != -100).sum(dim=1)
    parts = torch.zeros(())
    for i in range(2):
        one = Batch(
            *(x[i : i + 1] for x in (batch.input_features, batch.decoder_input_ids, batch.labels))
        )
        parts = parts + told[i] / told.sum() * term_of(student, teacher, one, options)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_teachers_states_come_first_and_then_the_students(sheared):
    student, teacher = sheared
    with torch.no_grad():
        student.model.decoder.layer_norm.weight.mul_(2)  # so that the states differ
    batch = a_batch(student)
    by = {
        states: term_of(student, teacher, batch, replace(SHEAR, states=states)).item()
        for states in ("teacher", "student")
    }
    assert by["teacher"] != pytest.approx(by["student"], rel=1e-3)
    options = replace(SHEAR, states="teacher_then_student", switch=0.4)
    for done, states in ((0, "teacher"), (3, "teacher"), (4, "student"), (9, "student")):
        found = term_of(student, teacher, batch, options, done=done).item()
        assert found == pytest.approx(by[states], rel=1e-6)


def test_gradients_reach_both_factors_from_both_uses(sheared):
    student, _ = sheared
    factors = student.model.decoder.embed_tokens
    ids = torch.tensor([[3, 4]])
    for use in (lambda: factors(ids), lambda: student.proj_out(torch.randn(1, 2, 32))):
        student.zero_grad()
        use().square().sum().backward()
        assert factors.rows.weight.grad.abs().sum() > 0
        assert factors.up.weight.grad.abs().sum() > 0
    assert student.proj_out.table is factors


def test_training_the_factors_leaves_hooks_and_counters_behind_nowhere(make_whisper, work):
    model = make_whisper()
    before = copy.deepcopy(model)
    student = shear.apply(model, replace(SHEAR, training=BRIEF), work)
    start = shear.apply(model, SHEAR, replace(work, record={}))
    assert same_tensors(model, before)
    assert student.state_dict().keys() == start.state_dict().keys()
    assert not student.proj_out._forward_pre_hooks
    for name in ("rows.weight", "up.weight"):
        name = f"{shear.TABLE}.{name}"
        assert not torch.equal(student.state_dict()[name], start.state_dict()[name])
    assert work.record["shear"]["training"]["steps"] == 2


# ------------------------------------------------------------------ the factorised model at large


def base(decoder_layers=6, **shapes):
    """Whisper-base's dimensions, without its memory."""
    config = WhisperConfig(
        d_model=512,
        encoder_layers=6,
        decoder_layers=decoder_layers,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
    )
    if shapes:
        config.edgewhisper = {"format": 1, **shapes}
    with torch.device("meta"):
        return whisper.WhisperForConditionalGeneration(config)


def test_whisper_base_gets_the_papers_sizes():
    with torch.device("meta"):
        merged, _ = regroup(base(), pairs(base()), 0.1, 1.0)
    assert count_parameters(merged)["total"] == pytest.approx(59.98e6, abs=5e3)
    final = base(decoder_layers=3, token_rank=96)
    assert count_parameters(final)["total"] == pytest.approx(38.46e6, abs=5e3)
    assert count_parameters(final)["token_table"] == 51865 * 96 + 96 * 512


def test_the_head_costs_what_the_factors_multiply():
    dense, final = (macs(base(3, **more))["decoder_per_token"] for more in ({}, {"token_rank": 96}))
    head = 51865 * 96 + 96 * 512
    assert head / 1e6 == pytest.approx(5.03, abs=0.005)
    assert dense - final == 51865 * 512 - head - 96 * 512  # the look-up multiplies, too


def test_a_factorised_model_shrinks_and_a_shrunk_one_is_factorised(tiny_whisper, work):
    one = shrink.apply(
        shear.apply(copy.deepcopy(tiny_whisper), SHEAR, work), shrink.Options(), work
    )
    slim = without_units(tiny_whisper, 1, 3)
    other = shear.apply(slim, SHEAR, work)
    for model in (one, other):
        assert model.config.edgewhisper["token_rank"] == 8
        assert len(model.config.edgewhisper["decoder"]) == 2
        assert layer_shapes(model) == model.config.edgewhisper
    assert other.config.edgewhisper["decoder"][1]["ffn"] == 45
    assert work.record["shrink"]["parameters"]["before"]["token_table"] == 8 * (783 + 32)


def test_a_copy_of_a_factorised_model_has_factors_of_its_own(sheared):
    student, _ = sheared
    twin = copy.deepcopy(student)
    assert twin.proj_out.table is twin.model.decoder.embed_tokens
    assert twin.proj_out.table is not student.model.decoder.embed_tokens


def test_a_factorised_model_works_in_the_pipeline(sheared, processor, rng):
    from transformers import pipeline

    recogniser = pipeline(
        "automatic-speech-recognition",
        model=sheared[0],
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    assert isinstance(recogniser(rng.standard_normal(8000).astype(np.float32))["text"], str)


def test_a_table_is_factorised_once_and_within_its_rank(sheared, tiny_whisper, work):
    with pytest.raises(Problem, match="factorised already, with rank 8"):
        shear.apply(sheared[0], SHEAR, work)
    with pytest.raises(
        Problem, match="rank 33 is more than a table of 783 tokens by 32"
    ) as problem:
        shear.apply(tiny_whisper, replace(SHEAR, rank=33), work)
    assert "set rank to 8" in problem.value.hint


def test_factors_that_save_nothing_are_a_letter(make_whisper, work, rng):
    model = make_whisper(d_model=16 * int(rng.integers(1, 5)))
    tokens, width = model.model.decoder.embed_tokens.weight.shape
    highest = (tokens * width - 1) // (tokens + width)
    with pytest.raises(Problem, match=f"shear: two factors of rank {highest + 1} have") as told:
        shear.apply(model, replace(SHEAR, rank=highest + 1), work)
    assert f"the token table has {tokens * width:,}: nothing would be saved" in str(told.value)
    small = shear.apply(model, replace(SHEAR, rank=highest), work)
    assert count_parameters(small)["token_table"] < tokens * width


@pytest.mark.parametrize("theta", [0.999999, 1.0])
def test_a_table_that_theta_would_make_larger_stays_as_it_is(theta, make_whisper, work):
    model = make_whisper(d_model=48)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = replace(SHEAR, theta=theta, training=BRIEF)
    found = shear.apply(model, options, work)
    told = work.record["shear"]
    assert told["kept_dense"] == {"rank_needed": 48, "parameters_of_factors": 48 * (783 + 48)}
    assert told["parameters"]["before"] == told["parameters"]["after"] == count_parameters(found)
    assert told["rank"] is None and not hasattr(found.config, "edgewhisper")
    assert all(torch.equal(before[name], t) for name, t in found.state_dict().items())


@pytest.mark.parametrize("rank", [0, -1, 33, 2.5, "8", True, None])
def test_a_bad_rank_in_a_checkpoint_is_a_letter(rank, sheared, processor, tmp_path):
    whisper.save(sheared[0], processor, tmp_path / "out", {})
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["edgewhisper"]["token_rank"] = rank
    path.write_text(json.dumps(config))
    with pytest.raises(Problem, match=r"token_rank is .*; it must be between 1 and 32"):
        whisper.load(tmp_path / "out")


def test_a_rank_that_is_not_the_weights_is_a_letter(sheared, processor, tmp_path):
    whisper.save(sheared[0], processor, tmp_path / "out", {})
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["edgewhisper"]["token_rank"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(Problem, match=r"wrong shape for 2 tensor.*embed_tokens.rows.weight"):
        whisper.load(tmp_path / "out")


# ---------------------------------------------------------------------------------- in ONNX


def stored(path):
    return [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_both_factors_are_stored_once(precision, sheared, processor, tmp_path):
    export_onnx(sheared[0], processor, tmp_path, precision)
    factors = sheared[0].model.decoder.embed_tokens
    arrays = stored(tmp_path / "decoder.onnx")
    rows, basis = (w.detach().numpy() for w in (factors.rows.weight, factors.up.weight.T))
    for weight in (rows, basis):
        if precision == "int8":
            weight, scale = quantise(weight / column_scales(weight))
            assert any(np.array_equal(array, scale) for array in arrays)
        assert sum(a.dtype == weight.dtype and np.array_equal(a, weight) for a in arrays) == 1
    assert not any(783 in array.shape and 32 in array.shape for array in arrays)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["layers"]["token_rank"] == 8


def test_int8_logits_are_those_of_the_quantised_factors(
    make_whisper, work, processor, rng, tmp_path
):
    """The factors of the torch model set to what int8 stores: only activations are rounded now."""
    model = shear.apply(make_whisper(d_model=64), replace(SHEAR, rank=16), work)
    factors = model.model.decoder.embed_tokens
    with torch.no_grad():
        for weight in (factors.rows.weight, factors.up.weight.T):
            q, scale = quantise(weight.detach().numpy())
            weight.copy_(torch.from_numpy(q * scale[:, None]))
    graph = Graph("int8")
    rows, basis = (w.detach().numpy() for w in (factors.rows.weight, factors.up.weight.T))
    table = FactorisedTable(graph, rows, basis, INT8)
    found_x, found_z = table.look_up("ids"), table.logits("x")
    inputs = [Spec("ids", (1, 5), "int64"), Spec("x", (1, 3, 64))]
    outputs = [Spec(found_x, (1, 5, 64)), Spec(found_z, (1, 3, 783))]
    onnx.save(graph.model("table", inputs, outputs), tmp_path / "table.onnx")
    session = open_model(tmp_path / "table.onnx")
    ids, x = rng.integers(0, 783, (1, 5)), rng.standard_normal((1, 3, 64)).astype(np.float32)
    found = session.run(None, {"ids": ids, "x": x})
    with torch.no_grad():
        wanted = factors(torch.from_numpy(ids)).numpy(), factors.logits(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    assert np.abs(found[1] - wanted[1]).max() < 0.05 * np.abs(wanted[1]).max()


def test_an_output_that_is_not_the_tables_is_refused(sheared, processor, tmp_path):
    student = sheared[0]
    student.proj_out = whisper.TiedOutput(copy.deepcopy(student.model.decoder.embed_tokens))
    with pytest.raises(Problem, match="differs from its token table"):
        export_onnx(student, processor, tmp_path / "out")


# ---------------------------------------------------------------------------------- the recipe


def test_the_recipe_is_the_papers():
    stages = load_recipe("bald-paper").steps
    assert [step.method for step in stages] == ["merge", "shear"]
    one, two = (step.options for step in stages)
    assert (one.start, one.groups, one.search, one.trials) == ("merge", "", "bayes", 30)
    assert (one.train_share, one.dev_share, two.rank, two.start) == (0.3, 0.6, 96, "svd")
    for training in (one.baseline, one.training, two.training):
        assert (training.epochs, training.learning_rate) == (20.0, 5e-5)


def test_the_recipe_for_minutes_merges_the_pair_in_the_middle():
    (merging, shearing) = (step.options for step in load_recipe("bald").steps)
    assert merge.plan_of(merging, 4) == [(0,), (1, 2), (3,)]
    assert merge.plan_of(merging, 6) == [(0,), (1,), (2, 3), (4,), (5,)]
    assert not merging.training.encoder and not shearing.training.encoder


def test_so_many_pairs_are_merged_in_the_middle():
    assert merge.plan_of(merge.Options(pairs=2), 5) == [(0,), (1, 2), (3, 4)]
    assert merge.plan_of(merge.Options(), 4) == [(0, 1), (2, 3)]
    with pytest.raises(Problem, match="pairs = 3 is given in a decoder of 4 layers"):
        merge.plan_of(merge.Options(pairs=3), 4)
    with pytest.raises(Problem, match="pairs = 1 is given besides groups"):
        merge.plan_of(merge.Options(pairs=1, groups="0+1"), 2)


def test_epochs_are_counted_in_steps(work, tiny_whisper):
    from edgewhisper.training import counted

    twenty = Training(epochs=20.0, batch_size=16, steps=7)
    assert counted(twenty, 100).steps == 125
    assert counted(twenty, 101).steps == 127
    assert counted(Training(steps=7), 100).steps == 7
    options = replace(SHEAR, training=Training(epochs=0.5, batch_size=1, steps=9))
    shear.apply(tiny_whisper, options, work)
    assert work.record["shear"]["training"]["steps"] == 2
