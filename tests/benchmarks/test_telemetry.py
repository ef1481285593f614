"""Telemetry of a run: what the runner reports, what is refused, energy, stability and rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_device import FakeDevice
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench
from benchmarks import telemetry as run_telemetry
from benchmarks.bench import BenchOptions, Candidate, bench_all
from benchmarks.result import STAGES, read, remarks, table_rows, validate, write
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from benchmarks.timing import ENOUGH_ROUNDS
from devices.device import Finished, open_device
from devices.runner.machine.host import UNAVAILABLE
from export.problem import Problem

PROJECT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


# ---------------------------------------------------------------------------- the runner, for real


@pytest.fixture(scope="module")
def listed(tmp_path_factory, clips) -> Path:
    """The list file of three clips, as the runner reads it."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(read_manifest(clips)[:3], folder)
    return folder / "clips.json"


def run(artifact: Path, listed: Path, *options: str, python: tuple[str, ...] = ()) -> dict:
    words = ["-m", "devices.runner", "bench", str(artifact), str(listed), *options]
    done = subprocess.run(
        [sys.executable, *python, *words], cwd=PROJECT, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_a_bench_answer_has_telemetry(exported, listed):
    core = min(os.sched_getaffinity(0))
    answer = run(exported, listed, "--pin", str(core))
    found, wrong = run_telemetry.valid_fields(answer)
    assert wrong == []
    assert (found["pinned"], found["threads"], found["debug"]) == ([core], 1, [])
    began, record = found["telemetry"]["began_s"], found["telemetry"]
    assert began < found["timed_s"][0] < found["timed_s"][1] < began + record["ended_s"]
    assert len(record["samples"]) >= 2
    known = [size for size in found["memory_bytes_by_phase"].values() if size != UNAVAILABLE]
    assert answer["peak_rss_bytes"] == max(known, default=answer["peak_rss_bytes"])
    cold = found["cold_load_s"]
    assert cold == UNAVAILABLE or cold > 0


@linux
def test_a_sustained_run_lasts_for_the_given_minutes(exported, listed):
    found, wrong = run_telemetry.valid_fields(
        run(exported, listed, "--threads", "1", "--minutes", "0.02")
    )
    assert wrong == []
    times, work = (found["sustained"][name] for name in ("at_s", "end_to_end_s"))
    assert len(times) == len(work) >= 1
    started_s = times[-1] - times[0]
    rounding_s = 0.002  # starts are rounded to milliseconds
    assert started_s < 1.2 + rounding_s
    assert started_s + work[-1] >= 1.2 - 0.01


@linux
def test_a_slower_interpreter_is_detected(exported, listed):
    answer = run(exported, listed, python=("-X", "dev"))
    assert answer["debug"] == ["python runs with -X dev"]


@linux
def test_a_bench_result_on_this_machine_is_complete(exported, clips, tmp_path):
    few = read_manifest(clips)[:3]
    how = BenchOptions(2, 1, minutes=0.02, pin=str(min(os.sched_getaffinity(0))))
    with open_device("local") as device:
        (found,) = bench_all([Candidate(exported)], device, few, how)
    write([found], tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl") == [json.loads(json.dumps(found))]
    times = [sample["at_s"] for sample in found["telemetry"]["samples"]]
    assert times == sorted(times) and times[0] >= 0
    assert 0 <= found["telemetry"]["sampler_cores"] < 0.2
    assert found["sustained"]["at_s"][0] > found["telemetry"]["samples"][0]["at_s"]
    assert found["sustained"]["ratio"] > 0
    assert len(found["load_s"]) == 2
    assert isinstance(found["unstable_because"], list)


# -------------------------------------------------------------------------------- invalid answers


def sample(at_s: float = 0.0, **changes) -> dict:
    return run_telemetry.require_sample({"at_s": at_s} | changes)


def record_of(samples: list[dict], began_s: float = 100.0, cpu_s: float = 0.01) -> dict:
    last = samples[-1]["at_s"] if samples else 0.0
    numbers = {"began_s": began_s, "ended_s": last, "interval_s": 1.0, "cpu_s": cpu_s}
    return numbers | {"samples": samples}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", 0),
        ("threads", True),
        ("pinned", [-1]),
        ("pinned", [0] * 5000),
        ("governor", ["performance"]),
        ("cold_load_s", "soon"),
        ("cold_load_s", float("nan")),
        ("memory_bytes_by_phase", {"imports": 1, "load": 2, "first": 3}),
        ("memory_bytes_by_phase", {"imports": -1, "load": 2, "first": 3, "run": 4}),
        ("debug", ["x"] * 10),
        ("timed_s", [2.0, 1.0]),
        ("timed_s", [1.0]),
        ("telemetry", []),
        ("telemetry", record_of([{"at_s": 1.0}, {"at_s": 0.0}])),
        ("telemetry", record_of([{"at_s": float("inf")}])),
        ("telemetry", record_of([{"at_s": 0.0}] * (run_telemetry.MAX_SAMPLES + 1))),
        ("telemetry", record_of([{"at_s": 0.0, "power_w": -1}])),
        ("telemetry", record_of([{"at_s": 0.0, "frequency_hz": [1e9, "fast"]}])),
        ("telemetry", record_of([{"at_s": 0.0, "throttled": {}}])),
        ("telemetry", record_of([{"at_s": 0.0, "charging": "perhaps"}])),
        ("telemetry", record_of([]) | {"samples": ["sample"]}),
        ("sustained", {"end_to_end_s": [], "at_s": []}),
        ("sustained", {"end_to_end_s": [1.0], "at_s": [1.0, 2.0]}),
        ("sustained", {"end_to_end_s": [1.0, 0.0], "at_s": [1.0, 2.0]}),
        ("sustained", {"end_to_end_s": [1.0], "at_s": [1e300]}),
    ],
)
def test_an_invalid_field_is_named(field, value):
    assert run_telemetry.valid_fields({field: value}) == ({}, [field])


