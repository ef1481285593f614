"""Sound files of every format: complete, cut short, with wrong headers; arrays of samples."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from benchmarks.speech.clips import read_manifest
from benchmarks.speech.containers import FORMATS
from benchmarks.speech.sound import read_audio
from devices.runner.audio import checked_samples, read_wav
from devices.runner.problem import RunnerProblem
from export.problem import Problem

RATE = 16_000
SECONDS = 4
KINDS = {
    "wav": {"subtype": "PCM_16"},
    "wavex": {"format": "WAVEX", "subtype": "PCM_24"},
    "mulaw": {"format": "WAV", "subtype": "ULAW"},
    "adpcm": {"format": "WAV", "subtype": "IMA_ADPCM"},
    "rf64": {"format": "RF64"},
    "w64": {"format": "W64"},
    "aiff": {"format": "AIFF"},
    "au": {"format": "AU"},
    "caf": {"format": "CAF"},
    "nist": {"format": "NIST"},
    "flac": {"format": "FLAC"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
}
COMPRESSED = {"m4a": "aac", "mp4": "aac", "mov": "pcm_s16le", "aac": "aac", "webm": "libopus"}
"""Suffix -> codec of the files that PyAV reads."""


@pytest.fixture
def sound(rng) -> np.ndarray:
    """Noise with a varying loudness, so that all parts differ."""
    t = np.arange(SECONDS * RATE) / RATE
    loudness = 0.1 * (1 + np.sin(2 * np.pi * 0.7 * t))
    return (loudness * rng.standard_normal(len(t)).clip(-3, 3)).astype(np.float32)


def write(folder: Path, kind: str, sound: np.ndarray) -> Path:
    path = folder / f"sound.{kind}"
    soundfile.write(path, sound, RATE, **{"format": "WAV", **KINDS[kind]})
    return path


def write_compressed(folder: Path, kind: str, sound: np.ndarray, rate: int = RATE) -> Path:
    path = folder / f"sound.{kind}"
    with av.open(path, "w", format={"m4a": "mp4", "aac": "adts"}.get(kind, kind)) as container:
        stream = container.add_stream(COMPRESSED[kind], rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in av.AudioResampler(format=stream.format, rate=rate).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def quietly(path: Path, strict: bool = True) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_audio(path, strict)


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_file_is_read_without_a_warning(kind, sound, tmp_path):
    found = quietly(write(tmp_path, kind, sound))
    assert abs(len(found) - len(sound)) < 2000
    assert 0.05 < np.abs(found).max() <= 1.1


@pytest.mark.parametrize("share", [0.5, 0.75, 0.97])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_short_is_refused_or_read_with_a_warning(kind, share, sound, tmp_path):
    path = write(tmp_path, kind, sound)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Problem, match=r"sound\.\w+"):
        read_audio(path)
    try:
        with pytest.warns(UserWarning, match="its text may be incomplete"):
            found = read_audio(path, strict=False)
    except Problem as problem:  # a short Ogg file may have no complete page
        assert kind in ("ogg", "opus"), problem
    else:
        assert 0.2 * len(sound) < len(found) < len(sound)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_files_are_read(kind, tmp_path):
    """A tone with a pause; decoders may add some milliseconds."""
    sound = (0.3 * np.sin(2 * np.pi * 440 * np.arange(4 * RATE) / RATE)).astype(np.float32)
    sound[RATE : 2 * RATE] = 0
    found = quietly(write_compressed(tmp_path, kind, sound))
    assert abs(len(found) - len(sound)) < 2500
    loud = np.abs(found).reshape(-1)[: 4 * RATE // 100 * 100].reshape(-1, 100).max(axis=1) > 0.1
    wanted = np.abs(sound).reshape(-1, 100).max(axis=1) > 0.1
    assert np.mean(loud[: len(wanted)] != wanted[: len(loud)]) < 0.1


@pytest.mark.parametrize("share", [0.5, 0.75, 0.97])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_file_that_is_cut_short_is_refused_or_read_with_a_warning(
    kind, share, sound, tmp_path
):
    path = write_compressed(tmp_path, kind, sound)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Problem, match=r"sound\.\w+"):
        read_audio(path)
    if kind in ("m4a", "mp4", "mov"):  # the index of an MP4 file is at its end
        with pytest.raises(Problem, match=r"is not a readable MP4 file \(the MP4 box at byte"):
            read_audio(path, strict=False)
        return
    with pytest.warns(UserWarning, match="its text may be incomplete"):
        found = read_audio(path, strict=False)
    assert 0.2 * len(sound) < len(found) < len(sound)


def test_a_compressed_file_needs_pyav(sound, tmp_path, monkeypatch):
    path = write_compressed(tmp_path, "m4a", sound)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Problem, match="reading MP4 files needs PyAV") as error:
        read_audio(path)
    assert "edgewhisper[audio]" in error.value.hint


def test_a_video_without_sound_is_refused(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(Problem, match="has no audio stream"):
        read_audio(tmp_path / "a.mp4")


def test_random_bytes_after_the_first_are_an_error_not_a_traceback(rng, tmp_path):
    for head in (b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3\x9f", b"\xff\xf1P\x80"):
        (tmp_path / "a").write_bytes(head + rng.bytes(int(rng.integers(0, 3000))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Problem):
                read_audio(tmp_path / "a")


def test_formats_whose_end_cannot_be_checked_are_not_read(sound, tmp_path):
    for format in ("VOC", "IRCAM", "PAF"):
        assert format not in FORMATS
        soundfile.write(tmp_path / "a", sound, RATE, format=format, subtype="PCM_16")
        with pytest.raises(Problem, match=f"{format} files are not supported"):
            read_audio(tmp_path / "a")


def wav(data: bytes, size: int, riff: int | None = None, behind: bytes = b"") -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body + behind


def sixteen(sound: np.ndarray) -> bytes:
    return (sound * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("size", [0, 2_000_000_000, 1_500_000_000])
def test_a_file_with_a_placeholder_length_is_read_to_the_end(size, sound, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(sixteen(sound), size, size + 36))
    for read in (read_audio, read_wav):
        with pytest.warns(UserWarning, match=f"promises {size} bytes of audio; all 128000 are"):
            assert len(read(path)) == len(sound)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0x7FFFF000])
def test_wav_files_written_to_pipes_are_read_to_the_end(size, sound, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(sixteen(sound), size, size))
    assert len(quietly(path)) == len(read_wav(path)) == len(sound)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_header_with_too_small_a_length_is_reported(share, sound, tmp_path):
    path, size = tmp_path / "a.wav", int(share * len(sound)) * 2
    path.write_bytes(wav(sixteen(sound), size))
    for read, error in ((read_audio, Problem), (read_wav, RunnerProblem)):
        with pytest.raises(error, match=f"damaged WAV file, its header promises {size} bytes"):
            read(path)
        with pytest.warns(UserWarning, match="may be incomplete"):
            assert len(read(path, strict=False)) == len(sound)


@pytest.mark.parametrize(
    "behind",
    [
        b"id3 " + struct.pack("<I", 4) + b"abcd",
        b"LIST" + struct.pack("<I", 4) + b"INFO",
        b"\0" * 99,
    ],
    ids=["id3", "LIST", "padding"],
)
def test_chunks_after_the_samples_are_ignored(behind, sound, tmp_path):
    path = tmp_path / "a.wav"
    data = sixteen(sound)
    path.write_bytes(wav(data, len(data), behind=behind))
    assert len(quietly(path)) == len(read_wav(path)) == len(sound)


def test_errors_of_a_clip_begin_with_its_manifest_and_line(sound, tmp_path):
    path = write(tmp_path, "wav", sound)
    path.write_bytes(path.read_bytes()[:1000])
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text('\n{"audio": "sound.wav", "text": "one"}\n')
    with pytest.raises(Problem, match=r"clips\.jsonl, line 2: .*sound\.wav: truncated WAV file"):
        read_manifest(manifest)[0].pcm()


# ------------------------------------------------------------------------------------------ pipes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_a_named_pipe_is_read(kind, sound, tmp_path):
    content = write(tmp_path, kind, sound).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    found = read_audio(pipe)
    writer.join()
    assert abs(len(found) - len(sound)) < 2000


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="needs /dev/stdin")
def test_standard_input_by_its_name_is_read(sound, tmp_path):
    code = "from benchmarks.speech.sound import read_audio; print(len(read_audio('/dev/stdin')))"
    given = {"cwd": Path(__file__).parents[3], "capture_output": True}
    path = write(tmp_path, "wav", sound)
    piped = subprocess.run([sys.executable, "-c", code], input=path.read_bytes(), **given)
    with path.open("rb") as file:
        redirected = subprocess.run([sys.executable, "-c", code], stdin=file, **given)
    assert int(piped.stdout) == int(redirected.stdout) == len(sound)


@pytest.mark.parametrize("content", [b"", b"no sound at all"])
def test_a_pipe_without_sound_is_an_error(content):
    code = "from benchmarks.speech.sound import read_audio; read_audio('/dev/stdin')"
    given = {"cwd": Path(__file__).parents[3], "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], input=content.decode(), **given)
    assert "Problem: /dev/stdin is " in done.stderr


# ----------------------------------------------------------------------------------------- arrays


def test_samples_are_scaled_by_their_dtype(sound):
    for dtype, scale in (("int8", 128), ("int16", 2**15), ("int32", 2**31)):
        found = checked_samples((sound.astype(np.float64) * (scale - 1)).astype(dtype))
        assert found.dtype == np.float32
        assert np.abs(found - sound).max() < 2 / scale + 1e-6
    unsigned = (sound * 127 + 128).astype(np.uint8)
    assert np.abs(checked_samples(unsigned) - sound).max() < 0.02
    assert np.array_equal(
        checked_samples((sound * 32767).astype(">i2")),
        checked_samples((sound * 32767).astype("<i2")),
    )


def test_floats_of_every_width_and_layout_are_the_same_samples(sound):
    wide = np.stack([sound, sound], 1)
    for given in (
        sound.astype(np.float64),
        sound[:, None],
        sound[None],
        wide[:, 0],
        sound[::-1][::-1],
        sound.astype(">f4"),
    ):
        assert np.array_equal(checked_samples(given), sound)
    assert np.abs(checked_samples(sound.astype(np.float16)) - sound).max() < 1e-3
    assert checked_samples(sound) is not None and sound.flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (list, "a list is not a NumPy array"),
        (lambda x: x.tobytes(), "a bytes is not a NumPy array"),
        (lambda x: memoryview(x), "a memoryview is not a NumPy array"),
        (lambda x: np.stack([x, x], 1), r"an array of shape \(64000, 2\) is not one channel"),
        (lambda x: np.stack([x, x]), r"an array of shape \(2, 64000\) is not one channel"),
        (lambda x: np.float32(1), "a float32 is not a NumPy array"),
        (lambda x: np.array(1.0), r"an array of shape \(\) is not one channel"),
        (lambda x: x[:0], "there are no samples"),
        (lambda x: (x * 32768).astype(np.int64), "dtype int64 have no known scale"),
        (lambda x: (x + 1).astype(np.uint16), "dtype uint16 have no known scale"),
        (lambda x: x > 0, "dtype bool have no known scale"),
        (lambda x: x.astype(np.complex64), "dtype complex64 have no known scale"),
        (lambda x: x.astype(object), "dtype object have no known scale"),
        (lambda x: x * 32768, "where full scale is 1.0"),
        (lambda x: x.astype(np.float64) * 2**31, "where full scale is 1.0"),
        (lambda x: np.where(np.arange(len(x)) == 9, np.nan, x), "1 of 64000 samples are NaN"),
        (lambda x: np.where(np.arange(len(x)) < 2, np.inf, x), "2 of 64000 samples are NaN"),
    ],
)
def test_arrays_that_are_not_mono_sound_are_refused(change, message, sound):
    with pytest.raises(RunnerProblem, match=message):
        checked_samples(change(sound))


def test_a_recognizer_takes_every_form_of_the_same_samples(exported, clips):
    from devices.runner.recognizer import Recognizer

    pcm = read_manifest(clips)[0].pcm()
    recognizer = Recognizer(exported, threads=1)
    want = recognizer.transcribe(pcm).text
    assert want
    for given in ((pcm * 32767).astype(np.int16), pcm.astype(np.float64), pcm[:, None]):
        assert recognizer.transcribe(given).text == want
        assert recognizer.window(given) == recognizer.window(pcm)
    for call in (recognizer.transcribe, recognizer.window, lambda x: recognizer.logits(x, [])):
        with pytest.raises(RunnerProblem, match="is not one channel"):
            call(np.stack([pcm, pcm]))
