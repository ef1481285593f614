"""LiteASR: factors, ranks, budgets, what is fitted to what, and what is left."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from dead_structure import kill
from torch import nn
from transformers import WhisperConfig

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import decoding, whisper
from edgewhisper.calibration import Moments, Point, Speech, collect, collect_together
from edgewhisper.compress import lite, shrink
from edgewhisper.compress.lite import (
    Choice,
    Options,
    allocate,
    bargains,
    choices,
    energies,
    energy_at,
    principal_axes,
    rank_for,
    refit,
    spectrum,
    split,
    square_root,
    worth_it,
)
from edgewhisper.compress.work import Work
from edgewhisper.training import Training
from edgewhisper.whisper import LowRank
from export.cost import macs
from export.problem import Problem
from export.shrink import layer_shapes

ENCODER = "model.encoder.layers.0"
FINE = Options(round_to=4, theta_attn=0.9, theta_mlp=0.95)
"""Ranks of a model 32 wide."""


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:3]


@pytest.fixture
def work(few, processor, tmp_path: Path) -> Work:
    return Work(processor=processor, train=few, dev=few, run_dir=tmp_path / "run")


@pytest.fixture
def narrow_whisper(make_whisper):
    """A model whose layers write little: their weights have falling singular values."""
    return narrowed(make_whisper())


@torch.no_grad()
def narrowed(model: nn.Module) -> nn.Module:
    for _, linear in whisper.linears(model):
        u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
        linear.weight.copy_(u * (s * torch.logspace(0, -3, len(s))) @ v)
    return model


def draw_layer(rng):
    """A linear layer of random shape and what it reads: weight, bias, rows with a mean."""
    d_in, d_out = (int(n) for n in rng.integers(2, 40, size=2))
    mixing = rng.standard_normal((d_in, d_in)) * np.geomspace(1, 1e-2, d_in)
    rows = rng.standard_normal((400, d_in)) @ mixing.T + rng.standard_normal(d_in) * 2
    arrays = rng.standard_normal((d_out, d_in)), rng.standard_normal(d_out), rows
    return tuple(torch.from_numpy(array) for array in arrays)


def split_layer(weight, bias, rows, rank):
    """The factors that the moments of the rows give, and what the dense layer writes."""
    written = rows @ weight.T + (0 if bias is None else bias)
    root = weight @ square_root(rows.T.cov(correction=0))
    return split(weight, bias, written.mean(dim=0), principal_axes(root, rank)), written


def through(factors, rows):
    return rows @ factors.down.T @ factors.up.T + factors.shift


# ------------------------------------------------------------------------- factorisation (2), (5)


def test_factors_of_a_layer_whose_answer_is_known():
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64))
    bias = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    mean_x = torch.tensor([0.0, 5.0, 2.0], dtype=torch.float64)
    mean = weight @ mean_x + bias  # [1, 11, 1.2]
    axes = principal_axes(weight @ square_root(torch.eye(3, dtype=torch.float64)), 2)
    down, up, shift = split(weight, bias, mean, axes)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([3.0, 2.0, 0.0]).double()))
    torch.testing.assert_close(shift, torch.tensor([1.0, 1.0, 1.2]).double())


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "k_proj"])
def test_all_axes_give_the_layer_itself(biased, rng):
    weight, bias, rows = draw_layer(rng)
    factors, written = split_layer(weight, bias if biased else None, rows, len(weight))
    rank = min(weight.shape)
    assert factors.down.shape == (rank, weight.shape[1])
    torch.testing.assert_close(through(factors, rows), written, rtol=0, atol=1e-8)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "k_proj"])
def test_the_mean_is_kept_exactly(biased, rng):
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, len(weight) + 1))
    factors, written = split_layer(weight, bias if biased else None, rows, rank)
    torch.testing.assert_close(
        through(factors, rows).mean(dim=0), written.mean(dim=0), rtol=0, atol=1e-10
    )


def test_what_is_lost_is_one_minus_the_energy(rng):
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, len(weight) + 1))
    factors, written = split_layer(weight, bias, rows, rank)
    centred = written - written.mean(dim=0)
    lost = (through(factors, rows) - written).square().sum() / centred.square().sum()
    variances = spectrum(weight @ square_root(rows.T.cov(correction=0)))
    assert lost.item() == pytest.approx(1 - energy_at(variances, rank), abs=1e-9)


def test_it_agrees_with_the_svd_of_stored_activations(rng):
    """The paper's own way: (2) on the centred outputs. Same spectrum, rank and subspace."""
    weight, bias, rows = draw_layer(rng)
    written = rows @ weight.T + bias
    centred = written - written.mean(dim=0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    root = weight @ square_root(rows.T.cov(correction=0))
    variances = spectrum(root)
    wanted = s.square() / len(rows)
    short = min(len(variances), len(wanted))
    torch.testing.assert_close(variances[:short], wanted[:short], rtol=1e-6, atol=1e-9)
    for theta in (0.5, 0.9, 0.99):
        assert rank_for(variances, len(weight), theta, 2) == rank_for(wanted, len(weight), theta, 2)
    rank = max(1, int((wanted > 1e-6 * wanted[0]).sum()) // 2)
    cosines = torch.linalg.svdvals(principal_axes(root, rank).T @ v[:rank].T)
    assert cosines.min() > 1 - 1e-6


def test_it_is_whitening_with_a_centred_covariance(rng):
    """SVD-LLM's way: S of C_xx = S S^T by Cholesky, truncate the SVD of W S, undo S. The weights
    are the same, and what they lose is the tail: ||(W - W') S||^2 = sum of the dropped sigma^2."""
    weight, bias, rows = draw_layer(rng)
    covariance = rows.T.cov(correction=0)
    root = torch.linalg.cholesky(covariance)
    u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
    rank = int(rng.integers(1, len(sigma) + 1))
    wanted = (u[:, :rank] * sigma[:rank]) @ v[:rank] @ torch.linalg.inv(root)
    factors, _ = split_layer(weight, bias, rows, rank)
    found = factors.up @ factors.down
    size = float(weight.norm())
    lost = ((weight - found) @ root).square().sum()
    dropped = sigma[rank:].square().sum()
    assert float(lost - dropped) == pytest.approx(0, abs=1e-9 * float(sigma.square().sum()))
    gap = sigma[rank - 1] - (sigma[rank] if rank < len(sigma) else 0)
    if gap > 1e-3 * sigma[0]:  # otherwise other axes do as well
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * size)


def test_no_other_subspace_of_that_rank_loses_less(rng):
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, len(weight) + 1))
    factors, written = split_layer(weight, bias, rows, rank)
    best = (through(factors, rows) - written).square().sum()
    mean = written.mean(dim=0)
    for size in (1.0, 1e-1, 1e-3):
        other = torch.linalg.qr(factors.up + size * torch.randn_like(factors.up)).Q
        assert (through(split(weight, bias, mean, other), rows) - written).square().sum() >= (
            best * (1 - 1e-9) - 1e-9
        )


