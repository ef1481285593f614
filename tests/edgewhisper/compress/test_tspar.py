"""TSPAR: penalties, proximal step, the two passes, the search, and the pruned model."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import graph_macs
import numpy as np
import pytest
import torch
from same_function import largest_difference
from scipy.optimize import minimize

from edgewhisper import decoding, whisper
from edgewhisper.compress import shrink, tspar
from edgewhisper.compress.context import Context
from edgewhisper.compress.masks import guards, removed_share, weights_of
from edgewhisper.compress.pruning_strength import SHARES, largest, refuse_unreachable
from edgewhisper.compress.tspar import (
    Options,
    Thresholds,
    column_penalty,
    element_penalty,
    keep_columns,
    keep_elements,
    proximal,
    shrink_columns,
    soft_threshold,
    two_pass,
)
from edgewhisper.training import Training, train
from edgewhisper.whisper import linears
from export.cost import macs
from export.onnx.to_onnx import export_onnx
from export.problem import Problem

NO_TRAINING = Training(steps=0)
BRIEF = Training(steps=2, batch_size=2, learning_rate=1e-3)
NOTHING = Options(
    encoder_element=0.0,
    decoder_element=0.0,
    encoder_column=0.0,
    decoder_column=0.0,
    c1=0.0,
    c2=float("inf"),
    rho=0.0,
    search=False,
    training=BRIEF,
)
SCOPES = ["per_matrix", "per_layer", "global"]
ORDERS = ["element_then_column", "statistics_then_apply"]


@pytest.fixture
def drawn(rng) -> dict[str, torch.Tensor]:
    """Random weights of two layers per side, with the names of a real model."""
    names = [f"model.{side}.layers.{n}.fc1" for side in ("encoder", "decoder") for n in (0, 1)]
    sizes = rng.integers(3, 40, size=(len(names), 2)).tolist()
    scales = rng.uniform(0.1, 3, size=len(names)).tolist()
    return {n: torch.randn(*shape) * s for n, shape, s in zip(names, sizes, scales, strict=True)}


def draw_matrix(rng, dtype=torch.float64) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(rng.integers(1, 12, size=2)))).to(dtype)


# ------------------------------------------------------------------------------- sparse group lasso


def test_penalties_of_a_small_matrix_by_hand():
    weight = torch.tensor([[3.0, 0.0, -1.0], [-4.0, 0.0, 0.0]])
    assert element_penalty(weight) == 8.0
    assert column_penalty(weight).item() == pytest.approx(2**0.5 * (5 + 0 + 1))
    assert column_penalty(weight, "l2_squared") == 26.0


def test_proximal_step_of_a_small_matrix_by_hand():
    weight = torch.tensor([[3.0, 0.5, -1.5], [-4.0, -0.2, 0.0]])
    # elements: [2, 0, -0.5], [-3, 0, 0]; then 0.5 is subtracted from the norm of every column
    columns = torch.tensor([13**0.5, 1.0, 0.5])
    expected = torch.tensor([[2.0, 0.0, -0.5], [-3.0, 0.0, 0.0]]) * (1 - 0.5 / columns)
    torch.testing.assert_close(proximal(weight, 1.0, 0.5 / 2**0.5), expected)


@pytest.mark.parametrize("norm", ["l2", "l2_squared"])
def test_no_perturbation_of_the_proximal_step_is_better(norm, rng):
    weight = draw_matrix(rng)
    element, column = rng.uniform(0, 0.5, size=2)

    def objective(x):
        distance = (x - weight).square().sum() / 2
        return distance + element * element_penalty(x) + column * column_penalty(x, norm)

    best = proximal(weight, element, column, norm)
    floor = objective(best) - 1e-12
    for size in (1e-1, 1e-3, 1e-5):
        for _ in range(300):
            assert objective(best + size * torch.randn_like(best)) >= floor


@pytest.mark.parametrize("norm", ["l2", "l2_squared"])
def test_the_proximal_step_agrees_with_a_numerical_solver(norm, rng):
    weight = draw_matrix(rng)
    element, column = (float(x) for x in rng.uniform(0, 0.4, size=2))

    def smooth(x: np.ndarray, rounding: float = 1e-9) -> tuple[float, np.ndarray]:
        """The objective, smoothed at zero, and its gradient."""
        point = torch.from_numpy(x.reshape(weight.shape)).requires_grad_()
        absolute = (point.square() + rounding).sqrt()
        groups = point.square().sum(dim=0)
        group = groups if norm == "l2_squared" else (len(point) * (groups + rounding)).sqrt()
        value = (point - weight).square().sum() / 2 + element * absolute.sum()
        value = value + column * group.sum()
        value.backward()
        return value.item(), point.grad.numpy().ravel()

    solved = minimize(
        smooth,
        weight.numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9},
    )
    ours = proximal(weight, element, column, norm).numpy()
    # the objective is 1-strongly convex, so a gap in value bounds the distance to the optimum
    gap = max(0.0, smooth(ours.ravel())[0] - solved.fun)
    assert gap < 1e-4 * weight.numel()
    np.testing.assert_allclose(solved.x.reshape(ours.shape), ours, atol=0.02)


def test_the_squared_norm_is_weight_decay_and_selects_no_column(rng):
    weight = draw_matrix(rng).requires_grad_()
    (0.3 * column_penalty(weight, "l2_squared")).backward()
    torch.testing.assert_close(weight.grad, 2 * 0.3 * weight.detach())
    assert (shrink_columns(weight.detach(), 5.0, "l2_squared") != 0).all()
    assert (shrink_columns(weight.detach(), 5.0, "l2") == 0).all(dim=0).any()


def test_the_squared_norm_equals_adams_coupled_weight_decay(rng):
    """A penalty with lambda equals a weight decay of 2 lambda in the gradient."""
    start, target = draw_matrix(rng), draw_matrix(rng).mean()
    amount = float(rng.uniform(0.01, 1))
    ends = []
    for penalty, decay in ((amount, 0.0), (0.0, 2 * amount)):
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=0.01, weight_decay=decay)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (weight.sin() - target).square().sum()
            (loss + penalty * column_penalty(weight, "l2_squared")).backward()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("step", [soft_threshold, shrink_columns])
def test_a_step_of_size_zero_changes_no_bit(step, rng):
    weight = draw_matrix(rng, torch.float32)
    weight[:, 0] = 0
    assert torch.equal(step(weight, 0.0), weight)


def test_each_penalty_starts_at_lambda_times_the_cross_entropy(tiny_whisper, context):
    from edgewhisper.training import initial_loss

    options = Options(encoder_element=0.5, decoder_element=2, encoder_column=0, decoder_column=3)
    term, hook, scales = tspar.regulariser(tiny_whisper, options, context)
    loss = initial_loss(tiny_whisper, context.processor, context.train, options.training)
    assert hook is None and set(scales) == {
        f"{side}_{kind}" for side in tspar.SIDES for kind in ("element", "column")
    }
    assert term(tiny_whisper, None, None).item() == pytest.approx(5.5 * loss, rel=1e-5)


def test_penalties_apply_only_to_linear_layers_of_the_blocks(tiny_whisper, context):
    options = replace(NOTHING, encoder_element=1e9, decoder_column=1e9, reg_mode="proximal")
    _, hook, _ = tspar.regulariser(tiny_whisper, options, context)
    before = {name: p.clone() for name, p in tiny_whisper.named_parameters()}
    with torch.no_grad():
        hook(tiny_whisper, 0, 1e-3)
    inside = {f"{name}.weight" for name, _ in linears(tiny_whisper)}
    assert len(inside) == 2 * 6 + 2 * 10
    for name, parameter in tiny_whisper.named_parameters():
        if name in inside:
            assert (parameter == 0).all()
        else:
            assert torch.equal(parameter, before[name])


def test_subgradient_training_shrinks_and_proximal_training_zeroes_columns(make_whisper, context):
    base = make_whisper(d_model=16, ffn=16, encoder_layers=1, decoder_layers=1)
    sizes, zeros = {}, {}
    for mode, strength in (("none", 0.0), ("subgradient", 300.0), ("proximal", 120.0)):
        model = copy.deepcopy(base)
        options = replace(
            NOTHING,
            encoder_column=strength,
            decoder_column=strength,
            reg_mode="subgradient" if mode == "none" else mode,
            training=Training(steps=8, batch_size=2, learning_rate=3e-3),
        )
        own = replace(context, run_dir=context.run_dir / mode, record={})
        tspar.apply(model, options, own)
        weights = weights_of(model).values()
        sizes[mode] = sum(column_penalty(w).item() for w in weights)
        zeros[mode] = sum(int((w == 0).all(dim=0).sum()) for w in weights)
    assert sizes["proximal"] < sizes["none"] and sizes["subgradient"] < sizes["none"]
    assert zeros["none"] == zeros["subgradient"] == 0 < zeros["proximal"]


# ---------------------------------------------------------------------------- two passes of pruning


def removed(keep: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
    return {(n, i) for n, k in keep.items() for i in (~k).flatten().nonzero().flatten().tolist()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_removed_at_the_neutral_thresholds(scope, order, drawn):
    options = Options(stats_scope=scope, pass_order=order)
    assert not removed(two_pass(drawn, Thresholds(0.0, float("inf"), 0.0), options))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_lower_c2_removes_more_columns(scope, order, drawn):
    options = Options(stats_scope=scope, pass_order=order)
    sets = [removed(two_pass(drawn, Thresholds(0, c2, 0), options)) for c2 in (9, 2, 1, 0, -1)]
    assert all(less <= more for less, more in pairwise(sets))
    assert sets[0] < sets[-1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "absolute"])
def test_a_higher_c1_removes_more_elements(scope, centered, drawn):
    options = Options(stats_scope=scope, centered=centered)
    sets = [removed(keep_elements(drawn, c1, options)) for c1 in (0, 0.1, 0.5, 1, 2)]
    assert not sets[0]
    assert all(less < more for less, more in pairwise(sets))


@pytest.mark.parametrize("scope", SCOPES)
def test_stricter_thresholds_remove_more_if_statistics_come_first(scope, drawn, rng):
    """Then c1 does not change the statistics that c2 refers to."""
    options = Options(stats_scope=scope, pass_order="statistics_then_apply")
    c1s, c2s = sorted(rng.uniform(0, 2, 4)), sorted(rng.uniform(-1, 2, 4), reverse=True)
    pairs = zip(c1s, c2s, strict=True)
    sets = [removed(two_pass(drawn, Thresholds(c1, c2, 0), options)) for c1, c2 in pairs]
    assert all(less <= more for less, more in pairwise(sets))


@pytest.mark.parametrize("scope", SCOPES)
def test_without_c2_a_higher_c1_removes_more_in_the_default_order(scope, drawn, rng):
    """An exception is the largest column, which is always kept and may change with c1."""
    options, rho = Options(stats_scope=scope), float(rng.uniform(0, 0.6))
    c1s = sorted(float(c1) for c1 in rng.uniform(0, 2, 5))
    passes = [two_pass(drawn, Thresholds(c1, float("inf"), rho), options) for c1 in c1s]
    assert removed(passes[0]) != removed(passes[-1])
    for c1, softer, harder in zip(c1s[1:], passes[:-1], passes[1:], strict=True):
        elements = keep_elements(drawn, c1, options)
        for name, weight in drawn.items():
            back = (harder[name] & ~softer[name]).any(dim=0)
            back[(weight * elements[name]).norm(dim=0).argmax()] = False
            assert not back.any()


def rewritten(weights, thresholds, options) -> dict[str, np.ndarray]:
    """The two passes in numpy, keeping the largest column."""
    group = {
        "per_matrix": lambda name: name,
        "per_layer": lambda name: name.rpartition(".")[0],
        "global": lambda name: name.split(".")[1],
    }[options.stats_scope]

    def moments(values, name) -> tuple[float, float]:
        pooled = np.concatenate([v.ravel() for n, v in values.items() if group(n) == group(name)])
        return pooled.mean(), pooled.std()

    def far(name, weight) -> np.ndarray:
        mean, sigma = moments(weights, name)
        return abs(weight - mean * options.centered) >= thresholds.c1 * sigma

    mask = {name: far(name, weight) for name, weight in weights.items()}
    after = options.pass_order == "element_then_column"
    pruned = {name: weight * mask[name] if after else weight for name, weight in weights.items()}
    rms = {name: np.sqrt((weight**2).mean(axis=0)) for name, weight in pruned.items()}
    for name, sizes in rms.items():
        mean, sigma = moments(rms, name)
        drop = (sizes < mean - thresholds.c2 * sigma) | (mask[name].mean(axis=0) < thresholds.rho)
        drop[sizes.argmax()] = False
        mask[name] = mask[name] & ~drop
    return mask


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_two_passes_agree_with_numpy(scope, order, rng):
    shapes = rng.integers(3, 40, size=(8, 2)).tolist()
    names = [f"model.{side}.layers.{n}.fc{m}" for side in tspar.SIDES for n in "01" for m in "12"]
    weights = {
        name: rng.normal(rng.normal(), rng.uniform(0.1, 3), shape)  # float64 avoids ties
        for name, shape in zip(names, shapes, strict=True)
    }
    for centered in (True, False):
        options = Options(stats_scope=scope, pass_order=order, centered=centered)
        thresholds = Thresholds(*(float(t) for t in rng.uniform((0, -1, 0), (1.5, 2, 0.6))))
        ours = two_pass({n: torch.from_numpy(w) for n, w in weights.items()}, thresholds, options)
        for name, keep in rewritten(weights, thresholds, options).items():
            np.testing.assert_array_equal(ours[name].numpy(), keep)


def test_a_higher_rho_removes_more_columns(drawn):
    options = Options()
    sets = [
        removed(two_pass(drawn, Thresholds(0.7, float("inf"), rho), options))
        for rho in (0, 0.3, 0.5, 0.8, 1)
    ]
    assert all(less <= more for less, more in pairwise(sets))
    assert sets[0] < sets[-1]


def test_c2_of_zero_drops_exactly_the_columns_below_the_mean(drawn):
    keep = two_pass(drawn, Thresholds(0.0, 0.0, 0.0), Options())
    for name, weight in drawn.items():
        rms = weight.square().mean(dim=0).sqrt()
        assert torch.equal(keep[name][0], rms >= rms.mean())


def test_the_two_passes_on_a_small_matrix_by_hand():
    weight = torch.tensor([[4.0, 0.1, 1.0], [-4.0, 0.1, 0.1], [0.1, -0.1, -1.2], [-0.1, -0.1, 0.1]])
    weights = {"model.encoder.layers.0.fc1": weight}
    sigma = weight.std(correction=0)  # 1.72; the mean is 0
    options = Options(centered=False)
    elements = keep_elements(weights, 0.5 / sigma.item(), options)
    assert elements["model.encoder.layers.0.fc1"].sum(dim=0).tolist() == [2, 0, 2]
    columns = keep_columns(weights, elements, Thresholds(0, 9.0, 0.4), options)
    assert columns["model.encoder.layers.0.fc1"].tolist() == [True, False, True]  # rho
    columns = keep_columns(weights, elements, Thresholds(0, 0.0, 0.0), options)
    assert columns["model.encoder.layers.0.fc1"].tolist() == [True, False, False]  # c2


def test_statistics_are_taken_over_the_scope():
    weights = {
        "model.encoder.layers.0.fc1": torch.full((2, 3), 1.0),
        "model.encoder.layers.0.fc2": torch.full((2, 3), 2.0),
        "model.encoder.layers.1.fc1": torch.full((2, 3), 4.0),
        "model.decoder.layers.0.fc1": torch.full((2, 3), 0.1),
    }
    means = {
        scope: [mean.item() for mean, _ in tspar.scoped(weights, scope).values()]
        for scope in SCOPES
    }
    assert means["per_matrix"] == pytest.approx([1, 2, 4, 0.1])
    assert means["per_layer"] == pytest.approx([1.5, 1.5, 4, 0.1])
    assert means["global"] == pytest.approx([7 / 3, 7 / 3, 7 / 3, 0.1])


def test_every_matrix_keeps_a_column_at_extreme_thresholds(drawn):
    keep = two_pass(drawn, Thresholds(50.0, -3.0, 1.0), Options(stats_scope="global"))
    columns = keep_columns(drawn, keep, Thresholds(50.0, -3.0, 1.0), Options(stats_scope="global"))
    assert all(kept.any() for kept in columns.values())


# --------------------------------------------------------------------------------------- the search


def test_strength_zero_is_neutral_and_strength_one_is_the_recipe():
    full = Thresholds(0.7, -0.4, 0.1)
    assert full.at(0) == Thresholds(0.0, float("inf"), 0.0)
    assert full.at(1) == full
    path = [full.at(s) for s in (0.1, 0.4, 0.9)]
    assert [t.c1 for t in path] == sorted(t.c1 for t in path)
    assert [t.c2 for t in path] == sorted((t.c2 for t in path), reverse=True)


@pytest.mark.parametrize("evaluations", [1, 4, 9])
def test_bisection_finds_the_edge_and_stays_within_its_evaluations(evaluations, rng):
    edge = float(rng.uniform(0.02, 0.98))
    evaluated: list[float] = []

    def acceptable(strength: float) -> bool:
        evaluated.append(strength)
        return strength <= edge

    result = largest(acceptable, 0.0, evaluations)
    assert result <= edge <= result + 2 ** (1 - evaluations)
    assert len(evaluated) == evaluations


def test_bisection_returns_one_if_it_is_acceptable():
    assert largest(lambda strength: True, 0.0, 5) == 1.0


@pytest.fixture
def context_with_known_wer(context, monkeypatch):
    """A context whose dev WER is 5 % plus one point per tenth of zero weights."""

    def wer(self, model):
        weights = torch.cat([w.flatten() for w in weights_of(model).values()])
        return SimpleNamespace(wer=0.05 + 0.1 * (weights == 0).double().mean().item())

    monkeypatch.setattr(Context, "wer", wer)
    return context


def test_the_search_prunes_up_to_the_margin(tiny_whisper, context_with_known_wer):
    options = Options(c1=2.0, c2=-1.0, wer_margin=2.0, evaluations=12, training=Training(steps=0))
    tspar.apply(tiny_whisper, options, context_with_known_wer)
    record = context_with_known_wer.record["tspar"]
    assert 0.15 < record["pruned"]["zero_elements"] <= 0.2 + 1e-9
    assert len(record["search"]["tried"]) == 12
    assert record["search"]["limit"] == pytest.approx(0.07)


def test_min_removed_takes_precedence_over_the_margin(tiny_whisper, context_with_known_wer):
    options = Options(
        c2=-2.0, wer_margin=0.0, min_removed=0.3, evaluations=2, training=Training(steps=0)
    )
    tspar.apply(tiny_whisper, options, context_with_known_wer)
    slim = shrink.apply(tiny_whisper, shrink.Options(), context_with_known_wer)
    record = context_with_known_wer.record
    assert 0.3 <= record["shrink"]["removed_outside_token_table"] < 0.4
    assert record["shrink"]["removed_outside_token_table"] == pytest.approx(
        record["tspar"]["pruned"]["removable_parameters"]
    )
    assert sum(p.numel() for p in slim.parameters()) < sum(
        p.numel() for p in tiny_whisper.parameters()
    )


@pytest.mark.parametrize("layers", ["*", "*.fc2"])
def test_min_zero_is_reached_without_a_search(layers, tiny_whisper, context, rng):
    share = float(rng.uniform(0.05, 0.15))
    options = Options(
        layers=layers, c2=-2.0, search=False, min_zero=share, training=Training(steps=0)
    )
    tspar.apply(tiny_whisper, options, context)
    assert "search" not in context.record["tspar"]
    slim = shrink.apply(tiny_whisper, shrink.Options(), context)
    table = slim.model.decoder.embed_tokens.weight.numel()
    nonzero = sum(int((p != 0).sum()) for p in slim.parameters()) - table
    dense = sum(p.numel() for p in tiny_whisper.parameters()) - table
    assert share <= 1 - nonzero / dense == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", ["min_removed", "min_zero"])
@pytest.mark.parametrize("search", [True, False], ids=["searched", "as given"])
def test_the_error_for_an_unreachable_share_has_the_reached_share(
    name, search, tiny_whisper, context, rng
):
    values = {"c1": float(rng.uniform(0, 0.3)), "c2": float(rng.uniform(0.2, 0.5)), "rho": 0.0}
    options = Options(search=search, training=NO_TRAINING, **values)
    own = replace(context, record={})
    pruned = tspar.apply(copy.deepcopy(tiny_whisper), replace(options, search=False), own)
    reached = SHARES[name](pruned)
    with pytest.raises(Problem, match=f"tspar: {name} asks for 0.500 of the parameters") as error:
        tspar.apply(copy.deepcopy(tiny_whisper), replace(options, **{name: 0.5}), context)
    assert f"c2 = {values['c2']:g} and rho = 0 reach {reached:.3f}" in str(error.value)
    assert "raise c1 or rho, lower c2" in error.value.hint
    assert not context.record


def test_a_share_that_full_strength_just_reaches_is_accepted(tiny_whisper, context, rng):
    options = Options(c1=float(rng.uniform(0, 0.3)), c2=0.3, search=False, training=NO_TRAINING)
    reached = removed_share(tspar.apply(copy.deepcopy(tiny_whisper), options, context))
    result = tspar.apply(tiny_whisper, replace(options, min_removed=reached), context)
    assert removed_share(result) >= reached > 0


@pytest.mark.parametrize("name", ["min_removed", "min_zero"])
def test_a_share_larger_than_the_layers_is_refused_before_training(
    name, tiny_whisper, context, monkeypatch
):
    monkeypatch.setattr(Context, "trained", None)
    before = {n: tensor.clone() for n, tensor in tiny_whisper.state_dict().items()}
    options = Options(layers="*.decoder.*.fc2", **{name: 0.5})
    with pytest.raises(Problem, match=rf"{name} asks for 0.500 .* have only 0\.[01]\d\d ") as error:
        tspar.apply(tiny_whisper, options, context)
    assert "extend `layers`" in error.value.hint
    assert all(torch.equal(before[n], t) for n, t in tiny_whisper.state_dict().items())


def test_protected_weights_do_not_count_as_available(make_whisper, context):
    """One of two heads per layer is protected; without protection the share is available."""
    model = make_whisper(ffn=4)
    model.generation_config.alignment_heads = [[0, 0], [1, 0]]
    required = {"min_removed": 0.12}, "*.encoder_attn.*"
    refuse_unreachable(model, *required, {})
    with pytest.raises(Problem, match=r"min_removed asks for 0.120"):
        refuse_unreachable(model, *required, guards(model, True))


def test_without_a_search_the_recipes_thresholds_are_applied(tiny_whisper, context):
    tspar.apply(tiny_whisper, Options(search=False, training=Training(steps=0)), context)
    assert context.record["tspar"]["thresholds"]["strength"] == 1.0


# ----------------------------------------------------------------------------------- the whole step


def test_with_neutral_options_it_is_plain_fine_tuning(tiny_whisper, context, few, processor):
    plain = copy.deepcopy(tiny_whisper)
    train(plain, processor, few, BRIEF, run_dir=context.run_dir / "plain", seed=context.seed)
    tspar.apply(tiny_whisper, NOTHING, context)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tiny_whisper.state_dict()[name], tensor)
    assert removed_share(tiny_whisper) == 0


def test_pruned_weights_stay_zero_in_recovery(tiny_whisper, context):
    options = replace(NOTHING, c1=0.5, c2=0.5, training=Training(steps=0), recovery=BRIEF, keep=0.1)
    pruned = two_pass(weights_of(tiny_whisper), Thresholds(0.5, 0.5, 0.0), options)
    before = {name: w.clone() for name, w in weights_of(tiny_whisper).items()}
    tspar.apply(tiny_whisper, options, context)
    for name, weight in weights_of(tiny_whisper).items():
        assert (weight[~pruned[name]] == 0).all()
        assert not torch.equal(weight, before[name] * pruned[name])
    assert context.record["tspar"]["recovery"]["steps"] == 2


def test_the_proximal_step_scales_with_the_learning_rate(make_whisper, rng):
    """Its size is learning rate * lambda * scale."""
    model = make_whisper(d_model=8 * int(rng.integers(1, 5)), ffn=int(rng.integers(9, 40)))
    element, column, rate = (float(x) for x in rng.uniform(0.1, 2.0, size=3))
    options = replace(
        NOTHING,
        reg_mode="proximal",
        encoder_element=element,
        decoder_element=0.0,
        encoder_column=0.0,
        decoder_column=column,
    )
    before = {name: module.weight.detach().clone() for name, module in linears(model)}
    scales = tspar.average_sizes(before)
    with torch.no_grad():
        tspar.proximal_hook(options, scales, {})(model, 0, 0.01 * rate)
    for name, module in linears(model):
        if ".encoder." in name:
            amount = 0.01 * rate * element * scales["encoder", "element"]
            expected = soft_threshold(before[name], amount)
        else:
            amount = 0.01 * rate * column * scales["decoder", "column"]
            expected = shrink_columns(before[name], amount)
        torch.testing.assert_close(module.weight.detach(), expected)
        assert not module.weight.equal(before[name])


def test_only_layers_that_match_are_penalised_and_pruned(tiny_whisper, context):
    before = weights_of(tiny_whisper)
    before = {name: weight.clone() for name, weight in before.items()}
    options = replace(NOTHING, layers="*encoder.layers.1.fc2", c2=0.0, training=Training(steps=0))
    tspar.apply(tiny_whisper, options, context)
    changed = [n for n, w in weights_of(tiny_whisper).items() if not torch.equal(w, before[n])]
    assert changed == ["model.encoder.layers.1.fc2"]
    assert set(tspar.penalties(tiny_whisper, options)) == {
        ("encoder", "element"),
        ("encoder", "column"),
    }


def test_a_pattern_without_a_match_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match=r"no linear layer matches '\*.fc3'") as caught:
        tspar.apply(tiny_whisper, replace(NOTHING, layers="*.fc3"), context)
    assert "fc1, fc2" in caught.value.hint


@pytest.fixture
def pruned(tiny_whisper, context) -> tuple:
    """A pruned model, and the same model after shrinking."""
    stamps = range(
        tiny_whisper.generation_config.no_timestamps_token_id + 1, tiny_whisper.config.vocab_size
    )
    # otherwise a random model predicts timestamps, and generate() starts a second segment
    tiny_whisper.generation_config.suppress_tokens = list(stamps)
    options = replace(NOTHING, c1=0.3, c2=0.2, training=Training(steps=0))
    masked = tspar.apply(tiny_whisper, options, context)
    return masked, shrink.apply(masked, shrink.Options(), context)


def test_pruned_and_shrunk_models_have_the_same_logits(pruned, processor):
    masked, slim = pruned
    features = torch.randn(2, 80, 600)
    prompt = torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        expected, result = (m(features, decoder_input_ids=prompt).logits for m in (masked, slim))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_pruned_and_shrunk_models_of_random_shapes_agree_with_and_without_the_cache(
    scope, order, make_whisper, context, rng
):
    heads = int(rng.integers(1, 4))
    masked = make_whisper(
        d_model=2 * heads * int(rng.integers(2, 7)),
        heads=heads,
        ffn=int(rng.integers(4, 50)),
        encoder_layers=int(rng.integers(1, 3)),
        decoder_layers=int(rng.integers(1, 3)),
    )
    c1, c2, rho = (float(x) for x in rng.uniform((0, -0.5, 0), (1.5, 1, 0.5)))
    options = replace(
        NOTHING, c1=c1, c2=c2, rho=rho, stats_scope=scope, pass_order=order, training=NO_TRAINING
    )
    tspar.apply(masked, options, context)
    slim = shrink.apply(masked, shrink.Options(), context)
    assert largest_difference(masked, slim, rng) < 1e-4


def test_pruned_and_shrunk_models_decode_the_same_tokens(pruned, processor, few):
    pcms = [clip.pcm() for clip in few[:2]]
    expected, result = (decoding.greedy(model, processor, pcms) for model in pruned)
    assert result == expected


@pytest.mark.parametrize("layers", ["*.fc2", "*.fc1"])
def test_zero_columns_give_the_number_of_removed_parameters(layers, make_whisper, context, rng):
    d_model, ffn = 2 * int(rng.integers(4, 20)), int(rng.integers(8, 60))
    model = make_whisper(d_model=d_model, heads=2, ffn=ffn)
    options = replace(
        NOTHING, layers=layers, c2=float(rng.uniform(-0.5, 0.5)), training=NO_TRAINING
    )
    tspar.apply(model, options, context)
    slim = shrink.apply(model, shrink.Options(min_saving=0.0), context)
    zero = sum(context.record["tspar"]["pruned"]["zero_columns"].values())
    assert zero > 0
    # a unit has a row and bias of fc1 and a column of fc2; an input of fc1 has a column
    each = 2 * d_model + 1 if layers == "*.fc2" else ffn
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, slim)]
    assert counts[0] - counts[1] == zero * each
    share = context.record["tspar"]["pruned"]["removable_parameters"]
    if layers == "*.fc2":  # inputs of fc1 are kept in layers that would lose only a few
        assert context.record["shrink"]["removed_outside_token_table"] == pytest.approx(share)


@pytest.mark.parametrize("layers", ["*.fc2", "*"], ids=["units", "everything"])
def test_macs_of_a_shrunk_model_are_those_of_its_graph(
    layers, make_whisper, context, processor, rng, tmp_path
):
    model = make_whisper(
        heads=2, d_model=2 * int(rng.integers(8, 20)), ffn=int(rng.integers(20, 60))
    )
    options = replace(NOTHING, layers=layers, c2=-0.3, training=NO_TRAINING)
    dense = macs(model)
    slim = shrink.apply(tspar.apply(model, options, context), shrink.Options(), context)
    tokens = int(rng.integers(2, 20))
    expected = macs(slim, tokens)
    encoder, step = graph_macs.of_exported(slim, processor, tmp_path, tokens)
    zeros = multiplied_zeros(slim)
    assert encoder == expected["encoder"] + expected["cross"] + zeros["encoder"]
    assert step == expected["decoder_per_token"] + zeros["decoder"]
    assert expected["encoder"] + expected["cross"] < dense["encoder"] + dense["cross"]
    assert layers == "*" or zeros == {"encoder": 0, "decoder": 0}


def multiplied_zeros(model) -> dict[str, int]:
    """Count multiplications with inputs that a layer does not read.

    Graphs make them if that is faster than a gather: in all layers except the decoder's fc1 and the
    q_proj of cross-attention.
    """
    d_model, positions = model.config.d_model, model.config.max_source_positions
    zeros = {"encoder": 0, "decoder": 0}
    for side in ("encoder", "decoder"):
        for shape in model.config.edgewhisper[side]:
            for name, inputs in shape["inputs"].items():
                attention, _, projection = name.rpartition(".")
                if side == "decoder" and name in ("fc1", "encoder_attn.q_proj"):
                    continue
                heads = shape.get(attention, {})
                width = {"q": "qk_dim", "k": "qk_dim", "v": "v_dim"}.get(projection[0])
                out = shape["ffn"] if name == "fc1" else heads["heads"] * heads[width]
                once = side == "encoder" or attention == "encoder_attn"
                place, times = ("encoder", positions) if once else ("decoder", 1)
                zeros[place] += (d_model - inputs) * out * times
    return zeros


def test_a_shrunk_model_survives_save_and_load(pruned, processor, tmp_path):
    slim = pruned[1]
    whisper.save(slim, processor, tmp_path / "slim", {})
    loaded = whisper.load(tmp_path / "slim")
    for name, tensor in slim.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_shrunk_model_survives_export(pruned, processor, few, tmp_path):
    from devices.runner.recognizer import Recognizer

    (tmp_path / "artifact").mkdir()
    manifest = export_onnx(pruned[1], processor, tmp_path / "artifact", precision="fp32")
    assert manifest["precision"] == "fp32"
    recognizer = Recognizer(tmp_path / "artifact", guards=False)
    pcm = few[0].pcm()
    assert recognizer.window(pcm) == decoding.greedy(pruned[0], processor, [pcm])[0]


def test_a_shrunk_model_can_be_pruned_again(pruned, context, make_whisper: Callable):
    slim = pruned[1]
    options = replace(NOTHING, c2=0.0, training=replace(BRIEF, steps=1))
    again = tspar.apply(slim, options, replace(context, run_dir=context.run_dir / "again"))
    assert removed_share(again) > 0.05
