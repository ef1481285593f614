"""The gate passes what says the same, and shows the clip where it does not."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from benchmarks.gate import EXACT, Bounds, GateFailure, gate_again, run_gate, tokens_record
from benchmarks.metadata import clips_hash
from benchmarks.speech import read_manifest
from edgewhisper import decoding, whisper
from export.artifact import read_manifest as read_artifact
from export.artifact import write_manifest
from export.problem import Problem
from export.to_onnx import export_onnx


@pytest.fixture(scope="module")
def model(digits):
    return whisper.load(digits)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, model, processor) -> Path:
    """The shipped checkpoint as an exact artifact."""
    out = tmp_path_factory.mktemp("gate") / "fp32"
    export_onnx(model, processor, out, "fp32")
    return out


@pytest.fixture(scope="module")
def int8(tmp_path_factory, model, processor) -> Path:
    """The shipped checkpoint as a quantised artifact."""
    out = tmp_path_factory.mktemp("gate") / "int8"
    export_onnx(model, processor, out, "int8")
    return out


@pytest.fixture(scope="module")
def few(clips):
    return read_manifest(clips)[::5]


@pytest.fixture(scope="module")
def reference(model, processor):
    """The checkpoint's tokens of a window, remembered between tests."""
    known = cache(lambda raw: decoding.greedy(model, processor, [np.frombuffer(raw, "<f4")])[0])
    return lambda pcm: known(pcm.astype("<f4").tobytes())


@pytest.fixture(scope="module")
def torch_logits(model, processor, fp32):
    """Logits of one pass of the decoder over prompt and tokens, without a cache."""
    prompt = read_artifact(fp32)["decoding"]["prompt"]

    @torch.no_grad()
    def logits(pcm, tokens):
        features = decoding.log_mel(processor.feature_extractor, [pcm])
        ids = torch.tensor([[*prompt, *tokens]])
        found = model(input_features=features, decoder_input_ids=ids, use_cache=False).logits[0]
        return {"logits": found[len(prompt) - 1 :].numpy()}

    return logits


def damaged(artifact: Path, out: Path, change) -> Path:
    """A copy of an artifact with one weight of its decoder changed: the widest that is used. Its
    hashes are those of what it holds now."""
    shutil.copytree(artifact, out)
    graph = onnx.load(out / "decoder.onnx")
    weight = max(graph.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)), weight.name))
    onnx.save(graph, out / "decoder.onnx")
    write_manifest(out, read_artifact(out))
    return out


def test_fp32_passes_exactly(fp32, reference, few, torch_logits):
    figures = run_gate(fp32, reference, few, EXACT, torch_logits, threads=1)
    assert figures["clips"] == len(few)
    assert figures["identical_tokens"] == figures["identical_texts"] == 1
    assert 0 < figures["max_logits_error"] < 1e-3
    assert figures["artifact_wer"] == figures["checkpoint_wer"] < 0.5
    assert figures["exact"] is True


def test_int8_passes_on_words(int8, reference, few):
    figures = run_gate(int8, reference, few, Bounds(), threads=1)
    assert figures["wer_loss_points"] <= 0.5
    assert figures["identical_texts"] >= figures["identical_tokens"] > 0.5
    assert figures["max_logits_error"] is None


def shown(failure: pytest.ExceptionInfo) -> tuple[str, str, str]:
    """Clip, checkpoint's text and artifact's text as the letter shows them."""
    form = r"First: (\S+), checkpoint says '(.*)' \[.*\], artifact says '(.*)' \["
    return re.search(form, str(failure.value)).groups()


def test_changed_tokens_fail_an_exact_gate_and_the_first_clip_is_shown(
    fp32, reference, few, tmp_path
):
    broken = damaged(fp32, tmp_path / "broken", lambda w: np.roll(w, 1, axis=-1))
    with pytest.raises(GateFailure, match=rf"\d+ of {len(few)} clips get other tokens") as failure:
        run_gate(broken, reference, few, EXACT, threads=1)
    name, wanted, found = shown(failure)
    assert name == few[0].audio.name
    assert wanted != found
    assert str(reference(few[0].pcm())) in str(failure.value)


def test_changed_words_fail_a_quantised_gate_and_the_first_clip_is_shown(
    int8, reference, few, tmp_path
):
    broken = damaged(int8, tmp_path / "broken", lambda w: np.roll(w, 1, axis=-1))
    with pytest.raises(GateFailure, match=r"a loss of .* points, allowed are 0\.5") as failure:
        run_gate(broken, reference, few, Bounds(), threads=1)
    name, wanted, found = shown(failure)
    assert name in [clip.audio.name for clip in few]
    assert wanted != found
    assert "export in fp32" in failure.value.hint