# -------------------------------------------------------------------------------------- rank rule


def test_ranks_of_a_spectrum_whose_answer_is_known():
    variances = torch.tensor([50.0, 30.0, 15.0, 4.0, 1.0, 0.0])
    assert energies(variances).tolist() == pytest.approx([0, 0.5, 0.8, 0.95, 0.99, 1, 1])
    assert rank_for(variances, 6, 0.7, round_to=1) == 2
    assert rank_for(variances, 6, 0.94, round_to=2) == 4
    assert rank_for(variances, 6, 0.0, round_to=2) == 2
    assert rank_for(variances, 6, 1.0, round_to=1) is None


def test_the_threshold_must_be_exceeded_not_met():
    variances = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert rank_for(variances, 4, 0.5, round_to=1) == 3


def test_a_flat_spectrum_stays_dense():
    """No multiple of 16 below 64 keeps more than 0.99 of it; the authors' code splits at 63."""
    assert rank_for(torch.ones(64), 64, 0.99) is None
    assert not worth_it(None, 64, 64)


def test_a_model_whose_layers_have_flat_spectra_stays_as_it_is(
    make_whisper, work, rng, monkeypatch
):
    """White noise through orthogonal matrices: no rank below the full one keeps 0.999."""
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
    monkeypatch.setattr(lite, "collect", white)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = Options(layers="*.encoder.*.fc1", theta_mlp=0.999, round_to=int(rng.integers(1, 17)))
    made = lite.apply(model, options, work)
    assert [layer["rank"] for layer in work.record["lite"]["layers"].values()] == [None, None]
    assert work.record["lite"]["parameters"]["after"] == work.record["lite"]["parameters"]["before"]
    assert not any(isinstance(module, LowRank) for module in made.modules())
    assert all(torch.equal(before[name], t) for name, t in made.state_dict().items())


def test_a_higher_threshold_never_lowers_a_rank(rng):
    variances = torch.from_numpy(np.sort(rng.exponential(size=64))[::-1].copy())
    thetas = np.sort(rng.uniform(size=50))
    ranks = [rank_for(variances, 64, theta, 4) or 64 for theta in thetas]
    assert ranks == sorted(ranks)


def test_outputs_that_never_vary_take_the_lowest_rank():
    assert rank_for(torch.zeros(64), 64, 0.99) == 16


