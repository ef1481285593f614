"""The report: a self-contained HTML file."""

from __future__ import annotations

import base64
import re

import pytest
from made_results import make_result

from benchmarks.plots import mean_parts, plots
from benchmarks.report import page, write_report
from export.problem import Problem


def test_the_page_is_self_contained_and_shows_every_result(tmp_path):
    results = [make_result(name="dense"), make_result(name="<slim> & fast", artifact_bytes=9)]
    write_report(results, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|href=|<script|@import|url\(", text)
    assert "&lt;slim&gt; &amp; fast" in text
    assert "<slim>" not in text
    assert text.count("<table>") == text.count("</table>") == 3
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(image)[:4] for image in images] == [b"\x89PNG"] * 3
    for fact in ("10 clips", "30 words", "50 (50 to 50)", "whisper-basic", "a" * 12):
        assert fact in text


def test_a_plot_changes_with_its_data():
    one, two = plots([make_result()]), plots([make_result(wer=0.2)])
    assert one == plots([make_result()])
    assert one["latency"] != two["latency"] and one["memory"] != two["memory"]
    assert one["stages"] == two["stages"]


def test_the_plots_are_written_to_a_given_folder(tmp_path):
    sampled = {"samples": [{"at_s": at, "temperature_c": 40.0 + at} for at in range(9)]}
    on_and_on = {"minutes": 0.1, "at_s": [1.0, 2.0], "end_to_end_s": [0.05, 0.06], "ratio": 1.2}
    results = [make_result(), make_result(telemetry=sampled, name="$\\frac warm_")]
    results += [make_result(sustained=on_and_on)]
    write_report(results, tmp_path / "r.html", tmp_path / "plots")
    found = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert found == plots(results)
    assert found.keys() == {"latency", "memory", "stages", "temperature", "sustained"}


def test_an_unavailable_temperature_is_not_plotted():
    blind = {"samples": [{"at_s": 0, "temperature_c": "unavailable"}, {"at_s": 1}]}
    assert "temperature" not in plots([make_result(telemetry=blind)])


def test_the_parts_of_a_clip_add_up_to_its_time():
    """Ten clips in three rounds, with two windows and four tokens per clip."""
    whole, windows, tokens = [0.1] * 30, [0.01] * 60, [0.005] * 120
    named = {"mel_s": windows, "encoder_s": windows, "prompt_s": [0.01] * 30}
    parts = mean_parts(make_result(end_to_end_s=whole, per_token_s=tokens, **named))
    assert parts == pytest.approx(
        {"log-mel": 0.02, "encoder": 0.02, "prompt": 0.01, "tokens": 0.02, "rest": 0.03}
    )


def test_an_emulated_result_has_no_milliseconds_and_no_plot_of_them(tmp_path):
    write_report([make_result(emulated=True)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert plots([make_result(emulated=True)]).keys() == {"memory"}
    assert plots([make_result(emulated=True, peak_rss_bytes="unavailable")]) == {}
    assert "50 (" not in text
    assert "<td>yes</td>" in text


@pytest.mark.parametrize("field", ["clips_hash", "normalizer"])
def test_a_mixture_is_refused_and_nothing_is_written(tmp_path, field):
    with pytest.raises(Problem, match="were measured on different"):
        write_report([make_result(), make_result(**{field: "other"})], tmp_path / "r.html")
    with pytest.raises(Problem, match="there are no results"):
        write_report([], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_the_report_shows_telemetry(tmp_path):
    watched = {
        "cold_load_s": [0.3, 0.5, 0.4],
        "memory_bytes_by_phase": {"imports": 50_000_000, "load": "unavailable"},
        "telemetry": {"samples": [], "energy_j_per_audio_s": 0.1234},
        "pinned": [2, 3],
        "unstable_because": ["the load average was 9.0 on 2 cores"],
    }
    write_report([make_result(), make_result(**watched)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    for fact in ("<td>400</td>", "<td>50</td>", "<td>unavailable</td>", "0.123", "2, 3"):
        assert fact in text
    assert "<p>~ made on local: the load average was 9.0 on 2 cores</p>" in text
    assert "<h2>Telemetry</h2>" not in page([make_result()], {})


def test_the_report_shows_no_telemetry_of_an_emulated_device():
    entry = {"cold_load_s": [0.3], "telemetry": {"samples": [], "energy_j_per_audio_s": 1.0}}
    assert "<h2>Telemetry</h2>" not in page([make_result(emulated=True, **entry)], {})
