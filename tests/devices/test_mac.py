"""A simulated Mac over SSH (see macs.py); only its sshd is real.

These tests show nothing about a real Mac's results, speed or memory.
"""

from __future__ import annotations

import os
import shlex
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import macs
import pytest
import sshd
from some_clips import manifest_of_some
from wheels_for_pip import make_wheel, raised

from benchmarks import bench as benching
from benchmarks import reference_runtimes
from benchmarks.candidates import by_units
from benchmarks.result import read
from benchmarks.speech.clips import read_manifest
from devices import connection, wheels
from devices.device import open_device, run_runner
from devices.runner.machine import mac
from devices.ssh import SshDevice
from devices.wheels import Target
from edgewhisper import pipeline
from export.problem import Problem

real = pytest.mark.skipif(not sshd.EXISTS, reason=sshd.MISSING)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory) -> Iterator[sshd.Server]:
    server = sshd.Server(tmp_path_factory.mktemp("mac"))
    macs.become(server)
    yield server
    server.stop()


@pytest.fixture
def server(one_server, monkeypatch) -> sshd.Server:
    """A new Mac with one python3 that is new enough."""
    one_server.fresh(monkeypatch)
    macs.become(one_server)
    macs.python(one_server, "python3.13")
    return one_server


@pytest.fixture
def few(clips, tmp_path) -> list:
    return read_manifest(manifest_of_some(clips, slice(None, None, 20), tmp_path))


@pytest.fixture(scope="module")
def coreml(digits, clips, tmp_path_factory) -> Path:
    """The embedded default as a Core ML artifact in float32."""
    out = tmp_path_factory.mktemp("coreml")
    speech = manifest_of_some(clips, slice(None, None, 20), out)
    options = {"precision": "fp32", "layout": "whisperkit", "target": "coreml"}
    return pipeline.export(
        str(digits), speech=speech, out=out / "fp32", say=lambda text: None, **options
    )


# -------------------------------------------------------------------------------- its python3


@real
def test_the_first_python_with_coremltools_wheels_is_used(server):
    """Neither the newest nor one that is too old, even if it is in the PATH."""
    macs.python(server, "python3.13", macs.of_version(10))
    wanted = macs.python(server, "python3.12")
    macs.tool(server.bin, "python3", macs.of_version(14))
    with SshDevice("pi") as device:
        assert device.python == str(wanted)
        assert device.facts["system"] == "Darwin" and device.facts["macos"] == "15.5"
        assert device.target() == Target(sys.version_info[:2], "arm64", 15, "Darwin")


@real
def test_a_python_in_the_path_is_preferred(server):
    macs.python(server, "python3").rename(server.bin / "python3")
    with SshDevice("pi") as device:
        assert device.python == str(server.bin / "python3")


@real
def test_a_newer_python_is_used_if_there_is_no_other(server):
    """coremltools has no wheels for it, but onnxruntime may."""
    macs.python(server, "python3.13", macs.of_version(9))
    newer = 'case "$2" in *"<(3,14)"*) exit 1;; esac'
    wanted = macs.python(server, "python3", newer)
    with SshDevice("pi") as device:
        assert device.python == str(wanted)


@real
def test_a_mac_with_only_apples_python_gets_an_error_message(server):
    """/usr/bin/python3 may be a stub that opens an installer window."""
    macs.python(server, "python3.13", macs.of_version(9))
    macs.tool(server.bin, "python3", macs.of_version(9))
    found = raised(lambda: SshDevice("pi"))
    assert str(found) == "pi: there is no Python 3.11 or newer except Apple's own"
    assert "brew install python@3.13" in found.hint
    line = connection.remote()
    assert '[ "$p" != /usr/bin/python3 ]' in line and "\n" not in line


@real
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("platform.machine = lambda: 'x86_64'", "and there is CPython on x86_64"),
        ("platform.mac_ver = lambda *_: ('13.7.1', (), '')", "it runs macOS 13.7.1, and"),
        ("platform.mac_ver = lambda *_: ('', (), '')", "it runs macOS of unknown version, and"),
        ("platform.python_implementation = lambda: 'PyPy'", "and there is PyPy on arm64"),
    ],
    ids=["intel", "old", "nothing", "pypy"],
)
def test_an_unsupported_mac_gets_an_error_message(server, code, words):
    macs.python(server, "python3.13", f"export MAC_CODE={shlex.quote(code)}")
    with SshDevice("pi") as device:
        found = raised(device.prepare)
    assert words in str(found) and found.hint


