"""CPU affinity and frequency governor of a measurement; the governor is restored afterwards."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..problem import RunnerProblem
from .android import big_cores
from .helper_process import HelperProcess, can_fork
from .host import UNAVAILABLE, read

CORES = "sys/devices/system/cpu"


def pin(asked: str, root: Path = Path("/")) -> list[int]:
    """Restrict this process to cores (big, all, or numbers); return those the system grants."""
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
            f"--pin {asked}: cores {', '.join(map(str, cores))} are not available here "
            f"({error.strerror})",
            f"available cores: {usable}",
        ) from None
    return sorted(os.sched_getaffinity(0))


def cores_of(asked: str, root: Path) -> list[int]:
    """Return the core numbers of a --pin argument."""
    if asked == "all":
        return list(range(os.cpu_count() or 1))
    if asked == "big":
        if not (big := big_cores(root)):
            raise RunnerProblem(
                "--pin big: the system does not report the maximum frequencies of its cores",
                "give core numbers, such as --pin 0,1",
            )
        return big
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", asked):
        raise RunnerProblem(
            f"--pin {asked}: not a list of cores", "use big, all, or numbers such as 0,1"
        )
    return sorted({int(core) for core in asked.split(",")})


@contextmanager
def governed(name: str | None, root: Path = Path("/")) -> Iterator[str]:
    """Set the frequency governor of all cores; yield the one that applies, restore the old one. A
    helper process in a session of its own restores it even if this process is killed."""
    paths = sorted((root / CORES).glob("cpu[0-9]*/cpufreq/scaling_governor"))
    if name is None:
        yield current_governor(paths)
        return
    before = {path: read(path) for path in paths}
    check(name, before)
    keeper = HelperProcess(lambda stop: restore(stop, before), own_session=True)
    try:
        write(name, paths)
        yield current_governor(paths)
    finally:
        keeper.finish()


def write(name: str, paths: list[Path]) -> None:
    for path in paths:
        try:
            path.write_text(name)
        except OSError as error:
            raise RunnerProblem(
                f"--governor {name}: {path} rejects it ({error.strerror})",
                "leave --governor out",
            ) from None


def current_governor(paths: list[Path]) -> str:
    """Return the governor; a comma-separated list if cores differ."""
    names = {read(path) for path in paths}
    return ", ".join(sorted(names)) if names else UNAVAILABLE


def check(name: str, before: dict[Path, str]) -> None:
    """Raise RunnerProblem for a governor that cannot be set."""
    if not before or not can_fork():
        raise RunnerProblem(
            f"--governor {name}: the governor of this machine cannot be set",
            "leave --governor out",
        )
    for path in before:
        known = read(path.parent / "scaling_available_governors")
        if known != UNAVAILABLE and name not in known.split():
            raise RunnerProblem(
                f"--governor {name}: {path.parent.parent.name} supports {known}",
                "choose one of these",
            )
        if not writable(path):
            raise RunnerProblem(
                f"--governor {name}: user {os.getuid()} may not write {path}; it is {before[path]}",
                f"run once on the device: echo {name} | sudo tee "
                f"/{CORES}/cpu*/cpufreq/scaling_governor; then leave --governor out",
            )


def writable(path: Path) -> bool:
    """Return whether a file can be opened for writing."""
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        return False
    return True


def restore(stop: int, before: dict[Path, str]) -> bytes:
    """Wait for the other process to finish, then write the old governors."""
    while os.read(stop, 1):
        pass
    for path, name in before.items():
        with suppress(OSError):  # a core may be offline now
            path.write_text(name)
    return b""
