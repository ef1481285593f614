"""BaldWhisper, stage 2: the factors of the token table, distillation, and export."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from bald_models import (
    BRIEF,
    SHEAR,
    a_batch,
    base,
    logits,
    same_tensors,
    without_units,
)
from onnx import numpy_helper
from onnx_sessions import open_model

from edgewhisper import whisper
from edgewhisper.compress import shear, shrink
from edgewhisper.compress.shear import (
    balanced,
    enough,
    factorise,
    feature_distance,
    weighted_error,
)
from edgewhisper.examples import Batch
from export.cost import count_parameters, macs
from export.manifest import Spec
from export.onnx.graph import INT8, Graph
from export.onnx.layers import quantise
from export.onnx.tables import FactorisedTable, column_scales
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.shrink import layer_shapes

STARTS = ["svd", "frequency", "activation", "both", "mix"]


# --------------------------------------------------------------------- factors before training, (6)


@pytest.fixture
def drawn(rng):
    """A random table, token frequencies with some at the floor, and a metric."""
    vocabulary, width = int(rng.integers(12, 60)), int(rng.integers(4, 12))
    table = torch.from_numpy(rng.standard_normal((vocabulary, width)))
    frequencies = torch.from_numpy(rng.dirichlet(np.full(vocabulary, 0.3))).clamp_min(1e-6)
    states = torch.from_numpy(
        rng.standard_normal((3 * width, width)) @ np.diag(rng.uniform(0.1, 3, width))
    )
    return table, frequencies, states.T @ states / len(states)


def test_factors_of_a_small_table_by_hand():
    # rank 1 of diag(3, 1) keeps the larger value, split evenly between the factors
    table = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    rows, basis = factorise(table, 1, torch.ones(2), torch.eye(2))
    torch.testing.assert_close(rows @ basis, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert rows.abs().max().item() == basis.abs().max().item() == pytest.approx(3**0.5)
    # the first token is rare, so the row of the second is kept
    rows, basis = factorise(table, 1, torch.tensor([1e-6, 1.0]), torch.eye(2))
    torch.testing.assert_close(rows @ basis, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_factors_agree_with_the_cholesky_form_in_numpy(drawn, rng):
    """(6) with S from the Cholesky decomposition; ours is the symmetric root."""
    table, frequencies, metric = (x.numpy() for x in drawn)
    rank = int(rng.integers(1, table.shape[1]))
    root = np.linalg.cholesky(metric)
    scale = np.sqrt(frequencies)[:, None]
    u, sigma, v = np.linalg.svd(scale * table @ root, full_matrices=False)
    expected = (u[:, :rank] / scale) @ (sigma[:rank, None] * v[:rank] @ np.linalg.inv(root))
    rows, basis = factorise(drawn[0], rank, *drawn[1:])
    np.testing.assert_allclose((rows @ basis).numpy(), expected, atol=1e-6)
    error = weighted_error(drawn[0], rows @ basis, *drawn[1:])
    assert error == pytest.approx((sigma[rank:] ** 2).sum() / (sigma**2).sum(), rel=1e-6)


def test_no_other_factors_have_a_smaller_weighted_error(drawn, rng):
    table, frequencies, metric = drawn
    rank = int(rng.integers(1, table.shape[1]))
    rows, basis = factorise(table, rank, frequencies, metric)
    least = weighted_error(table, rows @ basis, frequencies, metric)
    plain = factorise(table, rank, torch.ones(len(table)), torch.eye(table.shape[1]))
    assert least <= weighted_error(table, plain[0] @ plain[1], frequencies, metric) + 1e-12
    for size in (1e-1, 1e-3):
        for _ in range(100):
            other = (rows + size * torch.randn_like(rows)) @ (
                basis + size * torch.randn_like(basis)
            )
            assert weighted_error(table, other, frequencies, metric) >= least - 1e-12


def test_balancing_keeps_the_product_and_equalises_the_factors(rng):
    rows, basis = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((20, 3), (3, 6)))
    rows[:, 1] *= 100
    even, level = balanced(rows, basis)
    torch.testing.assert_close(even @ level, rows @ basis)
    torch.testing.assert_close(even.square().mean(0), level.square().mean(1))


def test_a_table_of_lower_rank_gives_no_nan(rng):
    table = torch.zeros(9, 4)
    table[:, 0] = 1
    rows, basis = factorise(table, 3, torch.ones(9), torch.eye(4))
    torch.testing.assert_close(rows @ basis, table)


@pytest.mark.parametrize("start", STARTS)
def test_the_full_rank_changes_neither_embeddings_nor_logits(start, tiny_whisper, context):
    config = tiny_whisper.config
    options = replace(SHEAR, start=start, rank=min(config.vocab_size, config.d_model))
    frequencies = shear.token_frequencies(tiny_whisper, context, options.floor)
    metric = shear.second_moment(tiny_whisper, options, context)
    factors = shear.factors_of(tiny_whisper, options, frequencies, metric)
    full = shear.sheared(
        tiny_whisper, *factors
    )  # apply refuses this rank, because it saves nothing
    ids = torch.arange(config.vocab_size)
    old, new = (m.model.decoder.embed_tokens(ids) for m in (tiny_whisper, full))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4)
    expected = logits(tiny_whisper)
    torch.testing.assert_close(
        logits(full), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )
    errors = shear.start_errors(tiny_whisper, full, frequencies, metric)
    assert max(errors.values()) < 1e-9


@pytest.mark.parametrize(("share", "rank"), [(0.84, 48), (0.3, 16), (0.01, 16)])
def test_a_share_of_the_width_gives_the_rank(share, rank, make_whisper, context):
    result = shear.apply(make_whisper(d_model=64), replace(SHEAR, share=share), context)
    assert result.config.edgewhisper["token_rank"] == rank == context.record["shear"]["rank"]


def test_theta_is_the_share_that_the_rank_must_exceed():
    sigma = torch.cat([torch.full((16,), 3.0), torch.full((16,), 1.0), torch.zeros(4)])
    assert [enough(sigma, theta) for theta in (0.1, 0.89, 0.91)] == [16, 16, 32]
    assert enough(sigma, 1.0) == 36  # no share exceeds 1


def test_theta_chooses_the_smallest_sufficient_rank(make_whisper, context, rng):
    model = make_whisper(d_model=48)
    theta = rng.uniform(0.3, 0.99)
    result = shear.apply(model, replace(SHEAR, start="svd", theta=theta), context)
    rank = context.record["shear"]["rank"]
    if rank is None:  # the full rank 48 saves nothing
        assert result is model
        rank = context.record["shear"]["kept_dense"]["rank_needed"]
    else:
        assert rank == result.config.edgewhisper["token_rank"] < 48
    squares = np.linalg.svd(model.model.decoder.embed_tokens.weight.detach().numpy())[1] ** 2
    share = np.cumsum(squares) / squares.sum()
    assert rank % 16 == 0 and share[rank - 1] > theta
    assert rank == 16 or share[rank - 17] <= theta


def test_each_start_minimises_its_own_error(tiny_whisper, context):
    table = tiny_whisper.model.decoder.embed_tokens.weight.detach()
    frequencies = shear.token_frequencies(tiny_whisper, context, SHEAR.floor)
    metric = shear.second_moment(tiny_whisper, SHEAR, context)
    products = {}
    for start in STARTS:
        model = shear.apply(tiny_whisper, replace(SHEAR, start=start), context)
        factors = model.model.decoder.embed_tokens
        products[start] = (factors.rows.weight @ factors.up.weight.T).detach()
    for start in STARTS:
        f, m = shear.powers(replace(SHEAR, start=start))
        by = frequencies**f, shear.power(metric, m)
        errors = {name: weighted_error(table, result, *by) for name, result in products.items()}
        assert min(errors, key=errors.__getitem__) == start


@pytest.mark.parametrize(("mix", "start"), [(1.0, "frequency"), (0.0, "activation")])
def test_mix_at_0_and_1_equals_the_pure_starts(mix, start, tiny_whisper, context):
    one = shear.apply(tiny_whisper, replace(SHEAR, start="mix", mix=mix), context)
    assert same_tensors(one, shear.apply(tiny_whisper, replace(SHEAR, start=start), context))


def test_token_frequencies_count_decoder_inputs(tiny_whisper, context):
    result = shear.token_frequencies(tiny_whisper, context, 1e-6)
    begin = tiny_whisper.config.decoder_start_token_id
    assert result.min().item() == pytest.approx(1e-6)
    assert result[tiny_whisper.config.eos_token_id].item() == pytest.approx(1e-6)
    spoken = [
        context.processor.tokenizer(" " + c.text, add_special_tokens=False).input_ids
        for c in context.train
    ]
    total = sum(4 + len(ids) for ids in spoken)
    assert result[begin].item() == pytest.approx(len(context.train) / total)


def test_the_second_moment_uses_the_last_decoder_states(tiny_whisper, context):
    result = shear.second_moment(tiny_whisper, SHEAR, context)
    batch = next(shear.batches(context.train[:2], tiny_whisper, context.processor, 2))
    with torch.no_grad():
        decoded = tiny_whisper.model(
            batch.input_features, decoder_input_ids=batch.decoder_input_ids
        )
    states = decoded.last_hidden_state[batch.labels != -100].double()
    expected = states.T @ states / len(states)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert torch.linalg.eigvalsh(result).min() > 0


# ----------------------------------------------------------------------------- feature distillation


def test_the_feature_distance_agrees_with_numpy(rng):
    a, b = (rng.standard_normal((5, 7)) for _ in range(2))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = np.abs(a - b).mean(axis=1) + np.log(1 + np.exp(-cosine))
    result = feature_distance(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4)


def test_equal_features_have_the_smallest_distance(rng):
    a = torch.from_numpy(rng.standard_normal((5, 7)))
    nearest = float(np.log(1 + np.exp(-1)))
    torch.testing.assert_close(feature_distance(a, a), torch.full((5,), nearest), rtol=0, atol=1e-5)
    assert (feature_distance(a, a + 0.1) > nearest).all()


@pytest.fixture
def sheared(make_whisper, context):
    """A factorised model and its dense original."""
    teacher = make_whisper()
    return shear.apply(teacher, SHEAR, context), teacher


def term_of(student, teacher, batch, options, steps=10, done=0):
    with shear.captured_states(student.proj_out) as captured, shear.step_counter(student):
        student.shear_steps += done
        outputs = student(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
        distillation = shear.Distillation(teacher, captured, options, steps)
        return distillation.term(student, batch, outputs)


def test_the_loss_term_is_the_papers(sheared):
    student, teacher = sheared
    batch = a_batch(student)
    batch.labels[0, 5] = -100  # clips of unequal length
    factors, dense = student.model.decoder.embed_tokens, teacher.model.decoder.embed_tokens.weight
    product = factors.rows.weight @ factors.up.weight.T
    states = shear.states_of(teacher, batch)
    labelled = batch.labels != -100
    inputs = outputs = torch.zeros(())
    for clip, length in enumerate((5, 4)):
        ids = batch.decoder_input_ids[clip, :length]
        share = labelled[clip].sum() / labelled.sum()
        inputs = inputs + share * feature_distance(dense[ids], product[ids]).mean()
        h = states[clip][labelled[clip]]
        outputs = outputs + share * feature_distance(h @ dense.T, h @ product.T).mean()
    options = replace(SHEAR, input_weight=0.7, logit_weight=1.3)
    result = term_of(student, teacher, batch, options)
    torch.testing.assert_close(result, 0.7 * inputs + 1.3 * outputs, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_split_batch_adds_up(sheared):
    student, teacher = sheared
    batch = a_batch(student)
    options = replace(SHEAR, states="student")
    whole = term_of(student, teacher, batch, options)
    labelled = (batch.labels != -100).sum(dim=1)
    parts = torch.zeros(())
    for i in range(2):
        one = Batch(
            *(x[i : i + 1] for x in (batch.input_features, batch.decoder_input_ids, batch.labels))
        )
        parts = parts + labelled[i] / labelled.sum() * term_of(student, teacher, one, options)
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
        result = term_of(student, teacher, batch, options, done=done).item()
        assert result == pytest.approx(by[states], rel=1e-6)


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


def test_training_removes_its_hooks_and_counters(make_whisper, context):
    model = make_whisper()
    before = copy.deepcopy(model)
    student = shear.apply(model, replace(SHEAR, training=BRIEF), context)
    start = shear.apply(model, SHEAR, replace(context, record={}))
    assert same_tensors(model, before)
    assert student.state_dict().keys() == start.state_dict().keys()
    assert not student.proj_out._forward_pre_hooks
    for name in ("rows.weight", "up.weight"):
        name = f"{shear.TABLE}.{name}"
        assert not torch.equal(student.state_dict()[name], start.state_dict()[name])
    assert context.record["shear"]["training"]["steps"] == 2


# -------------------------------------------------------------------------------- factorised models


def test_macs_of_the_head_are_those_of_the_factors():
    dense, final = (macs(base(3, **more))["decoder_per_token"] for more in ({}, {"token_rank": 96}))
    head = 51865 * 96 + 96 * 512
    assert head / 1e6 == pytest.approx(5.03, abs=0.005)
    assert dense - final == 51865 * 512 - head - 96 * 512  # a look-up also multiplies


def test_a_factorised_model_shrinks_and_a_shrunk_one_is_factorised(tiny_whisper, context):
    one = shrink.apply(
        shear.apply(copy.deepcopy(tiny_whisper), SHEAR, context), shrink.Options(), context
    )
    slim = without_units(tiny_whisper, 1, 3)
    other = shear.apply(slim, SHEAR, context)
    for model in (one, other):
        assert model.config.edgewhisper["token_rank"] == 8
        assert len(model.config.edgewhisper["decoder"]) == 2
        assert layer_shapes(model) == model.config.edgewhisper
    assert other.config.edgewhisper["decoder"][1]["ffn"] == 45
    assert context.record["shrink"]["parameters"]["before"]["token_table"] == 8 * (783 + 32)


def test_a_copy_of_a_factorised_model_has_factors_of_its_own(sheared):
    student, _ = sheared
    twin = copy.deepcopy(student)
    assert twin.proj_out.table is twin.model.decoder.embed_tokens
    assert twin.proj_out.table is not student.model.decoder.embed_tokens


def test_a_factorised_model_runs_in_a_transformers_pipeline(sheared, processor, rng):
    from transformers import pipeline

    recogniser = pipeline(
        "automatic-speech-recognition",
        model=sheared[0],
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    assert isinstance(recogniser(rng.standard_normal(8000).astype(np.float32))["text"], str)


def test_a_table_is_factorised_once_and_within_its_rank(sheared, tiny_whisper, context):
    with pytest.raises(Problem, match="already factorised, with rank 8"):
        shear.apply(sheared[0], SHEAR, context)
    with pytest.raises(
        Problem, match="rank 33 exceeds the highest rank 32 of a table of 783 tokens by 32"
    ) as problem:
        shear.apply(tiny_whisper, replace(SHEAR, rank=33), context)
    assert "set rank to 8" in problem.value.hint


def test_factors_that_save_nothing_are_refused(make_whisper, context, rng):
    model = make_whisper(d_model=16 * int(rng.integers(1, 5)))
    tokens, width = model.model.decoder.embed_tokens.weight.shape
    highest = (tokens * width - 1) // (tokens + width)
    with pytest.raises(Problem, match=f"shear: two factors of rank {highest + 1} have") as error:
        shear.apply(model, replace(SHEAR, rank=highest + 1), context)
    assert f"the token table has {tokens * width:,}; this saves nothing" in str(error.value)
    small = shear.apply(model, replace(SHEAR, rank=highest), context)
    assert count_parameters(small)["token_table"] < tokens * width


@pytest.mark.parametrize("theta", [0.999999, 1.0])
def test_a_table_that_theta_would_enlarge_does_not_change(theta, make_whisper, context):
    model = make_whisper(d_model=48)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = replace(SHEAR, theta=theta, training=BRIEF)
    result = shear.apply(model, options, context)
    record = context.record["shear"]
    assert record["kept_dense"] == {"rank_needed": 48, "parameters_of_factors": 48 * (783 + 48)}
    assert (
        record["parameters"]["before"] == record["parameters"]["after"] == count_parameters(result)
    )
    assert record["rank"] is None and not hasattr(result.config, "edgewhisper")
    assert all(torch.equal(before[name], t) for name, t in result.state_dict().items())


@pytest.mark.parametrize("rank", [0, -1, 33, 2.5, "8", True, None])
def test_an_invalid_rank_in_a_checkpoint_is_refused(rank, sheared, processor, tmp_path):
    whisper.save(sheared[0], processor, tmp_path / "out", {})
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["edgewhisper"]["token_rank"] = rank
    path.write_text(json.dumps(config))
    with pytest.raises(Problem, match=r"token_rank is .*; it must be between 1 and 32"):
        whisper.load(tmp_path / "out")


def test_a_rank_that_differs_from_the_weights_is_refused(sheared, processor, tmp_path):
    whisper.save(sheared[0], processor, tmp_path / "out", {})
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["edgewhisper"]["token_rank"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(Problem, match=r"wrong shape for 2 tensor.*embed_tokens.rows.weight"):
        whisper.load(tmp_path / "out")


# ------------------------------------------------------------------------------------------ in ONNX


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
    make_whisper, context, processor, rng, tmp_path
):
    """The torch model has the quantised factors, so that only activations differ."""
    model = shear.apply(make_whisper(d_model=64), replace(SHEAR, rank=16), context)
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
    result = session.run(None, {"ids": ids, "x": x})
    with torch.no_grad():
        expected = (
            factors(torch.from_numpy(ids)).numpy(),
            factors.logits(torch.from_numpy(x)).numpy(),
        )
    np.testing.assert_allclose(result[0], expected[0], atol=1e-5)
    assert np.abs(result[1] - expected[1]).max() < 0.05 * np.abs(expected[1]).max()


def test_an_untied_output_layer_is_refused(sheared, processor, tmp_path):
    student = sheared[0]
    student.proj_out = whisper.TiedOutput(copy.deepcopy(student.model.decoder.embed_tokens))
    with pytest.raises(Problem, match="differs from its token table"):
        export_onnx(student, processor, tmp_path / "out")