NAMES = st.sampled_from(
    [*run_telemetry.PHASES, *run_telemetry.READINGS, *sample(), *record_of([]), "at_s"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=9),
)


@given(st.dictionaries(st.sampled_from(list(run_telemetry.READERS)), ANYTHING, min_size=1))
def test_no_answer_raises_an_exception(answer):
    found, wrong = run_telemetry.valid_fields(answer)
    assert sorted([*found, *wrong]) == sorted(answer)
    json.dumps(found, allow_nan=False)


def test_an_invalid_answer_is_refused(exported, clips):
    few = read_manifest(clips)[:3]
    fake = FakeDevice(replies=[reply([1.0] * 3, telemetry={"samples": "all"})])
    with pytest.raises(Problem, match=r"fake: the runner's answer has no usable telemetry$"):
        bench.bench(exported, fake, few, BenchOptions(1))
    fake = FakeDevice(replies=[reply([1.0] * 3), Finished(0, "{}", "")])
    with pytest.raises(Problem, match=r"fake: the runner's answer has no usable sustained$"):
        bench.bench(exported, fake, few, BenchOptions(1, minutes=1))


def test_texts_from_a_device_contain_no_terminal_codes():
    found, _ = run_telemetry.valid_fields({"governor": "on\x1b[2Jdemand" + "!" * 999})
    assert found["governor"].startswith("on [2Jdemand")
    assert len(found["governor"]) <= run_telemetry.MAX_TEXT_CHARS
    assert "\x1b" not in sample(throttled="\x1b]0;x")["throttled"]


# ------------------------------------------------------------------------------------- energy


def test_energy_is_the_integral_of_power_over_the_timed_span(rng):
    """For a linear ramp the trapezoidal rule is exact for any sample times."""
    slope, start, end = rng.uniform(0.1, 2), 2.0, 8.0
    times = sorted([0.0, *rng.uniform(0, 10, 20), 10.0])
    known = [sample(t, power_w=3 + slope * t) for t in times]
    expected = 3 * (end - start) + slope * (end**2 - start**2) / 2
    assert run_telemetry.energy_j(record_of(known), start, end) == pytest.approx(expected)
    assert run_telemetry.energy_j(record_of([sample(0.0)]), start, end) is None
    holes = [one if place % 2 else sample(one["at_s"]) for place, one in enumerate(known)]
    assert run_telemetry.energy_j(
        record_of([known[0], *holes, known[-1]]), start, end
    ) == pytest.approx(expected)


