"""A device is run, push, pull and describe; all else is derived.

Profiles (`profiles/*.toml`) hold what is publicly known of a kind of device. A kind that can be
reached is one file and one line in KINDS.
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

KINDS = {
    "local": "devices.local:LocalDevice",
    "ssh": "devices.ssh:SshDevice",
    "adb": "devices.adb:AdbDevice",
    "browser": "devices.browser.device:BrowserDevice",
}
"""The kinds of device this release can reach, and their classes."""

MOST_TEXT = 2000
MOST_PARTS = 200
"""Of what a device says about itself."""

FAMILIES = {"rpi": "rpi4", "mobile": "pixel"}
"""Names for a family of devices, and the profile they stand for."""


class DeviceProblem(ValueError):
    """A letter to the user: what was asked and what was found; `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Finished:
    """How a command on a device ended."""

    exit_code: int
    stdout: str
    stderr: str


class Packages(NamedTuple):
    """What a program other than the runner is written for."""

    requirements: tuple[str, ...]
    """As pip writes them, of exact versions; what they need in turn comes with them."""
    modules: tuple[str, ...]
    """What can be imported then."""


Env = Mapping[str, str] | None
"""What a command finds in its environment beside the usual."""


class Place(NamedTuple):
    """A device to bench on, and how it is reached."""

    device: str = "local"
    """The name of a profile, or of a family."""
    address: str | None = None
    """What ssh calls it; the serial number that adb gives it; where its page is served."""

    def __str__(self) -> str:
        return self.device if self.address is None else f"{self.device} {self.address}"


class Device(ABC):
    """A machine with a private work folder; remote paths are relative to it."""

    name: str
    python: str
    """The interpreter there that has numpy and onnxruntime."""
    lacks: tuple[str, ...] = ()
    """Options of the runner's that have no meaning there."""
    libraries: tuple[str, ...] = ()
    """What else it should have, where that is to be had; told before the first command."""

    @abstractmethod
    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Run a command in the work folder; `argv` reaches it word by word, through no shell."""

    def having(self, packages: Packages, python: Path) -> Self:
        """This device and its work folder, for commands that need packages; raises where they are
        not to be had. `python` has them on this machine."""
        raise DeviceProblem(
            f"{self.name}: {packages.requirements[0]} cannot be brought there",
            "other engines run on this machine and over SSH: leave --rival out",
        )

    @abstractmethod
    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder to the device."""

    @abstractmethod
    def pull(self, remote: str, local: Path) -> None:
        """Copy a file or a folder from the device."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the machine is and in what state; sources that lack read "unavailable"."""

    @abstractmethod
    def close(self) -> None:
        """Remove the work folder; the end of a `with` block does it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Profile:
    """What is publicly known of a kind of device."""

    name: str
    kind: str
    """How it is reached: local, ssh, adb or browser."""
    model: str
    cpu: str
    cores: int
    isa: tuple[str, ...]
    """CPU features that matter to matrix products, as Linux spells them."""
    memory_bytes: tuple[int, ...]
    """The sizes it is sold with; empty where the machine itself is asked."""
    precision: str
    """The artifact precision that pays there."""
    reason: str
    """Why, in half a sentence."""


def profile_names() -> list[str]:
    """Return the names of the profiles: the directory is the registry."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Return a profile by its name or its family's; raise DeviceProblem for others."""
    stem = FAMILIES.get(name, name)
    if stem not in profile_names():
        raise DeviceProblem(
            f"device {name!r} is not known",
            f"the known ones are {', '.join([*FAMILIES, *profile_names()])}",
        )
    fields = tomllib.loads((PROFILES / f"{stem}.toml").read_text(encoding="utf-8"))
    fields |= {key: tuple(fields[key]) for key in ("isa", "memory_bytes")}
    return Profile(name=stem, **fields)


def open_device(
    name: str = "local", address: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Device:
    """Return a device that is ready for work; use it in a `with` block.

    `address` is a Place's; `say` hears what takes long.
    """
    profile = choose(name, address)
    module, _, class_name = KINDS[profile.kind].partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    device: Device = kind() if profile.kind == "local" else kind(address, name, say)
    return device


ADDRESSES = {
    "ssh": ("--host", "add --device rpi, rpi4, rpi5, rpi-zero2w or m1"),
    "adb": ("--serial", "add --device mobile"),
    "browser": ("--listen", "add --device mobile --browser"),
}
"""The option that addresses a kind of device, and what is missing where too many are given."""


def places(
    names: Sequence[str],
    hosts: Sequence[str] = (),
    serials: Sequence[str] = (),
    pages: Sequence[str] = (),
) -> list[Place]:
    """Pair devices with their addresses: each host goes to the next device that ssh reaches, each
    serial number to the next one that adb does, each page's address to the next browser.

    Raises DeviceProblem where they do not come out even, or one device is named twice.
    """
    left = {"ssh": list(hosts), "adb": list(serials), "browser": list(pages)}
    found = []
    for name in names:
        mine = left.get(load_profile(name).kind)
        found.append(Place(name, mine.pop(0) if mine else None))
    for kind, (option, more) in ADDRESSES.items():
        if left[kind]:
            raise DeviceProblem(
                f"{option} {clean(left[kind][0])} is given, and no device is left that is reached "
                f"by {kind}: {', '.join(names)}",
                f"leave {option} out, or {more}",
            )
    ways = [(choose(*place).kind, place.address) for place in found]
    for place, way in zip(found, ways, strict=True):
        if ways.count(way) > 1:
            raise DeviceProblem(
                f"{place} is named twice, and two runs at once disturb each other",
                "name each device once",
            )
    if ("adb", None) in ways and [kind for kind, _ in ways].count("adb") > 1:
        raise DeviceProblem(
            "of several phones one has no serial number, and may be any of them",
            "give each of them its --serial; `adb devices` lists them",
        )
    return found


def in_browser(names: Sequence[str]) -> list[str]:
    """Return the devices with each phone replaced by its browser; raise where there is none."""
    found = ["browser" if load_profile(name).kind == "adb" else name for name in names]
    if "browser" not in found:
        raise DeviceProblem(
            f"--browser is given, and no phone is among the devices ({', '.join(names)})",
            "add --device mobile",
        )
    return found


def choose(name: str, address: str | None) -> Profile:
    """Return the profile of a device that can be opened so, or raise the letter why it cannot."""
    profile = load_profile(name)
    if profile.kind == "ssh" and address is None:
        raise DeviceProblem(
            f"device {name!r} ({profile.model}) is reached by ssh, and no host is named",
            "add --host and what `ssh` calls it, for example --host pi@raspberrypi.local",
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
    """Run a program that speaks the runner's protocol; return the JSON of its last line.

    `python` is another interpreter there than the device's own.
    Raises the program's own letter, or one that says how it ended without any.
    """
    done = device.run([python or device.python, "-m", module, *arguments], env, timeout_s)
    answer = last_json(done.stdout)
    if answer is not None and "error" in answer:
        letter = (clean(str(answer[part])) for part in ("error", "hint") if part in answer)
        raise DeviceProblem(f"{device.name}: {next(letter)}", next(letter, ""))
    if done.exit_code or answer is None:
        said = last_line(done.stderr) or "it said nothing"
        raise DeviceProblem(
            f"{device.name}: {module} ended with exit code {done.exit_code} ({said})",
            "a negative code is a signal, -9 mostly means that memory ran out; otherwise check "
            "that numpy and onnxruntime are installed there",
        )
    return answer


def last_json(stdout: str) -> dict[str, Any] | None:
    """Return the JSON object on the last line, or None."""
    try:
        found = json.loads(stdout.strip().splitlines()[-1])
    except (IndexError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def last_line(words: str) -> str:
    """Return the last of what a program said that is not blank; nothing where it said nothing."""
    lines = (clean(line).strip() for line in reversed(words.splitlines()))
    return next(filter(None, lines), "")


def clean(found: Any) -> Any:
    """Return what a device has said, without what steers a terminal and of bounded length."""
    if isinstance(found, str):
        text = found if len(found) <= MOST_TEXT else f"{found[:MOST_TEXT]} ..."
        return "".join(letter if letter.isprintable() else " " for letter in text)
    if isinstance(found, list):
        return [clean(value) for value in found[:MOST_PARTS]]
    if isinstance(found, dict):
        return {clean(key): clean(found[key]) for key in list(found)[:MOST_PARTS]}
    return found