# -------------------------------------------------------------------------------- numpy and co.


def test_wheels_are_requested_for_the_mac():
    target = Target((3, 13), "arm64", 15, "Darwin", ("coremltools",))
    platforms = [word for word in target.options if word.startswith("macosx")]
    assert platforms[0] == "macosx_15_0_arm64" and "macosx_16_0_arm64" not in platforms
    assert {"macosx_14_0_arm64", "macosx_11_0_arm64", "macosx_10_9_universal2"} <= set(platforms)
    assert str(target) == "Python 3.13 on arm64 with macOS 15"
    assert target.name != Target((3, 13), "arm64", 15, "Darwin").name
    assert wheels.range_of("coremltools").startswith("coremltools")


MAC = "macosx_11_0_arm64"


@real
def test_missing_packages_are_pushed_and_coremltools_on_request_only(server, index):
    hidden = "('site-packages', 'tests/helpers/mac')"
    none = f"sys.path[:] = [p for p in sys.path if not p.endswith({hidden})]"
    macs.python(server, "python3.13", f"export MAC_CODE={shlex.quote(none)}")
    abi = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for name in ("numpy", "onnxruntime", "coremltools"):
        version = wheels.pin(name).split("==")[1]
        make_wheel(index, name, version, tags=f"{abi}-none-{MAC}")
        make_wheel(index, name, version, "raise SystemExit('of Linux')")
    said = "import numpy, onnxruntime, {0}; print(numpy.said, onnxruntime.said, {0}.__file__)"
    told: list[str] = []
    for libraries, last in ((), "numpy"), (("coremltools",), "coremltools"):
        with SshDevice("pi", "m1", told.append) as device:
            device.libraries = libraries
            done = device.run([device.python, "-c", said.format(last)])
            assert done.stdout.startswith("pushed "), done.stderr
            assert "/.cache/edgewhisper/runtime/" in done.stdout
        assert ("coremltools" in told[0]) == bool(libraries)
        told.clear()
    index.joinpath(f"coremltools-{wheels.pin('coremltools')[13:]}-{abi}-none-{MAC}.whl").unlink()
    (server.private / "runtime").rename(server.home / "gone")
    with SshDevice("pi") as device:
        device.libraries = ("coremltools",)
        found = raised(device.prepare)
    assert "no wheels of numpy, onnxruntime and coremltools for Python 3." in str(found)
    assert "on arm64 with macOS 15" in str(found) and "python@3.13" in found.hint


# --------------------------------------------------------------------------------- what it says


