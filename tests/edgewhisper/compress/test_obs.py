"""Optimal brain surgeon: losses, updates, heads, dimensions, levels, and the model that is left."""

import copy
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import decoding, whisper
from edgewhisper.calibration import Moments, Speech
from edgewhisper.compress import fits, lite, obs
from edgewhisper.compress.allocation import Level, allocate, front
from edgewhisper.compress.branches import (
    Branch,
    branches_of,
)
from edgewhisper.compress.budgets import Budget, total_of
from edgewhisper.compress.context import Context
from edgewhisper.compress.curves import Curve, scaled, tried_sizes
from edgewhisper.compress.fits import Fit, factorise, fit_of, put_units, remove_units, root_of
from edgewhisper.compress.low_rank import principal_axes, spectrum, split
from edgewhisper.compress.masks import removed_share
from edgewhisper.compress.obs import Options
from edgewhisper.compress.shrink import slimmed
from edgewhisper.compress.surgeon import (
    balanced,
    damped,
    fitted_loss,
    identity_rows,
    loss_of,
    orthonormal_rows,
    refit,
    refit_columns,
    remove_blocks,
    remove_columns,
    score_directions,
    value_directions,
)
from edgewhisper.compress.walk import Walk
from export.cost import count_parameters
from export.problem import Problem

QUICK = Options(
    own_words=False, effect_clips=0, round_to=1, remove=0.2, low_rank=True, branches=True
)
"""Options for a model 32 wide."""


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    """Four clips."""
    return read_manifest(clips)[:4]


@pytest.fixture
def layer(rng):
    """A linear layer and rows that it reads, which have a mean and are correlated."""
    d_in, d_out = int(rng.integers(6, 14)), int(rng.integers(3, 10))
    mixing = rng.standard_normal((d_in, d_in)) + np.eye(d_in)
    rows = torch.from_numpy(rng.standard_normal((300, d_in)) @ mixing + rng.standard_normal(d_in))
    linear = nn.Linear(d_in, d_out).double()
    return linear, rows


def moments_of(rows) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.chunk(3):
        moments.add(part)
    return moments


def fit(linear, rows, damping=0.0) -> Fit:
    return fit_of(linear, moments_of(rows), damping)


def error(linear, dense, rows) -> float:
    """Mean over rows of the squared distance of two layers' outputs."""
    return float((linear(rows) - dense(rows)).square().sum(1).mean().detach())


def pruned(linear, found: Fit, removed) -> nn.Linear:
    """The layer without those inputs, refitted."""
    after = copy.deepcopy(linear)
    kept = [i for i in range(linear.in_features) if i not in removed]
    weight = torch.zeros_like(linear.weight)
    weight[:, kept] = refit_columns(found.wanted, found.h, torch.tensor(kept))
    fits.put(after, found, weight.detach(), found.mean_x)
    return after


# ------------------------------------------------------------------------------ losses and updates


def test_nothing_removed_changes_nothing(layer):
    linear, rows = layer
    assert error(pruned(linear, fit(linear, rows), []), linear, rows) == pytest.approx(0, abs=1e-18)


def test_a_removal_whose_answer_is_known():
    """Two inputs that are equal but for a sign: one can go, and the other takes its weight."""
    x = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0, 0, 1], [0, 0, -1]]).double()
    h = damped(x.T @ x / 4, 1e-9)
    weight = torch.tensor([[3.0, 1.0, 5.0]]).double()
    removal = remove_columns(weight, h, 1, 1)
    assert int(removal.order[0]) in (0, 1)
    assert removal.losses == pytest.approx([0, 0], abs=1e-6)
    kept = torch.tensor([i for i in range(3) if i != int(removal.order[0])])
    sign = 1 if int(removal.order[0]) == 1 else -1
    torch.testing.assert_close(
        refit_columns(weight @ h, h, kept), torch.tensor([[2.0 * sign, 5.0]]).double()
    )


