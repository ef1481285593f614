"""Profiles, pairing of devices and addresses, the local and fake device, the runner's protocol."""

from __future__ import annotations

import importlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from fake_device import FakeDevice

from devices.device import (
    FAMILIES,
    DeviceProblem,
    Finished,
    load_profile,
    open_device,
    places,
    profile_names,
    run_runner,
)
from devices.local import LocalDevice
from devices.runner.machine.host import emulated


@pytest.fixture
def local():
    with LocalDevice() as device:
        yield device


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ------------------------------------------------------------------------------------- the profiles


def test_every_profile_is_complete():
    names = {"browser", "local", "m1", "pixel", "rpi-zero2w", "rpi4", "rpi5"}
    assert set(profile_names()) == names
    for profile in map(load_profile, profile_names()):
        assert profile.kind in {"local", "ssh", "adb", "browser"}
        assert profile.precision in {"fp32", "fp16", "int8"}
        assert profile.reason and not profile.reason.endswith(".")
        asked = profile.kind in {"local", "browser"}
        assert asked or (profile.cores > 0 and profile.memory_bytes)


def test_a_family_name_means_a_profile():
    assert load_profile("rpi") == load_profile("rpi4")
    assert load_profile("mobile").kind == "adb"
    assert set(FAMILIES.values()) <= set(profile_names())


def test_profiles_list_dot_product_instructions():
    assert "asimddp" in load_profile("rpi5").isa
    assert "asimddp" not in load_profile("rpi4").isa


@pytest.mark.parametrize("name", ["toaster", "../rpi4", ""])
def test_an_unknown_device_gets_the_list_of_known_ones(name):
    with pytest.raises(DeviceProblem, match="unknown device") as error:
        open_device(name)
    assert "rpi, mobile, browser, local, m1" in error.value.hint


def test_every_profile_can_be_reached():
    for name in profile_names():
        module = importlib.import_module(f"devices.{load_profile(name).kind}")
        assert callable(module.open_device)


@pytest.mark.parametrize("name", ["rpi", "rpi4", "rpi5", "rpi-zero2w", "m1"])
def test_a_device_that_is_reached_by_ssh_needs_a_host(name):
    with pytest.raises(DeviceProblem, match="reached by ssh, and no host is given") as error:
        open_device(name)
    assert load_profile(name).model in str(error.value)
    assert "--host pi@" in error.value.hint


def test_this_machine_takes_no_host():
    with pytest.raises(
        DeviceProblem, match="--host pi: there is no other --device that is reached by ssh"
    ):
        places(["local"], ["pi"])


def test_hosts_are_paired_with_ssh_devices_in_order():
    found = places(["rpi4", "local", "rpi5"], ["a", "b"])
    assert found == [("rpi4", "a"), ("local", None), ("rpi5", "b")]
    assert [str(place) for place in found] == ["rpi4 a", "local", "rpi5 b"]
    with pytest.raises(DeviceProblem, match=r"'rpi5' .* no host is given"):
        places(["rpi4", "rpi5"], ["a"])
    with pytest.raises(
        DeviceProblem, match="--host c: there is no other --device that is reached by ssh"
    ):
        places(["rpi4", "rpi5"], ["a", "b", "c"])
    with pytest.raises(DeviceProblem, match="rpi4 a is given twice"):
        places(["rpi4", "rpi4"], ["a", "a"])
    with pytest.raises(DeviceProblem, match="is given twice"):
        places(["rpi", "rpi4"], ["a", "a"])


def test_serial_numbers_are_paired_with_phones_and_one_phone_needs_none():
    found = places(["mobile", "rpi4", "pixel"], ["a"], ["s", "t"])
    assert found == [("mobile", "s"), ("rpi4", "a"), ("pixel", "t")]
    assert places(["mobile"]) == [("mobile", None)]
    with pytest.raises(DeviceProblem, match="one of them has no serial number"):
        places(["mobile", "pixel"], [], ["s"])
    with pytest.raises(
        DeviceProblem, match="--serial s: there is no other --device that is reached by adb"
    ):
        places(["rpi4"], ["a"], ["s"])


def test_this_machine_opens():
    # for other kinds see test_ssh.py, test_adb.py, test_browser.py
    with open_device("local") as device:
        assert device.name == "local"


# ---------------------------------------------------------------------------------- this machine


def test_a_command_runs_in_the_private_folder_which_is_removed(local):
    assert stat.S_IMODE(local.work.stat().st_mode) == 0o700
    done = local.run(python("import os; print(os.getcwd())"))
    assert done == Finished(0, f"{local.work.resolve()}\n", "")
    with LocalDevice() as other:
        place = other.work
        assert place != local.work
    assert not place.exists()


def test_arguments_reach_the_command_unchanged(local):
    words = ["a b", "$HOME", "; rm x", "'", '"', "*", ""]
    done = local.run([*python("import sys, json; print(json.dumps(sys.argv[1:]))"), *words])
    assert json.loads(done.stdout) == words


def test_exit_code_and_stderr_are_returned(local):
    done = local.run(python("import sys; sys.stderr.write('no'); sys.exit(5)"))
    assert done == Finished(5, "", "no")