@real
def test_a_mac_is_described(server):
    with open_device("m1", "pi") as device:
        found = device.describe()
        again = run_runner(device, ["describe"])
    assert found["model"] == "MacBookAir10,1" and found["cpu"] == "Apple M1"
    assert found["os"] == "macOS 15.5 (24F74)" and found["kernel"] == "Darwin 24.5.0"
    assert found["isa"] == ["asimd", "asimdhp", "asimddp"]
    assert (found["performance_cores"], found["efficiency_cores"]) == (4, 4)
    assert (found["cores"], found["memory_bytes"]) == (os.cpu_count(), 2**34)
    assert (found["battery_share"], found["power_source"]) == (0.85, "Battery Power")
    assert found["throttled"].startswith("No thermal warning level has been recorded; No perf")
    assert {found[name] for name in ("power_w", "temperature_c", "governor")} == {"unavailable"}
    assert found["emulated"] is False and found["load_average"] >= 0
    assert again.keys() == found.keys()
    assert "-i -w " in (server.home / "caffeinated").read_text()


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """An empty folder as PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    mac.has_powermetrics.cache_clear()
    yield tmp_path
    mac.has_powermetrics.cache_clear()


READINGS = {
    *("temperature_c", "frequency_hz", "throttled", "battery_share", "battery_temperature_c"),
    *("power_w", "load_average", "charging"),
}


def test_missing_tools_read_unavailable(tools):
    assert mac.readings().keys() == READINGS
    told = {name: value for name, value in mac.describe().items() if value != "unavailable"}
    assert told.keys() == {"load_average", "emulated"}


@pytest.mark.parametrize("text", ["", "\xff\x1b", "-1%", "Combined Power: lots mW", "a: b: c\n:\n"])
def test_unexpected_output_of_tools_reads_unavailable(tools, text):
    for name in ("sysctl", "sw_vers", "pmset", "sudo"):
        macs.tool(tools, name, macs.prints(text))
    found = mac.describe()
    assert found["power_w"] == found["isa"] == found["os"] == "unavailable"
    assert found["memory_bytes"] == found["power_source"] == "unavailable"


def test_power_needs_powermetrics_which_is_tried_once(tools):
    macs.tool(tools, "sudo", f"echo >>{tools}/asked", macs.REFUSED)
    assert [mac.readings()["power_w"] for _ in range(3)] == ["unavailable"] * 3
    assert (tools / "asked").read_text() == "\n"
    mac.has_powermetrics.cache_clear()
    macs.tool(tools, "sudo", f'echo "$*" >>{tools}/words', macs.prints(macs.POWER))
    assert mac.readings()["power_w"] == 4.434
    assert (
        (tools / "words").read_text().endswith("-n powermetrics --samplers cpu_power -n 1 -i 200\n")
    )


MINI = (
    "Now drawing from 'AC Power'\n"
    "2026-11-21 19:00:00 +0000 CPU Power notify\n\tCPU_Speed_Limit \t= 70\n"
)


def test_a_mac_may_lack_a_battery_and_intel_macs_report_speed_limits(tools):
    macs.tool(tools, "pmset", macs.prints(MINI))
    found = mac.describe()
    assert (found["power_source"], found["battery_share"]) == ("AC Power", "unavailable")
    assert found["throttled"].endswith("; CPU Power notify; CPU_Speed_Limit = 70")


# --------------------------------------------------------------------------------------- memory


def test_rusage_fields_are_at_the_headers_offsets(rng):
    """Offsets were counted by hand in <sys/resource.h>: after the uuid, v0 has 10 numbers, v1 6,
    v2 2, v3 9, and v4 begins with the logical writes."""
    raw = rng.bytes(mac.USAGE_BYTES)
    found = mac.usage_of(raw)
    assert mac.USAGE_BYTES == 16 + 8 * 35
    for name, offset in {
        "user_time": 16,
        "resident_size": 16 + 8 * 6,
        "phys_footprint": 16 + 8 * 7,
        "diskio_byteswritten": 16 + 8 * 17,
        "lifetime_max_phys_footprint": 16 + 8 * (10 + 6 + 2 + 9 + 1),
        "runnable_time": mac.USAGE_BYTES - 8,
    }.items():
        assert found[name] == struct.unpack_from("<Q", raw, offset)[0], name


def test_off_a_mac_there_is_no_footprint():
    assert mac.peak_footprint_bytes() == "unavailable"


# -------------------------------------------------------------------------------------- a bench


@real
def test_an_onnx_artifact_gives_the_same_texts_as_here(server, exported, few):
    how = benching.BenchOptions(1, 1)
    with open_device("m1", "pi") as device:
        there = benching.bench(exported, device, few, how)
    with open_device("local") as device:
        here = benching.bench(exported, device, few, how)
    assert there["texts"] == here["texts"] == [clip.text for clip in few]
    assert there["device"]["name"] == "m1" and there["device"]["cpu"] == "Apple M1"
    assert there["peak_footprint_bytes"] == 29_000 << 20 and "peak_footprint_bytes" not in here
    assert there["peak_rss_bytes"] > 0 and "compile_s" not in there
    assert server.working() == []


UNITS = {"cpu": "CPU_ONLY", "cpu-ane": "CPU_AND_NE"}
PACKAGES = ("MelSpectrogram", "AudioEncoder", "TextDecoder")


@real
def test_packages_are_compiled_once_and_measured_on_all_units(server, coreml, few):
    """A separate process compiles and first loads them; the rounds load the compiled packages."""
    said: list[str] = []
    how = benching.BenchOptions(1, 1, compute_units=tuple(UNITS))
    with open_device("m1", "pi") as device:
        results = benching.bench_all([benching.Candidate(coreml)], device, few, how, said.append)
    here = reference_runtimes.recognizer(coreml, threads=1)
    for result, name in zip(results, UNITS, strict=True):
        assert result["name"] == f"fp32 ({name})" and result["compute_units"] == name
        assert result["texts"] == [here.transcribe(clip.pcm()).text for clip in few]
        assert len(result["compile_s"]) == len(result["cold_load_s"]) == len(result["load_s"]) == 1
        assert min(result["compile_s"] + result["cold_load_s"]) > 0
        assert any(line.startswith(f"fp32 ({name}): compile_s ") for line in said)
        assert result["mel_share"] is None and result["versions"]["coremltools"]
    noted = (server.home / "coremltools").read_text().splitlines()
    compiling = [f"compile {package}.mlpackage" for package in PACKAGES]
    loads = {
        unit: [f"CompiledMLModel {package}.mlmodelc {unit}" for package in PACKAGES]
        for unit in UNITS.values()
    }
    cpu, engine = loads.values()
    assert noted == [*compiling, *cpu, *compiling, *engine, *cpu, *engine]


@real
def test_a_package_that_core_ml_rejects_gets_an_error_message(server, coreml, few):
    (server.home / "refuses").touch()
    with open_device("m1", "pi") as device:
        found = raised(lambda: benching.bench(coreml, device, few, benching.BenchOptions(1, 1)))
    assert "MelSpectrogram.mlpackage: the graph cannot be run (Error compiling model" in str(found)
    assert str(found).isprintable()


@real
def test_names_that_differ_only_in_case_get_an_error_message(server, tmp_path):
    """The agent detects such disks by looking up its own folder with swapped case."""
    for name in ("a/Model.bin", "a/model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with SshDevice("pi") as device:
        device.runtime = ""
        device.push(tmp_path / "a", "a")
        (server.private.parent / "EDGEWHISPER").symlink_to(server.private)
        found = raised(lambda: device.push(tmp_path / "a", "a"))
    assert "a/Model.bin and a/model.bin are the same name" in str(found)


def test_bad_compute_units_get_an_error_message(coreml, exported, few):
    def asked(source: Path, *units: str) -> list[str]:
        found = by_units([benching.Candidate(source)], units)
        return [candidate.label for candidate in found]

    assert asked(coreml) == ["fp32"]
    assert asked(coreml, "cpu", "all", "cpu") == ["fp32 (cpu)", "fp32 (all)"]
    assert len(asked(coreml, "each")) == 4
    with pytest.raises(Problem, match="unknown compute units 'gpu'"):
        asked(coreml, "cpu", "gpu")
    with pytest.raises(Problem, match="'cpu' are given, but none of the artifacts is for Core ML"):
        asked(exported, "cpu")
    both = [benching.Candidate(exported), benching.Candidate(coreml)]
    assert [c.compute_units for c in by_units(both, ("cpu",))] == [None, "cpu"]


# ---------------------------------------------------------------------------------- the command


@real
def test_edgewhisper_devices_lists_and_cleans_a_mac(server, monkeypatch, capsys, tmp_path):
    from edgewhisper.cli import main

    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["edgewhisper", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    assert "m1           ssh     --host USER@HOST     Apple M1\n" in said("devices")
    (tmp_path / "a").write_bytes(b"x" * 2_000_000)
    with SshDevice("pi") as device:
        device.runtime = ""
        device.push(tmp_path / "a", "a")
    assert said("devices", "clean", "--host", "pi").endswith("from pi: 2.0 MB\n")
    assert not server.private.exists()


@real
def test_edgewhisper_bench_runs_on_a_mac(server, exported, clips, tmp_path, monkeypatch, capsys):
    from edgewhisper.cli import main

    speech = manifest_of_some(clips, slice(2), tmp_path)
    words = ["bench", exported, "--device", "m1", "--host", "pi", "--speech", speech]
    words += ["--repeats", "1", "--threads", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgewhisper", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code or 0, err) == (0, "")
    (path,) = (tmp_path / "edgewhisper-runs").iterdir()
    (found,) = read(path)
    assert f"wrote {path.relative_to(tmp_path)}" in out
    assert found["device"]["model"] == "MacBookAir10,1" and found["peak_footprint_bytes"] > 0
