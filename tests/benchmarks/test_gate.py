"""The gate passes equal artifacts and shows the first clip that differs."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from gates import run_gate
from onnx import numpy_helper

from benchmarks.gate import (
    EXACT,
    Bounds,
    GateFailure,
    checkpoint_tokens,
    evenly,
    refuse_foreign,
    tokens_record,
)
from benchmarks.gate_loss import loss, too_much
from benchmarks.gate_record import gate_again
from benchmarks.metadata import clips_hash
from benchmarks.speech.clips import read_manifest
from benchmarks.text_difference import around_difference
from devices.runner.recognizer import Recognizer
from edgewhisper import decoding, gating, whisper
from export.artifact import read_manifest as read_artifact
from export.artifact import write_manifest
from export.onnx.to_onnx import export_onnx
from export.problem import Problem

WINDOW = 96_000


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
def tokens(model, processor):
    return partial(decoding.greedy, model, processor)


@pytest.fixture(scope="module")
def reference(tokens, few):
    """The checkpoint's tokens of the clips."""
    return checkpoint_tokens(tokens, few, WINDOW)


@pytest.fixture(scope="module")
def torch_logits(model, processor, fp32):
    """Function that computes logits in one pass of the decoder, without a cache."""
    prompt = read_artifact(fp32)["decoding"]["prompt"]

    @torch.no_grad()
    def logits(pcm, tokens, language):
        features = decoding.log_mel(processor.feature_extractor, [pcm])
        ids = torch.tensor([[*prompt, *tokens]])
        found = model(input_features=features, decoder_input_ids=ids, use_cache=False).logits[0]
        return {"logits": found[len(prompt) - 1 :].numpy()}

    return logits


def damaged(artifact: Path, out: Path, change) -> Path:
    """Return a copy of an artifact with the decoder's largest weight changed and valid hashes."""
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
    """Return the clip and both texts from the last three lines of the message."""
    form = r"\nclip: +(\S+) \(en.*\)\ncheckpoint: +'(.*)'\nartifact: +'(.*)'$"
    return re.search(form, str(failure.value)).groups()


def test_changed_tokens_fail_an_exact_gate_and_the_first_clip_is_shown(
    fp32, reference, few, tmp_path
):
    broken = damaged(fp32, tmp_path / "broken", lambda w: np.roll(w, 1, axis=-1))
    with pytest.raises(GateFailure, match=rf"\d+ of {len(few)} clips get other tokens") as failure:
        run_gate(broken, reference, few, EXACT, threads=1)
    name, expected, found = shown(failure)
    assert name == few[0].audio.name
    assert expected != found
    assert re.search(r"token \d+: \d+, artifact (\d+|the end)\)", str(failure.value))
    assert failure.value.figures["identical_tokens"] < 1


def test_changed_words_fail_a_quantised_gate_and_the_first_clip_is_shown(
    int8, reference, few, tmp_path
):
    broken = damaged(int8, tmp_path / "broken", lambda w: np.roll(w, 1, axis=-1))
    with pytest.raises(
        GateFailure, match=r"a loss of .* points .*; at most 0\.5 points"
    ) as failure:
        run_gate(broken, reference, few, Bounds(), threads=1)
    name, expected, found = shown(failure)
    assert name in [clip.audio.name for clip in few]
    assert expected != found
    assert "higher --precision" in failure.value.hint


def test_slightly_different_logits_fail_an_exact_gate(fp32, reference, few, torch_logits, tmp_path):
    """The token table is scaled by 1.002: all tokens stay the same, the logits change."""
    broken = damaged(fp32, tmp_path / "broken", lambda w: w * np.float32(1.002))
    options = {"bounds": EXACT, "parts": torch_logits, "threads": 1}
    with pytest.raises(GateFailure, match=r"logits differ by .* from the checkpoint's"):
        run_gate(broken, reference[:2], few[:2], **options)


def test_nan_logits_fail_an_exact_gate(fp32, reference, few):
    def nothing(pcm, tokens, language):
        return {"logits": np.full((len(tokens) + 1, 1), np.nan)}

    options = {"bounds": EXACT, "parts": nothing, "threads": 1}
    with pytest.raises(GateFailure, match="logits differ by inf"):
        run_gate(fp32, reference[:1], few[:1], **options)


