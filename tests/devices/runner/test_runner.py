"""The runner: WAV files, splitting in pauses, greedy decoding, and the commands."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speech.clips import read_manifest
from benchmarks.speech.noises import NOISES
from devices.device import RUNNER
from devices.runner.audio import FRAME, is_silent, is_steady, read_wav, sound_seconds, split
from devices.runner.decode.greedy import greedy
from devices.runner.decode.loops import loop_period
from devices.runner.decode.rules import Rules
from devices.runner.decode.text import join, read_tokens, to_text
from devices.runner.engines import sessions
from devices.runner.machine.host import (
    describe,
    give_back_memory,
    mapped,
    peak_rss_bytes,
    unmap_pages,
)
from devices.runner.measure import bench as measure
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer

ROOT = Path(__file__).parents[3]
WINDOW = 96_000


def wav(rate=16_000, channels=1, bits=16, coding=1, data=b"\0\0" * 1600, size=None) -> bytes:
    """Return the bytes of a WAV file; arguments can make one part of it wrong."""
    block = channels * bits // 8
    header = struct.pack("<HHIIHH", coding, channels, rate, rate * block, block, bits)
    chunks = b"fmt " + struct.pack("<I", len(header)) + header
    chunks += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


# ------------------------------------------------------------------------------- reading WAV files


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [
        pytest.param("PCM_U8", 1 / 128, id="8-bit"),
        pytest.param("PCM_16", 1 / 2**15, id="16-bit"),
        pytest.param("PCM_24", 1 / 2**23, id="24-bit"),
        pytest.param("PCM_32", 1e-7, id="32-bit"),
        pytest.param("FLOAT", 0, id="float"),
        pytest.param("DOUBLE", 0, id="double"),
    ],
)
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_every_sample_width_reads_as_the_same_sound(tmp_path, rng, container, subtype, tolerance):
    pcm = rng.uniform(-0.99, 0.99, 4000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", pcm, 16_000, subtype=subtype, format=container)
    found = read_wav(tmp_path / "a.wav")
    assert found.dtype == np.float32
    assert np.abs(found - pcm).max() <= tolerance


def test_stereo_is_averaged_with_a_warning(tmp_path, rng):
    stereo = rng.uniform(-0.9, 0.9, (500, 2)).astype(np.float32)
    soundfile.write(tmp_path / "s.wav", stereo, 16_000, subtype="FLOAT")
    with pytest.warns(UserWarning, match=r"s\.wav: 2 channels averaged into one"):
        pcm = read_wav(tmp_path / "s.wav")
    assert np.allclose(pcm, stereo.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x80000000])
def test_a_wav_streamed_into_a_pipe_is_read_to_its_end(tmp_path, size):
    (tmp_path / "p.wav").write_bytes(wav(size=size))
    assert len(read_wav(tmp_path / "p.wav")) == 1600


NAN = struct.pack("<4f", 0.1, float("nan"), float("inf"), 0.2)

BAD_FILES = [
    pytest.param(b"", "the file is empty (0 bytes)", "again", id="empty-file"),
    pytest.param(b"hello " * 9, "expected a WAV file, found not audio", "ffmpeg", id="not-audio"),
    pytest.param(b"OggS" + b"\0" * 60, "found an Ogg file", "-ar 16000 -ac 1", id="ogg"),
    pytest.param(b"fLaC" + b"\0" * 60, "found a FLAC file", "-ar 16000 -ac 1", id="flac"),
    pytest.param(wav(rate=8000), "sampled at 8000 Hz, the model needs 16000", "-ar", id="8kHz"),
    pytest.param(wav(data=b""), "there are no samples", "record", id="no-samples"),
    pytest.param(wav(bits=32, coding=3, data=NAN), "2 of 4 samples are NaN", "damaged", id="nan"),
    pytest.param(
        wav(size=4000),
        "promises 4000 bytes of audio and the file has 3200",
        "again",
        id="cut-short",
    ),
    pytest.param(wav()[:30], "truncated WAV file, 10 of 16 header bytes", "again", id="cut-header"),
    pytest.param(wav()[:36], "truncated WAV file, no `data` chunk", "again", id="no-data"),
    pytest.param(wav(coding=6, bits=8), "WAV coding 6 with 8 bits", "ffmpeg", id="a-law"),
    pytest.param(wav(channels=0), "and 0 channels", "ffmpeg", id="no-channel"),
]


@pytest.mark.parametrize(("content", "message", "hint"), BAD_FILES)
def test_a_bad_file_gets_an_error_message_with_its_name(tmp_path, content, message, hint):
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(RunnerProblem) as error:
        read_wav(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert hint in error.value.hint


def test_a_missing_file_and_a_folder_get_error_messages(tmp_path):
    with pytest.raises(RunnerProblem, match=r"gone\.wav: there is no such file$"):
        read_wav(tmp_path / "gone.wav")
    with pytest.raises(RunnerProblem, match="Is a directory"):
        read_wav(tmp_path)


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 60))
def test_a_header_cut_anywhere_never_crashes(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "c.wav"
    path.write_bytes(wav()[:cut])
    with pytest.raises(RunnerProblem):
        read_wav(path)


# ------------------------------------------------------------------------------- cutting long audio


def bursts(rng: np.random.Generator, lengths: list[float], gaps: list[float], noise: float):
    """Return tone bursts (words) with gaps (pauses), and a mask of the samples in words."""
    parts, words = [], []
    for length, gap in zip(lengths, gaps, strict=True):
        time = np.arange(int(length * 16_000)) / 16_000
        loud = rng.uniform(0.1, 0.6) * np.sin(2 * np.pi * rng.uniform(150, 900) * time)
        parts += [loud, np.zeros(int(gap * 16_000))]
        words += [np.ones(len(loud), bool), np.zeros(int(gap * 16_000), bool)]
    pcm = np.concatenate(parts)
    return (pcm + noise * rng.standard_normal(len(pcm))).astype(np.float32), np.concatenate(words)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    words=st.lists(st.tuples(st.floats(0.2, 0.9), st.floats(0.1, 0.6)), min_size=1, max_size=40),
    noise=st.sampled_from([0.0, 1e-4, 3e-3]),
)
def test_cuts_fall_into_pauses_and_lose_nothing(seed, words, noise):
    lengths, gaps = (list(values) for values in zip(*words, strict=True))
    pcm, is_word = bursts(np.random.default_rng(seed), lengths, gaps, noise)
    pieces = split(pcm, WINDOW)
    assert pieces[0].start == 0
    assert pieces[-1].stop == len(pcm)
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    assert all(0 < piece.stop - piece.start <= WINDOW for piece in pieces)
    assert not is_word[[piece.stop for piece in pieces[:-1]]].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400_000), st.integers(1, 200_000), st.integers(0, 2**32 - 1))
def test_any_sound_is_covered_once_by_pieces_of_a_window(samples, window, seed):
    pcm = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
    window = max(window, samples // 50 + 1)
    pieces = split(pcm, window)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == samples
    assert all(piece.stop - piece.start <= window for piece in pieces)


@pytest.mark.parametrize("hum", [0.0, 50.0, 60.0], ids=["offset", "50 Hz", "60 Hz"])
@pytest.mark.parametrize("amplitude", [0.003, 0.01, 0.03, 0.1])
def test_an_offset_or_hum_moves_no_cut_into_a_word(hum, amplitude, rng):
    sound, spans = bursts_of_words(rng, 60)
    t = np.arange(len(sound)) / 16_000
    disturbed = (sound + amplitude * np.cos(2 * np.pi * hum * t)).astype(np.float32)
    cuts = [piece.stop for piece in split(disturbed, WINDOW)][:-1]
    assert len(cuts) > 3
    assert not any(begin < cut < end for cut in cuts for begin, end in spans)


def bursts_of_words(rng, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return vowel-like words of a third of a second between pauses of 0.45 s, and their spans."""
    parts, spans, place = [], [], 0
    for _ in range(count):
        t = np.arange(int(rng.integers(4000, 7000))) / 16_000
        pitch = rng.uniform(100, 250)
        word = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 16))
        word = 0.05 * word * np.hanning(len(t))
        spans.append((place + len(t) // 8, place + len(t) - len(t) // 8))
        parts += [word, np.zeros(7200)]
        place += len(t) + 7200
    sound = np.concatenate(parts)
    return (sound + 3e-4 * rng.standard_normal(len(sound))).astype(np.float32), spans


def test_short_audio_is_one_piece_and_silence_is_split_too():
    assert split(np.ones(WINDOW, np.float32), WINDOW) == [slice(0, WINDOW)]
    assert len(split(np.zeros(10 * WINDOW, np.float32), WINDOW)) <= 20


def test_the_longest_pause_of_the_later_half_is_taken(rng):
    """Of two closures of 80 ms and a pause of 0.3 s, the cut is in the middle of the pause."""
    pcm, _ = bursts(rng, [3.2, 0.5, 0.6, 4.0], [0.08, 0.3, 0.08, 0.1], 1e-3)
    middle = (3.2 + 0.08 + 0.5 + 0.15) * 16_000
    assert abs(split(pcm, WINDOW)[0].stop - middle) <= 2 * FRAME


@pytest.mark.parametrize("place_s", [1.0, 4.3], ids=["early", "late"])
def test_digital_silence_hides_no_pause(place_s, rng):
    """A recording with noise in its pauses has 90 ms of zeros in a word of the first window."""
    sound, spans = bursts_of_words(rng, 12)
    begin, end = next(span for span in spans if span[0] > place_s * 16_000)
    sound[(begin + end) // 2 - 720 : (begin + end) // 2 + 720] = 0
    cuts = [piece.stop for piece in split(sound, WINDOW)][:-1]
    assert cuts
    assert not any(begin < cut < end for cut in cuts for begin, end in spans)


def test_cuts_are_late_so_that_windows_are_full(rng):
    sound, _ = bursts_of_words(rng, 100)
    pieces = split(sound, WINDOW)[:-1]
    assert all(piece.stop - piece.start >= 0.66 * WINDOW for piece in pieces)
    assert np.mean([piece.stop - piece.start for piece in pieces]) > 0.75 * WINDOW


def test_the_sound_of_a_recording_is_that_of_its_words(rng):
    sound, _ = bursts_of_words(rng, 12)
    assert sound_seconds(sound) == pytest.approx(12 * 0.3, rel=0.2)
    assert sound_seconds(np.zeros(16_000, np.float32)) == 0
    assert sound_seconds(rng.standard_normal(160_000).astype(np.float32)) == 0
    assert sound_seconds(sound[:100]) == 0


# ---------------------------------------------------------------------------------------- threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_an_artifact_is_run_with_as_many_threads_as_cores_that_the_process_may_use(exported):
    core = min(os.sched_getaffinity(0))
    program = f"""
import os, sys
os.sched_setaffinity(0, [{core}])
from devices.runner.recognizer import Recognizer
engine = Recognizer(sys.argv[1]).engine
sessions = engine.encoder, engine.decoder
print(*(session.get_session_options().intra_op_num_threads for session in sessions))
"""
    words = [sys.executable, "-c", program, str(exported)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1"]


# ----------------------------------------------------------------------------------- steady noise


@pytest.mark.parametrize("kind", ["white", "pink", "hum"])
@pytest.mark.parametrize("seconds", [1, 5, 30])
def test_noise_that_stays_the_same_is_steady(kind, seconds, rng):
    assert is_steady(1e-3 * NOISES[kind](seconds * 16_000, rng))


@pytest.mark.parametrize("kind", ["tones", "music"])
def test_tones_and_music_are_not_steady(kind, rng):
    assert not is_steady(NOISES[kind](160_000, rng))


@pytest.mark.parametrize("kind", ["white", "pink", "room"])
def test_digits_in_as_much_noise_are_not_steady(kind, clips, rng):
    for clip in read_manifest(clips):
        pcm = clip.pcm()
        loudness = np.sqrt(np.mean(np.square(pcm)))
        assert clip.text == "" or not is_steady(pcm + loudness * NOISES[kind](len(pcm), rng))


def test_less_than_a_second_is_never_steady():
    assert not is_steady(np.full(15_000, 0.1, np.float32))


def test_silence_is_below_minus_80_decibels():
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(np.full(100, 9e-5, np.float32))
    assert not is_silent(np.array([0, 2e-4], np.float32))


# ---------------------------------------------------------------------------------- greedy decoding


def rules(**changes) -> Rules:
    fields = {
        "prompt": [7, 8],
        "eos": 9,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "timestamp_begin": None,
        "max_new_tokens": 200,
    }
    return Rules.from_manifest(fields | changes)


class Script:
    """A decoder whose best tokens are given; the second best is always the next id."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.fed = tokens, []

    def __call__(self, ids):
        token = self.tokens[min(len(self.fed), len(self.tokens) - 1)]
        self.fed.append(tuple(ids))
        return np.array([2.0 * (i == token) + (i == token + 1) for i in range(12)], np.float32)


def test_the_prompt_is_fed_at_once_and_then_every_token():
    script = Script([3, 4, 9])
    assert greedy(script, rules(), stop_loops=True) == [3, 4]
    assert script.fed == [(7, 8), (3,), (4,)]


def test_suppressed_tokens_are_replaced_by_the_next_best():
    assert greedy(Script([3, 5, 9]), rules(suppress_tokens=[5]), stop_loops=True) == [3, 6]


def test_timestamps_are_never_chosen():
    assert greedy(Script([3, 5, 6, 9]), rules(timestamp_begin=10), stop_loops=True) == [3, 5, 6]
    assert 5 not in greedy(Script([3, 5, 4]), rules(timestamp_begin=5, max_new_tokens=4), True)


def test_begin_suppression_holds_for_the_first_token_only():
    assert greedy(Script([3, 3, 9]), rules(begin_suppress_tokens=[3]), stop_loops=True) == [4, 3]
    assert greedy(Script([9, 3, 9]), rules(begin_suppress_tokens=[9]), stop_loops=True) == [10, 3]


def test_equal_logits_give_the_lower_id():
    assert greedy(lambda ids: np.zeros(12, np.float32), rules(max_new_tokens=1), True) == [0]


def test_decoding_ends_at_max_new_tokens():
    assert len(greedy(Script([1, 2, 3] * 9), rules(max_new_tokens=5), stop_loops=True)) == 5
    assert greedy(Script([1]), rules(max_new_tokens=0), stop_loops=True) == []


@pytest.mark.parametrize(
    ("phrase", "copies"),
    [
        pytest.param([1], 30, id="a-word-30-times"),
        pytest.param([1, 2, 3], 10, id="three-tokens-10-times"),
        pytest.param([1, 2, 3, 4, 5, 6, 1, 2], 5, id="eight-tokens-5-times"),
    ],
)
def test_a_loop_is_cut_to_one_copy(phrase, copies):
    said = [5, 6, *phrase * copies]
    assert greedy(Script(said * 3), rules(), stop_loops=True) == [5, 6, *phrase]
    assert greedy(Script([*said, 9]), rules(), stop_loops=False) == said


def test_a_loop_that_starts_inside_a_phrase_keeps_its_first_words():
    said = [2, 3, *[1, 2, 3] * 10]
    assert greedy(Script(said * 9), rules(), stop_loops=True) == [2, 3, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80))
def test_the_loop_stop_fires_only_on_repetition(tokens):
    period = loop_period(tokens)
    expected = [
        n
        for n in range(1, len(tokens) // 5 + 1)
        for copies in [max(5, -(-30 // n))]
        if len(tokens) >= n * copies and tokens[-n * copies :] == tokens[-n:] * copies
    ]
    assert period == (expected[0] if expected else 0)


def test_six_equal_digits_are_no_loop():
    assert loop_period([4] * 6) == 0
    assert loop_period([4, 5] * 6) == 0


# -------------------------------------------------------------------------------------------- text


def test_characters_that_span_tokens_are_joined_and_halves_replaced(tmp_path):
    parts = [b" na", "ï".encode()[:1], "ï".encode()[1:], b"ve"]
    rows = [base64.b64encode(part).decode() for part in parts]
    (tmp_path / "tokens.json").write_text(json.dumps({"bytes": [*rows, None]}))
    table = read_tokens(tmp_path / "tokens.json")
    assert to_text([0, 1, 2, 3, 4, 99], table) == "naïve"
    assert to_text([0, 1, 3], table) == "na�ve"
    assert join(["one", "", "two"]) == "one two"


def test_a_damaged_token_table_gets_an_error_message(tmp_path):
    (tmp_path / "tokens.json").write_text('{"bytes": [')
    with pytest.raises(RunnerProblem, match=r"tokens\.json cannot be read"):
        read_tokens(tmp_path / "tokens.json")


# --------------------------------------------------------------------- the real model, in fp32


@pytest.fixture(scope="module")
def pcms(clips) -> list[np.ndarray]:
    """Ten shipped clips, within one window."""
    return [clip.pcm()[:WINDOW] for clip in read_manifest(clips)[::4]]


def test_tokens_equal_generate_on_speech_noise_and_silence(exported, digits, processor, pcms, rng):
    from edgewhisper.decoding import greedy as reference
    from edgewhisper.whisper import load

    noise = (0.1 * rng.standard_normal(WINDOW)).astype(np.float32)
    sounds = [*pcms, noise, np.zeros(WINDOW, np.float32), pcms[0][:100]]
    recognizer = Recognizer(exported, threads=1, guards=False)
    wanted = reference(load(digits), processor, sounds, batch_size=1)
    assert [recognizer.window(pcm) for pcm in sounds] == wanted
    assert any(wanted)


def test_text_equals_the_tokenizers(exported, processor, pcms):
    recognizer = Recognizer(exported, threads=1)
    found = [recognizer.transcribe(pcm) for pcm in pcms]
    decode = processor.tokenizer.decode
    assert [t.text for t in found] == [
        decode(t.tokens, skip_special_tokens=True).strip() for t in found
    ]


def test_every_stage_of_every_window_is_timed(exported, pcms):
    recognizer = Recognizer(exported, threads=1)
    transcript = recognizer.transcribe(np.concatenate([pcms[1], pcms[2], pcms[3], pcms[4]] * 2))
    windows = len(transcript.graph_s)
    assert windows > 1
    assert len(transcript.prompt_s) == windows
    assert len(transcript.per_token_s) == len(transcript.tokens)
    assert min(transcript.graph_s + transcript.prompt_s + transcript.per_token_s) > 0


def test_a_silent_window_is_not_decoded(exported):
    transcript = Recognizer(exported, threads=1).transcribe(np.zeros(2 * WINDOW, np.float32))
    assert (transcript.text, transcript.graph_s) == ("", [])


def test_logits_of_forced_tokens_agree_with_greedy_decoding(exported, pcms):
    recognizer = Recognizer(exported, threads=1, guards=False)
    tokens = recognizer.window(pcms[3])
    logits = recognizer.logits(pcms[3], tokens)
    assert logits.shape == (len(tokens) + 1, len(recognizer.table))
    assert [*tokens, recognizer.rules.eos] == logits.argmax(axis=1).tolist()


def test_window_refuses_more_than_a_window(exported):
    with pytest.raises(RunnerProblem, match="a window holds 96000 samples, 96001 were given") as e:
        Recognizer(exported, threads=1).window(np.ones(WINDOW + 1, np.float32))
    assert "transcribe()" in e.value.hint


DAMAGE = [
    pytest.param("manifest.json", None, "no manifest.json there", "edgewhisper export", id="none"),
    pytest.param("manifest.json", b"{", "manifest.json cannot be read", "export", id="no-json"),
    pytest.param(
        "manifest.json",
        b'{"format": 7, "target": "onnx"}',
        "artifact format 7 for 'onnx'; this runner reads 2 and 3",
        "same release",
        id="future-format",
    ),
    pytest.param("encoder.onnx", b"\x08", "1 bytes instead of", "again", id="bad-graph"),
    pytest.param("decoder.onnx", None, "there is no such file", "again", id="no-graph"),
]


@pytest.mark.parametrize(("name", "content", "message", "hint"), DAMAGE)
def test_a_damaged_artifact_gets_an_error_message(exported, tmp_path, name, content, message, hint):
    folder = tmp_path / "artifact"
    shutil.copytree(exported, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(RunnerProblem, match=message) as error:
        Recognizer(folder, threads=1)
    assert hint in error.value.hint


# ------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def device_folder(tmp_path_factory, exported, pcms) -> Path:
    """A device's work folder: the runner, an artifact, two clips and a stereo one."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(RUNNER, folder / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(exported, folder / "artifact")
    for name, pcm in (("a.wav", pcms[1]), ("b.wav", pcms[2])):
        soundfile.write(folder / name, pcm, 16_000, subtype="FLOAT")
    soundfile.write(folder / "s.wav", np.stack([pcms[1]] * 2, axis=1), 16_000, subtype="FLOAT")
    (folder / "clips.json").write_text('["a.wav", "b.wav"]')
    (folder / "bad.wav").write_bytes(wav(rate=8000))
    return folder


def runner(folder: Path, *argv: str, piped: bytes = b"") -> tuple[int, dict, str]:
    """Run the runner in the folder only; return exit code, JSON of the last line, and stderr."""
    command = [sys.executable, "-m", "runner", *argv]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, input=piped)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr.decode()


def python(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run another Python in the folder only."""
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True)


def test_transcribe_prints_texts_and_warns_of_averaged_channels(device_folder):
    code, answer, stderr = runner(device_folder, "transcribe", "artifact", "a.wav", "s.wav")
    texts = [found["text"] for found in answer["transcripts"]]
    assert code == 0
    assert texts[0] == texts[1] != ""
    assert stderr == "note:  s.wav: 2 channels averaged into one\n"


def test_transcribe_streams_segments_and_accepts_the_options(device_folder):
    argv = ["transcribe", "artifact", "a.wav", "--language", "hi", "--beams", "2", "--stream"]
    done = python(device_folder, "-m", "runner", *argv)
    *segments, last = map(json.loads, done.stdout.splitlines())
    (found,) = last["transcripts"]
    assert (found["audio"], found["language"]) == ("a.wav", "hi")
    assert segments == [{"audio": "a.wav", **segment} for segment in found["segments"]]
    code, answer, _ = runner(device_folder, *argv[:3], "--language", "xx")
    assert code == 1
    assert "language 'xx': not among" in answer["error"]


def test_transcripts_of_a_folder_are_written_by_several_jobs(device_folder, tmp_path):
    for name in ("a.wav", "b.wav"):
        shutil.copy(device_folder / name, tmp_path)
    argv = ["transcribe", "artifact", str(tmp_path), "--output", "srt,json", "--jobs", "2"]
    code, answer, stderr = runner(device_folder, *argv)
    assert (code, stderr) == (0, "")
    for row in answer["transcripts"]:
        path = Path(row["audio"])
        assert json.loads(path.with_suffix(".json").read_text()) == row
        assert path.with_suffix(".srt").read_text().startswith("1\n00:00:00,")
        assert 0 < row["segments"][0]["no_speech_prob"] < 1
    code, answer, _ = runner(device_folder, *argv)
    assert code == 1
    assert "a.json exists already" in answer["error"] or "a.srt exists already" in answer["error"]
    code, answer, stderr = runner(device_folder, "transcribe", "artifact", "a.wav", "bad.wav")
    assert code == 1
    assert answer["transcripts"][0]["text"]
    assert stderr.startswith("error: bad.wav: sampled at 8000 Hz")


def test_audio_is_read_from_standard_input(device_folder):
    _, wanted, _ = runner(device_folder, "transcribe", "artifact", "a.wav")
    content = (device_folder / "a.wav").read_bytes()
    code, answer, _ = runner(device_folder, "transcribe", "artifact", "-", piped=content)
    assert code == 0
    assert answer["transcripts"] == [wanted["transcripts"][0] | {"audio": "-"}]
    for strict in ([], ["--strict"]):
        argv = ["transcribe", "artifact", "-", *strict]
        code, answer, notes = runner(device_folder, *argv, piped=content[:2000])
        said = answer["error"] if strict else notes
        assert code == len(strict)
        assert "-: truncated WAV file, its header promises" in said


def test_ctrl_c_ends_a_long_recording_cleanly(device_folder, pcms):
    soundfile.write(device_folder / "long.wav", np.concatenate(pcms * 40), 16_000)
    argv = ["transcribe", "artifact", "long.wav", "--stream"]
    with subprocess.Popen(
        [sys.executable, "-m", "runner", *argv],
        cwd=device_folder,
        env={},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        first = json.loads(running.stdout.readline())
        running.send_signal(signal.SIGINT)
        rest, stderr = running.communicate()
    (device_folder / "long.wav").unlink()
    assert first["start_s"] == 0
    assert all("text" in json.loads(line) for line in rest.splitlines())
    assert running.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted", "there may be a progress line before"


def test_the_text_does_not_depend_on_the_number_of_threads(exported, pcms):
    one, two = (Recognizer(exported, threads=n) for n in (1, 2))
    assert [one.transcribe(pcm).tokens for pcm in pcms] == [
        two.transcribe(pcm).tokens for pcm in pcms
    ]


def test_the_python_api_works_on_a_device(device_folder):
    code = (
        "import sys, runner\n"
        "assert not {'numpy', 'onnxruntime'} & set(sys.modules)\n"
        "from runner import Recognizer\n"
        "recognizer = Recognizer('artifact', threads=1)\n"
        "for segment in recognizer.stream('a.wav'):\n"
        "    print(segment.text)\n"
        "assert recognizer.transcribe('a.wav').text == segment.text\n"
    )
    done = python(device_folder, "-c", code)
    assert done.stderr == ""
    assert done.stdout.strip()


def test_bench_prompts_each_clip_for_its_language(device_folder, monkeypatch):
    heard, transcribe = [], Recognizer.transcribe
    monkeypatch.setattr(
        Recognizer,
        "transcribe",
        lambda *given, **options: (
            heard.append(options["language"]) or transcribe(*given, **options)
        ),
    )
    languages = device_folder / "languages.json"
    languages.write_text('["hi_in", "tlh"]')
    try:
        measure.bench(device_folder / "artifact", device_folder / "clips.json", threads=1)
        assert heard == ["hi", None] * 2
        languages.write_text('["hi"]')
        with pytest.raises(RunnerProblem, match="1 entries for 2 clips"):
            measure.read_languages(device_folder / "clips.json", 2)
    finally:
        languages.unlink()
    assert measure.read_languages(device_folder / "clips.json", 2) == [None, None]


def test_bench_returns_every_sample(device_folder):
    code, answer, _ = runner(
        device_folder, *["bench", "artifact", "clips.json", "--repeats", "2", "--threads", "1"]
    )
    tokens = sum(len(found) for found in answer["tokens"])
    assert code == 0
    assert [len(answer[name]) for name in ("load_s", "end_to_end_s", "cpu_s")] == [1, 4, 4]
    assert len(answer["mel_s"]) == len(answer["encoder_s"]) == 4
    assert len(answer["per_token_s"]) == 2 * tokens
    assert 0 < answer["mel_share"] < 1
    assert answer["mel_s"][0] / answer["encoder_s"][0] == pytest.approx(
        answer["mel_share"] / (1 - answer["mel_share"])
    )
    assert all(answer["texts"])
    assert answer["peak_rss_bytes"] > 20e6
    assert set(answer["versions"]) == {"python", "numpy", "onnxruntime"}


def test_an_error_is_json_on_stdout_and_text_on_stderr(device_folder):
    code, answer, stderr = runner(device_folder, "transcribe", "artifact", "bad.wav")
    assert code == 1
    assert "sampled at 8000 Hz" in answer["error"]
    assert stderr == f"error: {answer['error']}\ntry:   {answer['hint']}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the list of clips is empty"),
        ("{", "not a list of clips"),
        (None, "not a list of clips"),
    ],
    ids=["empty", "no-json", "missing"],
)
def test_a_bad_list_of_clips_gets_an_error_message(tmp_path, content, message):
    path = tmp_path / "clips.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunnerProblem, match=message):
        measure.read_clips(path)


def test_the_runner_imports_only_numpy_and_onnxruntime(device_folder):
    code = (
        "import importlib, pkgutil, sys, runner\n"
        "for module in pkgutil.walk_packages(runner.__path__, 'runner.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'onnx', 'scipy', 'soundfile',"
        " 'edgewhisper', 'benchmarks', 'export', 'devices') if m in sys.modules])"
    )
    done = python(device_folder, "-c", code)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------- the machine


PI = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n",
    "proc/meminfo": "MemTotal:        3884452 kB\nMemFree: 1 kB\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "proc/loadavg": "0.42 0.30 0.20 1/99 1234\n",
    "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
}


def test_a_raspberry_pi_is_described_in_si_units(tmp_path):
    for name, text in PI.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = describe(tmp_path)
    assert found["model"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["cpu"] == "implementer 0x41 part 0xd08"
    assert found["isa"] == ["asimd"]
    assert found["governor"] == "ondemand"
    assert found["frequency_hz"] == 1.5e9
    assert found["temperature_c"] == 48.312
    assert found["load_average"] == 0.42
    assert found["memory_bytes"] == 3884452 * 1024
    assert found["os"] == "Debian GNU/Linux 12 (bookworm)"


def test_missing_files_read_unavailable_and_never_zero(tmp_path):
    found = describe(tmp_path)
    silent = ("model", "cpu", "isa", "governor", "frequency_hz", "temperature_c", "memory_bytes")
    assert {name: found[name] for name in silent} == dict.fromkeys(silent, "unavailable")
    assert peak_rss_bytes(tmp_path) == "unavailable"


def test_mapped_pages_are_returned_and_read_again(tmp_path, rng):
    held = rng.integers(0, 256, 2**22, np.uint8)
    held.tofile(tmp_path / "held.weights")
    os.sync()  # pages not written to disk yet cannot be dropped
    array = np.memmap(tmp_path / "held.weights", mode="r")
    assert array.sum() == held.sum()
    before = resident(tmp_path / "held.weights")
    give_back_memory(mapped(tmp_path / "elsewhere"))
    assert resident(tmp_path / "held.weights") == before
    give_back_memory(mapped(tmp_path))
    assert resident(tmp_path / "held.weights") <= before
    assert (array == held).all()


def test_pages_of_a_mapped_file_leave_the_process_and_are_mapped_again(tmp_path, rng):
    held = rng.integers(0, 256, 2**22, np.uint8)
    held.tofile(tmp_path / "held.weights")
    array = np.memmap(tmp_path / "held.weights", mode="r")
    assert (array == held).all()
    (place,) = mapped(tmp_path)
    assert (place.path, place.size) == (str(tmp_path / "held.weights"), 2**22)
    before = resident_bytes(place)
    unmap_pages([place])
    assert (before, resident_bytes(place)) == (2**22, 0)
    assert (array == held).all()
    assert mapped(tmp_path, maps=tmp_path / "not Linux") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sessions_unmap_only_their_own_files(exported):
    """The addresses of closed sessions may belong to other memory, which madvise would erase."""
    closed, kept = (Recognizer(exported).engine for _ in range(2))
    assert closed.mapped and kept.mapped
    assert not set(closed.mapped) & set(kept.mapped)
    del closed
    assert set(kept.mapped) <= set(mapped(exported))


def resident_bytes(place) -> int:
    """The bytes of a mapping that are in this process, from /proc/self/smaps."""
    _, entry = Path("/proc/self/smaps").read_text().split(f"{place.start:x}-", 1)
    return 1024 * int(re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc")
@pytest.mark.parametrize("returned", [False, True])
def test_large_blocks_are_returned_when_they_are_freed(returned):
    """By default, glibc keeps a freed block below a smaller one once it has freed such blocks."""
    program = f"""
import ctypes, re
from devices.runner.machine.host import return_large_blocks
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallopt"): raise SystemExit("no glibc")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
if {returned}: return_large_blocks()
libc.free(libc.malloc(24 << 20))
before, block = resident(), libc.malloc(16 << 20)
above = libc.malloc(100_000)
ctypes.memset(block, 1, 16 << 20)
libc.free(block)
print(resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "no glibc" in run.stderr:
        pytest.skip("mallopt is glibc's")
    assert (int(run.stdout) < 2 << 10) == returned, run


def resident(path):
    """Return the kilobytes of a mapped file that are in memory, or 0 if unknown."""
    try:
        told = Path("/proc/self/smaps").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(rf"{re.escape(str(path))}\n(?:.+\n)*?Rss:\s+(\d+)", told)))


def test_the_high_water_mark_is_in_bytes(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmHWM:\t   61234 kB\n")
    assert peak_rss_bytes(tmp_path) == 61234 * 1024


def test_an_emulators_memory_is_not_reported_as_the_programs(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmHWM:\t   61234 kB\n")
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/arch").write_text("another\n")
    assert peak_rss_bytes(tmp_path) == "unavailable"


# ---------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"timestamps": True}, {"fallback": True}])
def test_threads_can_share_a_recognizer(exported, pcms, options, monkeypatch):
    """Every decoder step lets other threads run before its graph runs."""
    recognizer = Recognizer(exported, threads=1)
    alone = [recognizer.transcribe(pcm, **options).text for pcm in pcms]
    assert len(set(alone)) > 1
    step = sessions.Decoder.step

    def slow(decoder, ids):
        time.sleep(0.001)
        return step(decoder, ids)

    monkeypatch.setattr(sessions.Decoder, "step", slow)
    for threads in (2, 4):
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda pcm: recognizer.transcribe(pcm, **options).text, pcms))
        assert found == alone


def test_interleaved_streams_do_not_mix(exported, pcms):
    recognizer = Recognizer(exported, threads=1)
    long = [np.concatenate([first, *pcms]) for first in pcms[:2]]
    alone = [[segment.text for segment in recognizer.stream(pcm)] for pcm in long]
    turns = zip(*(recognizer.stream(pcm) for pcm in long), strict=False)
    found = [[segment.text for segment in segments] for segments in zip(*turns, strict=True)]
    assert len(found[0]) > 1
    assert found == [texts[: len(found[0])] for texts in alone]
