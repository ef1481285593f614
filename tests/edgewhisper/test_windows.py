"""Windows of several lengths: the record, decoding, export, the runner, and batches."""

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
from short_windows import SAMPLES, WINDOWS, clips_of_all_windows, with_windows

from benchmarks.gate import EXACT, checkpoint_tokens
from benchmarks.speech.clips import Clip, read_manifest
from devices.runner.audio import shortest
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper import calibration, decoding, gating, whisper
from edgewhisper.examples import Examples
from export.artifact import read_manifest as read_artifact
from export.cost import macs_by_window
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.shrink import layer_shapes, shrink, windows_of


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return clips_of_all_windows(clips)


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


# -------------------------------------------------------- calibration and training of other methods


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


def test_calibration_uses_the_windows_of_decoding(short_whisper, processor, few):
    speech = calibration.Speech(few, processor)
    result = [(w.features.shape[2], w.positions) for w in speech.windows(short_whisper)]
    assert result == [(200, 100), (200, 100), (400, 200), (600, 300)]
    masked = replace(speech, mask_padding=True)
    assert [w.positions for w in masked.windows(short_whisper)] == [47, 76, 176, 205]