def test_the_environment_is_quiet_and_clean(local, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    found = json.loads(local.run(python(code), env={"EXTRA": "1"}).stdout)
    assert found["ORT_DISABLE_TELEMETRY"] == "1"
    assert found["EXTRA"] == "1"
    assert found["PATH"] == os.environ["PATH"]
    assert not {"OMP_NUM_THREADS", "PYTHONPATH"} & found.keys()


def test_files_and_folders_are_pushed_and_pulled(local, tmp_path, rng):
    content = rng.bytes(1000)
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/x.bin").write_bytes(content)
    local.push(tmp_path / "in", "artifact")
    local.push(tmp_path / "in/deep/x.bin", "sub/y.bin")
    local.pull("artifact", tmp_path / "out")
    local.pull("sub/y.bin", tmp_path / "y.bin")
    assert (tmp_path / "out/deep/x.bin").read_bytes() == content
    assert (tmp_path / "y.bin").read_bytes() == content


@pytest.mark.parametrize("remote", ["../x", "/etc/x", "a/../../x"])
def test_nothing_is_written_outside_the_work_folder(local, tmp_path, remote):
    (tmp_path / "x").write_text("x")
    with pytest.raises(DeviceProblem, match="is outside the work folder"):
        local.push(tmp_path / "x", remote)


def test_failures_get_error_messages(local, tmp_path):
    with pytest.raises(DeviceProblem, match="nowhere cannot be started: No such file"):
        local.run(["nowhere"])
    with pytest.raises(DeviceProblem, match="gone cannot be copied: No such file"):
        local.push(tmp_path / "gone", "x")
    with pytest.raises(DeviceProblem, match=r"did not end within 0\.2 s"):
        local.run(python("import time; time.sleep(60)"), timeout_s=0.2)


def test_this_machine_describes_itself(local):
    found = local.describe()
    assert found["emulated"] is False
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["runtime"]["onnxruntime"][0].isdigit()
    assert not [name for name in found if found[name] in ("", None)]


def test_emulated_machines_are_detected(tmp_path):
    kernel, board = tmp_path / "proc/sys/kernel/arch", tmp_path / "proc/device-tree/compatible"
    for path in (kernel, board):
        path.parent.mkdir(parents=True)
    assert not emulated(tmp_path, "aarch64")  # kernels before 6.1 lack these files
    for arch, machine, wanted in (
        ("x86_64", "x86_64", False),
        ("aarch64", "armv7l", False),  # a 32-bit program
        ("x86_64", "i686", False),
        ("x86_64", "aarch64", True),  # qemu-aarch64
    ):
        kernel.write_text(f"{arch}\n")
        assert emulated(tmp_path, machine) == wanted
    kernel.write_text("aarch64\n")
    board.write_bytes(b"linux,dummy-virt\0")  # qemu-system-aarch64 -M virt
    assert emulated(tmp_path, "aarch64")
    board.write_bytes(b"raspberrypi,4-model-b\0brcm,bcm2711\0")
    assert not emulated(tmp_path, "aarch64")


# -------------------------------------------------------------------------------- the fake device


def test_the_fake_device_records_and_replays(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with FakeDevice(replies=[Finished(0, "one", "")]) as fake:
        fake.push(tmp_path / "a", "there")
        assert fake.run(["echo", "x y"]).stdout == "one"
        fake.pull("there", tmp_path / "b")
        with pytest.raises(DeviceProblem, match="no reply is left for echo again"):
            fake.run(["echo", "again"])
    assert (tmp_path / "b").read_bytes() == b"abc"
    assert [call[0] for call in fake.calls] == ["push", "run", "pull", "run", "close"]


# --------------------------------------------------------------------------- the runner's protocol


def test_the_last_line_is_the_answer():
    fake = FakeDevice(replies=[Finished(0, 'chatter\n{"x": 1}\n', "")])
    assert run_runner(fake, ["bench", "a b"]) == {"x": 1}
    assert fake.calls == [("run", "python3", "-m", "runner", "bench", "a b")]


def test_the_runners_error_is_raised_with_its_hint():
    error = json.dumps({"error": "a.wav: empty", "hint": "record again"})
    fake = FakeDevice(replies=[Finished(1, error, "error: ...")])
    with pytest.raises(DeviceProblem, match=r"fake: a\.wav: empty$") as found:
        run_runner(fake, ["bench"])
    assert found.value.hint == "record again"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Finished(-9, "", ""), r"exit code -9 \(no output\)"),
        (Finished(1, "", "x\nNo module named numpy"), r"exit code 1 \(No module named numpy\)"),
        (Finished(0, "", ""), "exit code 0"),
        (Finished(0, "not json", ""), "exit code 0"),
        (Finished(0, "[1]", ""), "exit code 0"),
        (Finished(0, "[" * 100_000, ""), "exit code 0"),
        (Finished(1, "", "\x1b[2Jno"), r"exit code 1 \(\[2Jno\)"),
    ],
    ids=["killed", "no-numpy", "nothing", "chatter", "list", "deep", "escapes"],
)
def test_a_run_without_a_result_reports_its_exit_code(reply, message):
    with pytest.raises(DeviceProblem, match=message) as error:
        run_runner(FakeDevice(replies=[reply]), ["bench"])
    assert "memory ran out" in error.value.hint


def test_devices_import_none_of_the_other_packages():
    root = Path(__file__).parents[2] / "devices"
    for path in root.rglob("*.py"):
        for folder in ("edgewhisper", "benchmarks", "export"):
            assert f"import {folder}" not in path.read_text()
            assert f"from {folder}" not in path.read_text()
