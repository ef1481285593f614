"""A machine over SSH; it needs only Linux or macOS and a python3.

Wheels of numpy and onnxruntime are copied to it if they are missing.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Self

from devices.connection import Connection
from devices.device import DeviceProblem, Env, Packages, clean, last_line
from devices.remote import RemoteDevice, field
from devices.wheels import LEAST_PYTHON, NAMES, Target, download, in_range, listed

FREE = "free 300 MB there; `edgewhisper devices clean` removes copied files"
LEAST_MACOS = 14
"""The oldest macOS that onnxruntime's wheels support."""
HOST = re.compile(r"[^\s\x00-\x20\x7f'\"`$\\;&|<>(){}*?!#~]{1,255}")
"""No shell metacharacters, in case the user's ssh configuration passes the host to a shell."""


class SshDevice(RemoteDevice):
    """A machine with Linux or macOS and python3, reached by the system's ssh."""

    packages: Packages | None = None
    """The packages of a program other than the runner."""

    def __init__(
        self, host: str, name: str = "ssh", say: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(Connection(checked(host)), name, say)
        self.python = clean(str(self.facts.get("command", "python3")))

    # --------------------------------------------------------------------------- the runtime

    def prepare(self) -> None:
        """Ensure, once, that the packages can be imported there; copy their wheels otherwise."""
        if self.runtime is not None:
            return
        target, known = self.target(), field(self.facts, "runtimes", list)
        if self.packages is None and self.has_runtime():
            self.runtime = ""
            return
        if target.name not in known:
            self.install(target)
            known.append(target.name)
        self.runtime = target.name

    def having(self, packages: Packages, python: Path) -> Self:
        """Return this device with the packages' wheels, which are copied if they are missing."""
        device = copy(self)
        device.packages, device.runtime = packages, None
        device.prepare()
        return device

    def has_runtime(self) -> bool:
        """Return whether the runner's packages are installed there."""
        versions = field(self.facts, "versions", dict)
        supported = in_range(versions, self.more, self.oldest_runtime)
        return supported and self.imports() is None

    def target(self) -> Target:
        """Return the interpreter that wheels are needed for; raise DeviceProblem if unsupported."""
        match self.facts:
            case {"python": [int(major), int(minor), *_], "machine": str(machine)}:
                python, machine = (major, minor), clean(machine)
            case _:
                raise self.problem("it does not say what its python3 is", "start again")
        system = clean(field(self.facts, "system", str))
        if python < LEAST_PYTHON:
            raise self.problem(
                f"python3 there is {python[0]}.{python[1]}, and the runner needs "
                f"{LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or newer",
                "install a newer system: Raspberry Pi OS 12 and later have it",
            )
        if system not in ("Linux", "Darwin"):
            raise self.problem(f"{system} is not supported", "bench a machine with Linux or macOS")
        release = self.macos(machine) if system == "Darwin" else self.glibc(machine)
        if self.packages:
            return Target(python, machine, release, system, only=self.packages.requirements)
        return Target(python, machine, release, system, self.more, oldest=self.oldest_runtime)

    def glibc(self, machine: str) -> int:
        """Return glibc's minor version; raise DeviceProblem if there are no wheels for it."""
        if self.facts.get("bits") != 64 or machine.startswith(("armv6", "armv7")):
            raise self.problem(
                f"python3 there is a 32-bit program (on {machine}), and onnxruntime has no wheels "
                "for it",
                "install the 64-bit Raspberry Pi OS; the Pi 3, 4, 5 and Zero 2 W run it",
            )
        libc = re.fullmatch(r"glibc 2\.(\d{1,3})", field(self.facts, "libc", str))
        if libc is None or self.facts.get("implementation") != "CPython":
            raise self.problem(
                "onnxruntime's wheels need CPython and glibc, and there is "
                f"{clean(str(self.facts.get('implementation')))} with "
                f"{clean(field(self.facts, 'libc', str)) or 'another C library'}",
                "use Raspberry Pi OS, Debian or Ubuntu there",
            )
        return int(libc[1])

    def macos(self, machine: str) -> int:
        """Return the major version of macOS; raise DeviceProblem if there are no wheels for it."""
        if machine != "arm64" or self.facts.get("implementation") != "CPython":
            raise self.problem(
                f"onnxruntime's wheels for macOS need CPython on arm64, and there is "
                f"{clean(str(self.facts.get('implementation')))} on {machine}",
                "bench a Mac with Apple's processor; if it has one, install a python3 for it: "
                "brew install python@3.13",
            )
        version = re.match(r"(\d{1,3})(\.|$)", field(self.facts, "macos", str))
        if version is None or int(version[1]) < LEAST_MACOS:
            raise self.problem(
                f"it runs macOS {clean(self.facts['macos']) or 'of unknown version'}, and "
                f"onnxruntime's wheels need {LEAST_MACOS} or newer",
                "update macOS there",
            )
        return int(version[1])

    @property
    def more(self) -> tuple[str, ...]:
        """The packages needed besides numpy and onnxruntime, on a Mac only: coremltools."""
        needed = self.packages is None and self.facts.get("system") == "Darwin"
        return self.libraries if needed else ()

    def imports(self, env: Env = None) -> str | None:
        """Import the needed modules on the device; return the error message, or None."""
        modules = self.packages.modules if self.packages else (*NAMES, *self.more)
        code = f"import {', '.join(modules)}"
        done = self.start([self.python, "-c", code], env, None)
        why = last_line(done.stderr) or f"exit code {done.exit_code}"
        return why if done.exit_code else None

    def install(self, target: Target) -> None:
        """Download wheels here, unpack them there, and keep them if they can be imported."""
        what = listed(target.names)
        self.say(f"{self.address} lacks {what}: downloading wheels for {target.machine}")
        with tempfile.TemporaryDirectory() as folder:
            wheels = download(target, Path(folder))
            hashes = self.place({f"wheels/{wheel.name}": wheel for wheel in wheels})
        for wheel in wheels:
            unzip = [self.python, "-m", "zipfile", "-e", f"wheels/{wheel.name}", "unpacked"]
            done = self.start(unzip, None, None)
            if done.exit_code:
                output = last_line(done.stderr) or "no output"
                raise self.problem(f"{wheel.name} cannot be unpacked: {output}", FREE)
        # the first import compiles the modules for all later ones
        if (why := self.imports({"PYTHONPATH": "unpacked"})) is not None:
            raise self.problem(
                f"{what} were copied but cannot be imported there: {why}",
                "install them there yourself, and start again",
            )
        self.ask("keep", folder="unpacked", name=target.name, drop=hashes)


def checked(host: str) -> str:
    """Return the host; raise DeviceProblem if ssh or a shell could read it as anything else."""
    if host.startswith("-") or "@-" in host or HOST.fullmatch(host) is None:
        raise DeviceProblem(
            f"--host {clean(host)!r} is not a valid host name",
            "give the name that ssh uses: pi@raspberrypi.local, or an alias of your ~/.ssh/config",
        )
    return host


open_device = SshDevice
