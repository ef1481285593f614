"""Windows of several lengths: the record, decoding, export, the runner, and training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import graph_macs
import numpy as np
import pytest
import soundfile
import torch
from dead_structure import kill
from exported import irregular
from gates import run_gate

from benchmarks.gate import EXACT, checkpoint_tokens
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import score
from devices.runner.audio import shortest
from devices.runner.decode.loops import loop_period
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper import calibration, decoding, gating, pipeline, whisper
from edgewhisper.compress import short
from edgewhisper.compress.context import Context
from edgewhisper.compress.short import Lengths, Options, drawn_length, windows_for
from edgewhisper.compress.teacher import Teacher
from edgewhisper.examples import Examples
from edgewhisper.recipe import parse
from edgewhisper.shipped import SPEECH
from edgewhisper.training import Training
from export.artifact import read_manifest as read_artifact
from export.cost import macs_by_window
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.shrink import layer_shapes, shrink, windows_of

WINDOWS = [100, 200, 300]
SAMPLES = 320
"""Samples of one encoder position."""


def with_windows(model, windows=WINDOWS):
    whisper.set_windows(model.config, windows)
    return model


@pytest.fixture
def short_whisper(tiny_whisper):
    return with_windows(tiny_whisper)


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    """Clips of 0.9, 1.5, 3.5 and 4.1 s, which need all three windows."""
    every = read_manifest(clips)
    return [every[i] for i in (0, 2, 4, 5)]


def sound(rng: np.random.Generator, positions: int) -> np.ndarray:
    """Modulated noise as long as this many encoder positions."""
    samples = positions * SAMPLES
    level = 0.1 * (1 + np.sin(np.arange(samples) / rng.uniform(200, 2000)))
    return (level * rng.standard_normal(samples)).astype(np.float32)


# --------------------------------------------------------------------------------------- the record


def test_a_model_without_a_record_has_the_full_window(tiny_whisper):
    assert windows_of(tiny_whisper.config) == [300]
    assert not hasattr(tiny_whisper.config, "edgewhisper")
    with_windows(tiny_whisper, [300])
    assert not hasattr(tiny_whisper.config, "edgewhisper")


@pytest.mark.parametrize("kind", ["dense", "slim"])
def test_windows_survive_save_and_load(kind, tiny_whisper, processor, rng, tmp_path):
    model = with_windows(tiny_whisper)
    if kind == "slim":
        shrunk = shrink(kill(model, "all_kinds", rng))
        model = whisper.rebuild(model, shrunk.tensors, shrunk.layers)
    whisper.save(model, processor, tmp_path / "out", {})
    again = whisper.load(tmp_path / "out")
    assert windows_of(again.config) == WINDOWS
    assert layer_shapes(again)["windows"] == WINDOWS
    features = torch.randn(1, 80, 200)
    ids = torch.tensor([[375, 1, 2]])
    with torch.no_grad():
        expected, result = (m(features, decoder_input_ids=ids).logits for m in (model, again))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_rebuild_keeps_the_windows(short_whisper):
    state = short_whisper.state_dict()
    shapes = {k: v for k, v in layer_shapes(short_whisper).items() if k != "windows"}
    for layers in (None, shapes):
        assert windows_of(whisper.rebuild(short_whisper, state, layers).config) == WINDOWS


@pytest.mark.parametrize(
    "windows",
    [[200, 100, 300], [100, 100, 300], [0, 300], [100, 400], [100, 200], [], [True, 300], "300"],
    ids=["falling", "twice", "zero", "beyond", "no-full", "empty", "bool", "text"],
)
def test_invalid_windows_in_a_checkpoint_are_refused(windows, tiny_whisper, processor, tmp_path):
    whisper.save(tiny_whisper, processor, tmp_path / "bad", {})
    path = tmp_path / "bad" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "edgewhisper": {"format": 1, "windows": windows}}))
    with pytest.raises(Problem, match=r"windows is .*ascending list of encoder positions .* 300"):
        whisper.load(tmp_path / "bad")


# ----------------------------------------------------------------------------------------- in torch


@torch.no_grad()
def in_transformers(model, features: torch.Tensor) -> torch.Tensor:
    """Encoder output of a transformers model whose full window has this length."""
    from transformers import WhisperForConditionalGeneration

    config = copy.deepcopy(model.config)
    config.max_source_positions = features.shape[-1] // 2
    reference = WhisperForConditionalGeneration(config).eval()
    state = model.state_dict()
    table = "model.encoder.embed_positions.weight"
    reference.load_state_dict({**state, table: state[table][: config.max_source_positions]})
    return reference.model.encoder(features).last_hidden_state


def test_a_short_window_equals_a_transformers_model_of_that_length(short_whisper, rng):
    for positions in (100, 200):
        features = torch.randn(2, 80, 2 * positions)
        with torch.no_grad():
            result = short_whisper.model.encoder(features).last_hidden_state
        assert result.shape == (2, positions, 32)
        torch.testing.assert_close(result, in_transformers(short_whisper, features))


def test_the_full_window_is_bit_identical_to_transformers(short_whisper, rng):
    features = torch.randn(2, 80, 600)
    with torch.no_grad():
        result = short_whisper.model.encoder(features).last_hidden_state
    assert torch.equal(result, in_transformers(short_whisper, features))


def test_hidden_states_and_attentions_of_a_short_window_are_returned(short_whisper):
    short_whisper.set_attn_implementation("eager")
    outputs = short_whisper(
        torch.randn(1, 80, 200),
        decoder_input_ids=torch.tensor([[375]]),
        output_hidden_states=True,
        output_attentions=True,
    )
    assert [x.shape for x in outputs.encoder_hidden_states] == [(1, 100, 32)] * 3
    assert [x.shape for x in outputs.encoder_attentions] == [(1, 2, 100, 100)] * 2
    assert outputs.cross_attentions[0].shape == (1, 2, 1, 100)


@pytest.mark.parametrize("frames", [199, 202, 300, 700])
def test_an_unknown_window_is_refused(frames, short_whisper):
    with pytest.raises(Problem, match=rf"windows of 200, 400, 600 mel frames; {frames} were given"):
        short_whisper.model.encoder(torch.randn(1, 80, frames))


def test_training_accepts_any_length_up_to_the_full_window(tiny_whisper):
    tiny_whisper.train()
    assert tiny_whisper.model.encoder(torch.randn(1, 80, 26)).last_hidden_state.shape[1] == 13
    with pytest.raises(Problem, match="602 were given"):
        tiny_whisper.model.encoder(torch.randn(1, 80, 602))


def test_generate_accepts_short_features(short_whisper):
    features = torch.randn(3, 80, 400)
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 8}
    stamps = range(short_whisper.generation_config.no_timestamps_token_id + 1, 783)
    options["suppress_tokens"] = list(stamps)  # otherwise a random model starts a second segment
    for beams in (1, 2):
        result = short_whisper.generate(features, num_beams=beams, **options)
        encoded = short_whisper.model.encoder(features)
        expected = short_whisper.generate(encoder_outputs=encoded, num_beams=beams, **options)
        assert torch.equal(result, expected)
    assert short_whisper.config.max_source_positions == 300
    alone = short_whisper.generate(features[1:2], **options)
    assert torch.equal(alone[0], short_whisper.generate(features, **options)[1][: alone.shape[1]])


def test_every_clip_is_decoded_in_the_shortest_window_that_holds_it(
    short_whisper, processor, few, monkeypatch
):
    shapes = []
    forward = whisper.Encoder.forward
    monkeypatch.setattr(
        whisper.Encoder,
        "forward",
        lambda self, x=None, *, input_features=None, **k: (
            shapes.append((input_features if x is None else x).shape)
            or forward(self, input_features if x is None else x)
        ),
    )
    pcms = [clip.pcm() for clip in few]
    together = decoding.greedy(short_whisper, processor, pcms)
    assert sorted(shape[0] * [shape[2]] for shape in shapes) == [[200, 200], [400], [600]]
    assert together == [decoding.greedy(short_whisper, processor, [pcm])[0] for pcm in pcms]


@pytest.mark.parametrize(
    ("samples", "window"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 96), (96, 96), (97, 96)]
)
def test_the_shortest_window_is_the_first_that_holds_the_samples(samples, window):
    assert shortest([32, 64, 96], samples) == window


# ----------------------------------------------------------------------------------------- exported


def shared_heads(make_whisper, rng):
    """A model whose encoder attentions have one key and value for all heads."""
    model = make_whisper(heads=4)
    shapes = layer_shapes(model)
    tensors = dict(model.state_dict())
    for number, layer in enumerate(shapes["encoder"]):
        layer["self_attn"]["shared"] = True
        prefix = f"model.encoder.layers.{number}.self_attn."
        for name in ("k_proj.weight", "v_proj.weight"):
            tensors[prefix + name] = tensors[prefix + name][:8].clone()
        del tensors[prefix + "v_proj.bias"]
    return whisper.rebuild(model, tensors, shapes)


def dense(make_whisper, rng):
    return make_whisper()


@pytest.mark.parametrize("make", [dense, irregular, shared_heads])
def test_the_graphs_agree_with_torch_at_every_window(make, make_whisper, processor, rng, tmp_path):
    model = with_windows(make(make_whisper, rng))
    manifest = export_onnx(model, processor, tmp_path, "fp32")
    recognizer = Recognizer(tmp_path, threads=1, guards=False)
    prompt = manifest["decoding"]["prompt"]
    for window in WINDOWS:
        pcm = sound(rng, window)[: -int(rng.integers(0, 90 * SAMPLES))]
        tokens = decoding.greedy(model, processor, [pcm])[0]
        assert recognizer.window(pcm) == tokens
        expected = decoding.logits(model, processor, pcm, [*prompt, *tokens])[len(prompt) - 1 :]
        assert np.abs(recognizer.logits(pcm, tokens) - expected).max() < 1e-3


def test_the_contract_names_the_axes_that_follow_the_window(short_whisper, processor, tmp_path):
    manifest = export_onnx(short_whisper, processor, tmp_path, "int8")
    encoder, decoder = (manifest["contract"][name] for name in ("encoder", "decoder"))
    assert encoder["inputs"] == [{"name": "pcm", "shape": [1, "samples"], "dtype": "float32"}]
    shapes = {tuple(spec["shape"]) for spec in encoder["outputs"]}
    assert shapes == {(1, 2, "room", 16), (32,)}
    shapes = {spec["name"]: spec["shape"] for spec in decoder["inputs"]}
    assert shapes["cross.1.key"] == [1, "heads_enc_1", "room", 16]
    assert manifest["audio"]["windows_samples"] == [32000, 64000, 96000]
    assert manifest["audio"]["window_samples"] == 96000
    assert manifest["layers"]["windows"] == WINDOWS


def test_a_model_of_one_window_has_static_axes(tiny_whisper, processor, tmp_path):
    manifest = export_onnx(tiny_whisper, processor, tmp_path, "int8")
    assert manifest["contract"]["encoder"]["inputs"][0]["shape"] == [1, 96000]
    assert manifest["contract"]["encoder"]["outputs"][0]["shape"] == [1, 2, 332, 16]


def test_int8_agrees_with_torch_in_short_windows(digits, processor, few, tmp_path):
    """The untrained model transcribes badly, but both versions give the same tokens."""
    model = with_windows(whisper.load(digits))
    export_onnx(model, processor, tmp_path, "int8")
    recognizer = Recognizer(tmp_path, threads=1, guards=False)
    expected = decoding.greedy(model, processor, [clip.pcm() for clip in few])
    result = [recognizer.window(clip.pcm()) for clip in few]
    assert sum(one == other for one, other in zip(result, expected, strict=True)) >= 3


def test_the_gate_uses_the_same_windows(short_whisper, processor, few, tmp_path):
    manifest = export_onnx(short_whisper, processor, tmp_path, "fp32")
    figures = run_gate(
        tmp_path,
        checkpoint_tokens(partial(decoding.greedy, short_whisper, processor), few, 96_000),
        few,
        EXACT,
        gating.torch_parts(short_whisper, processor, manifest),
        threads=1,
    )
    assert figures["identical_tokens"] == 1
    assert figures["max_logits_error"] < 1e-3


# ------------------------------------------------------------------------------------ in the runner


@pytest.fixture
def artifact(short_whisper, processor, tmp_path) -> Path:
    export_onnx(short_whisper, processor, tmp_path / "artifact", "int8")
    return tmp_path / "artifact"


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """The number of samples of every window that the runner encodes."""
    from devices.runner.engines import sessions

    samples: list[int] = []
    encode = sessions.encode
    monkeypatch.setattr(
        sessions,
        "encode",
        lambda session, window: samples.append(window.shape[1]) or encode(session, window),
    )
    return samples


def test_the_runner_takes_the_shortest_window_that_holds_the_clip(artifact, lengths, rng):
    recognizer = Recognizer(artifact, threads=1)
    for seconds in (0.5, 2.0, 2.01, 4.0, 4.5, 6.0):
        recognizer.window(sound(rng, 300)[: round(seconds * 16000)])
    assert lengths == [32000, 32000, 64000, 64000, 96000, 96000]


def test_the_last_piece_of_a_long_clip_may_take_a_short_window(artifact, lengths, rng):
    levels = np.resize([0.02, 0.12, 0.02, 0.12, 0.02, 0.4], 310 * SAMPLES // 800 + 1)  # no pause
    sound = np.repeat(levels, 800)[: 310 * SAMPLES] * rng.standard_normal(310 * SAMPLES)
    pcm = np.insert(sound.astype(np.float32), 250 * SAMPLES, np.zeros(4800))
    Recognizer(artifact, threads=1).transcribe(pcm)
    assert lengths == [96000, 32000]


def test_an_old_artifact_without_windows_is_read(tiny_whisper, processor, tmp_path, lengths, rng):
    manifest = export_onnx(tiny_whisper, processor, tmp_path, "int8")
    del manifest["audio"]["windows_samples"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    Recognizer(tmp_path, threads=1).window(sound(rng, 20))
    assert lengths == [96000]
    assert "windows_samples" not in read_artifact(tmp_path)["audio"]


def test_audio_longer_than_the_largest_window_is_refused(artifact, rng):
    with pytest.raises(RunnerProblem, match="a window holds 96000 samples, 96001 were given"):
        Recognizer(artifact, threads=1).window(np.ones(96001, np.float32))


def test_timing_reads_an_artifact_of_several_windows(artifact, few, tmp_path):
    from devices.runner.measure import bench as measure

    names = []
    for i, clip in enumerate(few):
        soundfile.write(tmp_path / f"{i}.wav", clip.pcm(), 16_000)
        names.append(f"{i}.wav")
    (tmp_path / "clips.json").write_text(json.dumps(names))
    answer = measure.bench(artifact, tmp_path / "clips.json", threads=1)
    assert 0 < answer["mel_share"] < 1
    assert len(answer["encoder_s"]) == len(few)


# ------------------------------------------------------------------------ training of other methods


def test_batches_are_grouped_by_window_and_cut_to_it(short_whisper, processor, clips, seed):
    every = read_manifest(clips)
    size = 4
    examples = Examples(every, short_whisper, processor, seed, batch_size=size)
    for epoch in range(3):
        result = [examples.index(epoch * len(every) + i) for i in range(len(every))]
        assert sorted(result) == list(range(len(every)))
    mixed = 0
    batches = 2 * len(every) // size
    for number in range(batches):
        positions = range(number * size, (number + 1) * size)
        batch = examples[positions]
        windows = {shortest(WINDOWS, examples.needed[examples.index(p)]) for p in positions}
        assert batch.input_features.shape[2] == 2 * max(windows)
        assert batch.whole_features.shape[2] == 600
        cut = batch.whole_features[..., : batch.input_features.shape[2]]
        assert torch.equal(cut, batch.input_features)
        mixed += len(windows) > 1
    assert mixed <= 3 * 2 + 2  # batches at the borders of windows and epochs


def test_passes_and_processes_of_a_batch_use_the_same_window(short_whisper, processor, clips, seed):
    examples = Examples(read_manifest(clips), short_whisper, processor, seed, batch_size=6)
    for number in range(5):
        whole = examples[range(6 * number, 6 * number + 6)].input_features
        parts = [examples[[6 * number + i]].input_features for i in range(6)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_clip_longer_than_its_manifest_states_is_refused(short_whisper, processor, few):
    wrong = [replace(few[2], duration_s=1.0)]
    with pytest.raises(Problem, match=r"lasts 3.5\d s, which is longer than its manifest says"):
        Examples(wrong, short_whisper, processor, seed=0)[[0]]


def test_a_model_of_one_window_keeps_the_order_of_clips(
    tiny_whisper, processor, few: list[Clip], seed, make_whisper: Callable
):
    from edgewhisper.examples import permutation

    examples = Examples(few, tiny_whisper, processor, seed, batch_size=2)
    order = [examples.index(i) for i in range(12)]
    assert order == [*(i for epoch in range(3) for i in permutation(seed, epoch, 4))]
    assert examples[range(2)].input_features.shape[2] == 600


# ----------------------------------------------------------------------------------------- training

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


def test_calibration_uses_the_windows_of_decoding(short_whisper, processor, few):
    speech = calibration.Speech(few, processor)
    result = [(w.features.shape[2], w.positions) for w in speech.windows(short_whisper)]
    assert result == [(200, 100), (200, 100), (400, 200), (600, 300)]
    masked = replace(speech, mask_padding=True)
    assert [w.positions for w in masked.windows(short_whisper)] == [47, 76, 176, 205]


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


# ------------------------------------------------------------------------------- speed and accuracy


def test_macs_by_window_are_those_of_the_encoders_graph(make_whisper, processor, rng, tmp_path):
    heads = int(rng.integers(1, 4))
    model = make_whisper(
        d_model=2 * heads * int(rng.integers(4, 12)), heads=heads, ffn=int(rng.integers(20, 80))
    )
    with_windows(model, sorted({*rng.integers(1, 300, size=2).tolist(), 300}))
    manifest = export_onnx(model, processor, tmp_path / "artifact", "fp32")
    expected = macs_by_window(model)
    assert manifest["audio"]["windows_samples"] == [int(window) * SAMPLES for window in expected]
    counted = []
    for window, costs in expected.items():
        pcm = {"pcm": np.zeros((1, int(window) * SAMPLES), np.float32)}
        counted.append(graph_macs.count(tmp_path / "artifact" / "encoder.onnx", pcm))
        assert counted[-1] == costs["encoder"] + costs["cross"]
    # attention costs grow with the square of the window
    for window, count in zip(expected, counted, strict=True):
        assert count / counted[-1] <= int(window) / 300


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
