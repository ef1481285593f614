"""The report: one file that needs nothing else."""

from __future__ import annotations

import base64
import re

import pytest
from made_results import make_result

from benchmarks.report import plot, write_report
from export.problem import Problem


def test_the_page_stands_alone_and_shows_every_result(tmp_path):
    results = [make_result(name="dense"), make_result(name="<slim> & fast", artifact_bytes=9)]
    write_report(results, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|href=|<script|@import|url\(", text)
    assert "&lt;slim&gt; &amp; fast" in text
    assert "<slim>" not in text
    assert text.count("<table>") == text.count("</table>") == 3
    image = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', text)[1])
    assert image.startswith(b"\x89PNG")
    for fact in ("10 clips", "30 words", "50 (50 to 50)", "whisper-basic", "a" * 12):
        assert fact in text


def test_the_plot_changes_with_the_results():
    one = plot([make_result()])
    assert one == plot([make_result()])
    assert one != plot([make_result(wer=0.2)])


def test_an_emulated_result_has_no_plot_and_no_milliseconds(tmp_path):
    write_report([make_result(emulated=True)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text
    assert "50 (" not in text
    assert "<td>yes</td>" in text


@pytest.mark.parametrize("field", ["clips_hash", "normalizer"])
def test_a_mixture_is_refused_and_nothing_is_written(tmp_path, field):
    with pytest.raises(Problem, match="were measured on different"):
        write_report([make_result(), make_result(**{field: "other"})], tmp_path / "r.html")
    with pytest.raises(Problem, match="there are no results"):
        write_report([], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
