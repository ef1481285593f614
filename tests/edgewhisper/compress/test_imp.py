"""Iterative magnitude pruning: rounds, masks, and resumed runs."""

import copy
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from edgewhisper import decoding, training, whisper
from edgewhisper.compress import imp, masks, shrink
from edgewhisper.compress.context import Context
from edgewhisper.compress.imp import Options, kept_after, prune
from edgewhisper.compress.masks import smallest, weights_of
from edgewhisper.resume import Interrupted
from edgewhisper.training import Training, train
from export.problem import Problem

NONE = Training(steps=0)
BRIEF = Training(steps=2, batch_size=2, learning_rate=1e-3)
THREE_ROUNDS = Options(share=0.3, target=0.6, start=BRIEF, training=BRIEF, recovery=BRIEF)
AT_ONCE = Options(share=1.0, target=0.5, start=NONE, training=NONE, recovery=NONE)


@pytest.fixture
def context(few, processor, tmp_path: Path, seed: int) -> Context:
    return Context(
        processor=processor, train=few, dev=few, run_dir=tmp_path / "run", seed=seed % 1000
    )


@pytest.fixture
def model(make_whisper):
    return make_whisper(d_model=16, ffn=16, encoder_layers=1, decoder_layers=1)


@pytest.fixture
def drawn(rng) -> dict[str, torch.Tensor]:
    """Random matrices of random shapes and scales."""
    shapes = rng.integers(1, 30, size=(int(rng.integers(1, 6)), 2)).tolist()
    return {f"{n}": torch.randn(*s) * float(rng.uniform(0.1, 3)) for n, s in enumerate(shapes)}


def whole(weights):
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---------------------------------------------------------------------------- rounds and magnitudes


def test_rounds_of_a_fifth_reach_the_target_and_end_there():
    assert kept_after(0.2, 0.36) == pytest.approx([0.8, 0.64])
    assert kept_after(0.2, 0.5) == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert kept_after(1.0, 0.3) == pytest.approx([0.7])
    assert kept_after(0.2, 0.0) == []


def test_every_round_prunes_its_share_of_the_remaining_weights(rng):
    share, target = rng.uniform(0.01, 0.9), rng.uniform(0.01, 0.99)
    kept = [1.0, *kept_after(share, target)]
    assert kept[-1] == pytest.approx(1 - target)
    assert all(after > 1 - target for after in kept[:-1])
    for before, after in list(pairwise(kept))[:-1]:
        assert after == pytest.approx(before * (1 - share))
    assert kept[-2] * (1 - share) <= kept[-1] * (1 + 1e-9)


def test_pruning_of_small_matrices_by_hand():
    weights = {"a": torch.tensor([[1.0, -8.0], [3.0, 0.5]]), "b": torch.tensor([[-0.1, 0.2]])}
    globally = prune(weights, whole(weights), 0.5, "global")
    assert globally["a"].tolist() == [[True, True], [True, False]]
    assert globally["b"].tolist() == [[False, False]]
    each = prune(weights, whole(weights), 0.5, "per_matrix")
    assert each["a"].tolist() == [[False, True], [True, False]]
    assert each["b"].tolist() == [[False, True]]


