"""A machine over SSH: Linux or macOS and a python3 are all that it needs.

numpy and onnxruntime go there with the files where they are missing.
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

FREE = "see that there are 300 MB free there; `edgewhisper devices clean` removes what was copied"
LEAST_MACOS = 14
"""Of onnxruntime's wheels."""
HOST = re.compile(r"[^\s\x00-\x20\x7f'\"`$\\;&|<>(){}*?!#~]{1,255}")
"""Nothing that a shell reads, should the user's own ssh configuration pass it to one."""


class SshDevice(RemoteDevice):
    """A machine with Linux or macOS and python3 that the system's ssh can reach."""

    packages: Packages | None = None
    """What commands need in the place of the runner's."""

    def __init__(
        self, host: str, name: str = "ssh", say: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(Connection(checked(host)), name, say)
        self.python = clean(str(self.facts.get("command", "python3")))

    # --------------------------------------------------------------------------- the runtime

    def prepare(self) -> None:
        """See, once, that what is needed can be imported there; push it where not."""
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
        """Push the packages' wheels where they have not been pushed before."""
        found = copy(self)
        found.packages, found.runtime = packages, None
        found.prepare()
        return found

    def has_runtime(self) -> bool:
        """Whether what the runner needs is installed there."""
        versions = field(self.facts, "versions", dict)
        return in_range(versions, self.more) and self.imports() is None

    def target(self) -> Target:
        """What wheels have to fit; a letter where there are none."""
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
            raise self.problem(
                f"{system} is not in this release", "bench a machine with Linux or macOS"
            )
        release = self.macos(machine) if system == "Darwin" else self.glibc(machine)
        only = self.packages.requirements if self.packages else ()
        return Target(python, machine, release, system, self.more, only)

    def glibc(self, machine: str) -> int:
        """Return the minor version of the C library; a letter where there are no wheels for it."""
        if self.facts.get("bits") != 64 or machine.startswith(("armv6", "armv7")):
            raise self.problem(
                f"python3 there is a 32-bit program (on {machine}), and onnxruntime has no wheel "
                "for it",
                "install the 64-bit Raspberry Pi OS; the Pi 3, 4, 5 and Zero 2 W run it",
            )
        libc = re.fullmatch(r"glibc 2\.(\d{1,3})", field(self.facts, "libc", str))
        if libc is None or self.facts.get("implementation") != "CPython":
            raise self.problem(
                "onnxruntime's wheels are for CPython and glibc, and there is "
                f"{clean(str(self.facts.get('implementation')))} with "
                f"{clean(field(self.facts, 'libc', str)) or 'another C library'}",
                "use Raspberry Pi OS, Debian or Ubuntu there",
            )
        return int(libc[1])

    def macos(self, machine: str) -> int:
        """Return the major version of macOS, likewise."""
        if machine != "arm64" or self.facts.get("implementation") != "CPython":
            raise self.problem(
                f"onnxruntime's wheels for macOS are for CPython on arm64, and there is "
                f"{clean(str(self.facts.get('implementation')))} on {machine}",
                "bench a Mac with Apple's processor; a python3 for Intel's on such a one is in "
                "the way: brew install python@3.13",
            )
        found = re.match(r"(\d{1,3})(\.|$)", field(self.facts, "macos", str))
        if found is None or int(found[1]) < LEAST_MACOS:
            raise self.problem(
                f"it runs macOS {clean(self.facts['macos']) or 'of no version'}, and onnxruntime's "
                f"wheels need {LEAST_MACOS} or newer",
                "update macOS there",
            )
        return int(found[1])

    @property
    def more(self) -> tuple[str, ...]:
        """What is needed beside numpy and onnxruntime; coremltools runs nothing but on a Mac."""
        wanted = self.packages is None and self.facts.get("system") == "Darwin"
        return self.libraries if wanted else ()

    def imports(self, env: Env = None) -> str | None:
        """Import what is needed there; return why that fails, or None."""
        modules = self.packages.modules if self.packages else (*NAMES, *self.more)
        code = f"import {', '.join(modules)}"
        done = self.start([self.python, "-c", code], env, None)
        why = last_line(done.stderr) or f"exit code {done.exit_code}"
        return why if done.exit_code else None

    def install(self, target: Target) -> None:
        """Fetch wheels here, unpack them there and try them before they get their name."""
        what = listed(target.names)
        self.say(f"{self.address} lacks {what}: fetching them for {target.machine}")
        with tempfile.TemporaryDirectory() as folder:
            wheels = download(target, Path(folder))
            hashes = self.place({f"wheels/{wheel.name}": wheel for wheel in wheels})
        for wheel in wheels:
            unzip = [self.python, "-m", "zipfile", "-e", f"wheels/{wheel.name}", "unpacked"]
            done = self.start(unzip, None, None)
            if done.exit_code:
                said = last_line(done.stderr) or "it said nothing"
                raise self.problem(f"{wheel.name} cannot be unpacked: {said}", FREE)
        # the first import compiles what it needs, for all later ones
        if (why := self.imports({"PYTHONPATH": "unpacked"})) is not None:
            raise self.problem(
                f"{what} were copied and do not work there: {why}",
                "install them there by hand, and start again",
            )
        self.ask("keep", folder="unpacked", name=target.name, drop=hashes)


def checked(host: str) -> str:
    """Return the host, if it is a name that ssh cannot take for anything else."""
    if host.startswith("-") or "@-" in host or HOST.fullmatch(host) is None:
        raise DeviceProblem(
            f"--host {clean(host)!r} is no name of a host",
            "name it as you would to ssh: pi@raspberrypi.local, or an alias of your ~/.ssh/config",
        )
    return host
