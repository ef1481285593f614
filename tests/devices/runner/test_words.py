"""Word timestamps, compared with torch and with OpenAI's algorithm."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import scipy.signal
from exported import irregular, whole
from openai_timing import dtw, token_times

from benchmarks.speech.clips import read_manifest
from devices.runner.decode import listen
from devices.runner.decode.text import Tokens, to_text
from devices.runner.decode.words import (
    TimedWord,
    at_pauses,
    characters,
    median_filter,
    shortened,
    spaced,
    timed_words,
    token_starts,
    warping_path,
    with_punctuation,
)
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer, Transcript
from edgewhisper import whisper
from edgewhisper.alignment import TimedClip, Word, cross_attentions, spell
from export.onnx.layouts.native import alignment
from export.onnx.to_onnx import export_onnx


@pytest.fixture(scope="module")
def pcms(clips) -> list[np.ndarray]:
    return [clip.pcm()[:96_000] for clip in read_manifest(clips)[1::5]]


@pytest.fixture(scope="module")
def recognizer(exported) -> Recognizer:
    return Recognizer(exported, threads=1)


# -------------------------------------------------------------------------------------- arithmetic


def test_the_path_is_that_of_dynamic_time_warping(rng):
    for _ in range(20):
        cost = rng.standard_normal(rng.integers(1, 12, 2)).round(1)  # with equal sums
        assert list(zip(*warping_path(cost), strict=True)) == dtw(cost)


def test_the_median_is_that_of_scipy(rng):
    values = rng.standard_normal((2, 3, int(rng.integers(4, 40)))).astype(np.float32)
    wide = np.pad(values, ((0, 0), (0, 0), (3, 3)), mode="reflect")
    assert np.array_equal(median_filter(values), scipy.signal.medfilt(wide, (1, 1, 7))[..., 3:-3])
    assert median_filter(values[..., :3]).shape == (2, 3, 3)


def test_tokens_start_where_their_attention_begins():
    attention = np.full((2, 5, 60), 0.01, np.float32)  # a prompt of two tokens, two of text, end
    for row, span in ((1, slice(0, 20)), (2, slice(20, 45)), (3, slice(45, 60))):
        attention[:, row, span] = 1
    assert token_starts(attention, before=1) == pytest.approx([0, 0.4, 0.9])


# ------------------------------------------------------------------------------------------- words


def test_words_begin_with_a_space_or_are_punctuation():
    table = Tokens([b" it", b"'s", b" fo", b"ur", b".", b" (", b"\xe2\x80", b"\x9c", b" \xff"])
    groups = characters([0, 1, 2, 3, 4, 5, 6, 7, 8], table)
    assert groups[-2:] == [("“", 2), (" \ufffd", 1)]
    assert spaced(groups) == [
        *((" it's", 2), (" four", 2), (".", 1), (" (“", 3), (" \ufffd", 1)),
    ]


def test_punctuation_is_joined_to_its_word():
    texts = [' "', " four", ",", " five", "?", '"']
    words = [TimedWord(text, i, i + 1, i, i + 1) for i, text in enumerate(texts)]
    found = with_punctuation(words)
    assert [word.text for word in found] == [' " four,', ' five?"']
    assert [word[1:] for word in found] == [(1, 2, 0, 3), (3, 4, 3, 6)]


def test_a_word_after_a_sentence_loses_its_pause():
    ends = [0.3, 0.6, 0.8, 3.0, 3.3]
    texts = [" one", " two", ".", " three", " four"]
    spans = pairwise([0, *ends])
    words = [TimedWord(t, a, b, 0, 0) for t, (a, b) in zip(texts, spans, strict=True)]
    found = shortened(words)
    assert found[3].start_s == pytest.approx(3.0 - 2 * 0.3)
    assert [*found[:3], found[4]] == [*words[:3], words[4]]


def test_borders_of_words_move_to_the_edges_of_pauses(rng):
    pcm = (1e-3 * rng.standard_normal(4 * 16_000)).astype(np.float32)
    for begin, end in ((0.5, 1.2), (1.6, 3.0)):
        part = pcm[round(begin * 16_000) : round(end * 16_000)]
        part += 0.2 * np.sin(np.arange(len(part)) / 6).astype(np.float32)
    spans = [(0.3, 0.8), (0.8, 1.75), (1.75, 2.4), (2.4, 3.2)]
    words = [TimedWord(f" {i}", a, b, i, i + 1) for i, (a, b) in enumerate(spans)]
    found = [time for word in at_pauses(words, pcm) for time in word[1:3]]
    assert found == pytest.approx([0.5, 0.8, 0.8, 1.2, 1.6, 2.4, 2.4, 3.0], abs=0.021)
    assert at_pauses(words, rng.standard_normal(64_000).astype(np.float32) / 9) == words
    assert (at_pauses([], pcm), at_pauses(words, pcm[:100])) == ([], words)


# ------------------------------------------------------------------------------------- the graphs


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("make", [irregular, whole])
def test_the_attention_is_that_of_torch(make, precision, make_whisper, processor, rng, tmp_path):
    """For pruned and low-rank layers, too."""
    model = make(make_whisper, rng)
    export_onnx(model, processor, tmp_path, precision)
    recognizer = Recognizer(tmp_path, threads=1)
    pcm = (0.1 * rng.standard_normal(96_000)).astype(np.float32)
    clip = TimedClip(pcm, (Word("three one four " * 12, 0, 1),))
    prompt, words = spell(clip, model, processor)
    ids = [*prompt, *words[0]]
    assert len(ids) > 32  # fed in two parts
    found = recognizer.decoder_over(pcm, Transcript()).attention(ids, 300)
    heads = alignment(model)["heads"]
    assert recognizer.manifest["decoding"]["alignment"]["heads"] == heads
    torch_weights = cross_attentions(model, processor, clip)
    wanted = np.stack([torch_weights[layer][head].numpy() for layer, head in heads])
    assert np.abs(found - wanted).max() < {"fp32": 1e-5, "int8": 2e-3}[precision]


def test_alignment_heads_that_the_model_has_are_used(tiny_whisper):
    counts = [layer.encoder_attn.num_heads for layer in tiny_whisper.model.decoder.layers]
    upper = [[1, head] for head in range(counts[1])]
    for named, wanted in (([[0, 1], [9, 9]], [[0, 1]]), ([[0, 99]], upper), (None, upper)):
        tiny_whisper.generation_config.alignment_heads = named
        assert alignment(tiny_whisper)["heads"] == wanted


def test_the_delay_of_the_heads_is_stored_and_subtracted(tiny_whisper):
    generation = tiny_whisper.generation_config
    generation.alignment_heads, generation.word_delay_s = [[0, 1]], 0.06
    assert alignment(tiny_whisper)["delay_s"] == 0.06
    generation.alignment_heads = [[0, 99]]  # does not exist, so others are used
    assert "delay_s" not in alignment(tiny_whisper)

    attention = np.full((1, 5, 40), 0.01, np.float32)
    for row, column in ((1, 2), (2, 12), (3, 24), (4, 34)):
        attention[0, row, column : column + 8] = 1.0
    table = [b" one", b" two", b" three"]
    for delay_s in (0.0, 0.06, -0.06, 0.9):
        words = timed_words(attention, 0, [0, 1, 2], table, "en", delay_s)
        plain = timed_words(attention, 0, [0, 1, 2], table, "en")
        times, late = ([(w.start_s, w.end_s) for w in found] for found in (words, plain))
        np.testing.assert_allclose(times, np.clip(np.array(late) - delay_s, 0, 0.8), atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"timestamps": True}, {"beams": 2}], ids=str)
def test_the_times_are_those_of_openai_s_algorithm(
    options, recognizer, digits, processor, pcms, monkeypatch
):
    monkeypatch.setattr(listen, "at_pauses", lambda words, pcm: words)
    model = whisper.load(digits)
    heads = recognizer.manifest["decoding"]["alignment"]["heads"]
    prompt = list(recognizer.rules.prompt)
    for pcm in pcms[:4]:
        transcript = recognizer.transcribe(pcm, word_timestamps=True, **options)
        assert transcript.text == recognizer.transcribe(pcm, **options).text
        words = [word for segment in transcript.segments for word in segment.words]
        assert "".join(word.text for word in words).strip() == transcript.text
        text = [token for token in transcript.tokens if token < recognizer.rules.eos]
        times = token_times(model, processor, pcm, prompt, text, heads)
        groups = spaced(characters(text, recognizer.table))
        borders = np.cumsum([0, *(size for _, size in groups)])
        assert [w.start_s for w in words] == pytest.approx([times[i] for i in borders[:-1]])
        assert [w.end_s for w in words] == pytest.approx([times[i] for i in borders[1:]])
        assert all(0 < word.probability <= 1 for word in words)


def test_the_times_of_later_windows_count_from_the_start(recognizer, pcms):
    pcm = np.concatenate([pcms[1], np.zeros(96_000, np.float32), pcms[2]])
    transcript = recognizer.transcribe(pcm, word_timestamps=True)
    assert len(transcript.segments) > 1
    for segment in transcript.segments:
        assert to_text(segment.tokens, recognizer.table) == segment.text
        assert all(segment.start_s <= word.start_s <= segment.end_s for word in segment.words)
        assert segment.as_dict()["words"][0]["start_s"] == segment.words[0].start_s


def test_older_artifacts_run_and_have_no_word_timestamps(exported, tmp_path, pcms):
    folder = shutil.copytree(exported, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["decoding"]["alignment"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    old = Recognizer(folder, threads=1)
    assert old.transcribe(pcms[0]).text
    with pytest.raises(RunnerProblem, match="word_timestamps: the artifact") as error:
        old.transcribe(pcms[0], word_timestamps=True)
    assert "export the checkpoint again" in error.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": []}, "different heads"),
        ({"heads": [[0, 0]]}, "one of its heads"),
        ({"heads": [[10**9, 0]]}, "one of its heads"),
        ({"heads": [[1]]}, "one of its heads"),
        ({"heads": [[1, 99]]}, "one of its heads"),
        ({"heads": [[1, -1]]}, "a whole number"),
        ({"heads": "all"}, "a list of at most"),
        ({"scale": 0.0}, "a positive number"),
        ({"scale": "x"}, "a positive number"),
        ({"heads": [[1, 0], [1, 0]]}, "different heads"),
        ({"delay_s": 1.5}, "a number from -1.0 to 1.0"),
        ({"delay_s": "x"}, "a number from -1.0 to 1.0"),
    ],
    ids=str,
)
def test_alignment_heads_of_strangers_are_checked(change, message, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "odd")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["decoding"]["alignment"] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunnerProblem, match=message):
        Recognizer(folder, threads=1)