def test_equal_weights_are_pruned_in_order_of_index():
    assert smallest(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [False, True, True, False]
    assert not smallest(torch.ones(2, 2), 0).any()
    assert smallest(torch.ones(2, 2), 4).all()


def test_smallest_agrees_with_argsort(rng):
    values = torch.from_numpy(rng.integers(0, 9, size=tuple(rng.integers(1, 12, size=2)))).float()
    count = int(rng.integers(0, values.numel() + 1))
    expected = np.zeros(values.numel(), dtype=bool)
    expected[np.argsort(values.numpy().ravel(), kind="stable")[:count]] = True
    assert smallest(values, count).numpy().ravel().tolist() == expected.tolist()


@pytest.mark.parametrize("scope", ["global", "per_matrix"])
def test_masks_only_shrink_and_by_exactly_their_share(scope, drawn, rng):
    keep, total = whole(drawn), sum(w.numel() for w in drawn.values())
    for remaining in sorted(rng.uniform(0, 1, size=4), reverse=True):
        weights = {name: torch.randn_like(w) for name, w in drawn.items()}  # as after training
        before, keep = keep, prune(weights, keep, remaining, scope)
        assert all((keep[name] <= before[name]).all() for name in keep)
        if scope == "global":
            assert sum(int(m.sum()) for m in keep.values()) == total - round(
                (1 - remaining) * total
            )
        for mask in keep.values() if scope == "per_matrix" else ():
            size = mask.numel()
            assert int(mask.sum()) == size - round((1 - remaining) * size)
        gone = [weights[n].abs()[before[n] & ~keep[n]] for n in keep]
        stay = [weights[n].abs()[keep[n]] for n in keep]
        groups = (
            zip(gone, stay, strict=True)
            if scope == "per_matrix"
            else [map(torch.cat, (gone, stay))]
        )
        for less, more in groups:
            assert not len(less) or not len(more) or less.max() <= more.min()


@pytest.mark.parametrize("scope", ["global", "per_matrix"])
def test_masks_agree_with_torch_pruning(scope, model, context):
    from torch.nn.utils import prune as torchs

    twin = copy.deepcopy(model)
    linears = [module for _, module in whisper.linears(twin)]
    options = replace(AT_ONCE, scope=scope, share=0.25, target=1 - 0.75**2)
    if scope == "global":
        total = sum(module.weight.numel() for module in linears)
        remaining = total - round(0.25 * total)
        for amount in (total - remaining, remaining - round(0.75**2 * total)):
            torchs.global_unstructured(
                [(m, "weight") for m in linears], torchs.L1Unstructured, amount=amount
            )
    else:
        for module in linears:
            torchs.l1_unstructured(module, "weight", amount=0.25)
            torchs.l1_unstructured(module, "weight", amount=0.25)
    imp.apply(model, options, context)
    for (_, ours), theirs in zip(whisper.linears(model), linears, strict=True):
        # the two round the number of weights differently
        assert ((ours.weight != 0) != (theirs.weight != 0)).sum() <= (0 if scope == "global" else 1)


# ----------------------------------------------------------------------------------------- the step


def test_without_pruning_it_is_plain_fine_tuning(model, context, few, processor):
    plain = copy.deepcopy(model)
    train(plain, processor, few, BRIEF, run_dir=context.run_dir / "plain", seed=context.seed)
    imp.apply(model, replace(AT_ONCE, target=0.0, start=BRIEF), context)
    assert same_bits(bits(plain), bits(model))
    assert context.record["imp"]["rounds"] == []


@pytest.mark.parametrize("scope", ["global", "per_matrix"])
def test_zeros_grow_with_each_round_and_stay_zero_in_recovery(scope, model, context, monkeypatch):
    zeros = []
    original = imp.train_masked

    def counting(model, keep, *rest):
        record = original(model, keep, *rest)
        weights = weights_of(model)
        assert all((weights[name][~mask] == 0).all() for name, mask in keep.items())
        zeros.append(sum(int((~mask).sum()) for mask in keep.values()))
        return record

    monkeypatch.setattr(imp, "train_masked", counting)
    imp.apply(model, replace(THREE_ROUNDS, scope=scope), context)
    total = sum(w.numel() for w in weights_of(model).values())
    assert [n / total for n in zeros] == pytest.approx([0, 0, 0.3, 0.51, 0.6], abs=0.01)
    record = context.record["imp"]
    assert record["pruned"]["zero_elements"] == pytest.approx(0.6, abs=0.01)
    assert [entry["left"] for entry in record["rounds"]] == pytest.approx([0.7, 0.49, 0.4])
    assert record["recovery"]["steps"] == 2


def test_pruned_weights_do_not_count_in_the_gradient_norm(model, context):
    """The clipped norm equals the norm over all other weights."""
    options = replace(AT_ONCE, recovery=replace(BRIEF, steps=1, clip_norm=1e-3, weight_decay=0.1))
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def recording(parameters, limit, **rest):
        parameters = list(parameters)
        norms.append(clip(parameters, 1e9).item())
        live = [
            module.weight.grad[module.weight != 0].square().sum()
            for _, module in whisper.linears(model)
        ]
        inside = {id(module.weight) for _, module in whisper.linears(model)}
        other = [
            p.grad.square().sum() for p in parameters if id(p) not in inside and p.grad is not None
        ]
        norms.append(torch.stack([*live, *other]).sum().sqrt().item())
        return clip(parameters, limit, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", recording)
        imp.apply(model, options, context)
    assert len(norms) == 2 and norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_rewinding_resets_remaining_weights_to_the_start(model, context):
    start = copy.deepcopy(model)
    imp.apply(model, replace(THREE_ROUNDS, rewind=True, start=NONE, recovery=NONE), context)
    trained = weights_of(model)
    for name, weight in weights_of(start).items():
        alive = trained[name] != 0
        assert torch.equal(trained[name], weight * alive)
    assert (
        0.39
        < sum(int((w != 0).sum()) for w in trained.values())
        / sum(w.numel() for w in trained.values())
        < 0.41
    )
    inside = {f"{name}.weight" for name in trained}
    for name, tensor in start.state_dict().items():
        if name not in inside:
            assert torch.equal(model.state_dict()[name], tensor)


def test_rewinding_resets_to_the_weights_after_start(model, context, few, processor):
    plain = copy.deepcopy(model)
    train(plain, processor, few, BRIEF, run_dir=context.run_dir / "plain", seed=context.seed)
    imp.apply(model, replace(THREE_ROUNDS, rewind=True, recovery=NONE), context)
    for name, weight in weights_of(plain).items():
        result = weights_of(model)[name]
        assert torch.equal(result, weight * (result != 0))


def test_only_layers_that_match_are_pruned(model, context):
    imp.apply(model, replace(AT_ONCE, layers="*decoder*.fc1", target=0.5), context)
    for name, weight in weights_of(model).items():
        share = (weight == 0).float().mean()
        assert share == (0.5 if name.endswith("decoder.layers.0.fc1") else 0)


def test_a_pattern_without_a_match_is_refused_before_training(model, context):
    with pytest.raises(Problem, match=r"no linear layer matches '\*.fc3'"):
        imp.apply(model, replace(THREE_ROUNDS, layers="*.fc3"), context)
    assert not context.run_dir.exists()


# ---------------------------------------------------------------------------------- stop and resume


class Killed(Exception):
    pass


def stop_in(monkeypatch, part: int, how: str) -> None:
    """Interrupt or kill the training of this part (0 is `start`) in its first step."""
    original = masks.hold
    calls = iter(range(100))

    def hold(keep):
        hook, number = original(keep), next(calls)

        def stopping(model, step, rate):
            hook(model, step, rate)
            if number == part and step == 0:
                if how == "killed":
                    raise Killed
                os.kill(os.getpid(), signal.SIGINT)

        return stopping

    monkeypatch.setattr(masks, "hold", hold)


def trainings(monkeypatch) -> list[tuple[str, int]]:
    """Return a list that receives the directory and number of steps of every training."""
    done = []
    original = training.train

    def counted(*args, **options):
        steps = []
        hook = options.pop("after_step")

        def counting(*step):
            steps.append(step)
            hook(*step)

        log = original(*args, after_step=counting, **options)
        done.append((options["run_dir"].name, len(steps)))
        return log

    monkeypatch.setattr(training, "train", counted)
    return done


@pytest.mark.parametrize(
    ("part", "how", "rewind"),
    [
        pytest.param(0, "killed", False, id="killed at the start"),
        pytest.param(1, "interrupted", False, id="interrupted in the 1st round"),
        pytest.param(2, "killed", False, id="killed in the 2nd round"),
        pytest.param(3, "interrupted", True, id="interrupted in the 3rd round, rewinding"),
        pytest.param(4, "killed", True, id="killed in the recovery, rewinding"),
    ],
)
def test_a_resumed_run_gives_the_same_bits_and_repeats_no_finished_round(
    part, how, rewind, model, context, tmp_path, monkeypatch
):
    options = replace(THREE_ROUNDS, training=replace(BRIEF, steps=3), rewind=rewind)
    unbroken, stopped = copy.deepcopy(model), copy.deepcopy(model)
    imp.apply(unbroken, options, replace(context, run_dir=tmp_path / "unbroken", record={}))
    with monkeypatch.context() as patch:
        stop_in(patch, part, how)
        with pytest.raises(Interrupted if how == "interrupted" else Killed):
            imp.apply(stopped, options, context)
    done = trainings(monkeypatch)
    imp.apply(model, options, context)  # a new process starts from the base model
    assert same_bits(bits(model), bits(unbroken))
    assert len(context.record["imp"]["rounds"]) == 3
    names = ["imp-start", "training-0001", "training-0002", "training-0003", "imp-recovery"]
    steps = dict(zip(names, [2, 3, 3, 3, 2], strict=True))
    again = {name: count for name, count in done if count}
    first = steps[names[part]] - (2 if how == "interrupted" else 0)
    assert again == {n: steps[n] for n in names[part + 1 :]} | (
        {names[part]: first} if first else {}
    )


def test_only_the_last_finished_round_is_stored(model, context):
    imp.apply(model, THREE_ROUNDS, context)
    (part,) = (context.run_dir / "imp-rounds").iterdir()
    assert part.name == "part-0003"
    assert sorted(path.name for path in part.iterdir()) == ["part.json", "tensors.safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        dict(share=0.25),
        dict(target=0.7),
        dict(scope="global"),
        dict(rewind=True),
        dict(training=replace(BRIEF, learning_rate=2e-3)),
        dict(layers="*.fc?"),
        dict(start=NONE),
    ],
    ids=lambda other: next(iter(other)),
)
def test_rounds_of_other_options_are_not_resumed(other, model, context):
    options = replace(THREE_ROUNDS, start=NONE) if "start" not in other else THREE_ROUNDS
    imp.apply(copy.deepcopy(model), options, context)
    with pytest.raises(Problem, match="imp-rounds holds the state of another training"):
        imp.apply(model, replace(options, **other), context)


def test_rounds_of_another_model_seed_or_speech_are_not_resumed(model, make_whisper, context, few):
    options = replace(THREE_ROUNDS, start=NONE)
    imp.apply(copy.deepcopy(model), options, context)
    other = make_whisper(d_model=16, ffn=16, encoder_layers=1, decoder_layers=1)
    for model_, context_ in (
        (other, context),
        (model, replace(context, seed=context.seed + 1)),
        (model, replace(context, train=few[:2])),
        (model, replace(context, train=[replace(few[0], text="nine"), *few[1:]])),
    ):
        with pytest.raises(Problem, match="imp-rounds holds the state of another training"):
            imp.apply(model_, options, context_)


def test_the_interval_of_checkpoints_may_change_in_a_resumed_run(model, context):
    imp.apply(copy.deepcopy(model), THREE_ROUNDS, context)
    imp.apply(model, replace(THREE_ROUNDS, training=replace(BRIEF, checkpoint_steps=1)), context)
    assert len(context.record["imp"]["rounds"]) == 3


def test_the_error_names_a_damaged_round(model, context):
    imp.apply(copy.deepcopy(model), THREE_ROUNDS, context)
    file = context.run_dir / "imp-rounds" / "part-0003" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Problem, match="part-0003 cannot be read as the state of a training"):
        imp.apply(model, THREE_ROUNDS, context)


# ---------------------------------------------------------------------------------- save and export


@pytest.fixture
def sparse(make_whisper, context):
    """A pruned model whose timestamp tokens are suppressed."""
    model = make_whisper()
    stamps = range(model.generation_config.no_timestamps_token_id + 1, model.config.vocab_size)
    model.generation_config.suppress_tokens = list(stamps)
    return imp.apply(model, AT_ONCE, context)


def test_a_pruned_model_survives_save_and_load(sparse, processor, tmp_path):
    whisper.save(sparse, processor, tmp_path / "sparse", {})
    assert same_bits(bits(whisper.load(tmp_path / "sparse")), bits(sparse))


def test_a_pruned_model_survives_shrinking_and_export(sparse, context, processor, few, tmp_path):
    from devices.runner.recognizer import Recognizer
    from export.onnx.to_onnx import export_onnx

    slim = shrink.apply(sparse, shrink.Options(), context)
    (tmp_path / "artifact").mkdir()
    export_onnx(slim, processor, tmp_path / "artifact", precision="fp32")
    recognizer = Recognizer(tmp_path / "artifact", guards=False)
    pcm = few[0].pcm()
    assert recognizer.window(pcm) == decoding.greedy(sparse, processor, [pcm])[0]
