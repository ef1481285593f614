"""Descriptions of a phone, from fake tools with Android's output formats in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pixel
import pytest

from devices.runner.machine import android
from devices.runner.machine import host as machine

PIXEL_8 = [1704000] * 4 + [2367000] * 4 + [2914000]
"""Maximum frequencies of its cores in kHz."""


@pytest.fixture
def phone(tmp_path) -> Path:
    lay_out(tmp_path, pixel.tools("arm64-v8a"), pixel.cores(*PIXEL_8))
    return tmp_path


def lay_out(base: Path, tools: dict[str, str], files: dict[str, str]) -> None:
    for name, script in tools.items():
        path = base / "system/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    for name, text in files.items():
        (base / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (base / "sys" / name).write_text(text)


def test_a_phone_is_described_by_its_properties_and_services(phone):
    found = machine.describe(phone)
    wanted = {
        "model": "Google Pixel 8",
        "cpu": "Google Tensor G3",
        "abi": "arm64-v8a",
        "os": "Android 14 (SDK 34)",
        "temperature_c": 47.2,
        "throttled": "light",
        "battery_share": 0.87,
        "battery_temperature_c": 28.3,
        "plugged": "usb",
        "screen": "off",
        "pinned_to": sorted(os.sched_getaffinity(0)),
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["core_frequencies_max_hz"] == [1000.0 * khz for khz in PIXEL_8]


def test_a_sample_has_the_frequencies_of_all_cores(phone):
    found = android.readings(phone)
    assert found["frequency_hz"] == [1000.0 * (khz // 2) for khz in PIXEL_8]
    assert (found["temperature_c"], found["throttled"]) == (47.2, "light")
    assert found["power_w"] == "unavailable"  # it is plugged in


@pytest.mark.parametrize("sign", [1, -1])
def test_power_is_reported_only_on_battery(phone, sign):
    supply = {
        f"class/power_supply/battery/{name}": text
        for name, text in {"current_now": f"{sign * 500_000}\n", "voltage_now": "4000000\n"}.items()
    }
    lay_out(phone, pixel.tools("arm64-v8a", usb="false"), supply)
    assert android.readings(phone)["power_w"] == pytest.approx(2.0)
    (phone / "sys/class/power_supply/battery/voltage_now").unlink()
    assert android.readings(phone)["power_w"] == pytest.approx(0.5 * 4.205)


def test_missing_sources_read_unavailable_and_never_zero(tmp_path):
    lay_out(tmp_path, {"getprop": "exit 1\n"}, {})
    found = android.describe(tmp_path) | android.readings(tmp_path)
    del found["pinned_to"]
    assert set(found.values()) == {"unavailable"}
    assert not android.here(tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["", "x", "  level: \n  scale: 0\n", "\0" * 100, "]: [" * 1000])
def test_malformed_output_reads_unavailable(tmp_path, text):
    lay_out(tmp_path, {name: f"cat <<'END'\n{text}\nEND\n" for name in ("getprop", "dumpsys")}, {})
    found = android.describe(tmp_path) | android.readings(tmp_path)
    del found["pinned_to"]
    assert set(found.values()) == {"unavailable"}


@pytest.mark.parametrize("seconds", [30])
def test_a_tool_that_hangs_times_out(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(android, "TOOL_S", 0.2)
    lay_out(tmp_path, {"dumpsys": f"exec sleep {seconds}\n"}, {})
    assert android.tool(tmp_path, "dumpsys", "battery") == "unavailable"


# --------------------------------------------------------------------------------------- the cores


@pytest.mark.parametrize(
    ("khz", "big"),
    [
        (PIXEL_8, [4, 5, 6, 7, 8]),
        ([3_000_000, 1_800_000, 3_000_000, 1_800_000], [0, 2]),
        ([2_000_000] * 8, list(range(8))),
        ([], []),
    ],
    ids=["pixel-8", "two-kinds", "one-kind", "untold"],
)
def test_big_cores_are_faster_than_the_slowest_kind(tmp_path, khz, big):
    lay_out(tmp_path, {}, pixel.cores(*khz))
    assert android.big_cores(tmp_path) == big


@pytest.fixture
def affinity(monkeypatch) -> list[set[int]]:
    """Affinities requested by a process that may use all cores but core 8."""
    asked: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: asked.append(cores))
    return asked


@pytest.mark.parametrize(
    ("threads", "kept"), [(None, {4, 5, 6, 7}), (3, {4, 5, 6}), (9, set(range(8)))]
)
def test_a_run_is_pinned_to_the_fastest_allowed_cores(phone, affinity, threads, kept):
    android.take_fast_cores(threads, phone)
    assert affinity == [kept]


def test_the_frequency_of_the_fastest_core_in_use_is_reported(phone, affinity):
    found = machine.describe(phone)
    assert (found["frequency_max_hz"], found["frequency_hz"]) == (2.367e9, 1.1835e9)
    assert found["cores"] == 8


def test_without_known_frequencies_all_cores_are_used(tmp_path, affinity):
    android.take_fast_cores(2, tmp_path)
    assert affinity == []