def test_logits_that_are_off_a_little_fail_an_exact_gate(
    fp32, reference, few, torch_logits, tmp_path
):
    """The token table grows by 0.2 %: every token stays, the numbers are wrong."""
    broken = damaged(fp32, tmp_path / "broken", lambda w: w * np.float32(1.002))
    options = {"bounds": EXACT, "parts": torch_logits, "threads": 1}
    with pytest.raises(GateFailure, match=r"logits differ by .* from the checkpoint's"):
        run_gate(broken, reference, few[:2], **options)


def test_logits_that_are_no_numbers_fail_an_exact_gate(fp32, reference, few):
    def nothing(pcm, tokens):
        return {"logits": np.full((len(tokens) + 1, 1), np.nan)}

    options = {"bounds": EXACT, "parts": nothing, "threads": 1}
    with pytest.raises(GateFailure, match="logits differ by inf"):
        run_gate(fp32, reference, few[:1], **options)


def test_long_clips_are_compared_window_by_window(fp32, reference, clips):
    others = read_manifest(clips.parent / "other.jsonl")
    long = next(clip for clip in others if clip.audio.stem == "long")
    figures = run_gate(fp32, reference, [long], EXACT, threads=1)
    assert figures["windows"] > 1


# ------------------------------------------------------------------ again, without the checkpoint


def record(clips, tokens, **changes):
    """What the manifest keeps of a gate in which all words were right."""
    kept = {"clips_hash": clips_hash(clips), "normalizer": "whisper-basic", "exact": False}
    kept |= {"checkpoint_wer": 0.0, "artifact_wer": 0.0, "max_wer_loss_points": 0.5}
    return kept | tokens_record(tokens) | changes


@pytest.fixture
def said(few, rng):
    """Drawn tokens of some clips, the first of two windows."""
    tokens = [[rng.integers(700, size=5).tolist()] for _ in few]
    return [[*tokens[0], rng.integers(700, size=3).tolist()], *tokens[1:]]


def test_a_gate_keeps_what_asking_again_takes(fp32, reference, few):
    figures = run_gate(fp32, reference, few[:2], EXACT, threads=1)
    tokens = [[reference(clip.pcm())] for clip in few[:2]]
    texts = [clip.text for clip in few[:2]]
    assert "the tokens of all 2 clips" in gate_again(figures, few[:2], tokens, texts)


def test_other_tokens_fail_an_exact_gate_and_name_the_clip(few, said):
    gate, texts = record(few, said, exact=True), [clip.text for clip in few]
    said[1][0][2] += 1
    with pytest.raises(GateFailure, match=rf"1 of {len(few)} clips.*{few[1].audio.name}"):
        gate_again(gate, few, said, texts)


def test_tokens_cut_between_other_windows_are_other_tokens(few, said):
    gate, texts = record(few, said, exact=True), [clip.text for clip in few]
    said[0] = [said[0][0] + said[0][1]]
    with pytest.raises(GateFailure, match="1 of"):
        gate_again(gate, few, said, texts)


def test_other_tokens_of_the_same_words_pass_a_gate_of_words(few, said):
    gate, texts = record(few, said), [clip.text for clip in few]
    said[2][0].append(5)
    assert "within the gate's 0.5 points" in gate_again(gate, few, said, texts)
    with pytest.raises(GateFailure, match=r"WER \d.*at the gate 0.00 %"):
        gate_again(gate, few, said, ["nothing", *texts[1:]])


def test_other_clips_and_gates_without_a_record_are_refused(few, said):
    gate, texts = record(few, said), [clip.text for clip in few]
    with pytest.raises(Problem, match=rf"the gate heard {len(few)} other clips than these") as told:
        gate_again(gate, few[1:], said[1:], texts[1:])
    assert "--speech" in told.value.hint
    for name in gate:
        broken = {key: value for key, value in gate.items() if key != name}
        with pytest.raises(Problem, match=f"says no {name}"):
            gate_again(broken, few, said, texts)


def test_a_gate_without_clips_is_refused(fp32, reference):
    with pytest.raises(Problem, match="the gate got no clips"):
        run_gate(fp32, reference, [], EXACT)
