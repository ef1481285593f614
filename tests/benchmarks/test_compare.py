"""Comparison of results: significant differences, noise, and incomparable results."""

from __future__ import annotations

import json

import pytest
from made_results import make_result

from benchmarks.compare import compare, compare_pair
from export.problem import Problem


def measures(base, other, **options) -> dict:
    return {row["measure"]: row for row in compare_pair(base, other, **options)}


def test_a_result_does_not_differ_from_itself():
    found = measures(make_result(), make_result())
    assert found["end_to_end_s"]["ratio"] == 1
    assert not any(row["real"] for row in found.values())
    assert found["wer"]["verdict"].startswith("no significant difference")


def test_half_the_time_is_twice_as_fast(rng):
    slow = [float(t) for t in rng.normal(0.10, 0.001, 30)]
    fast = [float(t) for t in rng.normal(0.05, 0.001, 30)]
    row = measures(make_result(end_to_end_s=slow), make_result(end_to_end_s=fast))["end_to_end_s"]
    assert row["real"] is True
    assert row["ratio"] == pytest.approx(0.5, rel=0.02)
    assert row["interval"][0] < row["ratio"] < row["interval"][1]
    assert row["verdict"].startswith(("2.0", "1.9"))
    assert "times faster" in row["verdict"]


def test_a_difference_within_the_noise_is_not_significant():
    """The medians differ by 1 %, the samples of each result by 40 %."""
    times = [0.08, 0.10, 0.12] * 10
    later = [0.0808, 0.101, 0.1212] * 10
    row = measures(make_result(end_to_end_s=times), make_result(end_to_end_s=later))["end_to_end_s"]
    assert row["ratio"] == pytest.approx(1.01)
    assert row["interval"][0] < 1 < row["interval"][1]
    assert row["real"] is False
    assert row["verdict"] == "no significant difference"


def test_too_few_rounds_are_undecided():
    row = measures(make_result(rounds=2), make_result(rounds=2))["end_to_end_s"]
    assert row["real"] is None
    assert row["verdict"] == "undecided: fewer than 3 rounds"


def test_a_verdict_mentions_an_unstable_run():
    busy = [0.05] * 10 + [0.1] * 10 + [0.05] * 10
    row = measures(make_result(end_to_end_s=busy), make_result())["end_to_end_s"]
    assert row["verdict"].endswith("; unstable")


def test_word_errors_are_compared_clip_by_clip():
    """Of ten clips with three words, the other result has one more error in six."""
    base = make_result(clip_errors=[0] * 10, clip_words=[3] * 10, wer=0.0)
    worse = make_result(clip_errors=[1] * 6 + [0] * 4, clip_words=[3] * 10, wer=0.2)
    row = measures(base, worse)["wer"]
    assert row["difference"] == pytest.approx(20.0)
    assert row["real"] is True
    assert row["verdict"].startswith("20.0 points worse (+")
    assert measures(worse, base)["wer"]["verdict"].startswith("20.0 points better (-")


def test_errors_on_the_same_clips_cancel():
    hard = [3] * 5 + [0] * 5
    row = measures(make_result(clip_errors=hard), make_result(clip_errors=hard))["wer"]
    assert row["interval"] == [0, 0]


def test_sizes_are_counted_not_sampled():
    row = measures(make_result(artifact_bytes=9_000_000), make_result(artifact_bytes=3_000_000))
    assert row["artifact_bytes"]["verdict"] == "0.33 times as large"
    unknown = measures(make_result(peak_rss_bytes="unavailable"), make_result())
    assert "peak_rss_bytes" not in unknown


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clips_hash", "f" * 64, "different clip sets: aaaaaaaaaaaa and ffffffffffff"),
        ("normalizer", "none", "different normalizers: whisper-basic and none"),
        ("emulated", True, r"emulated and real\): False and True"),
    ],
    ids=["clips", "normalizer", "emulated"],
)
def test_results_of_different_measurements_are_refused(field, value, message):
    with pytest.raises(Problem, match=message) as error:
        compare_pair(make_result(name="a"), make_result(name="b", **{field: value}))
    assert str(error.value).startswith("a and b were measured on")
    assert "bench both" in error.value.hint


def test_versions_are_compared_only_when_asked():
    old, new = (make_result(versions={"onnxruntime": v, v: "1"}) for v in ("1.30", "1.31"))
    with pytest.raises(Problem, match=r"different versions: onnxruntime 1\.30 and 1\.31$"):
        compare_pair(old, new)
    assert compare_pair(old, new, across_versions=True)


def test_emulated_results_compare_no_times():
    found = measures(make_result(emulated=True), make_result(emulated=True))
    assert not any(name.endswith("_s") for name in found)
    assert "wer" in found


def test_all_are_compared_with_the_first_in_a_table():
    results = [make_result(name=name) for name in "abc"]
    found = compare(results)
    assert json.loads(json.dumps(found)) == found
    assert found["base"] == "a"
    assert [other["name"] for other in found["others"]] == ["b", "c"]
    assert {row["model"] for row in found["rows"]} == {"b", "c"}
    row = next(row for row in found["rows"] if row["measure"] == "total ms")
    assert row == {
        "model": "b",
        "measure": "total ms",
        "base": "50",
        "this": "50",
        "verdict": "no significant difference",
    }


def test_one_result_is_not_enough():
    with pytest.raises(Problem, match="1 result was given; at least two are needed"):
        compare([make_result()])


def test_each_device_has_a_base_of_its_own():
    def on(device, name, peak):
        return make_result(name=name, device={"name": device}, peak_rss_bytes=peak)

    results = [on("a", "dense", 10), on("a", "slim", 5), on("b", "dense", 40), on("b", "slim", 10)]
    found = compare(results)
    peaks = [
        next(row["ratio"] for row in other["measures"] if row["measure"] == "peak_rss_bytes")
        for other in found["others"]
    ]
    assert peaks == [0.5, 4.0, 0.25]
    devices = [row["device"] for row in found["rows"] if row["measure"] == "peak MB"]
    assert devices == ["a", "b : a", "b"]


def test_versions_may_differ_between_devices_and_not_on_one():
    old, new = {"onnxruntime": "1.30"}, {"onnxruntime": "1.31"}
    here, there = make_result(versions=old), make_result(versions=new, device={"name": "there"})
    assert compare([here, there])["others"][0]["base_device"] == "local"
    with pytest.raises(Problem, match=r"onnxruntime 1\.30 and 1\.31"):
        compare([here, make_result(versions=new)])


def test_there_is_no_time_ratio_for_a_rival_with_other_texts():
    ours = make_result(name="ours")
    rival = make_result(name="theirs", rival="r", wer=0.2, checkpoint_wer=0.1)
    rows = {row["measure"]: row for row in compare_pair(ours, rival)}
    assert rows["end_to_end_s"]["ratio"] is None
    assert rows["end_to_end_s"]["real"] is None
    assert rows["end_to_end_s"]["other"] == rival["medians"]["end_to_end_s"]
    assert "theirs: WER 20.0 %, the checkpoint's 10.0 %" in rows["end_to_end_s"]["verdict"]
    assert rows["artifact_bytes"]["ratio"] == 1
    same = rival | {"wer": 0.1}
    assert compare_pair(ours, same)[1]["ratio"] is not None
