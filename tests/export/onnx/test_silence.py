"""The silence after a short clip in few encoder positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import export, irregular, low_rank, torch_steps, whole, window

from devices.runner import Recognizer
from devices.runner.interfaces import Transcript
from edgewhisper import decoding
from edgewhisper.compress.branches import branches_of, run, stem
from edgewhisper.compress.shared_attention import share_attention
from export.onnx.silence import Silence
from export.onnx.to_onnx import export_onnx
from export.problem import Problem

STRIDE = 2
"""Every computed position stands for exactly two, with windows of 1 and 2 s."""


def shared(make_whisper, rng):
    """The layers of the encoder share one key and one value between their heads."""
    model = make_whisper()
    for layer in model.model.encoder.layers:
        for name in ("k_proj", "v_proj"):
            low_rank(layer.self_attn, name, 3)
    return share_attention(model)[0]


@torch.no_grad()
def repeated(model, processor, pcm, silence):
    """The logits after token 5, if the decoder and all layers of the encoder read every computed
    position of the silence as often as there are positions that it stands for."""
    n_samples = processor.feature_extractor.n_samples
    seconds = -(-len(pcm) // 16000)
    full = np.pad(pcm, (0, n_samples - len(pcm)))
    x = stem(model, decoding.log_mel(processor.feature_extractor, [full]))
    n = 50 * seconds + 48
    assert silence.positions(50 * seconds) == n + (300 - n) // STRIDE
    angles = model.model.encoder.embed_positions.weight
    means = angles[n:300].unflatten(0, (-1, STRIDE)).mean(1).repeat_interleave(STRIDE, 0)
    x = torch.cat([x[:, :n], x[:, n - 1 : n] - angles[n - 1] + means], 1)
    for branch in branches_of(model, "encoder"):
        x = x + run(model, branch, x, None)
    states = model.model.encoder.layer_norm(x)
    return model(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[5]])).logits[0, 0]


@pytest.mark.parametrize("make", [whole, irregular, shared])
@pytest.mark.parametrize("seconds", [0.4, 1.7])
def test_a_position_of_silence_stands_for_its_neighbours(
    make, seconds, make_whisper, processor, rng, tmp_path
):
    model = make(make_whisper, rng)
    export_onnx(model, processor, tmp_path, "fp32", silence_stride=STRIDE)
    pcm = window(processor, rng)[: int(16000 * seconds)]
    decoder = Recognizer(tmp_path, 1, guards=False).decoder_over(pcm, Transcript())
    want = repeated(model, processor, pcm, Silence(300, STRIDE))
    assert np.abs(decoder([5]) - want.numpy()).max() < 1e-3


def test_a_full_window_is_computed_as_without_a_stride(make_whisper, processor, rng, tmp_path):
    model, pcm = irregular(make_whisper, rng), window(processor, rng)
    exported = export(model, processor, tmp_path, silence_stride=4)
    want = torch_steps(model, processor, pcm, [[375, 5]])[0]
    logits, _ = exported.step([375, 5], exported.no_past(), exported.encode(pcm))
    assert np.abs(logits - want).max() < 1e-3


def test_speech_has_the_same_text_and_times(digits, processor, clips, tmp_path):
    """Short clips of the embedded model, whose window of 6 s is mostly silence then."""
    from benchmarks.speech.clips import read_manifest
    from edgewhisper import whisper

    model = whisper.load(digits)
    pcms = [clip.pcm() for clip in read_manifest(clips)[:10]]
    results = []
    for stride in (1, 4):
        place = tmp_path / str(stride)
        manifest = export_onnx(model, processor, place, "int8", silence_stride=stride)
        recognizer = Recognizer(place, 1)
        results.append([recognizer.transcribe(pcm, word_timestamps=True) for pcm in pcms])
    assert manifest["audio"]["windows_samples"] == [16000 * s for s in range(1, 7)]
    assert manifest["macs_by_window"]["100"]["encoder"] < manifest["macs"]["encoder"]
    pairs = list(zip(*results, strict=True))
    assert sum(one.text == other.text for one, other in pairs) >= 9
    equal = [(starts(one), starts(other)) for one, other in pairs if one.text == other.text]
    later = np.concatenate([np.abs(one - other) for one, other in equal])
    assert np.mean(later <= 0.05) >= 0.9


def starts(transcript):
    return np.array([word.start_s for segment in transcript.segments for word in segment.words])


@pytest.mark.parametrize("options", [{"silence_stride": 0}, {"layout": "single"}])
def test_unusable_strides_are_refused(options, make_whisper, processor, tmp_path):
    with pytest.raises(Problem, match="silence stride"):
        export_onnx(make_whisper(), processor, tmp_path / "x", **{"silence_stride": 4} | options)
    assert not list(tmp_path.glob("x/*"))
