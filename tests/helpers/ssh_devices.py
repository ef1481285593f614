"""Devices over SSH, and the processes there."""

from __future__ import annotations

from pathlib import Path

import pytest
import sshd

from devices.ssh import SshDevice

real = pytest.mark.skipif(not sshd.EXISTS, reason=sshd.MISSING)


def connect(name: str = "ssh") -> SshDevice:
    """A device with numpy and onnxruntime; checking for them takes a while."""
    device = SshDevice("pi", name)
    device.runtime = ""
    return device


def python(code: str) -> list[str]:
    return ["python3", "-c", code]


def alive(pid: str | int) -> bool:
    """Return whether a process is running; zombies do not count."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")")[-1].split()[0] != "Z"
