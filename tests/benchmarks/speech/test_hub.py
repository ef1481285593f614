"""Datasets of the hub instead of a manifest, with the real library, offline.

The library reads OWNER/NAME from a local folder of that name, which the tests create.
"""

from __future__ import annotations

import io
import json
import sys

import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.speech import hub
from benchmarks.speech.clips import read_manifest
from export.problem import Problem


def sound(samples: int, rate: int = 16000, kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(samples, 0.25), rate, format=kind)
    return file.getvalue()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with empty caches."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(home, split: str, columns: dict, audio: str | None = "audio") -> None:
    """Write a split of owner/name as the hub stores it: audio files inside a parquet file."""
    import datasets

    table = datasets.Dataset.from_dict(columns)
    if audio is not None:
        table = table.cast_column(audio, datasets.Audio(decode=False))
    place = home / "owner" / "name" / "data"
    place.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))


def spoken(*texts: str) -> dict:
    rows = [{"bytes": sound(1600 * n), "path": f"{n}.flac"} for n, _ in enumerate(texts, 1)]
    return {"audio": rows, "sentence": list(texts)}


def test_a_split_becomes_clips(home):
    store(home, "train", spoken("one") | {"locale": ["hi"]})
    store(home, "test", spoken("two", "three") | {"locale": ["hi", "hi_IN"]})
    clips = read_manifest("hf:owner/name::test")
    assert [(clip.text, clip.lang) for clip in clips] == [("two", "hi"), ("three", "hi")]
    assert [len(clip.pcm()) for clip in clips] == [1600, 3200]
    assert clips[0].audio.read_bytes() == sound(1600), "kept as it came, not decoded"


def test_the_only_split_needs_no_name_and_sound_is_resampled(home):
    store(
        home,
        "train",
        {"speech": [{"bytes": sound(800, 8000), "path": None}], "text": ["a"]},
        "speech",
    )
    (clip,) = read_manifest("hf:owner/name")
    with pytest.warns(UserWarning, match="8000 Hz"):
        assert len(clip.pcm()) == 1600


def test_the_first_clips_of_a_split(home):
    store(home, "train", spoken("one", "two", "three"))
    assert [clip.text for clip in read_manifest("hf:owner/name::train[:2]")] == ["one", "two"]


def test_a_downloaded_data_set_is_not_downloaded_again(home, monkeypatch):
    store(home, "train", spoken("one"))
    first = read_manifest("hf:owner/name::train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_manifest("hf:owner/name::train") == first


def test_a_configuration_names_the_language(home):
    store(home, "train", spoken("हाँ"))
    (home / "owner" / "name" / "README.md").write_text(
        "---\nconfigs:\n- config_name: hi\n  data_files: data/*.parquet\n---\n"
    )
    assert read_manifest("hf:owner/name:hi")[0].lang == "hi"


def test_a_text_column_may_be_named_after_its_language(home):
    """jeli-asr, which the recipe `bald` uses, has such a column."""
    (rows, texts) = spoken("kelen").values()
    store(home, "train", {"audio": rows, "duration": [0.1], "bam": texts, "french": ["un"]})
    (clip,) = read_manifest("hf:owner/name::train")
    assert (clip.text, clip.lang) == ("kelen", "bm")


# -------------------------------------------------------------------------------------- errors


def refused(source: str, words: str) -> str:
    """Check that reading fails with the source in the message; return the hint."""
    with pytest.raises(Problem, match=words) as error:
        read_manifest(source)
    assert source in str(error.value)
    assert not [*hub.cache().rglob("manifest.jsonl")]
    return error.value.hint


def test_an_unknown_split_lists_the_known_ones(home):
    store(home, "train", spoken("one"))
    store(home, "test", spoken("two"))
    assert "hf:owner/name::" in refused("hf:owner/name::dev", "no split 'dev'; .* has train, test")
    refused("hf:owner/name", "no split is given; the dataset has train, test")


def test_an_unknown_configuration_lists_the_known_ones(home):
    store(home, "train", spoken("one"))
    refused("hf:owner/name:hi:train", r"cannot be opened \(.*'hi' not found.*default")


def test_an_unknown_data_set(home):
    assert "check its name" in refused("hf:owner/nowhere", "cannot be opened")


def test_no_column_of_text(home):
    store(home, "train", {"audio": spoken("one")["audio"], "label": [3]})
    hint = refused("hf:owner/name", "no column for the text; the columns are `audio`, `label`")
    assert "sentence" in hint


def test_no_column_of_audio(home):
    store(home, "train", {"text": ["one"], "label": [3]}, audio=None)
    refused("hf:owner/name", "no column for the audio; the columns are `text`, `label`")


def test_an_empty_split(home):
    store(home, "train", {"audio": [], "text": []})
    refused("hf:owner/name", "has no clips")


def test_a_row_without_text_is_named_by_its_number(home):
    store(home, "train", spoken("one") | {"sentence": [None]} | {"text": [None]})
    refused("hf:owner/name", "row 1: `text` is None")


def test_a_row_must_not_name_a_file_of_this_machine(home):
    (home / "secret.wav").write_bytes(sound(100))
    path = str(home / "secret.wav")
    store(home, "train", {"audio": [{"bytes": None, "path": path}], "text": ["one"]})
    assert "without hf:" in refused("hf:owner/name", "which is not on the hub")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/hostname",
        "file:///etc/hostname",
        "file:///etc/hostname::hf://datasets/o/n/a.zip",
        None,
    ],
)
def test_only_the_hub_is_read_for_a_row(path):
    with pytest.raises(Problem, match=r"row 3: `audio` has no sound.* not on the hub"):
        hub.sound_bytes({"bytes": None, "path": path}, "audio", "row 3")
    assert hub.on_the_hub("zip://a.wav::hf://datasets/o/n/a.zip")


