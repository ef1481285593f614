"""Whisper-KDQ: distances, matching, guidance, training, and export."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from exported import irregular
from scipy.special import log_softmax, softmax
from small_whisper import whisper_without_weights
from stored_weights import same_bits, stored_rows

from devices.runner.recognizer import Recognizer
from edgewhisper import decoding, whisper
from edgewhisper.compress import kdq, qat
from edgewhisper.compress.context import Context
from edgewhisper.compress.kdq import (
    Lesson,
    Options,
    Precision,
    distillation,
    distilling,
    enabled,
    imitating,
    published_bytes,
    ready,
)
from edgewhisper.compress.layer_matching import (
    fc1_weight,
    feature_distance,
    hidden_of,
    limit,
    monotone,
    nolimit,
    rows_of,
    static,
    weight_distance,
)
from edgewhisper.compress.teacher import check_teacher, check_vocabulary, divergence
from edgewhisper.examples import Batch
from edgewhisper.recipe import load_recipe
from edgewhisper.training import Training, cross_entropy, train
from edgewhisper.whisper import GatherLinear, linears
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.quantise import Scheme, fake_quantise, schemes
from export.shrink import layer_shapes

NONE = Training(steps=0)
BRIEF = Training(steps=3, batch_size=2, learning_rate=1e-3)
FLOAT = Precision(encoder=32, decoder=32, token_table=32)
GUIDED = pytest.mark.parametrize("guided", ["KD", "KDQ"])
FEATURES = pytest.mark.parametrize("features", ["softmax", "normalised"])


@pytest.fixture
def batch(rng) -> Batch:
    labels = torch.tensor([[-100, 5, 6, 7, 8], [-100, 9, 10, -100, -100]])
    return Batch(torch.randn(2, 80, 600), labels.clamp_min(0), labels)


@pytest.fixture
def teacher(make_whisper, processor, tmp_path) -> str:
    """A larger teacher: wider, with twice the decoder layers."""
    model = make_whisper(d_model=48, ffn=80, decoder_layers=4, encoder_layers=3)
    whisper.save(model, processor, tmp_path / "teacher", {})
    return str(tmp_path / "teacher")


def draw(rng, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


# --------------------------------------------------------------------------- distances, (1) (2) (5)


def test_distances_of_small_features_by_hand():
    one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log1p()
    # softmax: (1/2, 1/2) and (1/5, 4/5)
    counts = torch.tensor([1.0])
    assert feature_distance(one, other, counts, "softmax", 1.0).item() == pytest.approx(0.18)
    assert weight_distance(one, other, "softmax", 1.0).item() == pytest.approx(0.6)
    at_two = feature_distance(2 * one, 2 * other, counts, "softmax", 2.0)
    assert at_two.item() == pytest.approx(4 * 0.18)
    ours = "normalised", 1.0
    assert feature_distance(-other, other, counts, *ours).item() == pytest.approx(4, rel=1e-3)
    assert weight_distance(-other, other, *ours).item() == pytest.approx(2, rel=1e-3)


@FEATURES
def test_distances_agree_with_numpy(features, rng):
    n, f = (int(x) for x in rng.integers(1, 30, size=2))
    temperature = float(rng.uniform(0.3, 4))
    form = features, temperature
    one, other = draw(rng, n, f), draw(rng, n, f)
    counts = torch.from_numpy(rng.dirichlet(np.ones(n))).float()
    a, b = one.double().numpy(), other.double().numpy()
    if features == "softmax":
        off = softmax(a / temperature, -1) - softmax(b / temperature, -1)
        square, absolute = (temperature**2 * x.sum(-1) for x in (off**2, np.abs(off)))
        whole = absolute.sum()
    else:
        off = normalised(a) - normalised(b)
        square, whole = (off**2).mean(-1), np.abs(off).mean()
    result = feature_distance(one, other, counts, *form)
    assert result.item() == pytest.approx((counts.numpy() * square).sum(), rel=1e-3, abs=1e-6)
    assert weight_distance(one, other, *form).item() == pytest.approx(whole, rel=1e-3, abs=1e-6)


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_the_divergence_agrees_with_numpy(rng):
    temperature = float(rng.uniform(0.3, 4))
    theirs, ours = draw(rng, 7, 11), draw(rng, 7, 11)
    p, q = (log_softmax(z.double().numpy() / temperature, -1) for z in (theirs, ours))
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert divergence(theirs, ours, temperature).item() == pytest.approx(expected, rel=1e-4)
    assert divergence(ours, ours, temperature).item() == pytest.approx(0, abs=1e-6)


def test_rounding_loss_of_a_small_layer_by_hand():
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, 1.25, -2.5]]))  # rounded: 127, 1, -2
    lost = kdq.rounding_loss({layer: Scheme(8)})
    assert lost.item() == pytest.approx(0.75 / 130.75)
    assert kdq.rounding_loss({}).item() == 0


# ------------------------------------------------------------------------------------ matching, (4)


@pytest.fixture
def cost(rng) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(size=tuple(rng.integers(1, 7, size=2))))


def price(cost: torch.Tensor, matches: list[int]) -> float:
    return float(cost[range(len(matches)), matches].sum())


def test_monotone_finds_the_best_of_all_monotone_matches(cost):
    layers, count = cost.shape
    every = itertools.combinations_with_replacement(range(count), layers)
    assert price(cost, monotone(cost)) == pytest.approx(min(price(cost, list(m)) for m in every))


def test_limited_matches_are_monotone_and_cost_more_than_free_ones(cost):
    for match in (limit, monotone, static):
        result = match(cost)
        assert result == sorted(result) and len(result) == len(cost)
        assert set(result) <= set(range(cost.shape[1]))
    free, best, greedy = (price(cost, m(cost)) for m in (nolimit, monotone, limit))
    assert free <= best + 1e-12 and best <= greedy + 1e-12
    assert best <= price(cost, static(cost)) + 1e-12


def test_greedy_matching_is_stuck_after_the_last_layer_is_matched():
    cost = torch.tensor([[0.5, 0.6, 0.4], [0.1, 0.2, 0.9], [0.1, 0.1, 0.9]])
    assert limit(cost) == [2, 2, 2]
    assert monotone(cost) == [0, 0, 0]
    assert nolimit(cost) == [2, 0, 0]
    assert price(cost, limit(cost)) > price(cost, static(cost))


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (3, 3, [0, 1, 2]),
        (1, 4, [3]),
        (4, 2, [0, 0, 0, 1]),
    ],
)
def test_static_matches_are_evenly_spaced_and_end_together(layers, count, expected):
    assert static(torch.zeros(layers, count)) == expected


# ------------------------------------------------------------------------------- inputs of the loss


def lesson_of(model, teacher, options):
    """A Lesson without activations."""
    return Lesson(teacher, model, {}, {}, schemes(model), options)


def loss_of(model, teacher, batch, options, context):
    """Return (3) minus the cross entropy, the outputs, and the distiller."""
    with (
        distilling(model, teacher, options, context) as distiller,
        hidden_of(model, kdq.sides(options)) as ours,
        hidden_of(teacher, kdq.sides(options)) as theirs,
    ):
        lesson = Lesson(teacher, model, ours, theirs, schemes(model), options)
        outputs = model(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
        return distillation(lesson)(model, batch, outputs), outputs, distiller


@pytest.mark.parametrize("encoder", [False, True], ids=["decoder", "both"])
@pytest.mark.parametrize("matching", ["limit", "nolimit", "dp", "static"])
@GUIDED
@FEATURES
def test_the_loss_is_zero_if_student_and_teacher_are_equal(
    features, guided, matching, encoder, make_whisper, batch, context
):
    model = make_whisper(decoder_layers=3)
    options = Options(
        features=features, guided_mode=guided, matching=matching, encoder=encoder, alpha=0.7
    )
    loss, outputs, distiller = loss_of(model, copy.deepcopy(model), batch, options, context)
    expected = -0.7 * cross_entropy(outputs.logits, batch.labels)  # K and all D are zero
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distiller.decoder_matches.tolist() == [0, 1, 2]
    assert distiller.decoder_losses.abs().max() < 1e-6
    assert not encoder or distiller.encoder_matches.tolist() == [0, 1]


def test_hidden_features_are_causal_activations_of_the_forward_pass(tiny_whisper, batch):
    layer = tiny_whisper.model.decoder.layers[1]
    outputs = []
    hook = layer.final_layer_norm.register_forward_hook(lambda m, a, output: outputs.append(output))
    with torch.no_grad(), hidden_of(tiny_whisper, ["decoder"]) as hidden:
        ids = batch.decoder_input_ids.clone()
        tiny_whisper(batch.input_features, decoder_input_ids=ids)
        first = hidden["decoder"][1]
        ids[:, 3:] += 20
        tiny_whisper(batch.input_features, decoder_input_ids=ids)
    hook.remove()
    torch.testing.assert_close(first, torch.nn.functional.gelu(layer.fc1(outputs[0])))
    assert torch.equal(first[:, :3], hidden["decoder"][1][:, :3])
    assert not torch.equal(first[:, 3:], hidden["decoder"][1][:, 3:])


def test_rows_are_weighted_by_labelled_tokens(batch):
    hidden = torch.randn(2, 5, 4)
    rows, counts = rows_of(hidden, batch.labels, "decoder")
    assert torch.equal(rows, torch.cat([hidden[0, 1:], hidden[1, 1:3]]))
    assert counts.tolist() == pytest.approx([1 / 6] * 6)
    rows, counts = rows_of(hidden, batch.labels, "encoder")
    assert torch.equal(rows, hidden.flatten(0, 1))
    assert counts.tolist() == pytest.approx([4 / 6 / 5] * 5 + [2 / 6 / 5] * 5)


@GUIDED
def test_splitting_a_batch_does_not_change_the_loss(guided, make_whisper, batch, context):
    """Each part counts by its tokens, as in the training loop.

    Matches are static, because the others are chosen separately for every part.
    """
    options = Options(matching="static", encoder=True, guided_mode=guided)
    model, teacher = make_whisper(), make_whisper(decoder_layers=4)
    whole, _, _ = loss_of(model, teacher, batch, options, context)
    parts = []
    for clip, share in ((0, 4 / 6), (1, 2 / 6)):
        tensors = (batch.input_features, batch.decoder_input_ids, batch.labels)
        part = Batch(*(tensor[clip : clip + 1] for tensor in tensors))
        parts.append(share * loss_of(model, teacher, part, options, context)[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)


def test_only_the_matched_terms_have_gradients(make_whisper, batch, context):
    """(3) computed directly from the matched pairs."""
    model, teacher = make_whisper(), make_whisper(decoder_layers=3, ffn=40)
    options = Options(alpha=1.0)
    loss, _, distiller = loss_of(model, teacher, batch, options, context)
    labelled = batch.labels != -100
    with (
        hidden_of(model, kdq.sides(options)) as ours,
        hidden_of(teacher, kdq.sides(options)) as theirs,
    ):
        again = model(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
        with torch.no_grad():
            target = teacher(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
    (adapter,) = distiller.adapters.values()
    pairs = [
        (
            ours["decoder"][i][labelled].softmax(-1)
            - adapter(theirs["decoder"][j][labelled]).softmax(-1)
        )
        for i, j in enumerate(distiller.decoder_matches.tolist())
    ]
    by_hand = sum(pair.square().sum(-1).mean() for pair in pairs) / 2
    by_hand = by_hand + divergence(target.logits[labelled], again.logits[labelled], 1.0)
    by_hand = by_hand - cross_entropy(again.logits, batch.labels)
    torch.testing.assert_close(loss, by_hand)
    weights = [layer.fc1.weight for layer in model.model.decoder.layers]
    result, expected = (torch.autograd.grad(x, weights) for x in (loss, by_hand))
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_fc1_weight_is_dense_for_slim_and_low_rank_layers(make_whisper, rng):
    model = irregular(make_whisper, rng)
    whisper_layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    layer = whisper_layers[0]
    layer.fc1 = whisper.LowRank(gathered(layer.fc1, rng), torch.nn.Linear(3, 7))
    for layer in whisper_layers:
        x = torch.randn(4, layer.embed_dim)
        bias = getattr(layer.fc1, "up", layer.fc1).bias
        torch.testing.assert_close(layer.fc1(x), x @ fc1_weight(layer).T + bias)


def gathered(dense, rng) -> GatherLinear:
    inputs = torch.from_numpy(np.sort(rng.permutation(32)[:9]))
    made = GatherLinear(9, 3, bias=False)
    made.inputs.copy_(inputs)
    return made


# ----------------------------------------------------------------------------------------- guidance


def test_layers_with_the_largest_rounding_loss_are_distilled(make_whisper, batch, context):
    model, teacher = make_whisper(decoder_layers=4), make_whisper(decoder_layers=4)
    layer = model.model.decoder.layers[2]
    with torch.no_grad():  # with one outlier per row, the other weights get few codes
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:, 0] = 50
    qat.note_bits(model, Precision())
    options = Options(distil_share=0.25, matching="static", alpha=1.0)
    lesson = lesson_of(model, teacher, options)
    assert imitating("decoder", lesson) == [2]
    loss, outputs, distiller = loss_of(model, teacher, batch, options, context)
    by_hand = distiller.decoder_losses[2] / 4 - cross_entropy(outputs.logits, batch.labels)
    with torch.no_grad():
        ids = batch.decoder_input_ids
        expected = teacher(batch.input_features, decoder_input_ids=ids).logits
    labelled = batch.labels != -100
    by_hand = by_hand + divergence(expected[labelled], outputs.logits[labelled], 1.0)
    torch.testing.assert_close(loss, by_hand)
    assert imitating("decoder", replace(lesson, options=Options())) == [0, 1, 2, 3]


def test_the_layers_nearest_to_the_teacher_are_quantised(make_whisper, context):
    model = make_whisper(decoder_layers=4)
    qat.note_bits(model, Precision(encoder=16, decoder=4))
    options = Options(quantise_share=0.5)
    with distilling(model, copy.deepcopy(model), options, context) as distiller:
        quantised = schemes(model)
        decoder = {m for layer in model.model.decoder.layers for m in layer.modules()}
        before = enabled(model, quantised, options)
        assert not decoder & before.keys(), "nothing is known yet"
        assert {m for m in quantised if m not in decoder} == set(before)
        distiller.decoder_losses.copy_(torch.tensor([0.3, 0.1, 0.9, 0.2]))
        assert ready("decoder", model, options) == [1, 3]
        chosen = {m for i in (1, 3) for m in model.model.decoder.layers[i].modules()}
        assert enabled(model, quantised, options).keys() & decoder == quantised.keys() & chosen
        assert ready("decoder", model, Options()) == [0, 1, 2, 3]


def test_layers_that_are_not_ready_are_stored_in_16_bits(make_whisper, context):
    model = make_whisper(decoder_layers=4)
    options = Options(quantise_share=0.5, training=BRIEF, matching="dp")
    model = kdq.apply(model, options, context)
    kept = context.record["kdq"]["quantised"]["decoder"]
    assert len(kept) == 2
    for number, shape in enumerate(model.config.edgewhisper["decoder"]):
        assert set(shape["bits"].values()) == {8 if number in kept else 16}
    for module, scheme in schemes(model).items():
        assert same_bits(fake_quantise(module.weight, scheme), module.weight)


def test_guidance_without_distances_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match=r"quantise_share is 0.5, .* 'logits' does not measure"):
        kdq.apply(tiny_whisper, Options(distill_mode="logits", quantise_share=0.5), context)


# ----------------------------------------------------------------------------------------- the step


def test_without_quantisation_and_training_no_bit_changes(tiny_whisper, context):
    before = copy.deepcopy(tiny_whisper.state_dict())
    after = kdq.apply(tiny_whisper, Options(quantise=FLOAT, training=NONE), context).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_alpha_of_zero_is_plain_fine_tuning(tiny_whisper, context):
    plain = copy.deepcopy(tiny_whisper)
    train(
        plain,
        context.processor,
        context.train,
        BRIEF,
        run_dir=context.run_dir / "plain",
        seed=context.seed,
    )
    options = Options(alpha=0.0, encoder=True, quantise=FLOAT, training=BRIEF)
    model = kdq.apply(tiny_whisper, options, context)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_the_encoder_has_gradients_only_if_it_is_trained(tiny_whisper, teacher, batch, context):
    for encoder in (False, True):
        model = copy.deepcopy(tiny_whisper)
        before = copy.deepcopy(model.model.encoder.state_dict())
        options = Options(encoder=encoder, teacher=teacher, quantise=FLOAT)
        loss, _, _ = loss_of(model, whisper.load(teacher), batch, options, context)
        loss.backward()
        grads = {n: p.grad for n, p in model.model.encoder.named_parameters() if "embed" not in n}
        assert all((grad is not None) == encoder for grad in grads.values())
        assert all(p.grad is not None for p in model.model.decoder.layers.parameters())
        model.zero_grad()
        model = kdq.apply(
            model, replace(options, training=BRIEF), context_in(context, str(encoder))
        )
        moved = [
            name
            for name, tensor in model.model.encoder.state_dict().items()
            if not torch.equal(tensor, before[name])
        ]
        assert bool(moved) == encoder
        assert all(p.requires_grad for p in model.model.encoder.layers.parameters())


def context_in(context: Context, place: str) -> Context:
    return replace(context, run_dir=context.run_dir / place)


@GUIDED
@FEATURES
def test_a_small_student_learns_from_a_large_teacher(
    features, guided, make_whisper, teacher, context, monkeypatch
):
    """Adapters are trained and then removed; the loss falls."""
    model = make_whisper(decoder_layers=2)
    names = set(model.state_dict())
    distillers: list[kdq.Distiller] = []
    make = kdq.Distiller.__init__

    def remember(self, *args):
        make(self, *args)
        distillers.append(self)
        self.before = copy.deepcopy(self.adapters.state_dict())

    monkeypatch.setattr(kdq.Distiller, "__init__", remember)
    options = Options(
        teacher=teacher,
        features=features,
        guided_mode=guided,
        matching="dp",
        training=Training(steps=8, batch_size=2, learning_rate=3e-3),
    )
    model = kdq.apply(model, options, context)
    assert set(model.state_dict()) == names
    after = distillers[0].adapters.state_dict()
    assert all(not torch.equal(after[name], distillers[0].before[name]) for name in after)
    record = context.record["kdq"]
    assert record["training"]["last_loss"] < record["training"]["first_loss"]
    assert record["matches"]["decoder"] == sorted(record["matches"]["decoder"])
    assert record["published_bytes"]["student"] < record["published_bytes"]["teacher, 16 bits"]
    for module, scheme in schemes(model).items():
        assert same_bits(fake_quantise(module.weight, scheme), module.weight)


def test_a_slim_student_learns_too(make_whisper, teacher, context, rng):
    model = irregular(make_whisper, rng)
    model = whisper.rebuild(model, model.state_dict(), layer_shapes(model))
    for guided in ("KD", "KDQ"):
        options = Options(teacher=teacher, guided_mode=guided, encoder=True, training=BRIEF)
        kdq.apply(copy.deepcopy(model), options, context_in(context, guided))
        assert np.isfinite(context.record["kdq"]["training"]["last_loss"])


def test_saving_and_export_keep_the_quantised_weights(
    tiny_whisper, teacher, context, processor, tmp_path
):
    options = Options(teacher=teacher, training=BRIEF, quantise=Precision(encoder=4, stem=8))
    model = kdq.apply(tiny_whisper, options, context)
    whisper.save(model, processor, tmp_path / "student", {})
    again = whisper.load(tmp_path / "student")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    (tmp_path / "artifact").mkdir()
    export_onnx(again, processor, tmp_path / "artifact", "int8")
    rows = stored_rows(*(tmp_path / f"artifact/{n}.onnx" for n in ("encoder", "decoder")))
    for name, module in linears(model):
        expected = "MatMulNBits" if ".encoder." in name else "int8"
        for row in module.weight.detach():
            assert expected in rows[(row + 0.0).numpy().tobytes()], name


@pytest.mark.parametrize("name", ["kdq", "digits-kdq"])
def test_the_recipe_has_the_published_values(name):
    (step,) = load_recipe(name).steps
    result = step.options
    assert (result.matching, result.features, result.guided_mode) == ("limit", "softmax", "KD")
    assert (result.alpha, result.temperature, result.training.learning_rate) == (0.9, 1.0, 3e-5)
    assert (result.quantise.encoder, result.quantise.decoder, result.encoder) == (16, 8, False)


# ----------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 51865, "has 51865 tokens, the student 783"),
        ("num_mel_bins", 128, "has 128 mel bins, the student 80"),
        ("max_source_positions", 1500, "has 1500 encoder positions, the student 300"),
        ("max_target_positions", 8, "reads at most 8 text tokens, the student 64"),
    ],
)
def test_the_error_for_a_mismatched_teacher_has_both_numbers(key, value, message, tiny_whisper):
    other = copy.deepcopy(tiny_whisper)
    setattr(other.config, key, value)
    with pytest.raises(Problem, match=f"kdq: the teacher big {message}") as problem:
        check_teacher(other, tiny_whisper, "big", "kdq")
    assert problem.value.hint


def test_a_teacher_with_another_vocabulary_is_refused():
    check_vocabulary({"a": 0, "b": 1}, {"b": 1, "a": 0}, "big", "kdq")
    with pytest.raises(Problem, match="of 2 tokens of the teacher and 3 of the student, 3 differ"):
        check_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 2, "c": 1}, "big", "kdq")


def test_a_missing_teacher_is_refused(tiny_whisper, context):
    with pytest.raises(Problem, match="there is no such checkpoint"):
        kdq.apply(tiny_whisper, Options(teacher="./nowhere"), context)


# --------------------------------------------------------------------------------------------- size


def test_sizes_are_those_of_the_paper():
    small = published_bytes(whisper_without_weights(768, 12, 12), 16)
    base, tiny = (
        published_bytes(whisper_without_weights(*size)) for size in ((512, 6, 8), (384, 4, 6))
    )
    assert (small / 1e6, base / 1e6, tiny / 1e6) == pytest.approx((483.5, 93.46, 46.16), abs=0.05)
    assert base / 1e6 == pytest.approx(93.46, abs=0.005)
    assert tiny / 1e6 == pytest.approx(46.16, abs=0.005)
    assert (small / base, small / tiny) == pytest.approx((5.17, 10.47), abs=0.005)


# ------------------------------------------------------------------------------------------- export


def test_the_exported_graph_transcribes_like_the_student(
    tiny_whisper, teacher, context, processor, few, tmp_path
):
    options = Options(teacher=teacher, training=BRIEF, quantise=Precision(encoder=4, stem=8))
    model = kdq.apply(tiny_whisper, options, context)
    whisper.save(model, processor, tmp_path / "student", {})
    again = whisper.load(tmp_path / "student")
    (tmp_path / "artifact").mkdir()
    export_onnx(again, processor, tmp_path / "artifact", "fp32")
    recognizer = Recognizer(tmp_path / "artifact", threads=1, guards=False)
    pcms = [clip.pcm() for clip in few]
    expected = decoding.greedy(again, processor, pcms)
    assert any(expected)
    assert [recognizer.window(pcm) for pcm in pcms] == expected
