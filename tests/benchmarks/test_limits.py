"""Limits for --fail-if: parsing and checking."""

from __future__ import annotations

import pytest
from made_results import make_result

from benchmarks.compare import compare
from benchmarks.limits import broken, broken_pairs, parse
from export.problem import Problem


@pytest.mark.parametrize(
    ("text", "kept", "changes"),
    [
        ("total>60ms", True, {}),
        ("total > 0.06 s", True, {}),
        ("total>50ms", True, {}),
        ("total>49ms", False, {}),
        ("wer>10%", True, {}),
        ("wer>7%", True, {"wer": 0.07}),
        ("wer>9.9%", False, {}),
        ("peak>72MB", True, {}),
        ("peak>71.9MB", False, {}),
        ("size>1740kB", True, {}),
        ("size>1.7MB", False, {}),
        ("parameters>1.4M", True, {}),
        ("parameters>1.3M", False, {}),
    ],
)
def test_a_limit_is_checked_in_its_unit(text, kept, changes):
    assert (broken([make_result(**changes)], [parse(text)]) == []) is kept


def test_the_message_has_the_name_the_limit_and_the_value():
    (message,) = broken([make_result()], [parse("total>40ms"), parse("wer>50%")])
    assert message == "made on local fails total>40ms: it is 50ms"


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("total>1s", {"emulated": True}),
        ("mel>1s", {"mel_s": []}),
        ("peak>1GB", {"peak_rss_bytes": "unavailable"}),
        ("wer>99%", {"forced_tokens": 4}),
        ("parameters>99M", {"parameters": None}),
    ],
)
def test_an_unknown_value_exceeds_every_limit(text, changes):
    (message,) = broken([make_result(**changes)], [parse(text)])
    assert message.endswith("it is unknown")


@pytest.mark.parametrize(
    "text",
    [
        *("", "total", "total>", "total>5", "total<5ms", "total>5MB", "total>-5ms", "total>1e9ms"),
        *("speed>5ms", "wer>5ms", "total>1.1x", "total>nanms"),
    ],
)
def test_an_invalid_limit_is_refused(text):
    with pytest.raises(Problem, match="is not a valid limit") as error:
        parse(text)
    assert "total>400ms" in error.value.hint
    assert "peak" in error.value.hint


@pytest.mark.parametrize("text", ["total>50ms", "wer>1.1x", "x>1.1x"])
def test_limits_of_a_comparison_are_factors(text):
    with pytest.raises(Problem, match="is not a valid limit") as error:
        parse(text, relative=True)
    assert "total>1.1x" in error.value.hint
    assert "wer" not in error.value.hint


def test_only_significant_differences_exceed_a_factor(rng):
    base = make_result(end_to_end_s=[float(t) for t in rng.normal(0.100, 0.001, 30)])
    slow = make_result(end_to_end_s=[float(t) for t in rng.normal(0.130, 0.001, 30)], name="slow")
    noisy = make_result(end_to_end_s=[0.02, 0.105, 0.9] * 10, name="noisy")
    found = compare([base, slow, noisy])
    (message,) = broken_pairs(found, [parse("total>1.02x", relative=True)])
    assert message.startswith("slow on local fails total>1.02x: it is 1.")
    assert broken_pairs(found, [parse("total>1.5x", relative=True)]) == []


def test_a_missing_measurement_exceeds_every_factor():
    found = compare([make_result(), make_result(peak_rss_bytes="unavailable")])
    (message,) = broken_pairs(found, [parse("peak>2x", relative=True)])
    assert message.endswith("it is unknown (not measured)")
