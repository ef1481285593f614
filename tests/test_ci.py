"""CI and the environment of the rivals: what happens where it cannot be made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = "note: make rivals-env failed, so the tests of the rivals are skipped"
STEPS = ("rivals-env", "test", "check", "demo", "test-slow", "test-devices", "test-real")


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_ci(folder: Path, failing: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of .ci/run with a `make` that only prints its target, and fails for one."""
    executable(folder / "bin" / "make", f'echo "$1"; test "$1" != {failing}')
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [folder / ".ci" / "run"]
    return subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )


def test_ci_continues_without_the_rivals_and_says_so(tmp_path):
    done = run_ci(tmp_path, failing="rivals-env")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["rivals-env", SKIPPED, *STEPS[1:]]


@pytest.mark.parametrize("step", STEPS[1:])
def test_ci_fails_with_any_other_step(step, tmp_path):
    done = run_ci(tmp_path, failing=step)
    assert done.returncode != 0
    assert done.stdout.splitlines() == [*STEPS[: STEPS.index(step) + 1]]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make; install the package")
def test_an_incomplete_environment_of_the_rivals_is_removed(tmp_path):
    """Otherwise its interpreter exists, and the tests of the rivals fail instead of being skipped.

    The interpreter here makes an environment, but pip fails in it.
    """
    rivals, venv = tmp_path / "rivals", tmp_path / "venv"
    made = 'for last; do :; done\nmkdir -p "$last/bin" && printf "exit 1" > "$last/bin/python"'
    executable(venv / "bin" / "python", f'{made}\nchmod +x "$last/bin/python"; echo "$last"')
    (venv / ".ready").touch()
    newest = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt"))
    os.utime(venv / ".ready", (newest + 1, newest + 1))
    arguments = ["make", "rivals-env", f"RIVALS={rivals}", f"VENV={venv}"]
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert str(rivals) in done.stdout, done.stderr
    assert not rivals.exists()
