"""Method `short`: the lengths that it draws, its loss, and what it trains."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from short_windows import SAMPLES, WINDOWS, clips_of_all_windows, with_windows

from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import score
from devices.runner.decode.loops import loop_period
from edgewhisper import decoding, pipeline, whisper
from edgewhisper.compress import short
from edgewhisper.compress.context import Context
from edgewhisper.compress.short import Lengths, Options, drawn_length, windows_for
from edgewhisper.compress.teacher import Teacher
from edgewhisper.examples import Examples
from edgewhisper.recipe import parse
from edgewhisper.shipped import SPEECH
from edgewhisper.training import Training
from export.artifact import read_manifest as read_artifact
from export.problem import Problem
from export.shrink import windows_of


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return clips_of_all_windows(clips)


BRIEF = Training(steps=2, batch_size=3, learning_rate=1e-3)
NOTHING = Training(steps=0)


@pytest.fixture
def context(processor, few, tmp_path, seed) -> Context:
    return Context(processor=processor, train=few, dev=few, run_dir=tmp_path / "run", seed=seed)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_zero_steps_record_the_windows_and_change_nothing(tiny_whisper, context):
    before = weights(tiny_whisper)
    model = short.apply(tiny_whisper, Options(training=NOTHING), context)
    assert same_bits(weights(model), before)
    assert windows_of(model.config) == WINDOWS
    assert context.record["short"]["windows_s"] == pytest.approx([2.0, 4.0, 6.0])
    assert context.record["short"]["macs"].keys() == {"100", "200", "300"}
    assert model.config.output_hidden_states is False


@pytest.mark.parametrize("lengths", ["windows", "jitter"])
def test_at_the_full_window_the_student_equals_the_teacher_and_does_not_change(
    lengths, tiny_whisper, context
):
    """With n = N, (2) and all gradients are zero."""
    before = weights(tiny_whisper)
    options = Options(windows_s=(6.0,), lengths=lengths, margin=300, reach=0)
    model = short.apply(tiny_whisper, replace(options, training=BRIEF), context)
    assert context.record["short"]["training"]["last_loss"] == 0
    assert same_bits(weights(model), before)
    assert not hasattr(model.config, "edgewhisper")


def test_training_brings_short_windows_closer_to_the_full_one(
    tiny_whisper, context, few, processor
):
    teacher = copy.deepcopy(tiny_whisper)
    whisper.set_windows(tiny_whisper.config, WINDOWS)

    @torch.no_grad()
    def distance(model) -> float:
        batch = Examples(few, model, processor, seed=0)[[0]]
        outputs = model(
            batch.whole_features[..., :200],
            decoder_input_ids=batch.decoder_input_ids,
            output_hidden_states=True,
        ).decoder_hidden_states
        expected = short.full_outputs(Teacher(teacher), batch).decoder_hidden_states
        return float(short.state_distance(expected, outputs).mean())

    before = distance(tiny_whisper)
    training = Training(steps=40, batch_size=2, learning_rate=1e-3)
    context.train = few[:2]
    short.apply(tiny_whisper, Options(lengths="windows", training=training), context)
    assert distance(tiny_whisper) < 0.7 * before


def test_the_published_values_are_the_defaults():
    options = Options()
    assert (options.lengths, options.reach, options.margin, options.full_share) == (
        "jitter",
        64,
        0,
        0.0,
    )
    assert (options.kl, options.ce) == (0.0, 0.0)
    training = options.training
    assert (training.learning_rate, training.batch_size, training.epochs) == (1e-6, 1, 8)
    assert (training.schedule, training.warmup, training.clip_norm) == ("constant", 0, np.inf)


def test_the_distance_of_small_states_by_hand():
    """Two states, tokens and features; squared errors 0, 4 and 1, 1, then 0, 0 and 9, 1."""
    expected = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    result = [torch.tensor([[[0.0, 2], [1, -1]]]), torch.tensor([[[1.0, 1], [4, 0]]])]
    assert short.state_distance(expected, result).tolist() == [[(2 + 0) / 2, (1 + 5) / 2]]


def test_the_loss_of_one_clip_is_the_published_one(short_whisper, processor, few, rng):
    """The published loss is the mean squared error over all hidden states in one tensor."""
    teacher, student = short_whisper, copy.deepcopy(short_whisper).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = Examples(few, student, processor, seed=0, window=lambda number, needed: 57)[[0]]
    assert batch.input_features.shape[2] == 114
    ids = batch.decoder_input_ids
    outputs = student(batch.input_features, decoder_input_ids=ids, output_hidden_states=True)
    expected = teacher(batch.whole_features, decoder_input_ids=ids, output_hidden_states=True)
    pair = (torch.cat(x.decoder_hidden_states) for x in (outputs, expected))
    published = torch.nn.functional.mse_loss(*pair)
    term = short.distillation(teacher, Options())(student, batch, outputs)
    result = term + torch.nn.functional.cross_entropy(outputs.logits[0], batch.labels[0])
    assert result.item() == pytest.approx(published.item(), rel=1e-4)


def test_ce_is_the_weight_of_the_cross_entropy(short_whisper, processor, few):
    batch = Examples(few, short_whisper, processor, seed=0)[[0]]
    outputs = short_whisper(
        batch.input_features, decoder_input_ids=batch.decoder_input_ids, output_hidden_states=True
    )
    terms = [
        short.distillation(short_whisper, Options(ce=ce))(short_whisper, batch, outputs).item()
        for ce in (0.0, 1.0, 3.0)
    ]
    entropy = torch.nn.functional.cross_entropy(outputs.logits[0], batch.labels[0]).item()
    assert terms[1] - terms[0] == pytest.approx(entropy, rel=1e-3)
    assert terms[2] - terms[0] == pytest.approx(3 * entropy, rel=1e-3)


@pytest.mark.parametrize("needed", [1, 2, 3, 50, 191, 200, 1000, 1490, 1500])
def test_lengths_are_drawn_around_the_end_of_the_clip(needed, rng):
    """(1): u is uniform over [-m, m), m = min(64, n / 3), and n is at most N."""
    m = min(64, needed // 3)
    drawn = {drawn_length(needed, 64, 1500, rng) for _ in range(3000)}
    expected = {min(needed + u, 1500) for u in range(-m, m)} or {needed}
    assert drawn <= expected
    assert {min(expected), max(expected)} <= drawn or m > 50
    assert len(drawn) > 0.9 * len(expected)


def test_lengths_depend_only_on_the_seed_and_the_step(seed):
    options = Options(full_share=0.3)
    one, other = (Lengths(options, (100, 200, 300), seed) for _ in range(2))
    assert [one(s, 80) for s in range(50)] == [other(s, 80) for s in range(50)]
    assert len({one(s, 80) for s in range(50)}) > 10
    full = sum(one(s, 80) == 300 for s in range(1000))
    assert 200 < full < 400
    assert [one(s, 80) for s in range(50)] != [
        Lengths(options, (100, 200, 300), seed + 1)(s, 80) for s in range(50)
    ]


def test_windows_never_cut_speech(seed):
    """The margin is ignored."""
    rule = Lengths(Options(lengths="windows", margin=5), (100, 200, 300), seed)
    needed = (1, 95, 96, 100, 101, 200, 201, 300)
    assert [rule(0, n) for n in needed] == [100, 100, 100, 100, 200, 200, 300, 300]


def test_the_margin_is_added_after_the_clip(seed):
    rule = Lengths(Options(reach=0, margin=5), (100, 200, 300), seed)
    assert [rule(0, needed) for needed in (1, 95, 298, 300)] == [6, 100, 300, 300]


def test_training_uses_the_windows_that_decoding_uses(
    short_whisper, processor, seed, rng, tmp_path
):
    """Clips have random lengths, and lengths within one sample of a window."""
    borders = [w * SAMPLES + extra for w in WINDOWS[:2] for extra in (-1, 0, 1)]
    lengths = [*borders, *rng.integers(1600, 300 * SAMPLES, size=10).tolist()]
    for number, samples in enumerate(lengths):
        soundfile.write(tmp_path / f"{number}.wav", np.full(samples, 0.1), 16000)
    drawn = [Clip(tmp_path / f"{n}.wav", "one", "en") for n in range(len(lengths))]
    rule = Lengths(Options(lengths="windows", margin=int(rng.integers(64))), tuple(WINDOWS), seed)
    examples = Examples(drawn, short_whisper, processor, seed, window=rule)
    decoded = {}
    for indices, features in decoding.batches(
        short_whisper, processor, [clip.pcm() for clip in drawn], 4
    ):
        decoded |= dict.fromkeys(indices, features.shape[-1] // 2)
    for position in range(len(drawn)):
        assert examples.window(position) == decoded[examples.index(position)]


@pytest.mark.parametrize(
    ("seconds", "full", "windows"),
    [
        ((), 1500, [500, 1000, 1500]),
        ((), 300, [100, 200, 300]),
        ((), 2, [1, 2]),
        ((5.0, 10.0), 1500, [250, 500, 1500]),
        ((10.0, 30.0), 1500, [500, 1500]),
        ((0.02,), 300, [1, 300]),
    ],
)
def test_windows_are_named_in_seconds(seconds, full, windows):
    assert windows_for(seconds, full, 0.02) == windows


@pytest.mark.parametrize(
    "seconds", [(4.0, 2.0), (2.0, 2.0), (0.0, 2.0), (-1.0,), (6.1,), (np.inf,), (np.nan,)]
)
def test_invalid_windows_are_refused(seconds, tiny_whisper, context):
    with pytest.raises(Problem, match=r"short: windows_s is .* ascending and between 0.02") as e:
        short.apply(tiny_whisper, Options(windows_s=seconds), context)
    assert "windows_s = [2, 4]" in e.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windows_s = 5.0", "windows_s: 5.0 is not a list"),
        ('windows_s = [5.0, "ten"]', "windows_s: 'ten' is not a number"),
        ("full_share = 1.5", "full_share: 1.5 is not between 0 and 1"),
        ('lengths = "random"', "lengths: 'random' is not one of 'jitter', 'windows'"),
    ],
)
def test_a_recipe_with_invalid_options_is_refused(text, message):
    with pytest.raises(Problem) as caught:
        parse("mine", f'[[step]]\nmethod = "short"\n{text}\n')
    assert message in str(caught.value)


def test_a_recipe_lists_windows_in_seconds():
    step = parse("mine", '[[step]]\nmethod = "short"\nwindows_s = [5, 10.0]\n').steps[0]
    assert step.options.windows_s == (5.0, 10.0)


def test_accumulated_passes_equal_one_step(tiny_whisper, processor, clips, tmp_path, seed):
    eight = read_manifest(clips)[:8]
    options = Options(full_share=0.3, kl=0.5, ce=0.2, training=Training(steps=3, batch_size=4))
    results = []
    for passes in (1, 2):
        model = copy.deepcopy(tiny_whisper)
        training = replace(options.training, accumulate=passes, learning_rate=1e-3)
        run = Context(processor, eight, eight, tmp_path / str(passes), seed)
        short.apply(model, replace(options, training=training), run)
        results.append(weights(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-4)


def test_other_methods_keep_the_windows(tiny_whisper, context):
    """TSPAR, removal and a low-rank encoder keep the windows of a model."""
    from edgewhisper.compress import lite, shrink, tspar

    model = short.apply(tiny_whisper, Options(training=BRIEF), context)
    pruned = tspar.Options(
        layers="*.fc2", c2=0.0, search=False, evaluations=1, training=replace(BRIEF, steps=1)
    )
    model = tspar.apply(model, pruned, replace(context, run_dir=context.run_dir / "tspar"))
    model = shrink.apply(model, shrink.Options(), context)
    model = lite.apply(model, lite.Options(), replace(context, run_dir=context.run_dir / "lite"))
    assert windows_of(model.config) == WINDOWS
    again = replace(context, run_dir=context.run_dir / "again")
    model = short.apply(model, Options(windows_s=(3.0,), training=BRIEF), again)
    assert windows_of(model.config) == [150, 300]


def test_a_trained_model_survives_export_and_its_gate(digits, context, few, clips, tmp_path):
    """On the embedded model: train, save, export in fp32, and compare tokens in the gate."""
    model = short.apply(whisper.load(digits), Options(training=BRIEF), context)
    whisper.save(model, context.processor, tmp_path / "trained", {})
    manifest_file = tmp_path / "few.jsonl"
    lines = clips.read_text().splitlines()
    absolute = [json.loads(lines[i]) for i in (0, 2, 4, 5)]
    for entry in absolute:
        entry["audio"] = str(clips.parent / entry["audio"])
    manifest_file.write_text("\n".join(map(json.dumps, absolute)) + "\n")
    place = pipeline.export(str(tmp_path / "trained"), "fp32", manifest_file, tmp_path / "out")
    manifest = read_artifact(place)
    assert manifest["audio"]["windows_samples"] == [32000, 64000, 96000]
    assert manifest["gate"]["identical_tokens"] == 1
    assert manifest["gate"]["max_logits_error"] < 1e-3
    assert set(manifest["macs_by_window"]) == {"100", "200", "300"}
    assert manifest["macs_by_window"]["300"] == manifest["macs"]


@pytest.mark.slow
def test_trained_short_windows_lose_less_than_one_point_and_do_not_loop(
    digits, processor, tmp_path
):
    """On the embedded model, which loses more than that before it is taught. 346 words: a point is
    three of them."""
    judged = [clip for part in ("test", "dev") for clip in read_manifest(SPEECH / f"{part}.jsonl")]
    pcms = [clip.pcm() for clip in judged]

    def wer(model) -> float:
        tokens = decoding.greedy(model, processor, pcms)
        assert not any(map(loop_period, tokens))
        assert max(map(len, tokens)) < model.config.max_target_positions - 4
        texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return score([clip.text for clip in judged], texts, "whisper-basic").wer

    model = whisper.load(digits)
    full = wer(model)
    assert wer(with_windows(model)) > full + 0.01
    training = Training(steps=40, batch_size=8, learning_rate=1e-4, warmup=0.1)
    options = Options(lengths="windows", full_share=0.2, kl=1.0, training=training)
    context = Context(
        processor, read_manifest(SPEECH / "train.jsonl"), [], tmp_path / "run", seed=0
    )
    model = short.apply(whisper.load(digits), options, context)
    assert windows_of(model.config) == WINDOWS
    assert wer(model) < wer(with_windows(model, [300])) + 0.01
