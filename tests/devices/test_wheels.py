"""numpy and onnxruntime for a device over SSH that lacks them."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from ssh_devices import python, real
from wheels_for_pip import PLATFORM, make_wheel, raised

from devices import wheels
from devices.ssh import SshDevice
from devices.wheels import Target

SAID = "import numpy, onnxruntime; print(numpy.said, onnxruntime.said, numpy.__cached__)"


@real
def test_missing_numpy_and_onnxruntime_are_pushed_once(server, index):
    server.python(options="-S")  # no installed packages are visible
    here = {name: metadata.version(name) for name in wheels.NAMES}
    for name, version in here.items():
        make_wheel(index, name, version)
        make_wheel(index, name, version, tags="cp311-cp311-manylinux_2_17_riscv64")
    told: list[str] = []
    with SshDevice("pi", "rpi", told.append) as device:
        done = device.run(python(SAID))
        assert done.stdout.startswith(f"pushed {here['numpy']} pushed {here['onnxruntime']} ")
        compiled = Path(done.stdout.split()[-1])
        assert compiled.is_file() and compiled.is_relative_to(server.private / "runtime")
        assert (
            0 < device.sent_bytes == sum(p.stat().st_size for p in index.glob(f"*{PLATFORM}.whl"))
        )
    assert server.stored() == 0  # the wheels are removed after unpacking
    assert "lacks numpy and onnxruntime" in told[0]
    shutil.rmtree(index)
    with SshDevice("pi") as device:
        assert device.run(python(SAID)).stdout == done.stdout
        assert device.sent_bytes == 0


@real
def test_other_supported_versions_are_used_without_matching_wheels(server, index):
    server.python(options="-S")
    make_wheel(index, "numpy", "2.0.7")
    make_wheel(index, "numpy", "99.0")
    make_wheel(index, "onnxruntime", "1.27.99")
    with SshDevice("pi") as device:
        assert device.run(python(SAID)).stdout.startswith("pushed 2.0.7 pushed 1.27.99 ")


@real
def test_wheels_are_chosen_by_the_oldest_runtime_of_the_artifacts(server, index):
    server.python(options="-S")
    make_wheel(index, "numpy", metadata.version("numpy"))
    make_wheel(index, "onnxruntime", "1.23.9")
    with SshDevice("pi") as device:
        device.oldest_runtime = "1.27"
        found = raised(device.prepare)
        assert "onnxruntime (the artifact needs onnxruntime 1.27 or newer) for Python" in str(found)
        assert "`export --runtime` makes artifacts for an older onnxruntime" in found.hint
        device.oldest_runtime = "1.22"
        assert device.run(python("import onnxruntime as o; print(o.said)")).stdout == (
            "pushed 1.23.9\n"
        )


@real
def test_missing_or_broken_wheels_get_error_messages(server, index):
    server.python(options="-S")
    make_wheel(index, "numpy", metadata.version("numpy"))
    with SshDevice("pi") as device:
        found = raised(device.prepare)
        assert "no wheels of numpy and onnxruntime for Python 3." in str(found)
        assert "No matching distribution found for onnxruntime" in str(found)
        broken = "raise ImportError('libfoo.so \\x1b')"
        make_wheel(index, "onnxruntime", metadata.version("onnxruntime"), broken)
        found = raised(device.prepare)
        assert "were copied but cannot be imported there: ImportError: libfoo.so" in str(found)
    assert list((server.private / "runtime").iterdir()) == []


def test_wheels_are_requested_for_the_device():
    words = Target((3, 13), "aarch64", 31).options
    platforms = [word for word in words if word.startswith("manylinux")]
    assert platforms[0] == "manylinux_2_31_aarch64" and platforms[-1] == "manylinux2014_aarch64"
    assert "manylinux_2_28_aarch64" in platforms and "manylinux_2_32_aarch64" not in platforms
    assert words[:4] == ["--implementation", "cp", "--python-version", "3.13"]
    assert Target((3, 13), "aarch64", 31).name != Target((3, 12), "aarch64", 31).name


def test_installed_versions_are_compared_with_the_supported_ranges():
    here = {name: metadata.version(name) for name in wheels.NAMES}
    assert wheels.in_range(here)
    for name, older in (("numpy", "1.26.4"), ("onnxruntime", "1.21.0")):
        for other in (older, "99.0", "", "x\n", None, ["2.3"]):
            assert not wheels.in_range(here | {name: other})
    old = here | {"onnxruntime": "1.23.2"}
    assert wheels.in_range(old, oldest="1.22") and not wheels.in_range(old, oldest="1.24")


def test_wheels_newer_than_here_are_requested_for_an_artifact_that_needs_them():
    exact = f"onnxruntime=={metadata.version('onnxruntime')}"
    target = Target((3, 13), "aarch64", 31, oldest="1.22")
    assert exact in target.requirements
    assert target.name == Target((3, 13), "aarch64", 31).name, "the same wheels are copied once"
    newer = Target((3, 13), "aarch64", 31, oldest="1.99")
    assert "onnxruntime<2,>=1.99" in newer.requirements
    assert newer.name != target.name
