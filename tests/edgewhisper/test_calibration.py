"""Calibration: streaming moments, the positions that are counted, and restored models."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper.calibration import (
    LayerHooks,
    Moments,
    Point,
    Speech,
    collect,
    collect_together,
    sounding_positions,
)
from edgewhisper.whisper import input_of, linears, reads_audio, side_and_layer
from export.problem import Problem

FC1 = "model.encoder.layers.0.fc1"
CROSS_KEY = "model.decoder.layers.1.encoder_attn.k_proj"
TOKENS_READ = "model.decoder.layers.0.fc2"


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:3]


@pytest.fixture
def speech(few, processor) -> Speech:
    return Speech(few, processor)


@pytest.fixture
def write_clip(tmp_path, rng):
    def write(seconds: float) -> Clip:
        path = tmp_path / f"{seconds:g}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(round(seconds * 16000)), 16000)
        return Clip(path, "one two", "en")

    return write


def activations(model, point: Point, speech: Speech) -> torch.Tensor:
    """Return all rows of a point, stored at once."""
    rows = []

    def store(module, inputs, output):
        rows.append((inputs[0] if point.side == "input" else output)[0].double())

    handle = model.get_submodule(point.module).register_forward_hook(store)
    with torch.no_grad():
        for window in speech.windows(model, decoder=True):
            model(window.features, decoder_input_ids=window.tokens, use_cache=False)
    handle.remove()
    return torch.cat(rows)


def same_moments(moments: Moments, rows: torch.Tensor) -> None:
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(dim=0))
    torch.testing.assert_close(moments.covariance, rows.T.cov(correction=0), rtol=1e-6, atol=1e-8)


# ----------------------------------------------------------------------------------- arithmetic


def test_moments_of_known_rows():
    moments = Moments(2)
    moments.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    moments.add(torch.tensor([[2.0, 6.0]]))
    assert moments.mean.tolist() == [2, 2]
    expected = torch.tensor([[2 / 3, 0], [0, 8]], dtype=torch.float64)
    torch.testing.assert_close(moments.covariance, expected)


def test_rows_may_be_added_in_any_portions(rng):
    rows = torch.from_numpy(rng.normal(30, 1, size=tuple(rng.integers(5, 60, size=2))))
    moments = Moments(rows.shape[1])
    for part in rows.split(int(rng.integers(1, len(rows)))):
        moments.add(part)
    same_moments(moments, rows)


@pytest.mark.parametrize(
    "point",
    [
        Point(FC1),
        Point("model.encoder.layers.1.self_attn.out_proj", "output"),
        Point(CROSS_KEY),
        Point(TOKENS_READ),
    ],
    ids=lambda point: f"{point.side}-of-{point.module}",
)
def test_streamed_moments_match_stored_activations(point, tiny_whisper, speech):
    moments = collect(tiny_whisper, [point], speech)[point]
    same_moments(moments, activations(tiny_whisper, point, speech))


def test_several_points_need_one_pass(tiny_whisper, speech, few):
    points = [Point(FC1), Point(FC1, "output"), Point(TOKENS_READ)]
    calls = []
    moments = collect(tiny_whisper, points, speech, lambda: calls.append(1))
    assert len(calls) == len(few)
    for point in points:
        same_moments(moments[point], activations(tiny_whisper, point, speech))


def test_memory_is_independent_of_the_amount_of_speech(tiny_whisper, few, processor):
    def stored(clips):
        moments = collect(tiny_whisper, [Point(FC1)], Speech(clips, processor))[Point(FC1)]
        tensors = [x for x in vars(moments).values() if isinstance(x, torch.Tensor)]
        return moments.count, sum(x.nbytes for x in tensors)

    (one, bytes_one), (three, bytes_three) = stored(few[:1]), stored(few)
    assert three == 3 * one
    assert bytes_one == bytes_three == 8 * (32 * 32 + 32)


def test_joint_moments_of_two_models(make_whisper, speech):
    first, second = make_whisper(), make_whisper()
    mine, theirs = Point(FC1), [Point(FC1, "output"), Point("model.encoder.layers.1.fc2")]
    joint = collect_together([first, second], [[mine], theirs], speech)
    rows = [activations(first, mine, speech)] + [activations(second, p, speech) for p in theirs]
    same_moments(joint, torch.cat(rows, dim=1))


# ------------------------------------------------------------------------- counted positions


@pytest.mark.parametrize(
    ("samples", "positions"),
    [(0, 1), (1, 1), (320, 1), (321, 2), (16000, 50), (96000, 300), (960000, 300)],
)
def test_a_position_is_320_samples(samples, positions):
    assert sounding_positions(samples, 160, 300) == positions


def test_masked_padding_is_not_counted(tiny_whisper, write_clip, processor, rng):
    clip = write_clip(float(rng.uniform(0.3, 5)))
    speech = Speech([clip], processor, mask_padding=True)
    point, cross, tokens = Point(FC1), Point(CROSS_KEY), Point(TOKENS_READ)
    moments = collect(tiny_whisper, [point, cross, tokens], speech)
    sound = sounding_positions(len(clip.pcm()), 160, 300)
    for one in (point, cross):
        same_moments(moments[one], activations(tiny_whisper, one, speech)[:sound])
    same_moments(moments[tokens], activations(tiny_whisper, tokens, speech))


def test_long_clips_are_cut_into_windows(tiny_whisper, write_clip, processor):
    speech = Speech([write_clip(8.0)], processor)  # the window is 6 s
    assert len(list(speech.windows(tiny_whisper))) == 2
    assert collect(tiny_whisper, [Point(FC1)], speech)[Point(FC1)].count == 600


def test_the_decoder_needs_clips_of_one_window(tiny_whisper, write_clip, processor):
    speech = Speech([write_clip(8.0)], processor)
    with pytest.raises(Problem, match=r"none of 1 clips could be used for model\.decoder"):
        collect(tiny_whisper, [Point(TOKENS_READ)], speech)
    with pytest.raises(Problem, match=r"none of 1 clips could be used for model\.decoder"):
        collect_together([tiny_whisper], [[Point(TOKENS_READ)]], speech)


# --------------------------------------------------------------------------- restored models


def test_later_layers_do_not_run_and_are_restored(tiny_whisper, speech):
    ran = []
    for side in ("encoder", "decoder"):
        for number, layer in enumerate(getattr(tiny_whisper.model, side).layers):
            layer.register_forward_pre_hook(lambda *_, at=(side, number): ran.append(at))
    collect(tiny_whisper, [Point(FC1)], speech)
    assert set(ran) == {("encoder", 0)}
    ran.clear()
    collect(tiny_whisper, [Point("model.decoder.layers.0.fc1")], speech)
    assert set(ran) == {("encoder", 0), ("encoder", 1), ("decoder", 0)}
    assert [len(getattr(tiny_whisper.model, side).layers) for side in ("encoder", "decoder")] == [
        2,
        2,
    ]


@pytest.mark.parametrize("fails", [False, True], ids=["whole", "interrupted"])
def test_hooks_are_removed_and_the_mode_is_restored(fails, tiny_whisper, speech):
    tiny_whisper.train()

    calls = []

    def check(point, rows):
        calls.append(point)
        assert not tiny_whisper.training
        if fails:
            raise RuntimeError("stopped")

    try:
        with LayerHooks(tiny_whisper, [Point(FC1)], check) as hooks:
            hooks.run(next(speech.windows(tiny_whisper)))
    except RuntimeError:
        assert fails
    assert tiny_whisper.training and len(tiny_whisper.model.encoder.layers) == 2
    count = len(calls)
    tiny_whisper.get_submodule(FC1)(torch.zeros(1, 1, 32))
    assert len(calls) == count > 0


# -------------------------------------------------------------------------------- names of layers


def test_layers_with_the_same_input_have_the_same_input_of(tiny_whisper, speech):
    read: dict[str, list] = {}
    ids = next(speech.windows(tiny_whisper, decoder=True))
    for name, module in linears(tiny_whisper):
        module.register_forward_hook(lambda m, x, y, n=name: read.setdefault(n, []).append(x[0]))
    with torch.no_grad():
        tiny_whisper(ids.features, decoder_input_ids=ids.tokens, use_cache=False)
    for name in read:
        for other in read:
            same = read[name][0] is read[other][0]
            assert same == (input_of(name) == input_of(other)), (name, other)
        assert reads_audio(name) == (read[name][0].shape[1] == 300), name


def test_sides_and_layers_are_read_from_names():
    assert side_and_layer(CROSS_KEY) == ("decoder", 1)
    assert side_and_layer("model.encoder.layers.31.fc1") == ("encoder", 31)


def test_a_weight_counts_rows_as_often(rng):
    rows = torch.from_numpy(rng.standard_normal((5, 3)))
    weighted, repeated = Moments(3), Moments(3)
    weighted.add(rows[:2], weight=3)
    weighted.add(rows[2:])
    repeated.add(torch.cat([rows[:2]] * 3 + [rows[2:]]))
    assert weighted.count == repeated.count
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.covariance, repeated.covariance)


def test_the_covariance_is_accurate_for_large_means(rng):
    rows = torch.from_numpy(rng.normal(1000, 1e-2, size=(5000, 3)))
    moments = Moments(3)
    moments.add(rows)
    np.testing.assert_allclose(moments.covariance, rows.T.cov(correction=0), atol=1e-8)
