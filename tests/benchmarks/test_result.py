"""Result lines: fields, writing, reading, validation and tables."""

from __future__ import annotations

import json

import pytest
from made_results import make_result

from benchmarks.result import (
    FIELDS,
    RATIO,
    STAGES,
    brief_rows,
    other_texts,
    read,
    remarks,
    summaries,
    table_rows,
    validate,
    write,
)
from export.problem import Problem


@pytest.fixture
def result():
    return make_result()


def test_a_result_is_read_as_it_was_written(tmp_path):
    results = [make_result(name="a"), make_result(name="ü", rival="transformers")]
    write(results, tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl") == results
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_a_result_has_all_public_fields(result):
    public = """wer cer wer_interval substitutions deletions insertions load_s mel_s encoder_s
    prompt_s per_token_s end_to_end_s peak_rss_bytes artifact_bytes parameters macs device
    emulated rival"""
    assert set(public.split()) <= result.keys()
    assert set(public.split()) <= FIELDS.keys()
    assert result["medians"].keys() == set(STAGES)


def test_a_stage_without_samples_has_no_median():
    found = summaries({"prompt_s": [1.0, 3.0], "per_token_s": []}, 1)
    assert found["medians"] == {"prompt_s": 2.0}
    assert found["intervals"] == {"prompt_s": [1.0, 3.0]}


def test_a_line_without_the_mean_per_utterance_is_read(tmp_path, result):
    assert "wer_per_utterance_mean" not in result
    new = result | {"wer_per_utterance_mean": 0.12}
    write([result, new], tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl") == [result, new]
    with pytest.raises(Problem, match="field `wer_per_utterance_mean` has type str"):
        validate(result | {"wer_per_utterance_mean": "0.12"})


def test_a_file_that_bench_did_not_write_is_refused(tmp_path):
    with pytest.raises(Problem, match=r"none\.jsonl cannot be read: No such file") as found:
        read(tmp_path / "none.jsonl")
    assert "`edgewhisper bench` wrote" in found.value.hint
    (tmp_path / "text.jsonl").write_text("hello")
    with pytest.raises(Problem, match="line 1: not JSON") as found:
        read(tmp_path / "text.jsonl")
    assert "`edgewhisper bench` wrote" in found.value.hint


@pytest.mark.parametrize("version", [2, "1", None])
def test_an_unknown_format_is_refused(result, version):
    with pytest.raises(Problem, match=rf"result format {version!r}; this version reads 1") as e:
        validate(result | {"format": version})
    assert "bench again" in e.value.hint


@pytest.mark.parametrize("field", ["wer", "texts", "device", "emulated", "clips_hash"])
def test_a_missing_or_wrong_field_is_named(result, field):
    with pytest.raises(Problem, match=f"field `{field}` has type set"):
        validate(result | {field: {1}})
    del result[field]
    with pytest.raises(Problem, match=f"field `{field}` is missing"):
        validate(result)


def test_a_bad_line_is_named_by_its_number(tmp_path, result):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(result) + "\n\n{broken\n")
    with pytest.raises(Problem, match=r"r\.jsonl, line 3: not JSON"):
        read(path)
    path.write_text("[]\n")
    with pytest.raises(Problem, match=r"line 1: result format None"):
        read(path)


def test_files_without_results_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(Problem, match="has no results"):
        read(tmp_path / "empty")
    with pytest.raises(Problem, match="cannot be read"):
        read(tmp_path / "gone")


def test_an_incomplete_result_is_not_written(tmp_path, result):
    with pytest.raises(Problem):
        write([result, {"format": 1}], tmp_path / "r.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_rows_have_equal_titles_and_milliseconds():
    rows = table_rows([make_result(name="a"), make_result(rival="transformers")])
    assert rows[0].keys() == rows[1].keys()
    assert rows[0]["model"] == "a"
    assert rows[0]["WER %"] == "10.0"
    assert rows[0]["95 %"] == "0.0 to 30.0"
    assert rows[0]["total ms"] == "50"
    assert rows[0]["size MB"] == "1.74"
    assert rows[0]["peak MB"] == "72"
    assert rows[0]["parameters"] == "1.35 M"


def test_unknown_and_emulated_values_show_no_number():
    row = table_rows([make_result(emulated=True, peak_rss_bytes="unavailable", parameters=None)])[0]
    assert {row[title] for title in row if title.endswith(" ms")} == {"-"}
    assert (row["peak MB"], row["parameters"]) == ("unavailable", "-")


def test_unstable_times_are_marked():
    times = [0.05] * 20 + [0.09] * 20
    row = table_rows([make_result(end_to_end_s=times, rounds=2)])[0]
    assert row["total ms"] == "~70"


def made_rival(**changes) -> dict:
    """Return a rival's result: its checkpoint's texts, and 0.1 s instead of our 0.05 s."""
    fields = {"name": "m (r)", "rival": "r", "checkpoint_wer": 0.1, "end_to_end_s": [0.1] * 30}
    return make_result(**fields | changes)


def test_a_rival_with_its_checkpoints_texts_has_a_ratio():
    rows = brief_rows([made_rival(), make_result(name="ours")])
    assert [row[RATIO] for row in rows] == ["2.00", ""]
    assert rows[0]["total ms"] == "100"
    assert remarks([made_rival()]) == []


@pytest.mark.parametrize("wer", [0.085, 0.115], ids=["better", "worse"])
def test_a_rival_with_other_texts_has_no_ratio_and_a_line_says_why(wer):
    rival = made_rival(wer=wer)
    rows = brief_rows([rival, make_result(name="ours")])
    assert [row[RATIO] for row in rows] == ["-", ""]
    assert rows[0]["total ms"] == "!100"
    (line,) = remarks([rival])
    assert line.startswith("! m (r) on ")
    assert f"WER {100 * wer:.1f} %, the checkpoint's 10.0 %" in line


@pytest.mark.parametrize("wer", [0.09, 0.11])
def test_one_point_of_difference_is_allowed(wer):
    assert other_texts(made_rival(wer=wer)) is None


def test_ratios_are_printed_only_where_texts_were_checked_and_times_are_real():
    unchecked = made_rival()
    del unchecked["checkpoint_wer"]
    assert RATIO not in table_rows([unchecked, make_result()])[0]
    assert RATIO not in table_rows([made_rival()])[0]
    elsewhere = make_result(device={"name": "rpi"})
    assert RATIO not in table_rows([made_rival(), elsewhere])[0]
    emulated = [made_rival(emulated=True), make_result(emulated=True)]
    assert [row[RATIO] for row in table_rows(emulated)] == ["-", ""]
    busy = make_result(unstable_because=["the processor was busy"])
    assert table_rows([made_rival(), busy])[0][RATIO] == "~2.00"


def test_the_build_of_an_engine_is_printed_below_the_table():
    (line,) = remarks([made_rival(build="wheel: AVX2 = 1")])
    assert line.startswith("note: m (r) on ")
    assert line.endswith(": wheel: AVX2 = 1")
