"""This machine as a device: commands run in a private folder that is removed at the end."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from copy import copy as shallow_copy
from pathlib import Path
from typing import Any, Self

from devices.device import RUNNER, Device, DeviceProblem, Env, Finished, Packages, run_runner

KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables that a run inherits; others, such as thread settings, change results."""


class LocalDevice(Device):
    """Runs on this machine with this interpreter."""

    name = "local"
    python = sys.executable

    def __init__(self) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="edgewhisper-"))  # mode 0700
        self.running: list[subprocess.Popen[str]] = []
        """The running process, at most one."""

    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Run a command in the work folder."""
        try:
            process = subprocess.Popen(
                list(argv),
                cwd=self.work,
                env={**inherited(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self.running.append(process)
            with process:
                try:
                    output = process.communicate(timeout=timeout_s)
                except BaseException:
                    process.kill()
                    raise
                finally:
                    self.running.remove(process)
        except subprocess.TimeoutExpired:
            raise DeviceProblem(
                f"local: {argv[0]} did not end within {timeout_s:g} s",
                "bench fewer clips or repeats, or allow more time",
            ) from None
        except OSError as error:
            raise DeviceProblem(f"local: {argv[0]} cannot be started: {error.strerror}") from None
        return Finished(process.returncode, *output)

    def having(self, packages: Packages, python: Path) -> Self:
        """Return this device with `python` as its interpreter."""
        device = shallow_copy(self)  # both share `running`, for close()
        device.python = str(python)
        return device

    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder into the work folder."""
        copy(Path(local), self.inside(remote))

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file or a folder out of the work folder."""
        copy(self.inside(remote), Path(local))

    def describe(self) -> dict[str, Any]:
        """Return the runner's description of this machine."""
        self.push(RUNNER, "runner")
        return run_runner(self, ["describe"], timeout_s=60)

    def inside(self, remote: str) -> Path:
        """Return the path of a remote name; raise DeviceProblem outside the work folder."""
        path = (self.work / remote).resolve()
        if not path.is_relative_to(self.work.resolve()):
            raise DeviceProblem(f"local: {remote} is outside the work folder")
        return path

    def close(self) -> None:
        """Kill the running command, even if another thread waits for it; remove the work folder."""
        for process in self.running:
            process.kill()
        shutil.rmtree(self.work, ignore_errors=True)


def open_device(address: str | None, name: str, say: Callable[[str], None]) -> Device:
    """Return this machine as a device."""
    return LocalDevice()


def inherited() -> dict[str, str]:
    """Return the environment of every run."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "ORT_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, replacing existing files."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=skip, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    except OSError as error:
        raise DeviceProblem(f"local: {source} cannot be copied: {error.strerror}") from None
