"""Transcription while sound is recorded: partial and final results, streams, the microphone."""

from __future__ import annotations

import io
import os
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from benchmarks.speech.clips import read_manifest
from devices.runner import live
from devices.runner.batch import Job
from devices.runner.live import Live, agreement, chunks, in_pause, latest, transcript
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer

SECOND = 16_000


@pytest.fixture(scope="module")
def recognizer(exported) -> Recognizer:
    return Recognizer(exported, threads=1)


@pytest.fixture(scope="module")
def pcms(clips) -> list[np.ndarray]:
    return [clip.pcm()[: 5 * SECOND] for clip in read_manifest(clips)[1:40:5]]


def raw(pcm: np.ndarray) -> bytes:
    return np.clip(pcm * 32768, -32768, 32767).astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("before", "text", "agreed"),
    [
        ("", "one two", ""),
        ("one tw", "one two", "one "),
        ("one two", "one two three", "one two "),
        ("one two", "one two", "one two"),
        ("on", "one", ""),
        ("一二", "一二三", "一二"),
    ],
)
def test_the_agreement_is_the_common_beginning_in_whole_words(before, text, agreed):
    assert agreement(before, text) == agreed


def test_a_pause_is_quiet_after_something_loud(rng):
    noise = 1e-3 * rng.standard_normal(3 * SECOND).astype(np.float32)
    speech = noise.copy()
    speech[: 2 * SECOND] += 0.3 * np.sin(np.arange(2 * SECOND) / 5).astype(np.float32)
    assert in_pause(speech)
    assert not in_pause(speech[: 2 * SECOND])
    assert not in_pause(noise)
    assert not in_pause(speech[:1000])


def test_results_grow_until_a_pause_ends_them():
    """A recogniser that hears a word a second; the last one is wrong until the next second."""

    def recognise(pcm: np.ndarray) -> str:
        loud = int(np.abs(pcm).max(initial=0) > 0) and np.flatnonzero(pcm)[-1] // SECOND + 1
        cut = bool(loud * SECOND >= len(pcm))
        return " ".join([f"w{n}" for n in range(loud)][: -1 if cut else None] + ["?"] * cut)

    sound = np.zeros(6 * SECOND, np.float32)
    sound[: 3 * SECOND] = 0.1
    heard = Live(recognise, 20 * SECOND)
    found = [r for n in range(6) for r in heard.feed(sound[n * SECOND : (n + 1) * SECOND])]
    assert [(r.text, r.tentative, r.final) for r in found] == [
        ("", "?", False),
        ("", "w0 ?", False),
        ("w0", "w1 ?", False),
        ("w0 w1 w2", "", True),
    ]
    assert (found[-1].start_s, found[-1].end_s) == (0.0, 4.0)
    assert list(heard.finish()) == []


def test_a_full_window_is_finished_in_a_pause(recognizer, pcms):
    pcm = np.concatenate([pcms[1], pcms[2], pcms[3], pcms[4], pcms[5]])
    heard = Live(lambda part: recognizer.transcribe(part).text, recognizer.window_samples)
    finals = [r for n in range(0, len(pcm), 8000) for r in heard.feed(pcm[n : n + 8000]) if r.final]
    finals += heard.finish()
    assert len(finals) > 2
    assert all(0 < r.end_s - r.start_s <= 6 for r in finals)
    assert all(a.end_s <= b.start_s for a, b in pairwise(finals))
    assert finals[-1].end_s == pytest.approx(len(pcm) / SECOND, abs=0.5)


@pytest.mark.parametrize("kind", ["raw", "PCM_16", "FLOAT", "stereo"])
def test_samples_come_from_wav_or_without_a_header(kind, pcms, tmp_path):
    if kind == "raw":
        content = raw(pcms[0])
    else:
        pcm = np.stack([pcms[0]] * 2, axis=1) if kind == "stereo" else pcms[0]
        subtype = "PCM_16" if kind == "stereo" else kind
        soundfile.write(tmp_path / "a.wav", pcm, SECOND, subtype=subtype)
        content = (tmp_path / "a.wav").read_bytes()
    found = np.concatenate(list(chunks(Path("-"), io.BufferedReader(io.BytesIO(content), 7))))
    assert found[: len(pcms[0])] == pytest.approx(pcms[0], abs=2**-15)


def test_a_header_of_another_rate_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    with (tmp_path / "a.wav").open("rb") as stream, pytest.raises(RunnerProblem, match="8000 Hz"):
        list(latest(chunks(Path("-"), stream)))


def test_sound_that_arrives_while_the_model_works_is_joined():
    ready, go_on = threading.Event(), threading.Event()

    def parts():
        yield np.ones(1, np.float32)
        ready.wait(60)
        yield np.full(2, 2, np.float32)
        yield np.full(3, 3, np.float32)
        go_on.set()

    found = latest(parts())
    assert len(next(found)) == 1
    ready.set()
    go_on.wait(60)
    assert np.concatenate(list(found)).tolist() == [2, 2, 3, 3, 3]


def test_standard_input_is_transcribed_and_written(recognizer, pcms, tmp_path, monkeypatch):
    stream = io.BufferedReader(io.BytesIO(raw(pcms[1])))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    results = []
    job = Job(Path("-"), {"txt": tmp_path / "a.txt"})
    row = transcript(recognizer, [job], results.append)
    assert row["text"] == recognizer.transcribe(pcms[1]).text
    assert results[-1].final
    assert (tmp_path / "a.txt").read_text() == row["text"] + "\n"


def test_the_microphone_is_read_from_a_recorder(recognizer, pcms, tmp_path, monkeypatch):
    """A program named arecord that writes samples to standard output, as the real one does."""
    (tmp_path / "sound").write_bytes(raw(pcms[1]))
    recorder = tmp_path / "arecord"
    recorder.write_text(f"#!/bin/sh\ncat {tmp_path / 'sound'}\n")
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    row = transcript(recognizer, [Job(Path("mic"))], lambda result: None)
    assert row["text"] == recognizer.transcribe(pcms[1]).text


def test_other_sources_and_missing_recorders_are_errors(recognizer, monkeypatch):
    with pytest.raises(RunnerProblem, match=r"a\.wav is neither - nor mic"):
        transcript(recognizer, [Job(Path("a.wav"))], print)
    with pytest.raises(RunnerProblem, match="2 inputs"):
        transcript(recognizer, [Job(Path("-"))] * 2, print)
    monkeypatch.setattr(live.shutil, "which", lambda name: None)
    with pytest.raises(RunnerProblem, match="one of the programs arecord, parec, rec"):
        transcript(recognizer, [Job(Path("mic"))], print)
