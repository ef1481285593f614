"""Which cores a measurement runs on, and at which clock; the clock's governor is put back."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..measure.helper_process import Beside, possible
from ..problem import RunnerProblem
from .android import big_cores
from .host import UNAVAILABLE, read

CORES = "sys/devices/system/cpu"


def pin(asked: str, root: Path = Path("/")) -> list[int]:
    """Run on these cores only: big, all, or their numbers; return those that the system grants."""
    if not hasattr(os, "sched_setaffinity"):
        raise RunnerProblem(
            f"--pin {asked}: this system does not let a program choose its cores",
            "leave --pin out",
        )
    cores = cores_of(asked, root)
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        usable = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise RunnerProblem(
            f"--pin {asked}: cores {', '.join(map(str, cores))} cannot be had here "
            f"({error.strerror})",
            f"those that can are {usable}",
        ) from None
    return sorted(os.sched_getaffinity(0))


def cores_of(asked: str, root: Path) -> list[int]:
    """Return the numbers of the cores that are asked for."""
    if asked == "all":
        return list(range(os.cpu_count() or 1))
    if asked == "big":
        if not (big := big_cores(root)):
            raise RunnerProblem(
                "--pin big: the system does not tell its cores' maximum frequencies",
                "name the cores, as in --pin 0,1",
            )
        return big
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", asked):
        raise RunnerProblem(
            f"--pin {asked}: that names no cores", "write big, all, or numbers such as 0,1"
        )
    return sorted({int(core) for core in asked.split(",")})


@contextmanager
def governed(name: str | None, root: Path = Path("/")) -> Iterator[str]:
    """Have all cores' clocks follow a governor meanwhile; yield the one that applies.

    A process that is out of reach for who kills this one puts back what was there before.
    """
    paths = sorted((root / CORES).glob("cpu[0-9]*/cpufreq/scaling_governor"))
    if name is None:
        yield told(paths)
        return
    before = {path: read(path) for path in paths}
    check(name, before)
    keeper = Beside(lambda asked: put_back(asked, before), own_session=True)
    try:
        write(name, paths)
        yield told(paths)
    finally:
        keeper.finish()


def write(name: str, paths: list[Path]) -> None:
    for path in paths:
        try:
            path.write_text(name)
        except OSError as error:
            raise RunnerProblem(
                f"--governor {name}: {path} does not take it ({error.strerror})",
                "leave --governor out",
            ) from None


def told(paths: list[Path]) -> str:
    """Return the governor, or all of them where cores differ."""
    found = {read(path) for path in paths}
    return ", ".join(sorted(found)) if found else UNAVAILABLE


def check(name: str, before: dict[Path, str]) -> None:
    """Raise the letter for a governor that cannot be set."""
    if not before or not possible():
        raise RunnerProblem(
            f"--governor {name}: this machine has no governor that could be set",
            "leave --governor out",
        )
    for path in before:
        known = read(path.parent / "scaling_available_governors")
        if known != UNAVAILABLE and name not in known.split():
            raise RunnerProblem(
                f"--governor {name}: {path.parent.parent.name} has {known}", "choose one of these"
            )
        if not writable(path):
            raise RunnerProblem(
                f"--governor {name}: user {os.getuid()} may not write {path}; it is {before[path]}",
                f"once, there: echo {name} | sudo tee /{CORES}/cpu*/cpufreq/scaling_governor; then "
                "leave --governor out",
            )


def writable(path: Path) -> bool:
    """Say whether a file can be written, by opening it."""
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        return False
    return True


def put_back(asked: int, before: dict[Path, str]) -> bytes:
    """Wait for the other process, and write what was there before."""
    while os.read(asked, 1):
        pass
    for path, name in before.items():
        with suppress(OSError):  # a core may be off by now
            path.write_text(name)
    return b""