def test_long_clips_are_compared_window_by_window(fp32, tokens, clips):
    others = read_manifest(clips.parent / "other.jsonl")
    long = next(clip for clip in others if clip.audio.stem == "long")
    figures = run_gate(fp32, checkpoint_tokens(tokens, [long], WINDOW), [long], EXACT, threads=1)
    assert figures["windows"] > 1


# -------------------------------------------------------------------- without the checkpoint


def record(clips, tokens, **changes):
    """Return the manifest's record of a gate without word errors."""
    kept = {"clips_hash": clips_hash(clips), "normalizer": "whisper-basic", "exact": False}
    kept |= {"checkpoint_errors": [0] * len(clips), "artifact_wer": 0.0}
    kept |= {"max_wer_loss_points": 0.5}
    return kept | tokens_record(tokens) | changes


@pytest.fixture
def drawn(few, rng):
    """Random tokens of the clips; the first clip has two windows."""
    tokens = [[rng.integers(700, size=5).tolist()] for _ in few]
    return [[*tokens[0], rng.integers(700, size=3).tolist()], *tokens[1:]]


def test_a_gate_can_be_repeated_from_its_record(fp32, reference, few):
    figures = run_gate(fp32, reference[:2], few[:2], EXACT, threads=1)
    texts = [clip.text for clip in few[:2]]
    assert "the tokens of all 2 clips" in gate_again(figures, few[:2], reference[:2], texts)


def test_other_tokens_fail_an_exact_gate_and_name_the_clip(few, drawn):
    gate, texts = record(few, drawn, exact=True), [clip.text for clip in few]
    drawn[1][0][2] += 1
    name = few[1].audio.name
    with pytest.raises(GateFailure, match=rf"(?s)1 of {len(few)} clips.*clip: +{name}"):
        gate_again(gate, few, drawn, texts)


def test_the_same_tokens_in_other_windows_differ(few, drawn):
    gate, texts = record(few, drawn, exact=True), [clip.text for clip in few]
    drawn[0] = [drawn[0][0] + drawn[0][1]]
    with pytest.raises(GateFailure, match="1 of"):
        gate_again(gate, few, drawn, texts)


def test_other_tokens_with_the_same_words_pass_a_gate_of_words(few, drawn):
    gate, texts = record(few, drawn), [clip.text for clip in few]
    drawn[2][0].append(5)
    assert "within the gate's 0.5 points" in gate_again(gate, few, drawn, texts)
    with pytest.raises(GateFailure, match=r"WER \d.*at the gate 0.00 %"):
        gate_again(gate, few, drawn, ["nothing"] * len(texts))


def test_other_clips_and_gates_without_a_record_are_refused(few, drawn):
    gate, texts = record(few, drawn), [clip.text for clip in few]
    with pytest.raises(
        Problem, match=rf"the gate was run on {len(few)} other clips than these"
    ) as error:
        gate_again(gate, few[1:], drawn[1:], texts[1:])
    assert "--speech" in error.value.hint
    for name in gate:
        broken = {key: value for key, value in gate.items() if key != name}
        with pytest.raises(Problem, match=f"has no valid `{name}`"):
            gate_again(broken, few, drawn, texts)


def test_a_gate_without_clips_is_refused(fp32, reference):
    with pytest.raises(Problem, match="the gate got no clips"):
        run_gate(fp32, [], [], EXACT)


# ------------------------------------------------------------------------------ loss of words


def lost(errors: list[tuple[int, int]], words: int) -> dict:
    """Return the loss of clips with `words` words each, from their errors before and after."""
    before, after = zip(*errors, strict=True)
    return loss([(n, words) for n in before], [(n, words) for n in after])