@pytest.mark.parametrize(
    ("d_out", "d_in", "bound"),
    [(1280, 1280, 640), (5120, 1280, 1024), (1280, 5120, 1024)],
    ids=["attention", "fc1", "fc2"],
)
def test_the_bounds_of_large_v3_are_the_papers(d_out, d_in, bound):
    assert worth_it(bound, d_out, d_in)
    assert not worth_it(bound + 1, d_out, d_in)
    assert not worth_it(bound, d_out, d_in, max_cost=0.99)


def test_parameters_of_large_v3_are_counted_from_its_ranks():
    """635 M in the dense encoder; one rank for all attention layers and one for all others."""
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
        found, before = (
            sum(
                p.numel()
                for p in whisper.WhisperForConditionalGeneration(c).model.encoder.parameters()
            )
            for c in (config, dense)
        )
    assert before == pytest.approx(635e6, rel=0.005)
    saved = 4 * (1280**2 - attention * 2560) + 2 * (1280 * 5120 - mlp * 6400) - 1280
    assert found == before - 32 * saved


# ----------------------------------------------------------------------------------------- budget


def draw_choices(rng) -> dict[str, list[Choice]]:
    layers = {}
    for number in range(int(rng.integers(1, 6))):
        d_out, d_in = (int(n) for n in rng.integers(8, 100, size=2))
        variances = torch.from_numpy(np.sort(rng.exponential(size=d_out))[::-1].copy())
        theta = float(rng.uniform(0.5, 0.999))
        options = Options(round_to=int(rng.integers(1, 5)))
        layers[str(number)] = choices(variances, d_out, d_in, options, 1, theta)
    return layers


def cost_and_loss(layers, ranks):
    taken = [next(c for c in layers[n] if c.rank == rank) for n, rank in ranks.items()]
    return sum(c.cost for c in taken), sum(c.loss for c in taken)


def test_allocation_of_two_layers_whose_answer_is_known():
    layers = {
        "cheap": [Choice(None, 100, 0.0), Choice(4, 50, 0.1), Choice(2, 25, 1.0)],
        "dear": [Choice(None, 100, 0.0), Choice(4, 50, 5.0), Choice(2, 25, 6.0)],
    }
    assert allocate(layers, 1.0) == {"cheap": None, "dear": None}
    assert allocate(layers, 0.75) == {"cheap": 4, "dear": None}
    assert allocate(layers, 0.63) == {"cheap": 2, "dear": None}
    assert allocate(layers, 0.3) == {"cheap": 2, "dear": 2}


def test_the_budget_is_kept_and_ranks_fall_with_it(rng):
    layers = draw_choices(rng)
    dense = sum(found[0].cost for found in layers.values())
    least = sum(found[-1].cost for found in layers.values()) / dense
    taken = []
    for budget in np.linspace(1, least + 1e-9, 20):
        ranks = allocate(layers, budget)
        assert cost_and_loss(layers, ranks)[0] <= budget * dense * (1 + 1e-12)
        taken.append({n: rank or 10**9 for n, rank in ranks.items()})
    assert all(less[n] <= more[n] for more, less in pairwise(taken) for n in layers)


def test_no_better_allocation_exists_at_the_cost_of_a_bargain(rng):
    """Against trying everything: where the budget is spent exactly, greedy is optimal."""
    from itertools import product

    layers = {n: found[::4] for n, found in list(draw_choices(rng).items())[:3]}
    hulls = {n: bargains(found) for n, found in layers.items()}
    steps = sorted(
        (lite.price(a, b), a.cost - b.cost) for hull in hulls.values() for a, b in pairwise(hull)
    )
    dense = sum(found[0].cost for found in layers.values())
    spent = dense - sum(saved for _, saved in steps[: int(rng.integers(0, len(steps) + 1))])
    ranks = allocate(layers, spent / dense + 1e-12)
    _, loss = cost_and_loss(layers, ranks)
    best = min(
        sum(c.loss for c in combination)
        for combination in product(*layers.values())
        if sum(c.cost for c in combination) <= spent + 1e-6
    )
    assert loss <= best + 1e-9


def test_a_budget_that_no_rank_reaches_is_a_letter():
    layers = {"one": [Choice(None, 100, 0.0), Choice(16, 60, 0.1)]}
    with pytest.raises(Problem, match=r"a budget of 0.5 .* already cost 0.600"):
        allocate(layers, 0.5)


def test_a_theta_of_one_keeps_its_layers_out_of_the_budget():
    variances = torch.ones(32)
    assert choices(variances, 32, 32, Options(round_to=4), 1, 1.0) == [Choice(None, 1024, 0.0)]


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_budget_is_what_remains_of_the_layers(share, narrow_whisper, work):
    options = replace(FINE, budget=share, round_to=1)
    before = narrow_whisper.model.encoder.layers
    dense = sum(p.numel() for p in before.parameters() if p.dim() == 2)
    slim = lite.apply(narrow_whisper, options, work)
    left = sum(p.numel() for p in slim.model.encoder.layers.parameters() if p.dim() == 2)
    assert share - 0.02 < left / dense <= share