def test_energy_per_second_of_audio_covers_whole_passes_only():
    steady = [sample(float(t), power_w=2.0) for t in range(20)]
    rounds = {"telemetry": record_of(steady), "timed_s": [103.0, 107.0], "end_to_end_s": [2.0, 2.0]}
    lasting = {  # two clips, two and a half passes of 4 s, 200 s later
        "telemetry": record_of(steady, began_s=300.0),
        "sustained": {
            "at_s": [302.0, 304.0, 306.0, 308.0, 310.0],
            "end_to_end_s": [2.0] * 5,
        },
    }
    found = run_telemetry.result_fields([rounds], lasting, audio_s=10.0, clips=2)
    assert found["telemetry"]["energy_j"] == pytest.approx(2 * (4 + 8))
    assert found["telemetry"]["energy_j_per_audio_s"] == pytest.approx(24 / 30)
    assert found["telemetry"]["samples"][-1]["at_s"] == 219.0
    assert found["telemetry"]["sampler_cores"] == pytest.approx(0.02 / 38)
    assert found["sustained"]["at_s"][0] == 202.0
    lasting["telemetry"]["samples"] = []
    found = run_telemetry.result_fields([rounds], lasting, audio_s=10.0, clips=2)
    assert found["telemetry"]["energy_j"] == found["telemetry"]["energy_j_per_audio_s"]
    assert found["telemetry"]["energy_j"] == UNAVAILABLE


def test_the_sustained_ratio_does_not_depend_on_the_order_of_clips(rng):
    """Long clips come first and short ones last; the second half is twice as slow."""
    usual = np.concatenate([np.full(30, 10.0), np.full(30, 2.0)])
    slow = np.where(np.arange(60) < 30, 1.0, 2.0)
    times = usual * slow
    at = 7 + np.concatenate([[0], np.cumsum(times)[:-1]])
    order = rng.permutation(3)
    rounds = np.stack([usual * factor for factor in (0.9, 1.0, 1.1)])[order].ravel()
    answer = {"end_to_end_s": times.tolist(), "at_s": at.tolist()}
    found = run_telemetry.summarise_sustained(answer, 7.0, rounds.tolist(), clips=60)
    assert found["ratio"] == pytest.approx(2)
    assert (found["first_minute_s"], found["last_minute_s"]) == (10, 4)
    assert found["minutes"] == pytest.approx(times.sum() / 60)
    assert found["at_s"][0] == 0


# ----------------------------------------------------------------------------------- stability


CALM = [sample(float(t), temperature_c=50.0 + t / 10, frequency_hz=[1.5e9]) for t in range(12)]


def test_a_stable_run_has_no_reasons_against_it():
    idle = [
        one | {"throttled": "0x50000", "load_average": 2.0, "others_cores": 0.1} for one in CALM
    ]
    result = {
        "emulated": False,
        "device": {"cores": 4},
        "end_to_end_s": [1.0, 1.01] * 3,
        "rounds": 3,
    }
    assert run_telemetry.unstable_because(result, idle, []) == []
    assert run_telemetry.unstable_because(result, [], []) == []
    wild = result | {"end_to_end_s": [1.0, 1.0, 2.0, 2.0], "rounds": 2}
    assert run_telemetry.unstable_because(wild, CALM, ["python is a debug build"] * 2) == [
        "the medians of the 2 rounds differ by 67%",
        "python is a debug build, which is slower",
    ]
    assert run_telemetry.unstable_because(wild | {"emulated": True}, CALM, []) == []


