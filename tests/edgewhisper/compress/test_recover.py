"""Recovery: the windows that are drawn, the loss, the dense model's texts, and the training."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dead_structure import kill
from gates import run_gate

from benchmarks.gate import EXACT, checkpoint_tokens
from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import decoding, training, whisper
from edgewhisper.compress import recover
from edgewhisper.compress.context import Context
from edgewhisper.compress.recover import (
    DrawnWindows,
    Options,
    SpeechAndMargin,
    relative_error,
    with_random_tokens,
)
from edgewhisper.examples import Examples
from edgewhisper.training import Training
from export.onnx.silence import Silence
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.shrink import shrink, windows_of

NOTHING = Training(steps=0)
WINDOWS = (100, 200, 300)


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    """Clips of 0.9, 1.5, 3.5 and 4.1 s, which need windows of 2, 4 and 6 s."""
    every = read_manifest(clips)
    return [every[i] for i in (0, 2, 4, 5)]


@pytest.fixture
def context(processor, few, tmp_path, seed, tiny_whisper) -> Context:
    dense = copy.deepcopy(tiny_whisper)
    return Context(processor, few, few, tmp_path / "run", seed, dense, dense_texts=True)


@pytest.fixture
def pruned(tiny_whisper, rng):
    """The model with dead structure removed, so that its layers are smaller."""
    shrunk = shrink(kill(tiny_whisper, "all_kinds", rng))
    return whisper.rebuild(tiny_whisper, shrunk.tensors, shrunk.layers)


def brief(steps: int) -> Options:
    training = Training(steps=steps, batch_size=2, learning_rate=1e-3)
    return Options(windows_s=(2.0, 4.0), training=training)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# -------------------------------------------------------------------------------- what it computes


def test_zero_steps_record_the_windows_and_change_nothing(tiny_whisper, context):
    before = copy.deepcopy(tiny_whisper.state_dict())
    model = recover.apply(tiny_whisper, Options(windows_s=(2.0,), training=NOTHING), context)
    assert same_bits(model.state_dict(), before)
    assert windows_of(model.config) == [100, 300]
    assert context.record["recover"]["macs"].keys() == {"100", "300"}


def test_the_dense_model_at_its_full_window_has_no_loss(tiny_whisper, context):
    recover.apply(tiny_whisper, replace(brief(1), windows_s=()), context)
    assert context.record["recover"]["training"]["first_loss"] == pytest.approx(0, abs=1e-5)


def test_the_relative_error_of_small_states_by_hand():
    """Squared errors 1, 0, 4, 3 * 3; the variance of 0, 2, 4, 6 is 20 / 3. The last row of the
    student is silence after the clip."""
    dense = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    student = torch.tensor([[1.0, 2.0], [2.0, 9.0], [50.0, 50.0]])
    assert float(relative_error(student, dense)) == pytest.approx((14 / 4) / (20 / 3))


def test_windows_are_drawn_from_those_that_hold_the_clips(seed):
    rule = DrawnWindows(WINDOWS, 0.0, seed)
    assert {rule(step, 80) for step in range(200)} == {100, 200}
    assert {rule(step, 101) for step in range(50)} == {200}
    assert {rule(step, 250) for step in range(50)} == {300}
    assert {DrawnWindows(WINDOWS, 1.0, seed)(step, 80) for step in range(50)} == {300}
    again = DrawnWindows(WINDOWS, 0.3, seed)
    assert [again(s, 80) for s in range(50)] == [again(s, 80) for s in range(50)]


def test_the_loss_equals_one_computed_clip_by_clip_with_transformers(
    tiny_whisper, pruned, processor, few
):
    options = Options(encoder=2.0, decoder=3.0, kl=0.5)
    examples = Examples(few[:2], pruned, processor, seed=0, batch_size=2)
    batch = examples[[0, 1]]
    pruned.train()
    outputs = pruned(
        batch.input_features[..., :400],
        decoder_input_ids=batch.decoder_input_ids,
        output_hidden_states=True,
    )
    result = recover.recovery(tiny_whisper, options)(pruned, batch, outputs)
    result = result + torch.nn.functional.cross_entropy(outputs.logits.mT, batch.labels)
    parts, tokens = [], []
    for row, position in enumerate((0, 1)):
        count, length = int((batch.labels[row] != -100).sum()), batch.lengths[row]
        read = int((batch.labels[row] != -100).nonzero().max()) + 1
        with torch.no_grad():
            dense = tiny_whisper(
                examples.features(position)[None],
                decoder_input_ids=batch.decoder_input_ids[row : row + 1, :read],
                output_hidden_states=True,
            )
        heard = dense.encoder_last_hidden_state[0, :length].half().float()  # as stored
        states = dense.decoder_hidden_states[-1][0].half().float()
        e = (outputs.encoder_last_hidden_state[row, :length] - heard).square().mean() / heard.var()
        d = (outputs.decoder_hidden_states[-1][row, :read] - states).square().mean() / states.var()
        p = tiny_whisper.proj_out(states[read - count : read]).softmax(-1)
        q = outputs.logits[row, read - count : read].log_softmax(-1)
        kl = (p * (p.log() - q)).sum(-1).mean()
        parts.append(2 * e + 3 * d + 0.5 * kl)
        tokens.append(count)
    expected = sum(n * part for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
    assert result.item() == pytest.approx(expected.item(), rel=1e-4)


def test_dense_states_are_computed_once_for_each_clip(tiny_whisper, processor, few, monkeypatch):
    states = recover.DenseStates(tiny_whisper)
    batch = Examples(few[:1], tiny_whisper, processor, seed=0)[[0]]
    first = states(batch, 0)
    monkeypatch.setattr(states, "computed", None)  # a second computation would fail
    assert states(batch, 0) is first
    assert first[0].shape == (batch.lengths[0], 32)


def test_invalid_windows_are_refused(tiny_whisper, context):
    with pytest.raises(Problem, match=r"recover: windows_s is \[7.0\].* between 0.02"):
        recover.apply(tiny_whisper, Options(windows_s=(7.0,)), context)


# ---------------------------------------------------------------------------------------- training


def test_training_brings_a_pruned_model_closer_to_the_dense_one(pruned, context):
    log = recover.apply(pruned, brief(40), context) and context.record["recover"]["training"]
    assert log["last_loss"] < 0.7 * log["first_loss"]


def test_silence_in_groups_trains_a_model_with_one_window(pruned, context):
    options = replace(brief(40), windows_s=(), silence_stride=8)
    model = recover.apply(pruned, options, context)
    training = context.record["recover"]["training"]
    assert training["last_loss"] < 0.9 * training["first_loss"]
    assert windows_of(model.config) == [300]
    assert model.model.encoder.silence is None


def test_steps_use_the_clip_and_a_margin_or_the_full_window(seed):
    rule = SpeechAndMargin(Silence(300, 8), 0.25, seed)
    drawn = Counter(rule(step, 101) for step in range(400))
    assert drawn.keys() == {200, 300}
    assert 60 <= drawn[300] <= 140
    never = replace(rule, full_share=0.0)
    assert [never(0, needed) for needed in (1, 50, 51, 251)] == [100, 100, 150, 300]


def test_a_silence_stride_needs_a_model_with_one_window(tiny_whisper, context):
    with pytest.raises(Problem, match="silence stride 8"):
        recover.apply(tiny_whisper, replace(brief(1), silence_stride=8), context)


def test_a_teacher_may_be_a_directory(
    pruned, tiny_whisper, processor, context, tmp_path, monkeypatch
):
    whisper.save(tiny_whisper, processor, tmp_path / "dense", {})
    other = copy.deepcopy(pruned)
    context.train = context.train[:2]
    recover.apply(pruned, brief(2), context)
    context.dense_texts, context.run_dir = False, tmp_path / "second"
    options = replace(brief(2), teacher=str(tmp_path / "dense"))
    monkeypatch.setattr(recover, "pseudo_labelled", lambda *rest: (list(rest[2]), {}))
    recover.apply(other, options, context)
    assert same_bits(pruned.state_dict(), other.state_dict())


def test_variants_of_the_clips_are_transcribed_and_trained_on(pruned, context, monkeypatch):
    labelled = []

    def label(dense, processor, clips, cache):
        labelled.extend(clips)
        return [replace(clip, text="three one") for clip in clips[1:]], Counter(empty=1)

    monkeypatch.setattr(recover, "pseudo_labelled", label)
    recover.apply(pruned, replace(brief(2), variants=2), context)
    record, variants = context.record["recover"], sorted(context.run_dir.rglob("*.flac"))
    assert [clip.audio for clip in labelled] == variants
    assert len(variants) == 8
    assert max(clip.duration_s for clip in labelled) <= 4.0  # the longest short window
    assert record["left_out"] == {"empty": 1}
    assert record["training"]["clips"] == 4 + 8 - 1


def test_every_second_variant_has_random_tokens_where_they_fit(pruned, context, monkeypatch):
    def label(dense, processor, clips, cache):
        return [replace(clip, text="three one") for clip in clips], Counter()

    trained, train = [], training.train
    monkeypatch.setattr(recover, "pseudo_labelled", label)
    monkeypatch.setattr(
        training, "train", lambda *rest, **named: trained.append(rest[2]) or train(*rest, **named)
    )
    recover.apply(pruned, replace(brief(1), variants=1, random_tokens=3), context)
    texts = [clip.text for clip in trained[0][len(context.train) :]]
    assert [text == "three one" for text in texts] == [False, True, False, True]
    assert all(text.endswith(" three one") for text in texts[::2])
    assert with_random_tokens(context.train, pruned, 10_000, context) == context.train


def test_a_recovered_model_survives_save_load_and_export(pruned, processor, context, tmp_path):
    model = recover.apply(pruned, brief(2), context).eval()
    whisper.save(model, processor, tmp_path / "out", {})
    again = whisper.load(tmp_path / "out")
    assert same_bits(again.state_dict(), model.state_dict())
    assert windows_of(again.config) == list(WINDOWS)
    export_onnx(again, processor, tmp_path / "artifact", "fp32")
    greedy = partial(decoding.greedy, again, processor)
    expected = checkpoint_tokens(greedy, context.train, WINDOWS[-1] * 320)
    figures = run_gate(tmp_path / "artifact", expected, context.train, EXACT, threads=1)
    assert figures["identical_tokens"] == 1