def test_a_budget_in_macs_counts_positions_and_tokens(tiny_whisper, few, processor):
    """300 positions, 32 tokens; cross-attention's keys and values run on positions."""
    names = lite.chosen(tiny_whisper, "*")
    outputs = lite.listen(tiny_whisper, names, Speech(few[:1], processor))
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


def test_of_two_equal_layers_the_one_that_runs_more_often_is_split_first():
    variances = torch.logspace(0, -3, 32)
    options = Options(round_to=4)
    often, seldom = (choices(variances, 32, 32, options, unit, 0.99) for unit in (300, 32))
    ranks = allocate({"seldom": seldom, "often": often}, 0.8)
    assert ranks["often"] is not None and ranks["seldom"] is None


# -------------------------------------------------------------------------- regression, (A)


def test_regression_keeps_the_weight_where_nothing_changed(rng):
    weight, bias, rows = draw_layer(rng)
    written = rows @ weight.T + bias
    c_xx = rows.T.cov(correction=0)
    found, offset = refit(
        weight, rows.mean(dim=0), written.mean(dim=0), c_xx, weight @ c_xx, ridge=1e-4
    )
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(offset, bias, rtol=0, atol=1e-8)


def test_regression_of_a_layer_whose_answer_is_known(rng):
    """Inputs come twice as large and turned: the weight must halve and turn back."""
    weight, bias, rows = draw_layer(rng)
    turn = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1]).double()).Q
    read, written = 2 * rows @ turn, rows @ weight.T + bias
    both = torch.cat([read, written], dim=1).T.cov(correction=0)
    width = rows.shape[1]
    c_xx, c_yx = both[:width, :width], both[width:, :width]
    means = read.mean(dim=0), written.mean(dim=0)
    found, offset = refit(weight, *means, c_xx, c_yx, ridge=1e-12)
    # judged by what is written: along directions in which hardly anything is read, the ridge rules
    size = float(written.std())
    known = read @ (weight @ turn).T / 2 + bias
    torch.testing.assert_close(read @ found.T + offset, known, rtol=0, atol=1e-4 * size)


def test_regression_keeps_the_weight_where_nothing_was_heard():
    """Feature 0 never varied: the weight of it stays; feature 1 is learnt."""
    weight = torch.tensor([[5.0, 1.0]], dtype=torch.float64)
    c_xx = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    c_yx = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    found, _ = refit(weight, torch.zeros(2).double(), torch.zeros(1).double(), c_xx, c_yx, 1e-9)
    torch.testing.assert_close(found, torch.tensor([[5.0, 3.0]]).double(), rtol=0, atol=1e-6)


def test_reduced_rank_regression_beats_projection_on_what_is_really_read(rng):
    """The outputs' axes for noisy inputs: never worse than those of the original's activations."""
    weight, bias, rows = draw_layer(rng)
    read = rows + 0.3 * torch.randn_like(rows)
    written = rows @ weight.T + bias
    rank = max(1, min(weight.shape) // 3)
    width = rows.shape[1]
    both = torch.cat([read, written], dim=1).T.cov(correction=0)
    c_xx, c_yx = both[:width, :width], both[width:, :width]
    means = read.mean(dim=0), written.mean(dim=0)
    better, offset = refit(weight, *means, c_xx, c_yx, ridge=1e-10)
    fitted = split(better, offset, means[1], principal_axes(better @ square_root(c_xx), rank))
    plain, _ = split_layer(weight, bias, rows, rank)
    errors = [(through(f, read) - written).square().sum().item() for f in (fitted, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-9)


# --------------------------------------------------------------------------------- the whole step


def low_rank_layers(model) -> dict[str, LowRank]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRank)}


@pytest.mark.parametrize("sequential", [False, True], ids=["at-once", "sequential"])
def test_thresholds_of_one_change_no_bit(sequential, tiny_whisper, work):
    before = copy.deepcopy(tiny_whisper.state_dict())
    options = Options(theta_attn=1.0, theta_mlp=1.0, round_to=1, sequential=sequential)
    same = lite.apply(tiny_whisper, options, work)
    assert all(torch.equal(same.state_dict()[name], before[name]) for name in before)
    assert not hasattr(same.config, "edgewhisper")
    assert {told["rank"] for told in work.record["lite"]["layers"].values()} == {None}


