"""Audio of the runner: WAV files, splitting in pauses, steady noise and silence."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from wav_bytes import wav

from benchmarks.speech.clips import read_manifest
from benchmarks.speech.noises import NOISES
from devices.runner.audio import FRAME, is_silent, is_steady, read_wav, sound_seconds, split
from devices.runner.problem import RunnerProblem

WINDOW = 96_000


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
