"""Training with the silence after a clip in groups of positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import irregular, whole

from benchmarks.speech.clips import read_manifest
from devices.runner import Recognizer
from devices.runner.interfaces import Transcript
from edgewhisper import decoding
from edgewhisper.calibration import Speech
from edgewhisper.compress.branches import branches_of, last_states
from edgewhisper.compress.walk import Walk
from edgewhisper.shapes import set_windows
from edgewhisper.silence import silence_for, silence_in_groups
from export.onnx.silence import Silence
from export.onnx.to_onnx import export_onnx

FULL = 300
"""Encoder positions of the window of 6 s."""


@pytest.mark.parametrize("stride", [1, 2, 7])
def test_the_groups_hold_every_position_once(stride):
    silence = Silence(FULL, stride)
    assert silence.windows == [50, 100, 150, 200, 250, 300]
    for window in silence.windows:
        assert sum(silence.sizes(window)) == FULL
        assert max(silence.sizes(window)) <= stride


@pytest.mark.parametrize("make", [whole, irregular])
@pytest.mark.parametrize(("samples", "positions"), [(6400, 100), (27200, 150)])
def test_training_computes_what_an_artifact_computes(
    make, samples, positions, make_whisper, processor, rng, tmp_path
):
    model = make(make_whisper, rng)
    export_onnx(model, processor, tmp_path, "fp32", silence_stride=7)
    pcm = rng.normal(0, 0.1, samples).astype(np.float32)
    want = Recognizer(tmp_path, 1, guards=False).decoder_over(pcm, Transcript())([5])
    features = decoding.log_mel(processor.feature_extractor, [pcm] * 2)[..., : 2 * positions]
    with torch.no_grad(), silence_in_groups(model.train(), Silence(FULL, 7)):
        outputs = model(features, decoder_input_ids=torch.tensor([[5]] * 2))
    assert np.abs(outputs.logits[1, 0].numpy() - want).max() < 1e-3


def test_models_with_short_windows_compute_all_positions(make_whisper):
    model = make_whisper()
    assert silence_for(model, 8) == Silence(FULL, 8)
    assert silence_for(model, 1) is None
    set_windows(model.config, [100, FULL])
    assert silence_for(model, 8) is None


def test_calibration_computes_what_training_computes(make_whisper, processor, clips):
    model, clip = make_whisper(), read_manifest(clips)[0]
    speech = Speech([clip], processor, mask_padding=True)
    with torch.no_grad(), silence_in_groups(model, Silence(FULL, 4)):
        walk = Walk(model, speech)
        first = branches_of(model, "encoder")[0]
        scores = walk.collect_scores(first)
        x = walk.states[0] + walk.output(first, 0, walk.states[0])
        tokens = walk.windows[0].tokens
        states = last_states(model, first, x, tokens, None)
        features = decoding.log_mel(processor.feature_extractor, [clip.pcm()])[..., :200]
        want = model.train()(features, decoder_input_ids=tokens).logits[0]
    assert x.shape[1] < 150
    assert torch.isfinite(scores.keys).all()
    assert (model.proj_out(states) - want).abs().max() < 1e-3


def test_a_full_window_and_a_model_after_training_are_unchanged(make_whisper, processor, rng):
    model = make_whisper().train()
    features = decoding.log_mel(processor.feature_extractor, [np.zeros(0, np.float32)])
    ids = torch.tensor([[5]])
    before = model(features, decoder_input_ids=ids).logits
    short = model(features[..., :200], decoder_input_ids=ids).logits
    with silence_in_groups(model, Silence(FULL, 4)):
        assert (model(features, decoder_input_ids=ids).logits - before).abs().max() < 1e-5
        grouped = model(features[..., :200], decoder_input_ids=ids).logits
    assert torch.equal(model(features[..., :200], decoder_input_ids=ids).logits, short)
    # with silence only, the groups give nearly the text of the full window
    assert (grouped - before).abs().max() < (short - before).abs().max()