def test_it_is_training_free_and_touches_the_encoder_only(narrow_whisper, work):
    before = copy.deepcopy(narrow_whisper.state_dict())
    slim = lite.apply(narrow_whisper, FINE, work)
    assert low_rank_layers(slim)
    layers = ("model.encoder.layers", *low_rank_layers(slim))
    for name, tensor in slim.state_dict().items():
        if not name.startswith(layers):
            assert torch.equal(tensor, before[name])
    assert all(name.startswith("model.encoder") for name in low_rank_layers(slim))
    record = work.record["lite"]
    assert record["recovery"]["steps"] == 0
    assert record["parameters"]["after"]["total"] < record["parameters"]["before"]["total"]
    assert record["macs"]["after"]["encoder"] < record["macs"]["before"]["encoder"]
    assert record["macs"]["after"]["cross"] == record["macs"]["before"]["cross"]


def test_each_layer_writes_its_mean_and_keeps_its_energy(narrow_whisper, work, few, processor):
    """On the calibration speech, with the original's inputs, and for key projections too."""
    dense = copy.deepcopy(narrow_whisper)
    slim = lite.apply(narrow_whisper, FINE, work)
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
            wanted, found = linear(read).double(), layer(read).double()
        centred = wanted - wanted.mean(dim=0)
        size = centred.square().mean().sqrt()
        torch.testing.assert_close(
            found.mean(dim=0), wanted.mean(dim=0), rtol=0, atol=float(1e-4 * size + 1e-5)
        )
        lost = float((found - wanted).square().sum() / centred.square().sum())
        told = work.record["lite"]["layers"][name]
        assert lost == pytest.approx(1 - told["energy"], abs=1e-4)
        assert told["rank"] == layer.down.out_features


def test_plain_decomposition_keeps_the_bias_and_the_best_of_the_weight(rng):
    """The same as numpy's truncated SVD of W, and nearer to W than the activations' axes."""
    weight, bias, rows = draw_layer(rng)
    rank = int(rng.integers(1, min(weight.shape) + 1))
    for own in (bias, None):
        mean, root = lite.plain(weight, own)
        factors = split(weight, own, mean, principal_axes(root, rank))
        u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
        wanted = torch.from_numpy(u[:, :rank] * s[:rank] @ v[:rank])
        torch.testing.assert_close(factors.up @ factors.down, wanted, rtol=0, atol=1e-9)
        kept = torch.zeros(len(weight)).double() if own is None else own
        torch.testing.assert_close(factors.shift, kept, rtol=0, atol=1e-12)
    heard, _ = split_layer(weight, bias, rows, rank)
    error = (heard.up @ heard.down - weight).norm()
    assert (wanted - weight).norm() <= error + 1e-9


def test_plain_decomposition_takes_the_same_ranks(narrow_whisper, work):
    ranks = []
    for basis in ("activations", "weights"):
        model = lite.apply(copy.deepcopy(narrow_whisper), replace(FINE, basis=basis), work)
        layers = work.record["lite"]["layers"]
        ranks.append({name: layer["rank"] for name, layer in layers.items()})
        assert any(ranks[-1].values())
        for name, module in narrow_whisper.named_modules():
            if ranks[-1].get(name) and basis == "weights" and module.bias is not None:
                assert torch.equal(model.get_submodule(name).up.bias, module.bias)
    assert ranks[0] == ranks[1]


def test_plain_decomposition_cannot_be_sequential(tiny_whisper, work):
    with pytest.raises(Problem, match="basis"):
        lite.apply(tiny_whisper, Options(basis="weights", sequential=True), work)


