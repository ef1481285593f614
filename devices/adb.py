"""A phone over ADB: no app and no root, only USB debugging.

All of it lies in /data/local/tmp/edgewhisper there, a folder for the shell's user alone. The agent
runs in an interpreter that is copied there once (bundle.py), and looks after the rest.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from devices.bundle import CPUS, Cpu, bundle
from devices.device import DeviceProblem, clean, last_line
from devices.link import READS_AGENT, Link
from devices.remote import ANSWER_S, SLOWEST_BYTES_PER_S, RemoteDevice

ROOT = "/data/local/tmp/edgewhisper"
SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%\[\]-]{0,127}")
NAME = re.compile(r"[0-9a-f]{16}")
"""Of a bundle."""
MOST_SAID = 1 << 16
"""Of what adb or a line there says."""
MOST_PHONES = 64
INSTALL = "sudo apt-get install adb"

PROBE = (
    'echo "abi=$(getprop ro.product.cpu.abi 2>/dev/null)"; echo "machine=$(uname -m)"; '
    f"if [ -L {ROOT} ] || [ -e {ROOT} -a ! -O {ROOT} ]; then echo foreign=yes; fi; "
    f'echo "runtimes="$(ls {ROOT}/runtime 2>/dev/null)'
)
ROOM = f"umask 077; mkdir -p {ROOT}/runtime && rm -rf {ROOT}/runtime/*.part"
TIDY = f"rm -rf {ROOT}/runtime/*.part; rmdir {ROOT}/runtime {ROOT} 2>/dev/null"
CLEAN = f"if [ -d {ROOT} ]; then du -sk {ROOT}; rm -rf {ROOT}; fi"

AGAIN = "plug it in again, and start again: whole files are kept"
STATES = {
    "unauthorized": (
        "it has not been told to trust this computer",
        "unlock its screen and allow USB debugging there",
    ),
    "authorizing": ("it is still asked whether it trusts this computer", "start again in a moment"),
    "offline": ("adb calls it offline", "plug it in again, or `adb reconnect offline`"),
    "no permissions": (
        "this user may not open it",
        "add yourself to the group plugdev and log in anew; Debian has the rules in "
        "android-sdk-platform-tools-common",
    ),
}
"""What adb says of a phone that it cannot work with -> what that means, and what to do."""
OTHER_STATE = "start Android on it: a bootloader or a recovery has no shell for this"
GONE = re.compile(r"(?:error|adb): .*(?:not found|offline|no devices|closed|unauthorized)")
"""What adb says when it has lost a phone."""


@dataclass(frozen=True)
class Phone:
    """One that adb can work with."""

    serial: str
    cpu: Cpu
    runtimes: tuple[str, ...]
    """What is there already."""


class AdbDevice(RemoteDevice):
    """A phone with Android; without a serial number the only one that is attached."""

    def __init__(
        self,
        serial: str | None = None,
        name: str = "adb",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        phone = probe(choose(serial))
        folder = bundle(phone.cpu, say)
        home = f"{ROOT}/runtime/{folder.name}"
        self.python = f"{home}/python"
        new = folder.name not in phone.runtimes
        if new:
            copy_bundle(phone.serial, folder, home, say)
        super().__init__(AgentOnPhone(phone.serial, self.python), name, say)
        self.runtime = ""
        if new:
            self.sent_bytes += size_of(folder)
            self.try_out()

    def prepare(self) -> None:
        """Nothing is missing: the bundle has all of it."""

    def try_out(self) -> None:
        """Import what every run does; that compiles it, and what is compiled is kept."""
        done = self.start([self.python, "-c", "import numpy, onnxruntime"], None, None)
        if done.exit_code:
            self.close()
            raise self.problem(
                "numpy and onnxruntime were copied and do not work there: "
                f"{last_line(done.stderr) or f'exit code {done.exit_code}'}",
                "its kernel or its rules may not allow it; `edgewhisper devices clean` removes "
                "what was copied",
            )


class AgentOnPhone(Link):
    """Runs agent.py in the interpreter that was copied to a phone."""

    def __init__(self, serial: str, python: str) -> None:
        there = [
            "env",
            f"EDGEWHISPER_HOME={ROOT}",
            "HOME=/data/local/tmp",
            python,
            "-c",
            READS_AGENT,
            python,
        ]
        super().__init__(serial, ["adb", "-s", serial, "shell", "-T", shlex.join(there)], INSTALL)

    def why(self, code: int, words: str) -> tuple[str, str]:
        said = last_line(words)
        # adb ends without a word, and as if all were well, when it loses a phone
        if code < 0 or GONE.match(said) or (self.open and not said and code in (0, 1)):
            how = said or (f"adb was ended by signal {-code}" if code < 0 else "adb has lost it")
            return f"the connection was cut ({how})", AGAIN
        said = said or last_line(self.noise.decode("utf-8", "replace")) or "it said nothing"
        found = f"the interpreter there ended with exit code {code} ({said})"
        if self.open:
            return found, "mostly memory has run out: close the apps there"
        hint = "run `edgewhisper devices clean --serial` with its serial number, and start again"
        return found, hint


def choose(serial: str | None) -> str:
    """Return the serial number of a phone that is ready, or raise the letter why none is."""
    if serial is not None and SERIAL.fullmatch(serial) is None:
        raise DeviceProblem(
            f"--serial {clean(serial)!r} is no serial number",
            "`adb devices` lists them: 8A1X0123, or 192.168.1.7:5555",
        )
    phones = attached()
    known = ", ".join(f"{name} ({state})" for name, state in phones.items()) or "none at all"
    if serial is not None and serial not in phones:
        raise DeviceProblem(
            f"{serial} is not attached; adb sees {known}",
            f"plug it in and switch USB debugging on; over the network first `adb connect {serial}`"
            if ":" in serial
            else "plug it in, and switch USB debugging on in its developer options",
        )
    if not phones:
        raise DeviceProblem(
            "no phone is attached",
            "plug one in and switch USB debugging on in its developer options; over the network "
            "first `adb connect` with its address",
        )
    if serial is None and len(phones) > 1:
        raise DeviceProblem(
            f"{len(phones)} phones are attached: {known}", "name one of them with --serial"
        )
    chosen = serial or next(iter(phones))
    if phones[chosen] != "device":
        found = STATES.get(phones[chosen], (f"its state is {phones[chosen]}", OTHER_STATE))
        raise DeviceProblem(f"{chosen}: {found[0]}", found[1])
    return chosen


def attached() -> dict[str, str]:
    """The phones that adb sees, and the state of each; one with a strange name is none."""
    code, said = adb("devices", "-l")
    _, listed, rest = said.partition("List of devices attached")
    if code or not listed:
        refuse("adb devices", code, said)
    found = {}
    for line in rest.splitlines()[: MOST_PHONES + 1]:
        words = re.match(r"(\S+)\s+(no permissions|[a-z]+)\b", line)
        if words and SERIAL.fullmatch(words[1]):
            found[words[1]] = words[2]
    return found


def probe(serial: str) -> Phone:
    """Ask a phone for its CPU and for what is there already."""
    code, said = adb("-s", serial, "shell", "-T", PROBE)
    told = dict(line.split("=", 1) for line in map(str.strip, said.splitlines()) if "=" in line)
    if code or "machine" not in told:
        refuse(serial, code, said)
    machine = told.get("abi") or told["machine"]
    cpu = next((cpu for abi, cpu in CPUS.items() if machine in (abi, cpu.machine)), None)
    if cpu is None:
        raise DeviceProblem(
            f"{serial}: its programs are for {clean(machine) or 'an unknown CPU'}, and "
            f"onnxruntime is for {' and '.join(CPUS)}",
            "bench a phone with 64-bit Android",
        )
    if "foreign" in told:
        raise DeviceProblem(
            f"{serial}: {ROOT} there belongs to somebody else, or is a link", "remove it there"
        )
    return Phone(serial, cpu, tuple(filter(NAME.fullmatch, told.get("runtimes", "").split())))


def copy_bundle(serial: str, folder: Path, home: str, say: Callable[[str], None]) -> None:
    """Copy an interpreter to a phone; it gets its name when it is whole and on the disk."""
    size = size_of(folder)
    say(f"copying {size / 1e6:.0f} MB to {serial}: Python, numpy and onnxruntime, once")
    steps = [
        (["shell", "-T", ROOM], ANSWER_S),
        (["push", str(folder), f"{home}.part"], ANSWER_S + size / SLOWEST_BYTES_PER_S),
        (["shell", "-T", f"sync; mv {home}.part {home}"], ANSWER_S),
    ]
    for words, patience_s in steps:
        code, said = adb("-s", serial, *words, patience_s=patience_s)
        if code:
            adb("-s", serial, "shell", "-T", TIDY)
            refuse(serial, code, said)


def remove_all(serial: str) -> tuple[str, int]:
    """Remove all that was ever copied to a phone; return the folder and its bytes. What runs there
    at the time fails."""
    chosen = choose(serial)
    code, said = adb("-s", chosen, "shell", "-T", CLEAN)
    if code:
        refuse(chosen, code, said)
    found = re.match(r"\d{1,12}\b", said)
    return ROOT, 1024 * int(found[0]) if found else 0


def adb(*words: str, patience_s: float = ANSWER_S) -> tuple[int, str]:
    """Run the system's adb; return its exit code and what it said, of bounded size."""
    try:
        process = subprocess.Popen(
            ["adb", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise DeviceProblem(
            f"adb cannot be started: {error.strerror}", f"install it here: {INSTALL}"
        ) from None
    late = threading.Timer(patience_s, process.kill)
    late.start()
    try:
        with process:
            assert process.stdout is not None
            said = process.stdout.read(MOST_SAID)
            if len(said) == MOST_SAID:
                process.kill()
    finally:
        process.kill()
        late.cancel()
    return process.returncode, said.decode("utf-8", "replace")


def refuse(what: str, code: int, said: str) -> NoReturn:
    """Raise the letter for what adb has said."""
    if "No space left" in said:
        raise DeviceProblem(
            f"{what}: its storage is full (No space left on device)",
            "make room there, 300 MB; `edgewhisper devices clean` removes what was copied before",
        )
    last = last_line(said) or "it said nothing"
    if GONE.match(last):
        raise DeviceProblem(f"{what}: the connection was cut ({last})", AGAIN)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise DeviceProblem(
        f"{what}: adb {how} ({last})", "see what `adb devices -l` says; `adb kill-server` helps"
    )


def size_of(folder: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
