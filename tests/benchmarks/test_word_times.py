"""Word timestamps against a forced alignment."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from benchmarks import word_times


@pytest.mark.parametrize(
    ("word", "bare"),
    [(" Won't,", "won't"), (" “Stop!”", "stop"), (" 1920.", ""), (" well-kept", ""), (" ", "")],
)
def test_words_are_spelled_as_in_the_dictionary(word, bare):
    assert word_times.plain(word) == bare


def test_errors_and_bias_are_those_of_starts_and_ends():
    ours = [(0.1, 0.5), (0.5, 0.9), (1.0, 1.5)]
    theirs = [(0.0, 0.5), (0.48, 0.95), (1.02, 1.5)]
    start, end = word_times.summary(ours, theirs)
    assert list(start.values()) == ["start", "20", "84", "+20"]
    assert list(end.values()) == ["end", "0", "40", "+0"]


class Frames:
    """A decoder that gives every word 10 frames, after as many of silence."""

    def __init__(self, **options):
        self.words = []

    def lookup_word(self, word):
        return None if word == "xyzzy" else "W ER D"

    def set_align_text(self, text):
        self.words = ["<s>", *(f"{word}(2)" for word in text.split()), "<sil>"]

    def start_utt(self): ...

    def process_raw(self, data, full_utt): ...

    def end_utt(self): ...

    def seg(self):
        return [
            SimpleNamespace(word=word, start_frame=10 * i, end_frame=10 * i + 9)
            for i, word in enumerate(self.words)
        ]


def test_the_alignment_has_a_span_for_each_word(monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "pocketsphinx", SimpleNamespace(Decoder=Frames))
    align = word_times.aligner()
    pcm = rng.uniform(-1, 1, 4800).astype("float32")
    assert align(pcm, ["one", "two"]) == [pytest.approx((0.1, 0.2)), pytest.approx((0.2, 0.3))]
    assert align(pcm, ["one", "xyzzy"]) is None
    assert align(pcm, ["one", ""]) is None


def test_a_missing_aligner_gets_an_error_message(exported, clips, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    assert word_times.main([str(exported), str(clips)]) == 1
    assert "pip install pocketsphinx" in capsys.readouterr().err
