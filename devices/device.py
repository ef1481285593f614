"""The interface of devices (run, push, pull, describe), their profiles, and how to open one.

A profile (`profiles/NAME.toml`) holds public facts about a device model. Its `kind` says how the
device is reached: the module `devices.KIND` has a function `open_device(address, name, say)`.
"""

import importlib
import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

PROFILES = Path(__file__).parent / "profiles"
RUNNER = Path(__file__).parent / "runner"

MOST_TEXT = 2000
MOST_PARTS = 200
"""Limits of a device's description: characters of a text, elements of a list."""

FAMILIES = {"rpi": "rpi4", "mobile": "pixel"}
"""Name of a family of devices -> the profile that it means."""


class DeviceProblem(ValueError):
    """An error message for the user: what was asked, what was found; `hint` is what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Finished:
    """Exit code and output of a command on a device."""

    exit_code: int
    stdout: str
    stderr: str


class Packages(NamedTuple):
    """The packages that a program other than the runner needs."""

    requirements: tuple[str, ...]
    """pip requirements of exact versions; their dependencies are installed too."""
    modules: tuple[str, ...]
    """The modules that can then be imported."""


Env = Mapping[str, str] | None
"""Additional environment variables of a command."""


class Place(NamedTuple):
    """A device to bench on, and its address."""

    device: str = "local"
    """The name of a profile or family."""
    address: str | None = None
    """The host for ssh, the serial number for adb, or the address on which the page is served."""

    def __str__(self) -> str:
        return self.device if self.address is None else f"{self.device} {self.address}"


class Device(ABC):
    """A machine with a private work folder; remote paths are relative to it."""

    name: str
    python: str
    """The device's interpreter that has numpy and onnxruntime."""
    lacks: tuple[str, ...] = ()
    """Options of the runner that the device does not support."""
    libraries: tuple[str, ...] = ()
    """Further packages to install if available; set before the first command."""
    oldest_runtime: str = ""
    """The oldest onnxruntime that the artifacts run in, such as "1.27"; set before the first
    command. Empty: the oldest that this project supports."""

    @abstractmethod
    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Run a command in the work folder; `argv` is passed unchanged, without a shell."""

    def having(self, packages: Packages, python: Path) -> Self:
        """Return this device with packages installed for its commands.

        `python` is an interpreter on this machine that has them. Raises DeviceProblem if they
        cannot be installed on the device.
        """
        raise DeviceProblem(
            f"{self.name}: {packages.requirements[0]} cannot be installed there",
            "other engines run only on this machine and over SSH: leave --rival out",
        )

    @abstractmethod
    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder to the device."""

    @abstractmethod
    def pull(self, remote: str, local: Path) -> None:
        """Copy a file or a folder from the device."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the machine's description and state; missing values read "unavailable"."""

    @abstractmethod
    def close(self) -> None:
        """Remove the work folder; called at the end of a `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Profile:
    """Public facts about a device model."""

    name: str
    kind: str
    """How it is reached, the name of a module in devices/: local, ssh, adb or browser."""
    model: str
    cpu: str
    cores: int
    isa: tuple[str, ...]
    """CPU features that matter for matrix products, by Linux's names."""
    memory_bytes: tuple[int, ...]
    """The memory sizes it is sold with; empty if the machine itself reports it."""
    precision: str
    """The recommended precision of artifacts."""
    reason: str
    """The reason for the precision."""


def profile_names() -> list[str]:
    """Return the names of the profiles, one per file in profiles/."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Return a profile by its name or its family's name; raise DeviceProblem if unknown."""
    stem = FAMILIES.get(name, name)
    if stem not in profile_names():
        raise DeviceProblem(
            f"unknown device {name!r}",
            f"choose one of {', '.join([*FAMILIES, *profile_names()])}",
        )
    fields = tomllib.loads((PROFILES / f"{stem}.toml").read_text(encoding="utf-8"))
    fields |= {key: tuple(fields[key]) for key in ("isa", "memory_bytes")}
    return Profile(name=stem, **fields)


