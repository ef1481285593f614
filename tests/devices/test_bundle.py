"""The bundle for a phone, built from packages and wheels; the one for ARM runs in an emulator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.aarch64 import machine
from devices import bundle, debian
from devices.bundle import CPUS
from devices.device import RUNNER, DeviceProblem, open_device, run_runner

ARM, CPU = CPUS["arm64-v8a"], "cortex-a76"


def raised(of: Callable[[], object]) -> DeviceProblem:
    with pytest.raises(DeviceProblem) as found:
        of()
    return found.value


# ---------------------------------------------------------------------------------- its parts


def test_libraries_are_copied_under_the_names_that_programs_load(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    old, new = (root / part / "aarch64-linux-gnu" for part in ("lib", "usr/lib"))
    for folder, name in ((old, "libc.so.6"), (new, "libz.so.1.2.13"), (old, ARM.loader)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (new / "libz.so.1").symlink_to("libz.so.1.2.13")
    (new / "libgone.so.1").symlink_to("/nowhere/libgone.so.1")
    (new / "libmine.so.1").symlink_to("/etc/passwd")
    bundle.gather(ARM, root, out)
    found = {path.name: path.read_text() for path in (out / "lib").iterdir()}
    assert found == {
        "libc.so.6": "libc.so.6",
        "libz.so.1": "libz.so.1.2.13",
        ARM.loader: ARM.loader,
    }
    assert not any(path.is_symlink() for path in (out / "lib").iterdir())


def test_only_files_needed_at_run_time_are_copied_and_no_link_leads_out(tmp_path):
    files = (
        "a.py",
        "a.pyi",
        "a.pyc",
        "deep/b.so",
        "test/c.py",
        "x/tests/d.py",
        "__pycache__/e.pyc",
    )
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in/site.py").symlink_to("/etc/passwd")
    (tmp_path / "in/own.py").symlink_to("a.py")
    bundle.copy_tree(tmp_path / "in", tmp_path / "out", tmp_path / "in")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert found == {"a.py", "own.py", "deep/b.so"}


def test_the_name_depends_on_all_file_names_and_contents(tmp_path, rng):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a").write_bytes(rng.bytes(100))
    first = bundle.hash_of(tmp_path)
    assert first == bundle.hash_of(tmp_path) and len(first) == 16
    (tmp_path / "deep/a").rename(tmp_path / "deep/b")
    assert first != bundle.hash_of(tmp_path)
    (tmp_path / "deep/b").write_bytes(rng.bytes(100))
    (tmp_path / "deep/b").rename(tmp_path / "deep/a")
    assert first != bundle.hash_of(tmp_path)


def test_the_start_script_passes_arguments_and_its_own_path_unchanged(tmp_path):
    """The loader is replaced by a script that prints its arguments."""
    home = tmp_path / "a b$x"
    (home / "lib").mkdir(parents=True)
    (home / "lib/loader").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONHOME$LD_PRELOAD" "$@"\n')
    (home / "lib/loader").chmod(0o755)
    (home / "python").write_text(bundle.START.format(loader="loader"))
    argv = ["sh", str(home / "python"), "-c", "a b", "$HOME", "*"]
    env = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": "/x"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    paths = [home, "--argv0", home / "python", "--library-path", home / "lib", home / "bin/python3"]
    assert done.stdout.splitlines() == [*map(str, paths), "-s", "-c", "a b", "$HOME", "*"]


def test_a_bundle_is_built_once_and_again_for_other_versions(tmp_path, monkeypatch):
    built: list[Path] = []

    def build(cpu: object, release: str, place: Path) -> Path:
        built.append(place)
        (place / ".half").mkdir()
        (place / "0123456789abcdef").mkdir()
        return place / "0123456789abcdef"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundle, "build", build)
    monkeypatch.setattr(debian, "release", lambda: "bookworm")
    told: list[str] = []
    first = [bundle.bundle(ARM, told.append) for _ in range(2)]
    assert first[0] == first[1] and len(built) == len(told) == 1
    assert tmp_path in first[0].parents
    monkeypatch.setattr(bundle, "pins", lambda: ["numpy==0"])
    assert bundle.bundle(ARM, told.append).parent != first[0].parent


# ------------------------------------------------------------------------------- this machine's apt


def test_another_system_gets_an_error_message(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = raised(debian.release)
    assert "this machine has no apt-get" in str(found) or "no release" in str(found)
    assert "Debian or Ubuntu" in found.hint


def test_a_failing_apt_program_is_reported_with_its_last_line(tmp_path):
    found = raised(lambda: debian.apt(["sh", "-c", "echo 'E: \x1bno' >&2; exit 100"], tmp_path))
    assert str(found) == "sh ended with exit code 100 (E:  no)"


@pytest.mark.parametrize(
    ("told", "found", "hint"),
    [
        ("python3-minimal\n  Depends: dpkg\n", "have no python3 for arm64", "another mirror"),
        ("  PreDepends: python3.10-minimal\n", "has Python 3.10, and the runner", "Ubuntu 24.04"),
    ],
)
def test_a_release_with_too_old_a_python_is_refused(monkeypatch, tmp_path, told, found, hint):
    monkeypatch.setattr(debian, "apt", lambda argv, config: told)
    said = raised(lambda: bundle.parts(ARM, "jammy", tmp_path))
    assert found in str(said) and hint in said.hint


# -------------------------------------------------------------------------------- in an emulator


@pytest.mark.devices
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-user is missing")
def test_the_arm_bundle_gives_the_same_tokens_as_this_machine(
    digits, processor, clips, tmp_path, monkeypatch
):
    from adbd import PLACE

    from benchmarks.speech.clips import read_manifest
    from benchmarks.speech.wav import write_clips
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    monkeypatch.setenv("XDG_CACHE_HOME", str(PLACE.with_name("cache")))
    home = bundle.bundle(ARM, print)
    export_onnx(load(digits), processor, tmp_path / "artifact", "int8")
    (tmp_path / "clips").mkdir()
    write_clips(read_manifest(clips)[:2], tmp_path / "clips")
    shutil.copytree(RUNNER, tmp_path / "runner")
    seen = machine.describe(home, CPU, tmp_path / "seen")
    loader = [str(home / "lib" / ARM.loader), "--library-path", str(home / "lib")]
    emulator = ["qemu-aarch64", "-cpu", CPU, "-L", str(seen)]
    words = ["-m", "runner", "check", "artifact", "clips/clips.json", "--threads", "1"]
    env = {"PYTHONHOME": str(home), "ORT_DISABLE_TELEMETRY": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*emulator, *loader, str(home / "bin/python3"), "-s", *words],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    with open_device("local") as device:
        for name in ("runner", "artifact", "clips"):
            device.push(tmp_path / name, name)
        here = run_runner(device, words[2:])
    assert there["tokens"] == here["tokens"] and all(any(clip) for clip in here["tokens"])
