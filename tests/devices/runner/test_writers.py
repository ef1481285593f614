"""Transcript files: text, subtitles, tables, JSON."""

from __future__ import annotations

import json

import pytest

from devices.runner.problem import RunnerProblem
from devices.runner.writers import FORMATS, formats_of, write

ROW = {
    "audio": "a.wav",
    "text": "one & two --> three",
    "language": "en",
    "segments": [
        {"start_s": 0.0, "end_s": 1.9996, "text": "one & two -->"},
        {"start_s": 3661.5, "end_s": 3662.25, "text": "three\tfour"},
    ],
}
CONTENTS = {
    "txt": "one & two -->\nthree\tfour\n",
    "srt": "1\n00:00:00,000 --> 00:00:02,000\none & two ->\n\n"
    "2\n01:01:01,500 --> 01:01:02,250\nthree\tfour\n\n",
    "vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\none &amp; two --&gt;\n\n"
    "01:01:01.500 --> 01:01:02.250\nthree\tfour\n\n",
    "tsv": "start\tend\ttext\n0\t2000\tone & two -->\n3661500\t3662250\tthree four\n",
}


@pytest.mark.parametrize("form", CONTENTS)
def test_the_content_of_a_transcript_file(form, tmp_path):
    write(ROW, {form: tmp_path / "new" / f"a.{form}"})
    assert (tmp_path / "new" / f"a.{form}").read_text() == CONTENTS[form]
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_json_has_the_whole_transcript():
    assert json.loads(FORMATS["json"](ROW)) == ROW


def test_a_text_without_segments_is_one_line():
    assert FORMATS["txt"]({"text": "one two", "language": "en"}) == "one two\n"
    assert FORMATS["srt"](ROW | {"segments": []}) == ""


def test_formats_may_be_listed_and_repeated():
    assert formats_of(["txt,srt", "json", "srt"]) == ["txt", "srt", "json"]
    with pytest.raises(RunnerProblem, match="output format 'doc' is not known") as error:
        formats_of(["txt,doc"])
    assert "txt, srt, vtt, json, tsv" in error.value.hint


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunnerProblem, match="cannot be written"):
        write(ROW, {"txt": tmp_path / "file" / "a.txt"})