def test_a_full_subspace_is_the_same_model(narrow_whisper, work, few, processor):
    """Every layer split at k = d_out: the same words."""
    dense = copy.deepcopy(narrow_whisper)
    names = lite.chosen(narrow_whisper, Options().layers)
    outputs = lite.listen(narrow_whisper, names, Speech(few, processor))
    full = {name: len(narrow_whisper.get_submodule(name).weight) for name in names}
    lite.split_at_once(narrow_whisper, full, outputs)
    assert len(low_rank_layers(narrow_whisper)) == len(names) == 12
    features = torch.randn(1, 80, 600)
    with torch.no_grad():
        wanted, found = (
            m.model.encoder(features).last_hidden_state for m in (dense, narrow_whisper)
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    pcms = [clip.pcm() for clip in few]
    assert decoding.greedy(narrow_whisper, processor, pcms) == decoding.greedy(
        dense, processor, pcms
    )


def test_covariances_of_inputs_and_of_outputs_find_the_same(narrow_whisper, work, few, processor):
    """fc2 is listened to where it writes; what it reads would tell the same."""
    name = f"{ENCODER}.fc2"
    model = narrow_whisper
    speech = Speech(few, processor)
    points = lite.where_to_listen(model, lite.chosen(model, Options().layers))
    assert points[name] == Point(name, "output")
    assert points[f"{ENCODER}.self_attn.v_proj"] == Point(f"{ENCODER}.self_attn.q_proj")
    found = {}
    for point in (Point(name), Point(name, "output")):
        outputs = lite.Outputs(model, collect(model, [point], speech), {name: point})
        found[point.side] = outputs.of(model, name).mean, outputs.variances[name]
    torch.testing.assert_close(found["input"][0], found["output"][0], rtol=0, atol=1e-4)
    largest = float(found["input"][1][0])
    torch.testing.assert_close(
        found["input"][1], found["output"][1], rtol=1e-4, atol=1e-5 * largest
    )


def test_sequential_is_nearer_to_the_original_at_the_same_size(
    narrow_whisper, work, few, processor
):
    from edgewhisper.compress.lite import split_at_once, split_in_turn

    options = replace(FINE, theta_attn=0.7, theta_mlp=0.7, sequential=True)
    speech = Speech(few, processor)
    names = lite.chosen(narrow_whisper, options.layers)
    outputs = lite.listen(narrow_whisper, names, speech)
    ranks = lite.choose_ranks(narrow_whisper, outputs, options)
    assert sum(map(bool, ranks.values())) > 3
    errors = {}
    for kind in ("at once", "in turn"):
        model = copy.deepcopy(narrow_whisper)
        if kind == "at once":
            split_at_once(model, ranks, outputs)
        else:
            split_in_turn(model, ranks, speech, options)
        errors[kind] = encoder_error(narrow_whisper, model, speech)
    assert errors["in turn"] < errors["at once"]


@torch.no_grad()
def encoder_error(dense, slim, speech) -> float:
    pairs = [
        [m.model.encoder(w.features).last_hidden_state for m in (dense, slim)]
        for w in speech.windows(dense)
    ]
    lost = sum((found - wanted).square().sum() for wanted, found in pairs)
    return float(lost / sum((wanted - wanted.mean()).square().sum() for wanted, _ in pairs))


def test_groups_are_fitted_to_what_they_read_then(narrow_whisper, work, few, processor):
    """The last layer of the chain, checked against least squares on stored rows."""
    options = replace(FINE, theta_mlp=1.0, sequential=True, ridge=1e-8)
    dense = copy.deepcopy(narrow_whisper)
    slim = lite.apply(narrow_whisper, options, work)
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


def test_the_decoders_layers_can_be_split_too(narrow_whisper, work, few, processor):
    options = replace(
        FINE,
        layers="model.decoder.*",
        theta_attn=0.99,
        theta_mlp=0.99,
        round_to=1,
        sequential=True,
    )
    dense = copy.deepcopy(narrow_whisper)
    slim = lite.apply(narrow_whisper, options, work)
    assert low_rank_layers(slim)
    assert all(name.startswith("model.decoder") for name in low_rank_layers(slim))
    for window in Speech(few, processor).windows(dense, decoder=True):
        with torch.no_grad():
            wanted, found = (
                m(window.features, decoder_input_ids=window.tokens).logits for m in (dense, slim)
            )
        assert (found - wanted).norm() < 0.5 * wanted.norm()


def test_masking_the_padding_looks_at_fewer_positions(narrow_whisper, work):
    lite.apply(copy.deepcopy(narrow_whisper), FINE, work)
    everything = work.record["lite"]["calibration"]["positions"]
    lite.apply(narrow_whisper, replace(FINE, mask_padding=True), work)
    assert work.record["lite"]["calibration"]["positions"] < everything == 900


def test_calibration_clips_are_drawn_by_the_seed(work):
    many = replace(work, train=list(range(50)))
    drawn = [
        lite.calibration_speech(Options(clips=10), replace(many, seed=seed)).clips
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert len(lite.calibration_speech(Options(clips=10**6), many).clips) == 50


def test_a_pattern_that_matches_no_layer_is_a_letter(tiny_whisper, work):
    with pytest.raises(Problem, match=r"none of the 32 linear layers .* is called '\*.fc3'"):
        lite.apply(tiny_whisper, replace(FINE, layers="*.fc3"), work)


def test_no_clips_is_a_letter(tiny_whisper, work):
    with pytest.raises(Problem, match="no clips to calibrate on"):
        lite.apply(tiny_whisper, FINE, replace(work, train=[]))


# ----------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("factors_only", [True, False], ids=["factors", "everything"])
def test_recovery_trains_what_it_should(factors_only, narrow_whisper, work):
    plain = lite.apply(copy.deepcopy(narrow_whisper), FINE, work)
    training = Training(steps=2, batch_size=2, learning_rate=1e-3)
    options = replace(FINE, recovery=training, factors_only=factors_only)
    trained = lite.apply(narrow_whisper, options, work)
    factors = low_rank_layers(trained)
    for name, tensor in plain.state_dict().items():
        inside = name.startswith(tuple(f"{factor}." for factor in factors))
        moved = not torch.equal(tensor, trained.state_dict()[name])
        if "embed_positions" not in name and not name.endswith("k_proj.up.bias"):
            assert moved == (inside or not factors_only), name
    assert work.record["lite"]["recovery"]["steps"] == 2
    assert all(p.requires_grad for n, p in trained.named_parameters() if "embed_positions" not in n)


def test_recovery_brings_the_encoder_nearer(narrow_whisper, work, few, processor):
    dense = copy.deepcopy(narrow_whisper)
    rough = replace(FINE, theta_attn=0.0, theta_mlp=0.0, round_to=1)
    plain = lite.apply(copy.deepcopy(narrow_whisper), rough, work)
    options = replace(
        rough, keep=100.0, recovery=Training(steps=12, batch_size=3, learning_rate=3e-3)
    )
    trained = lite.apply(narrow_whisper, options, work)
    speech = Speech(few, processor)
    assert encoder_error(dense, trained, speech) < encoder_error(dense, plain, speech)


# -------------------------------------------------------------------- save, shrink, export, cost


@pytest.fixture
def slim(narrow_whisper, work) -> nn.Module:
    stamps = range(
        narrow_whisper.generation_config.no_timestamps_token_id + 1,
        narrow_whisper.config.vocab_size,
    )
    narrow_whisper.generation_config.suppress_tokens = list(stamps)
    made = lite.apply(narrow_whisper, FINE, work)
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
def test_biases_that_no_layer_may_gain_are_refused(biases, slim):
    shapes = copy.deepcopy(slim.config.edgewhisper)
    shapes["encoder"][1]["biases"] = biases
    with pytest.raises(Problem, match=r"encoder\.layers\.1\.biases is .*\(self_attn\.k_proj\)"):
        whisper.check_shapes(shapes, slim.config)


def test_a_dense_key_projection_may_not_gain_a_bias(slim):
    shapes = copy.deepcopy(slim.config.edgewhisper)
    shapes["decoder"][0]["biases"] = ["self_attn.k_proj"]
    with pytest.raises(Problem, match=r"decoder\.layers\.0\.biases is .*this layer has none"):
        whisper.check_shapes(shapes, slim.config)


def test_shrink_takes_the_bias_of_keys_and_nothing_changes(slim, work):
    with torch.no_grad():
        for name, layer in low_rank_layers(slim).items():
            if name.endswith("k_proj"):
                layer.up.bias.add_(3.0)  # far from zero, so that it would show
    smaller = shrink.apply(slim, shrink.Options(), work)
    assert not any(name.endswith("k_proj.up.bias") for name in smaller.state_dict())
    assert "biases" not in smaller.config.edgewhisper["encoder"][0]
    features, ids = torch.randn(2, 80, 600), torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        wanted, found = (m(features, decoder_input_ids=ids).logits for m in (slim, smaller))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shrunk", [False, True], ids=["with-biases", "shrunk"])
def test_it_survives_export(shrunk, slim, work, processor, few, tmp_path):
    from devices.runner.recognizer import Recognizer
    from export.onnx.to_onnx import export_onnx

    made = shrink.apply(slim, shrink.Options(), work) if shrunk else slim
    (tmp_path / "artifact").mkdir()
    manifest = export_onnx(made, processor, tmp_path / "artifact", precision="fp32")
    layer = manifest["layers"]["encoder"][0]
    assert layer.get("biases") == (None if shrunk else ["self_attn.k_proj"])
    assert layer["ranks"] == made.config.edgewhisper["encoder"][0]["ranks"]
    recognizer = Recognizer(tmp_path / "artifact", guards=False)
    pcm = few[0].pcm()
    assert recognizer.window(pcm) == decoding.greedy(slim, processor, [pcm])[0]


def test_it_follows_pruning(narrow_whisper, work, rng):
    """Layers that read some of their inputs only are split as well."""
    pruned = shrink.apply(kill(narrow_whisper, "input_columns", rng), shrink.Options(), work)
    dense = copy.deepcopy(pruned)
    slim = lite.apply(pruned, replace(FINE, theta_attn=0.999, theta_mlp=0.999, round_to=1), work)
    gathered = [n for n, m in slim.named_modules() if isinstance(m, whisper.GatherLinear)]
    assert any(name.endswith(".down") for name in gathered)
    features = torch.randn(1, 80, 600)
    with torch.no_grad():
        wanted, found = (m.model.encoder(features).last_hidden_state for m in (dense, slim))
    assert (found - wanted).norm() < 0.3 * (wanted - wanted.mean()).norm()


@pytest.mark.parametrize("sequential", [False, True], ids=["at-once", "sequential"])
def test_what_is_split_already_is_left_alone(sequential, narrow_whisper, work):
    slim = lite.apply(narrow_whisper, replace(FINE, layers="model.encoder.*.fc1"), work)
    before = {name: copy.deepcopy(m.state_dict()) for name, m in low_rank_layers(slim).items()}
    assert set(before) == {f"model.encoder.layers.{n}.fc1" for n in (0, 1)}
    again = lite.apply(slim, replace(FINE, theta_attn=0.3, sequential=sequential), work)
    assert len(low_rank_layers(again)) == 12
    for name, tensors in before.items():
        found = low_rank_layers(again)[name].state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


# ------------------------------------------------------- attention of reduced dimension, (12), (16)


def test_terms_that_a_softmax_does_not_see_are_dropped(rng):
    """Dense low-rank attention, (12) with all its terms, and what is left of it: the same."""
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
    narrow, bias = lite.queries_of_shared_key(up_q, bias_q, up_k, heads)
    left = of_heads(a @ narrow.T + bias) @ b.T
    torch.testing.assert_close(left.softmax(-1), dense.softmax(-1))
    assert (left - dense).abs().max() > 1e-3

    folded, constant = lite.output_of_shared_value(out, up_v, bias_v, heads)
    torch.testing.assert_close(mixed(left, c[None]) @ folded.T + constant, mixed(dense, v) @ out.T)


SHARED = replace(FINE, share=True)


@pytest.fixture
def pair(narrow_whisper, work) -> tuple[nn.Module, nn.Module]:
    """A low-rank model, and the same with shared keys and values in both encoder layers."""
    stamps = range(
        narrow_whisper.generation_config.no_timestamps_token_id + 1,
        narrow_whisper.config.vocab_size,
    )
    narrow_whisper.generation_config.suppress_tokens = list(stamps)
    plain = lite.apply(copy.deepcopy(narrow_whisper), FINE, work)
    narrow = lite.apply(narrow_whisper, SHARED, work)
    assert work.record["lite"]["shared"] == [0, 1]
    return plain, narrow


def same_encoding(one, other, atol=1e-4):
    features = torch.randn(2, 80, 600)
    with torch.no_grad():
        wanted, found = (m.model.encoder(features).last_hidden_state for m in (one, other))
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_shared_keys_and_values_are_the_same_function_and_cost_less(pair):
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
def test_keys_and_values_are_shared_beside_dense_layers(dense, narrow_whisper, work):
    """Queries and outputs need not be low-rank."""
    for parts in ("kv", "q"):
        if parts == "kv" or dense == "out_proj":
            options = replace(FINE, layers=f"model.encoder.*.self_attn.[{parts}]_proj")
            narrow_whisper = lite.apply(narrow_whisper, options, work)
    shared, numbers = lite.share_attention(copy.deepcopy(narrow_whisper))
    assert numbers == [0, 1]
    same_encoding(narrow_whisper, shared)


def test_keys_and_values_are_shared_after_pruning(narrow_whisper, work, rng):
    pruned = shrink.apply(kill(narrow_whisper, "input_columns", rng), shrink.Options(), work)
    options = replace(FINE, theta_attn=0.5, round_to=1)
    slim = lite.apply(pruned, options, work)
    shared, numbers = lite.share_attention(copy.deepcopy(slim))
    split_up = low_rank_layers(slim)
    assert numbers == [  # a layer with very few inputs left is dearer as two
        n
        for n in (0, 1)
        if all(f"model.encoder.layers.{n}.self_attn.{part}_proj" in split_up for part in "kv")
    ]
    same_encoding(slim, shared)


def test_high_ranks_are_not_shared(narrow_whisper, work):
    high = replace(SHARED, round_to=16)
    lite.apply(narrow_whisper, high, work)
    assert work.record["lite"]["shared"] == []


def test_shared_attention_survives_save_load_and_shrink(pair, processor, work, tmp_path):
    narrow = pair[1]
    whisper.save(narrow, processor, tmp_path / "narrow", {})
    loaded = whisper.load(tmp_path / "narrow")
    assert layer_shapes(loaded) == layer_shapes(narrow) == narrow.config.edgewhisper
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    same_encoding(narrow, shrink.apply(loaded, shrink.Options(), work))
    again, numbers = lite.share_attention(loaded)
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
def test_sharing_that_cannot_be_is_refused(side, shared, pair):
    shapes = copy.deepcopy(pair[1].config.edgewhisper)
    shapes[side][1]["self_attn"]["shared"] = shared
    with pytest.raises(Problem, match=rf"{side}\.layers\.1\.self_attn\.shared is {shared!r}"):
        whisper.check_shapes(shapes, pair[1].config)
