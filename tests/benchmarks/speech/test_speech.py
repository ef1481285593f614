"""Valid and invalid manifests and audio files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from benchmarks.speech.clips import read_audio, read_manifest
from export.problem import Problem


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_common_formats_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(16000), 16000)
    pcm = read_audio(path)
    assert pcm.dtype == np.float32
    assert pcm.ndim == 1
    assert abs(len(pcm) - 8000) < 2500  # MP3 pads its ends


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_keep_their_pitch(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate), rate)
    with pytest.warns(UserWarning, match="8000 Hz") if rate == 8000 else _nothing():
        pcm = read_audio(tmp_path / "a.wav")
    spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
    assert abs(spectrum.argmax() * 16000 / len(pcm) - 440) < 3


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_stereo_is_averaged_with_a_warning(tmp_path, rng):
    stereo = rng.uniform(-0.5, 0.5, (1000, 2))
    soundfile.write(tmp_path / "a.wav", stereo, 16000, subtype="FLOAT")
    with pytest.warns(UserWarning, match="2 channels, averaged"):
        pcm = read_audio(tmp_path / "a.wav")
    assert np.allclose(pcm, stereo.mean(axis=1), atol=1e-6)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Problem, match=r"no audio file .*nowhere\.wav"):
        read_audio(tmp_path / "nowhere.wav")
    with pytest.raises(Problem, match="no audio file mic") as found:
        read_audio("mic")
    assert "--live" in found.value.hint


def test_text_is_not_audio(tmp_path):
    (tmp_path / "a.wav").write_text("hello")
    with pytest.raises(Problem, match="is not a readable audio file"):
        read_audio(tmp_path / "a.wav")


def test_a_file_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    with pytest.raises(Problem, match="has no samples"):
        read_audio(tmp_path / "a.wav")


def test_nan_is_counted(tmp_path):
    samples = tone(16000)
    samples[[3, 70]] = np.nan, np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(Problem, match="2 of 8000 samples are NaN or infinite"):
        read_audio(tmp_path / "a.wav")


def test_a_manifest_reads_in_order_with_its_fields(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    rows = [{"audio": "a.wav", "text": "one", "lang": "hi", "speaker": "x", "duration": 0.5}]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (clip,) = read_manifest(tmp_path / "m.jsonl")
    assert (clip.text, clip.lang, clip.speaker, clip.duration_s) == ("one", "hi", "x", 0.5)
    assert len(clip.pcm()) == 8000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"audio": "a.wav", "text": ', "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('{"audio": "a.wav"}', "`text` is None"),
        ('{"text": "one"}', "`audio` is None"),
        ('{"audio": "b.wav", "text": "one"}', "there is no file"),
    ],
    ids=["cut-short", "a-list", "no-text", "no-audio", "no-file"],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, words):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    good = '{"audio": "a.wav", "text": "one"}'
    (tmp_path / "m.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(Problem, match=f"line 3: .*{words}"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_manifest_without_clips_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(Problem, match="names no clips"):
        read_manifest(tmp_path / "m.jsonl")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(Problem, match=r"nowhere\.jsonl cannot be read"):
        read_manifest(tmp_path / "nowhere.jsonl")


def test_clips_are_read_on_access(clips, monkeypatch):
    from benchmarks.speech import clips as speech

    some = read_manifest(clips)[:5]
    opened = []
    read = speech.read_audio
    monkeypatch.setattr(speech, "read_audio", lambda path: opened.append(path) or read(path))
    samples = speech.Samples(some)
    assert (len(samples), opened) == (5, [])
    assert np.array_equal(samples[3], read(some[3].audio))
    assert [len(pcm) for pcm in samples[1:3]] == [len(clip.pcm()) for clip in some[1:3]]
    assert opened[0] == some[3].audio


def test_a_checkpoint_transcribes_a_few_clips_at_a_time(digits, processor, clips, monkeypatch):
    """The texts are the same as for all clips at once, with at most CLIPS_AT_ONCE in memory."""
    from benchmarks.speech.clips import Samples
    from edgewhisper import decoding
    from edgewhisper.whisper import load

    some, model = read_manifest(clips)[:7], load(digits)
    expected = decoding.transcribe(model, processor, [clip.pcm() for clip in some])
    taken, shown = [], []
    monkeypatch.setattr(decoding, "CLIPS_AT_ONCE", 3)
    take = Samples.__getitem__

    def counted(self, index):
        found = take(self, index)
        if isinstance(index, slice):
            taken.append(len(found))
        return found

    monkeypatch.setattr(Samples, "__getitem__", counted)
    assert decoding.transcribe(model, processor, Samples(some), done=shown.append) == expected
    assert taken == [3, 3, 1]
    assert shown == sorted(shown)
    assert shown[-1] == 7