@pytest.mark.parametrize(
    ("errors", "words", "fails"),
    [
        pytest.param([(0, 1), *[(0, 0)] * 7], 5, False, id="1 word of 40, 8 clips"),
        pytest.param([(0, 1)], 41, False, id="1 word of 41, one clip"),
        pytest.param([(0, 2)], 3, False, id="2 words of 3, one clip"),
        pytest.param([(1, 0), (0, 1)] * 38 + [(0, 1)] * 4, 9, False, id="0.6 points of 720 words"),
        pytest.param([(1, 2), (1, 0), (0, 1)] * 3, 9, False, id="3.7 points of 81 words"),
        pytest.param([(1, 2), (1, 0), (0, 1)] * 30, 9, True, id="3.7 points of 810 words"),
        pytest.param([(0, 1)] * 10 + [(0, 0)] * 70, 9, True, id="1.4 points, never better"),
        pytest.param([(0, 20)], 41, True, id="ruin, one clip"),
        pytest.param([(0, 3)], 3, True, id="ruin, one short clip"),
        pytest.param([(1, 5)] * 3, 6, True, id="ruin, three clips"),
        pytest.param([(0, 200), *[(0, 0)] * 79], 9, True, id="one clip of 80 never ends"),
        pytest.param([(5, 1)] * 3, 6, False, id="better"),
    ],
)
def test_a_loss_beyond_chance_fails_the_gate(errors, words, fails):
    assert too_much(lost(errors, words), 0.5) is fails


def test_the_interval_of_a_loss_is_paired():
    found = lost([(3, 4)] * 50, 10)
    assert found["wer_loss_interval"] == [10, 10], "the same loss in every clip"
    assert found["word_loss"] == 50
    assert lost([(3, 4)] * 50, 10) == found


# ---------------------------------------------------------------------------- clips and windows


def test_clips_are_chosen_evenly_and_always_the_same():
    assert evenly(range(3), 100) == [0, 1, 2]
    assert evenly(range(1000), 100) == list(range(0, 1000, 10))
    assert evenly(range(7), 3) == [0, 2, 4]


def test_windows_are_decoded_in_batches_of_one_language_and_stay_in_place(few):
    asked, done = [], []

    def tokens(pcms, spoken):
        asked.append(set(spoken))
        return [[len(pcm)] for pcm in pcms]

    languages = ["de", "en"] * 4
    found = checkpoint_tokens(
        tokens, few[:8], WINDOW, languages[: len(few)], lambda n, note: done.append(n)
    )
    assert found == [[[len(clip.pcm())]] for clip in few[:8]]
    assert done[-1] == len(few[:8])


def test_each_clip_is_prompted_for_its_own_language(fp32, tokens, few):
    """Checkpoint and artifact use the same prompt, also where logits are compared."""
    languages = ["de", "hi", "en", "xx", None, "fr", "de", "en"][: len(few)]
    reference = checkpoint_tokens(tokens, few, WINDOW, languages)
    recognizer = Recognizer(fp32, threads=1, guards=False)
    for clip, language, expected in zip(few, languages, reference, strict=True):
        assert [recognizer.window(clip.pcm(), language=language)] == expected
    pcm, drawn = few[0].pcm(), reference[0][0]
    one, other = (recognizer.parts(pcm, drawn, language)["logits"] for language in ("de", "hi"))
    assert np.abs(one - other).max() > 1e-3
    parts = gating.torch_parts(tokens.args[0], tokens.args[1], read_artifact(fp32))
    figures = run_gate(fp32, reference, few, EXACT, parts, 1, languages)
    assert figures["identical_tokens"] == 1


def test_foreign_speech_is_refused(few):
    texts = [clip.text for clip in few]
    refuse_foreign(few, texts)
    with pytest.raises(GateFailure, match=r"rate on these \d+ clips is \d{4,} %") as error:
        refuse_foreign(few, ["some thing else " * 100 for _ in few])
    assert "not this model's speech" in str(error.value)
    assert len(str(error.value)) < 700
    assert "--speech" in error.value.hint


def test_texts_are_cut_around_their_first_difference():
    one, other = around_difference("a" * 300 + "b" * 300, "a" * 300 + "c" * 300)
    assert "ab" in one
    assert "ac" in other
    assert max(len(one), len(other)) < 110
    assert around_difference("a b", "a c") == ("a b", "a c")