def test_each_disturbance_is_reported_with_its_number():
    hot = [
        sample(
            float(t), temperature_c=50.0 + 4 * t, frequency_hz=[6e8, 1.5e9 - 1e8 * max(0, t - 3)]
        )
        for t in range(12)
    ]
    assert run_telemetry.thermal_slowdown(hot) == (
        "the temperature rose from 54 to 90 °C and the clock fell from 1500 to 800 MHz"
    )
    assert run_telemetry.thermal_slowdown(CALM) is None
    turbo = [sample(0.0, temperature_c=45.0, frequency_hz=[4.9e9])]  # while one core imports
    steady = [sample(float(t), temperature_c=60.0, frequency_hz=[4.2e9]) for t in range(1, 12)]
    assert run_telemetry.thermal_slowdown(turbo + steady) is None
    bits = [sample(0.0, throttled="0x20000"), sample(1.0, throttled="0x70005")]
    assert run_telemetry.throttling(bits) == (
        "the firmware reported under-voltage, throttled (0x70005)"
    )
    since = [sample(0.0, throttled="0x0"), sample(1.0, throttled="0x20000")]
    assert run_telemetry.throttling(since) == "the firmware reported frequency capped (0x20000)"
    words = [sample(0.0, throttled="No warning"), sample(1.0, throttled="Level 2")]
    assert run_telemetry.throttling(words) == (
        "the system's thermal state changed: No warning -> Level 2"
    )
    assert run_telemetry.throttling(words[:1]) is None
    hot = [sample(0.0, throttled="severe")] * 2
    assert run_telemetry.throttling(hot) == "the system reported throttling: severe"
    load = [sample(load_average=5.25, others_cores=0.75, swapped_bytes=2.5e6)]
    assert run_telemetry.high_load(load, 4) == "the load average was 5.2 on 4 cores"
    assert run_telemetry.high_load([sample(load_average=4.4)], 4) is None
    assert run_telemetry.high_load(load, None) is run_telemetry.high_load(load, 6) is None
    assert run_telemetry.other_programs(load) == "other programs used 0.75 cores"
    assert run_telemetry.swapping(load) == "2.5 MB of the program were in swap"
    low = sample(battery_share=0.12)
    assert run_telemetry.low_battery([low]) == "the battery was down to 12%"
    assert run_telemetry.low_battery([low | {"charging": True}, sample(battery_share=0.9)]) is None


def test_an_unstable_result_is_marked_and_explained_once():
    from made_results import make_result

    calm, old = make_result(unstable_because=[], notes=[]), make_result()
    marked = make_result(unstable_because=["a", "b"], notes=["c"])
    rows = table_rows([calm, old, marked])
    assert [row["total ms"] for row in rows] == ["50", "50", "~50"]
    assert remarks([calm, old, marked]) == ["~ made on local: a; b", "note: made on local: c"]
    with pytest.raises(Problem, match="field `telemetry` has type list"):
        validate(calm | {"telemetry": []})


def test_a_governor_and_a_sustained_run_are_notes():
    result = {"emulated": False, "end_to_end_s": [1.0] * 9, "rounds": 3, "governor": "ondemand"}
    found = result | {"sustained": {"minutes": 10.04, "ratio": 1.339}}
    words = [sample(0.0, throttled="0x0"), sample(1.0, throttled="0x4")]
    assert run_telemetry.notes(found, words, None) == [
        "the CPU frequency governor was ondemand",
        "after 10 minutes a clip took 1.34 times as long; the firmware reported throttled (0x4)",
    ]
    quiet = result | {"governor": "performance", "telemetry": {"sampler_cores": 0.004}}
    assert run_telemetry.notes(quiet, [], 0.01) == []
    dear = quiet | {"telemetry": {"sampler_cores": 0.023}}
    assert run_telemetry.notes(dear, [], None) == ["telemetry used 2.3% of a core"]


# ----------------------------------------------------------------------- rounds for an interval


def reply(times: list[float], **changes) -> Finished:
    stages = {stage: times for stage in STAGES} | {"load_s": [0.1]}
    rest = {"mel_share": 0.2, "peak_rss_bytes": 1, "versions": {}, "texts": ["", "", ""]}
    return Finished(0, json.dumps(stages | rest | changes), "")


@pytest.fixture
def three(clips):
    return read_manifest(clips)[:3]