def test_a_row_may_name_a_file_of_its_repository(home, monkeypatch):
    """A fake file system replaces the hub, which needs a network."""

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store, pseudo_dirs = {}, [""]

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    with fsspec.open("hf://datasets/owner/name/a.flac", "wb") as file:
        file.write(sound(1600))
    stream = {"bytes": None, "path": "hf://datasets/owner/name/a.flac"}
    assert hub.sound_bytes(stream, "audio", "row 1") == sound(1600)
    with pytest.raises(Problem, match=r"row 2: hf://.*b\.flac cannot be downloaded"):
        hub.sound_bytes({"path": "hf://datasets/owner/name/b.flac"}, "audio", "row 2")


def test_an_interrupted_download_leaves_no_files(home, monkeypatch):
    class Stream:
        column_names, features = ["audio", "text"], None

        def select_columns(self, names):
            return self

        def __iter__(self):
            yield {"audio": {"bytes": sound(100), "path": "../../a.wav"}, "text": "one"}
            raise ConnectionError("the line is dead\nfor long")

    monkeypatch.setattr(hub, "open_stream", lambda *_: Stream())
    refused("hf:owner/name", r"stopped after 1 clips \(the line is dead\)")
    assert not [path for path in hub.cache().rglob("*") if path.is_file()]


def test_a_missing_library_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused("hf:owner/name", "the library datasets, which is not installed") == (
        "pip install 'edgewhisper[data]'"
    )


@pytest.mark.parametrize(
    "text", ["hf:name", "hf:../..", "hf:a/b:c:d:e", "hf:a/b::d[:0]", "hf:a/b::"]
)
def test_an_invalid_name_is_refused(text):
    with pytest.raises(Problem, match="is not the name of a dataset") as error:
        hub.parse(text)
    assert "hf:OWNER/NAME:CONFIG:SPLIT" in error.value.hint


def test_a_name_is_parsed_into_its_parts():
    assert hub.parse("hf:o/n.x:hi_in:test[:50]") == hub.Source("o/n.x", "hi_in", "test", 50)
    assert hub.parse("hf:o/n:hi") == hub.Source("o/n", "hi", None, None)
    assert hub.parse("hf:o/n::dev") == hub.Source("o/n", None, "dev", None)


def test_a_downloaded_data_set_has_a_manifest(home):
    store(home, "train", spoken("one") | {"speaker_id": [12]})
    rows = hub.fetch("hf:owner/name").read_text().splitlines()
    assert json.loads(rows[0]) == {
        "audio": "000001.flac",
        "text": "one",
        "lang": "en",
        "speaker": "12",
    }