def open_device(
    name: str = "local", address: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Device:
    """Return a connected device; use it in a `with` block. `address` is that of a Place. `say` is
    called with a progress line before slow steps."""
    module = importlib.import_module(f".{choose(name, address).kind}", __package__)
    device: Device = module.open_device(address, name, say)
    return device


ADDRESSES = {
    "ssh": ("--host", "add --device rpi, rpi4, rpi5, rpi-zero2w or m1"),
    "adb": ("--serial", "add --device mobile"),
    "browser": ("--listen", "add --device mobile --browser"),
}
"""Kind -> the option for its addresses, and the hint if there are more addresses than devices."""


def places(
    names: Sequence[str],
    hosts: Sequence[str] = (),
    serials: Sequence[str] = (),
    pages: Sequence[str] = (),
) -> list[Place]:
    """Pair devices with addresses, in order: hosts with devices over ssh, serial numbers with
    phones, listen addresses with browsers.

    Raises DeviceProblem if addresses are left over or missing, or a device is given twice.
    """
    left = {"ssh": list(hosts), "adb": list(serials), "browser": list(pages)}
    pairs = []
    for name in names:
        addresses = left.get(load_profile(name).kind)
        pairs.append(Place(name, addresses.pop(0) if addresses else None))
    for kind, (option, more) in ADDRESSES.items():
        if left[kind]:
            raise DeviceProblem(
                f"{option} {clean(left[kind][0])}: there is no other --device that is reached by "
                f"{kind} ({', '.join(names)})",
                f"leave {option} out, or {more}",
            )
    ways = [(choose(*place).kind, place.address) for place in pairs]
    for place, way in zip(pairs, ways, strict=True):
        if ways.count(way) > 1:
            raise DeviceProblem(
                f"{place} is given twice, and two runs at once disturb each other",
                "give each device once",
            )
    if ("adb", None) in ways and [kind for kind, _ in ways].count("adb") > 1:
        raise DeviceProblem(
            "several phones are given, and one of them has no serial number",
            "give one --serial per phone; `adb devices` lists them",
        )
    return pairs


def in_browser(names: Sequence[str]) -> list[str]:
    """Return the devices with each phone replaced by its browser. Raises DeviceProblem if there is
    no phone."""
    devices = ["browser" if load_profile(name).kind == "adb" else name for name in names]
    if "browser" not in devices:
        raise DeviceProblem(
            f"--browser: no phone is among the devices ({', '.join(names)})",
            "add --device mobile",
        )
    return devices


def choose(name: str, address: str | None) -> Profile:
    """Return the profile of a device; raise DeviceProblem if it needs an address."""
    profile = load_profile(name)
    if profile.kind == "ssh" and address is None:
        raise DeviceProblem(
            f"device {name!r} ({profile.model}) is reached by ssh, and no host is given",
            "add --host with the name that ssh uses, for example --host pi@raspberrypi.local",
        )
    return profile


def run_runner(
    device: Device,
    arguments: Sequence[str],
    module: str = "runner",
    env: Env = None,
    timeout_s: float | None = None,
    python: str | None = None,
) -> dict[str, Any]:
    """Run the runner, or another program with its protocol; return the JSON of its last line.

    `python` is an interpreter on the device, by default the device's own. Raises DeviceProblem with
    the program's own message, or with its exit code.
    """
    done = device.run([python or device.python, "-m", module, *arguments], env, timeout_s)
    result = last_json(done.stdout)
    if result is not None and "error" in result:
        message = (clean(str(result[part])) for part in ("error", "hint") if part in result)
        raise DeviceProblem(f"{device.name}: {next(message)}", next(message, ""))
    if done.exit_code or result is None:
        output = last_line(done.stderr) or "no output"
        raise DeviceProblem(
            f"{device.name}: {module} ended with exit code {done.exit_code} ({output})",
            "a negative code is a signal, and -9 usually means that memory ran out; otherwise "
            "check that numpy and onnxruntime are installed there",
        )
    return result


def thread_option(threads: int | None) -> list[str]:
    """Return the runner's arguments for this number of threads; none for its default."""
    return ["--threads", str(threads)] if threads else []


def device_cores(machine: dict[str, Any]) -> int:
    """Return the number of cores a process may use, or 1 if the device does not report it."""
    cores = machine.get("cores")
    return cores if isinstance(cores, int) else 1


def last_json(stdout: str) -> dict[str, Any] | None:
    """Return the JSON object on the last line, or None."""
    try:
        value = json.loads(stdout.strip().splitlines()[-1])
    except (IndexError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def last_line(output: str) -> str:
    """Return the last non-blank line of a program's output, or an empty string."""
    lines = (clean(line).strip() for line in reversed(output.splitlines()))
    return next(filter(None, lines), "")


def clean(value: Any) -> Any:
    """Return a device's output without control characters, and of bounded length."""
    if isinstance(value, str):
        text = value if len(value) <= MOST_TEXT else f"{value[:MOST_TEXT]} ..."
        return "".join(char if char.isprintable() else " " for char in text)
    if isinstance(value, list):
        return [clean(part) for part in value[:MOST_PARTS]]
    if isinstance(value, dict):
        return {clean(key): clean(value[key]) for key in list(value)[:MOST_PARTS]}
    return value
