"""Makes a python3 here take itself for a Mac's: it says so, and what only Linux has is gone."""

import builtins
import ctypes
import io
import os
import platform
import sys

here = sys.platform, platform.system
"""What it is in truth; the coremltools beside this needs a torch that knows."""
sys.platform = "darwin"
platform.system = lambda: "Darwin"
platform.release = lambda: "24.5.0"
platform.machine = lambda: "arm64"
platform.mac_ver = lambda *_: ("15.5", ("", "", ""), "arm64")
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)


def unless_linux(real):
    """A function of a path, for which /proc and /sys are not there."""

    def act(path, *rest, **more):
        if isinstance(path, str | os.PathLike) and str(path).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *rest, **more)

    return act


builtins.open = io.open = unless_linux(open)
os.stat = unless_linux(os.stat)


def confstr(name):
    raise ValueError(f"unrecognized configuration name {name}")


def killpg(group, number, real=os.killpg):
    """There a group of which only a dead process is left may not be signalled."""
    real(group, number)
    raise PermissionError(1, "Operation not permitted")


os.confstr, os.killpg = confstr, killpg


def usage(pid, flavor, buffer):
    """proc_pid_rusage of 16 bytes and 35 numbers: 1000, 2000 and so on, in MiB."""
    if (pid, flavor) != (os.getpid(), 4):
        return -1
    numbers = b"".join((1000 * n << 20).to_bytes(8, "little") for n in range(1, 36))
    ctypes.memmove(buffer, b"u" * 16 + numbers, 16 + len(numbers))
    return 0


class CDLL(ctypes.CDLL):
    def __init__(self, name=None, *rest, **more):
        super().__init__(name, *rest, **more)
        self.proc_pid_rusage = usage


ctypes.CDLL = CDLL
exec(os.environ.get("MAC_CODE", ""))