def test_rounds_are_added_until_the_interval_is_narrow_enough(exported, three, rng):
    """One disturbed round makes the interval wide; further rounds narrow it. Differences between
    clips, here a factor of ten, do not widen it."""
    replies = [reply([1.5, 0.3, 3.0])] + [reply([1.0, 0.2, 2.0])] * 30
    fake = FakeDevice(replies=replies)
    found = bench.bench(exported, fake, three, BenchOptions(2, interval=0.02))
    rounds = found["rounds"]
    assert 3 < rounds < 20
    assert rounds == len(found["load_s"]) == len([c for c in fake.calls if c[0] == "run"])
    assert run_telemetry.interval_is_within(found["end_to_end_s"], rounds, 0.02)
    assert not run_telemetry.interval_is_within(found["end_to_end_s"][:-3], rounds - 1, 0.02)
    assert found["notes"] == []


def test_a_stable_run_needs_the_fewest_rounds(exported, three):
    fake = FakeDevice(replies=[reply([1.0, 2.0, 3.0])] * 9)
    found = bench.bench(exported, fake, three, BenchOptions(1, interval=0.02))
    assert found["rounds"] == ENOUGH_ROUNDS


def test_an_interval_that_is_not_reached_is_noted(exported, three, monkeypatch):
    monkeypatch.setattr(bench, "MAX_ROUNDS", 4)
    fake = FakeDevice(replies=[reply([t, 2 * t, 3 * t]) for t in (1.0, 1.05, 0.95, 1.0)])
    found = bench.bench(exported, fake, three, BenchOptions(2, interval=0.02))
    assert found["rounds"] == 4
    (note,) = found["notes"]
    assert note.endswith("of it after 4 rounds; 2.0% was requested")


def test_the_options_reach_the_runner(exported, three):
    lasting = {"end_to_end_s": [1.0], "at_s": [5.0]}
    last = Finished(0, json.dumps({"sustained": lasting}), "")
    fake = FakeDevice(replies=[reply([1.0] * 3, threads=2, pinned=[1, 3]), last])
    how = BenchOptions(1, minutes=2.5, pin="big", governor="performance")
    found = bench.bench(exported, fake, three, how)
    first, second = (call[6:] for call in fake.calls if call[0] == "run")
    chosen = ("--governor", "performance", "--pin", "big")
    assert first == ("clips/clips.json", "--repeats", "1", *chosen)
    assert second == ("clips/clips.json", "--minutes", "2.5", *chosen)
    assert (found["threads"], found["pinned"]) == (2, [1, 3])
    assert found["sustained"]["end_to_end_s"] == [1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "--minutes 0 is not between 0 and 60"),
        ({"minutes": 61}, "--minutes 61 is not between"),
        ({"interval": 1}, "--interval 1 is not a valid share"),
    ],
)
def test_impossible_requests_are_refused(exported, three, changes, message):
    with pytest.raises(Problem, match=message):
        bench.bench(exported, FakeDevice(), three, replace(BenchOptions(1), **changes))


def test_pinning_a_rival_is_refused(digits, three):
    how = BenchOptions(1, pin="0", minutes=1)
    with pytest.raises(
        Problem, match=r"--minutes and --pin can be used with artifacts only; .* is a rival"
    ):
        bench_all([Candidate(digits, rival="transformers")], FakeDevice(), three, how)


def test_the_options_reach_the_bench(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from edgewhisper import pipeline
    from edgewhisper.cli import app

    received: list = []

    def receive(*given):
        received.extend(given)
        raise Problem("received")

    monkeypatch.setattr(pipeline, "bench", receive)
    words = ["--minutes", "10", "--interval", "2%", "--governor", "performance", "--pin", "big"]
    CliRunner().invoke(app, ["bench", str(tmp_path), *words])
    expected = BenchOptions(minutes=10, interval=0.02, governor="performance", pin="big")
    assert expected in received


def test_a_share_is_a_percentage_or_a_fraction():
    from edgewhisper.cli.bench import share_of

    assert share_of("--interval", "2%") == share_of("--interval", "0.02") == 0.02
    with pytest.raises(Problem, match="--interval often is not a valid share"):
        share_of("--interval", "often")
