"""Folders in audiofolder format instead of a manifest."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from benchmarks.speech.clips import read_manifest
from export.problem import Problem


@pytest.fixture
def folder(tmp_path):
    """Two audio files of 0.5 s, one in a subfolder, without metadata."""
    (tmp_path / "deep").mkdir()
    for name in ("a.wav", "deep/b.flac"):
        soundfile.write(tmp_path / name, np.full(8000, 0.1), 16000)
    return tmp_path


@pytest.mark.parametrize("column", ["text", "sentence", "transcription"])
def test_a_folder_with_csv_reads_in_order(folder, column):
    (folder / "metadata.csv").write_text(f'file_name,{column}\ndeep/b.flac,"one, two"\na.wav,\n')
    clips = read_manifest(folder)
    assert [(clip.text, clip.lang) for clip in clips] == [("one, two", "en"), ("", "en")]
    assert [len(clip.pcm()) for clip in clips] == [8000, 8000]


def test_a_folder_with_jsonl_reads_all_fields(folder):
    row = {"file_name": "a.wav", "sentence": "हाँ", "locale": "hi-IN", "speaker_id": 7}
    (folder / "metadata.jsonl").write_text(json.dumps(row | {"duration": 0.5}) + "\n\n")
    (clip,) = read_manifest(folder)
    assert (clip.text, clip.lang, clip.speaker, clip.duration_s) == ("हाँ", "hi", "7", 0.5)


def test_a_language_by_its_name_is_understood(folder):
    (folder / "metadata.csv").write_text("file_name,text,language\na.wav,one,Hindi\n")
    assert read_manifest(folder)[0].lang == "hi"


def test_a_text_column_may_be_named_after_its_language(folder):
    (folder / "metadata.csv").write_text("file_name,bam,french\na.wav,kelen,un\n")
    (clip,) = read_manifest(folder)
    assert (clip.text, clip.lang) == ("kelen", "bm")


def test_a_spreadsheet_s_byte_order_mark_is_not_a_column(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.wav,one\n", encoding="utf-8-sig")
    assert read_manifest(folder)[0].text == "one"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("csv", "path,text\na.wav,one\n", "no column `file_name`; the columns are `path`, `text`"),
        (
            "csv",
            "file_name,label\na.wav,one\n",
            "for the text; the columns are `file_name`, `label`",
        ),
        ("jsonl", '{"file_name": "a.wav", "words": 1}', "line 1: .* `file_name`, `words`"),
        ("csv", "file_name,text\na.wav,one\na.wav\n", "line 3: `text` is None"),
        ("csv", "file_name,text\nc.wav,one\n", r"line 2: there is no file .*c\.wav"),
        ("csv", "file_name,text\n../a.wav,one\n", r"'\.\./a\.wav' is outside the folder"),
        ("csv", "file_name,text\n/etc/hostname,one\n", "outside the folder"),
        ("jsonl", '{"file_name": "a.wav"', "line 1: not JSON"),
        ("jsonl", "[]", "line 1: a list, not an object"),
        ("jsonl", '{"file_name": "a.wav", "text": 3}', "line 1: `text` is 3, not a string"),
        ("csv", "", "names no clips"),
        ("csv", "file_name,text\n", "names no clips"),
        ("jsonl", "\n", "names no clips"),
    ],
)
def test_bad_metadata_is_named(folder, name, content, words):
    (folder / f"metadata.{name}").write_text(content)
    with pytest.raises(Problem, match=words) as error:
        read_manifest(folder)
    assert f"metadata.{name}" in str(error.value)
    assert error.value.hint


def test_a_folder_without_metadata_is_refused(folder):
    with pytest.raises(Problem, match=r"a folder without metadata\.csv or metadata\.jsonl"):
        read_manifest(folder)


def test_texts_and_metadata_may_be_missing_where_no_texts_are_needed(folder):
    (folder / "notes.txt").write_text("not audio")
    (folder / "phone.m4a").touch()
    audio = [clip.audio for clip in read_manifest(folder, need_texts=False)]
    assert audio == [folder / name for name in ("a.wav", "deep/b.flac", "phone.m4a")]
    (folder / "phone.m4a").unlink()
    clips = read_manifest(folder, need_texts=False)
    (folder / "metadata.csv").write_text("file_name,locale\na.wav,hi-IN\n")
    clips += read_manifest(folder, need_texts=False)
    assert [(clip.text, clip.lang) for clip in clips] == [("", "en"), ("", "en"), ("", "hi")]
    (folder / "rows.jsonl").write_text('{"audio": "a.wav"}\n')
    assert read_manifest(folder / "rows.jsonl", need_texts=False)[0].text == ""
    with pytest.raises(Problem, match="`text` is None"):
        read_manifest(folder / "rows.jsonl")


def test_a_folder_without_audio_files_is_refused_where_no_texts_are_needed(tmp_path):
    with pytest.raises(Problem, match=r"a folder without metadata\.csv or metadata\.jsonl"):
        read_manifest(tmp_path, need_texts=False)


def test_two_metadata_files_are_refused(folder):
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).write_text("")
    with pytest.raises(Problem, match="has both"):
        read_manifest(folder)


def test_a_folder_of_splits_lists_them(folder):
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(Problem, match="2 of its folders have some") as error:
        read_manifest(folder)
    assert error.value.hint == f"name one of {folder / 'test'}, {folder / 'train'}"


def test_links_of_a_downloaded_folder_are_followed(folder, tmp_path_factory):
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    soundfile.write(blob, np.zeros(1600), 16000, format="WAV")
    (folder / "c.wav").symlink_to(blob)
    (folder / "metadata.csv").write_text("file_name,text\nc.wav,one\n")
    assert len(read_manifest(folder)[0].pcm()) == 1600


def test_a_table_and_an_audio_file_are_not_manifests(tmp_path):
    (tmp_path / "clips.csv").write_text("audio,text\n")
    with pytest.raises(Problem, match="is a CSV file, not a manifest") as found:
        read_manifest(tmp_path / "clips.csv")
    assert "metadata.csv" in found.value.hint
    (tmp_path / "a.wav").touch()
    with pytest.raises(Problem, match="is an audio file, not a manifest"):
        read_manifest(tmp_path / "a.wav")