@pytest.mark.parametrize("size", [1, 3], ids=["one by one", "in groups"])
def test_the_error_is_what_the_formula_says(layer, size):
    linear, rows = layer
    found = fit(linear, rows)
    removal = remove_columns(found.weight, found.h, size, linear.in_features // 2)
    for groups, predicted in enumerate(removal.losses):
        removed = [int(i) for group in removal.order[:groups] for i in group]
        measured = error(pruned(linear, found, removed), linear, rows)
        assert measured == pytest.approx(predicted, rel=1e-6, abs=1e-9)


def test_the_error_after_the_update_is_at_most_that_of_masking(layer, rng):
    linear, rows = layer
    found = fit(linear, rows)
    removed = rng.permutation(linear.in_features)[: linear.in_features // 2].tolist()
    masked = copy.deepcopy(linear)
    with torch.no_grad():
        masked.weight[:, removed] = 0
        masked.bias.copy_(found.mean_y - masked.weight @ found.mean_x)  # with the mean folded
    plain = copy.deepcopy(linear)
    plain.weight.data[:, removed] = 0
    updated = error(pruned(linear, found, removed), linear, rows)
    assert updated <= error(masked, linear, rows) <= error(plain, linear, rows) * (1 + 1e-9)


def test_the_update_is_least_squares_on_what_remains(layer):
    linear, rows = layer
    after = pruned(linear, fit(linear, rows), [0, 2])
    kept = [i for i in range(linear.in_features) if i not in (0, 2)]
    design = torch.cat([rows[:, kept], torch.ones(len(rows), 1).double()], dim=1)
    best = torch.linalg.lstsq(design, linear(rows).detach()).solution  # (kept + 1, d_out)
    torch.testing.assert_close(after.weight[:, kept], best[:-1].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(after.bias, best[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_mean_of_the_output_is_kept(layer, damping):
    linear, rows = layer
    after = pruned(linear, fit(linear, rows, damping), [1, 3, 4])
    torch.testing.assert_close(after(rows).mean(0), linear(rows).mean(0), rtol=0, atol=1e-10)


def test_single_columns_go_in_the_greedy_order(layer):
    linear, rows = layer
    found = fit(linear, rows)
    removal = remove_columns(found.weight, found.h, 1, 3)
    gone: list[int] = []
    for group in removal.order:
        options = [i for i in range(linear.in_features) if i not in gone]
        errors = {i: error(pruned(linear, found, [*gone, i]), linear, rows) for i in options}
        assert int(group) == min(errors, key=errors.__getitem__)
        gone.append(int(group))


def test_a_constant_input_can_go_for_nothing(layer):
    linear, rows = layer
    rows = rows.clone()
    rows[:, 1] = 7.0
    found = fit(linear, rows, 1e-6)
    removal = remove_columns(found.weight, found.h, 1, 1)
    assert int(removal.order[0]) == 1
    assert error(pruned(linear, found, [1]), linear, rows) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------ heads


def test_heads_are_removed_like_brute_force_does(rng):
    heads, width = 4, 3
    rows = torch.from_numpy(rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12)))
    linear = nn.Linear(12, 5).double()
    found = fit(linear, rows)
    removal = remove_blocks(found.weight, found.h, width, heads - 1)
    block = {h: list(range(h * width, (h + 1) * width)) for h in range(heads)}
    gone: list[int] = []
    for number, group in enumerate(removal.order, 1):
        left = [h for h in range(heads) if h not in gone]
        errors = {
            h: error(pruned(linear, found, [i for g in [*gone, h] for i in block[g]]), linear, rows)
            for h in left
        }
        best = min(errors, key=errors.__getitem__)
        assert group.tolist() == block[best]
        assert removal.losses[number] == pytest.approx(errors[best], rel=1e-6)
        gone.append(best)


def test_the_loss_of_a_group_is_not_the_sum_of_its_columns(layer):
    """Inputs that stand in for each other are cheap apart and dear together."""
    linear, rows = layer
    rows = rows.clone()
    rows[:, 1] = rows[:, 0] + 0.01 * rows[:, 2]
    found = fit(linear, rows)
    inverse = torch.linalg.inv(found.h)
    alone = [float(loss_of(found.weight, inverse, torch.tensor([i]))) for i in (0, 1)]
    together = float(loss_of(found.weight, inverse, torch.tensor([0, 1])))
    assert together > sum(alone)


# ------------------------------------------------------------------------------ fewer dimensions


def test_rotated_values_lose_no_more_than_any_choice_of_channels(rng):
    width, kept = 5, 2
    rows = torch.from_numpy(rng.standard_normal((300, width)) @ rng.standard_normal((width, width)))
    found = fit(nn.Linear(width, 8).double(), rows)
    directions, losses = value_directions(found.weight, found.h, heads=1)
    basis = orthonormal_rows(directions[0, :kept])
    loss = fitted_loss(found.weight, found.wanted, found.h, basis)
    assert loss == pytest.approx(float(losses[0, kept:].sum()), rel=1e-6)
    for channels in combinations(range(width), kept):
        channel_rows = identity_rows(width, list(channels), found.h)
        assert loss <= fitted_loss(found.weight, found.wanted, found.h, channel_rows) * (1 + 1e-9)


def test_a_product_loses_what_is_said_and_no_more_than_others(layer):
    linear, rows = layer
    found = fit(linear, rows, 0.1)
    weight, h = found.weight, found.h
    root = root_of(found)
    down, up, _ = split(weight, None, found.mean_y, principal_axes(root, min(weight.shape)))
    torch.testing.assert_close(up @ down, weight)
    losses = spectrum(root)

    def loss(other):
        return float(((weight - other) @ h * (weight - other)).sum())

    u, sizes, axes = torch.linalg.svd(weight, full_matrices=False)
    factor = torch.linalg.cholesky(h)  # as SVD-LLM does it
    left, _, _ = torch.linalg.svd(weight @ factor, full_matrices=False)
    axes_y = left[:, :2]
    of_rank_2 = loss(up[:, :2] @ down[:2])
    assert of_rank_2 == pytest.approx(float(losses[2:].sum()))
    assert of_rank_2 == pytest.approx(loss(axes_y @ axes_y.T @ weight))
    assert of_rank_2 < loss((u[:, :2] * sizes[:2]) @ axes[:2])


def test_a_factorised_layer_keeps_the_mean_of_its_output(make_whisper, few, processor):
    model = make_whisper()
    branch = branches_of(model, "encoder")[1]
    first = branch.layer_of(model).fc1
    walk = Walk(model, speech(few, processor))
    walk.move(branches_of(model, "encoder")[0])
    moments = walk.collect(branch, first)
    fit = fit_of(first, moments, 0.01)
    factorise(model, "model.encoder.layers.0.fc1", fit, 5)
    split = branch.layer_of(model).fc1
    mean = split(moments.mean.float()[None])[0]
    assert split.down.out_features == 5
    torch.testing.assert_close(mean, fit.mean_y.float(), atol=1e-4, rtol=1e-4)


def test_refitted_rows_of_the_identity_are_refitted_columns(layer):
    linear, rows = layer
    found = fit(linear, rows, 0.01)
    kept = torch.tensor([0, 2, 5])
    basis = identity_rows(linear.in_features, kept, found.h)
    torch.testing.assert_close(
        refit(found.wanted, found.h, basis), refit_columns(found.wanted, found.h, kept)
    )


def test_fewer_score_dimensions_lose_what_is_said(rng):
    width, kept = 6, 3
    draws = [rng.standard_normal((width, width)) for _ in range(2)]
    queries, keys = (torch.from_numpy(draw @ draw.T) for draw in draws)
    left, right, losses = score_directions(queries, keys)
    left, right = balanced(left[:kept], right[:kept])
    missing = torch.eye(width).double() - left.T @ right
    lost = torch.trace(missing.T @ queries @ missing @ keys)  # E[(q^T missing k)^2]
    assert float(lost) == pytest.approx(float(losses[kept:].sum()), rel=1e-6)
    torch.testing.assert_close(left.norm(dim=1), right.norm(dim=1))


def test_all_score_dimensions_give_the_same_scores(rng):
    draws = [rng.standard_normal((4, 4)) for _ in range(2)]
    left, right, _ = score_directions(*(torch.from_numpy(draw @ draw.T) for draw in draws))
    torch.testing.assert_close(left.T @ right, torch.eye(4).double(), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------ levels


def brute_force(parts, wanted) -> float:
    sums = [
        (sum(level.saved for level in chosen), sum(level.loss for level in chosen))
        for chosen in product(*parts)
    ]
    return min(loss for saved, loss in sums if saved >= wanted)


def test_levels_are_chosen_like_brute_force_does(rng):
    for _ in range(20):
        parts = [
            [Level((9,), 0.0, 0.0)]
            + [
                Level((n,), float(rng.integers(1, 40)) * 100, float(rng.random()))
                for n in range(int(rng.integers(1, 5)))
            ]
            for _ in range(4)
        ]
        most = sum(max(level.saved for level in part) for part in parts)
        wanted = float(rng.integers(1, int(most // 100) + 1)) * 100
        chosen = allocate(parts, wanted)
        assert sum(level.saved for level in chosen) >= wanted * (1 - 1e-3)
        loss = sum(level.loss for level in chosen)
        # savings are rounded down to 1/4000 of what is wanted
        assert loss <= brute_force(parts, min(wanted * (1 + 4 / 4000), most)) + 1e-9


def test_all_levels_can_be_needed():
    parts = [[Level((2,), 0.0, 0.0), Level((1,), 7.0, 1.0)]] * 3
    assert [level.kept for level in allocate(parts, 21.0)] == [(1,)] * 3


def test_nothing_wanted_removes_nothing():
    parts = [[Level((2,), 0.0, 0.0), Level((1,), 7.0, 1.0)]] * 3
    assert [level.kept for level in allocate(parts, 0.0)] == [(2,)] * 3


def test_levels_that_others_beat_are_left_out():
    levels = [Level((3,), 0, 0), Level((2,), 5, 2), Level((1,), 6, 1), Level((0,), 9, 1.5)]
    assert [level.kept for level in front(levels)] == [(3,), (1,), (0,)]


def test_more_than_there_is_is_refused():
    with pytest.raises(Problem, match="8 are to be saved, and the highest levels save 7"):
        allocate([[Level((2,), 0.0, 0.0), Level((1,), 7.0, 1.0)]], 8.0)


def test_a_curve_goes_through_what_was_measured():
    curve = scaled(Curve([8, 6, 4, 2], [0.0, 0.1, 0.2, 0.4]), {6: 0.01, 4: 0.02})
    assert curve.losses == pytest.approx([0.0, 0.01, 0.02, 0.04])
    steep = scaled(Curve([8, 6, 4, 2], [0.0, 0.1, 0.2, 0.4]), {6: 0.01, 4: 0.04})
    assert steep.losses == pytest.approx([0.0, 0.01, 0.04, 0.16])


def test_sizes_near_a_half_and_three_quarters_are_tried():
    assert tried_sizes(Curve([64, 56, 48, 40, 32, 16], [0.0] * 6)) == [48, 32]
    assert tried_sizes(Curve([6, 5, 4, 3, 2], [0.0] * 5)) == [5, 3]
    assert tried_sizes(Curve([2, 1], [0.0] * 2)) == [1]
    assert tried_sizes(Curve([1], [0.0])) == []


# ------------------------------------------------------------------------------ the model


def speech(few, processor) -> Speech:
    return Speech(few, processor, mask_padding=True)


@pytest.mark.parametrize("kind", obs.KINDS)
def test_nothing_asked_for_changes_nothing(kind, make_whisper, context):
    model = make_whisper()
    before = copy.deepcopy(model.state_dict())
    kinds = dict.fromkeys(obs.KINDS, False) | {kind: True}
    after = obs.apply(model, replace(QUICK, remove=0.0, **kinds), context)
    assert all(after.state_dict()[name].equal(tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "kinds",
    [*((kind,) for kind in obs.KINDS), ("units", "heads", "value_dims")],
    ids=" and ".join,
)
def test_the_share_is_reached_and_the_smaller_model_is_the_same(
    kinds, make_whisper, context, few, tmp_path
):
    model = make_whisper()
    chosen = {kind: kind in kinds for kind in obs.KINDS}
    remove = 0.1 if {"units", "low_rank"} & set(kinds) else 0.05
    before = count_parameters(model)["rest"]
    masked = obs.apply(model, replace(QUICK, remove=remove, **chosen), context)
    slim, _ = slimmed(masked)
    removed = 1 - count_parameters(slim)["rest"] / before
    assert remove - 1e-3 <= removed <= remove + (0.1 if chosen["branches"] else 0.05)
    pcm = few[0].pcm()
    whisper.save(slim, context.processor, tmp_path / "slim")
    same = (masked, slim, whisper.load(tmp_path / "slim"))
    logits = [decoding.logits(m, context.processor, pcm, [1, 2, 3]) for m in same]
    for other in logits[1:]:
        np.testing.assert_allclose(logits[0], other, rtol=0, atol=1e-4 * np.abs(other).max() + 1e-4)
    assert set(context.record["obs"]["branches"]) >= {"encoder.0.ffn", "decoder.1.encoder_attn"}


def test_half_of_the_units_cost_less_than_masking_by_size(make_whisper, few, processor):
    model = make_whisper()
    walk = Walk(model, speech(few, processor), held_out=speech(few, processor))
    branch = branches_of(model, "encoder")[1]
    dense = walk.dense()
    walk.move(branches_of(model, "encoder")[0])
    found = fit_of(branch.last_of(model), walk.collect(branch), 1e-3)
    weight, bias = (p.detach().clone() for p in branch.last_of(model).parameters())
    remove_units(model, branch, found, 24)
    updated = walk.collect(branch)
    (losses,) = walk.divergences(branch, [walk.changed(branch)], dense)
    smallest = weight.square().sum(0).argsort()[:24]
    with torch.no_grad():
        branch.last_of(model).weight.copy_(weight)
        branch.last_of(model).weight[:, smallest] = 0
        branch.last_of(model).bias.copy_(bias)
    assert updated.count > 0
    assert [losses] < walk.divergences(branch, [walk.changed(branch)], dense)


def test_a_layer_that_says_almost_nothing_is_removed(make_whisper, context, few):
    """Levels are measured, so the layer goes whole; what it added on average stays in a bias."""
    model = make_whisper(encoder_layers=3)
    layer = model.model.encoder.layers[1]
    with torch.no_grad():
        for last in (layer.self_attn.out_proj, layer.fc2):
            last.weight.mul_(1e-4)
            last.bias.normal_()
    options = replace(QUICK, effect_clips=2, remove=0.15)
    after, _ = slimmed(obs.apply(copy.deepcopy(model), options, context))
    record = context.record["obs"]["branches"]["encoder.1.ffn"]
    assert record["after"] == {"units": 0} and record["divergence"] < 1e-4
    assert len(after.model.encoder.layers) == after.config.encoder_layers == 2
    only = replace(options, **dict.fromkeys(obs.KINDS[:-1], False))
    layers = len(slimmed(obs.apply(model, only, context))[0].model.encoder.layers)
    assert layers == 2


def test_the_digits_model_still_hears(digits, processor, clips, tmp_path):
    """10 % of the embedded model, chosen by divergence and refitted in sequence."""
    some = read_manifest(clips)[::40]
    model = whisper.load(digits)
    context = Context(processor=processor, train=some[:8], dev=some, run_dir=tmp_path / "run")
    before = context.wer(model).wer
    options = Options(remove=0.1, effect_clips=2, own_words=False)
    after = obs.apply(model, options, context)
    assert removed_share(after) >= 0.1 - 1e-3
    assert context.wer(after).wer <= before + 0.15


def test_runs_are_repeatable(make_whisper, context):
    model = make_whisper()
    results = [obs.apply(copy.deepcopy(model), QUICK, context).state_dict() for _ in range(2)]
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


def test_stored_measurements_are_reused_with_another_share_only(make_whisper, context, tmp_path):
    model = make_whisper()
    context = replace(context, measured_dir=tmp_path / "measured")
    fresh = obs.apply(copy.deepcopy(model), replace(QUICK, remove=0.1), context)
    (file,) = context.measured_dir.iterdir()
    written = file.stat().st_mtime_ns
    obs.apply(copy.deepcopy(model), QUICK, context)
    again = obs.apply(copy.deepcopy(model), replace(QUICK, remove=0.1), context)
    assert file.stat().st_mtime_ns == written
    assert all(again.state_dict()[n].equal(tensor) for n, tensor in fresh.state_dict().items())
    obs.apply(copy.deepcopy(model), replace(QUICK, damping=0.5), context)
    obs.apply(copy.deepcopy(model), QUICK, replace(context, train=context.train[:2]))
    assert len(list(context.measured_dir.iterdir())) == 3


@pytest.mark.parametrize(
    "text", ["", "[]", '{"parts": [{"branch": ["encoder", 0, "ffn"], "curves": {"units": {}}}]}']
)
def test_damaged_measurements_are_measured_again(text, make_whisper, context, tmp_path):
    context = replace(context, measured_dir=tmp_path)
    model = make_whisper()
    clips = context.calibration_clips("obs", QUICK.clips)
    measured = obs.measure(model, clips, QUICK, context)
    (file,) = tmp_path.glob("obs-*.json")
    stored = file.read_text()
    file.write_text(text)
    assert obs.measure(model, clips, QUICK, context) == measured
    assert file.read_text() == stored


@pytest.mark.parametrize("axis", ["bytes", "parameters", "macs"])
def test_what_a_level_saves_is_what_the_smaller_model_lacks(axis, make_whisper, context):
    model = make_whisper()
    budget = Budget(axis, "int8")
    masked = obs.apply(model, replace(QUICK, budget_of=axis, remove=0.1), context)
    slim, _ = slimmed(masked)
    assert total_of(slim, budget) <= total_of(model, budget) * (0.9 + 1e-3)


def test_a_budget_of_latency_needs_a_device(tiny_whisper, context):
    with pytest.raises(Problem, match='budget_of = "latency" needs a device'):
        obs.apply(tiny_whisper, replace(QUICK, budget_of="latency"), context)


def test_units_can_be_put_back(make_whisper, few, processor):
    model = make_whisper()
    walk = Walk(model, speech(few[:1], processor))
    branch = Branch("decoder", 0, "ffn")
    for earlier in branches_of(model, "encoder"):
        walk.move(earlier)
    walk.enter_decoder()
    before = branch.last_of(model).weight.clone()
    found = fit_of(branch.last_of(model), walk.collect(branch), 0.1)
    with fits.restored(branch.last_of(model)):
        put_units(model, branch, found, torch.arange(10))
        assert (branch.last_of(model).weight[:, :10] == 0).all()
    assert branch.last_of(model).weight.equal(before)


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(
            replace(QUICK, **dict.fromkeys(obs.KINDS, False)),
            "units, low_rank, heads, value_dims, score_dims, branches are all false",
            id="no kind",
        ),
        pytest.param(
            replace(QUICK, remove=0.95), "remove = 0.95 is asked for; .* can save 0.", id="too much"
        ),
        pytest.param(
            replace(
                QUICK, remove=0.9, units=False, low_rank=False, branches=False, budget_of="macs"
            ),
            "of the macs",
            id="too many macs",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(options, told, tiny_whisper, context):
    with pytest.raises(Problem, match=told):
        obs.apply(tiny_whisper, options, context)


def test_no_clips_are_refused(tiny_whisper, context):
    with pytest.raises(Problem, match="there are no clips to calibrate on"):
        obs.apply(tiny_whisper, QUICK, replace(context, train=[]))


def test_low_rank_layers_are_refused(make_whisper, context):
    options = lite.Options(round_to=4, theta_attn=0.1, theta_mlp=0.1)
    split = lite.apply(make_whisper(), options, context)
    with pytest.raises(Problem, match=r"encoder\.0\.\w+ has low-rank layers") as caught:
        obs.apply(split, QUICK, context)
    assert caught.value.hint == "put the step obs before lite in the recipe"
