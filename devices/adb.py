"""An Android phone over ADB; it needs USB debugging, but no app and no root.

All files are in /data/local/tmp/edgewhisper on the phone, a private folder of the shell's user. The
agent runs in an interpreter that is copied there once (bundle.py).
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
from devices.wheels import in_range, installed

ROOT = "/data/local/tmp/edgewhisper"
SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%\[\]-]{0,127}")
NAME = re.compile(r"[0-9a-f]{16}")
"""Names of bundles."""
MOST_OUTPUT = 1 << 16
"""Most bytes of output of an adb command."""
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

AGAIN = "plug it in again, and start again: complete files are kept"
STATES = {
    "unauthorized": (
        "it does not trust this computer yet",
        "unlock its screen and allow USB debugging there",
    ),
    "authorizing": ("it is asking whether to trust this computer", "start again in a moment"),
    "offline": ("adb reports it as offline", "plug it in again, or run `adb reconnect offline`"),
    "no permissions": (
        "this user may not open it",
        "add yourself to the group plugdev and log in again; on Debian, install the rules of "
        "android-sdk-platform-tools-common",
    ),
}
"""adb's state of a phone that is not ready -> error message and hint."""
OTHER_STATE = "start Android on it: a bootloader or recovery system has no suitable shell"
GONE = re.compile(r"(?:error|adb): .*(?:not found|offline|no devices|closed|unauthorized)")
"""Messages of adb when it loses a phone."""


@dataclass(frozen=True)
class Phone:
    """A phone that is ready."""

    serial: str
    cpu: Cpu
    runtimes: tuple[str, ...]
    """The bundles that are already there."""


class AdbDevice(RemoteDevice):
    """An Android phone; `serial` may be left out if only one is attached."""

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
        """Check the onnxruntime of the bundle, which has the version installed on this machine."""
        versions = self.facts.get("versions")
        if self.oldest_runtime and not in_range(versions, oldest=self.oldest_runtime):
            raise self.problem(
                f"the artifact needs onnxruntime {self.oldest_runtime} or newer, and this machine "
                f"copied {installed().get('onnxruntime')} there",
                "update onnxruntime on this machine, or export the checkpoint again with --runtime",
            )

    def try_out(self) -> None:
        """Import numpy and onnxruntime once, which also compiles them for later runs."""
        done = self.start([self.python, "-c", "import numpy, onnxruntime"], None, None)
        if done.exit_code:
            self.close()
            raise self.problem(
                "numpy and onnxruntime were copied but cannot be imported there: "
                f"{last_line(done.stderr) or f'exit code {done.exit_code}'}",
                "its kernel or security policy may forbid it; `edgewhisper devices clean` removes "
                "the copied files",
            )


open_device = AdbDevice


class AgentOnPhone(Link):
    """A link that runs agent.py in the interpreter copied to a phone."""

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

    def why(self, code: int, stderr: str) -> tuple[str, str]:
        output = last_line(stderr)
        # when adb loses a phone, it ends without output, and possibly with exit code 0
        if code < 0 or GONE.match(output) or (self.open and not output and code in (0, 1)):
            how = output or (f"adb was ended by signal {-code}" if code < 0 else "adb lost it")
            return f"the connection was lost ({how})", AGAIN
        output = output or last_line(self.noise.decode("utf-8", "replace")) or "no output"
        message = f"the interpreter there ended with exit code {code} ({output})"
        if self.open:
            return message, "probably memory ran out: close the apps there"
        hint = "run `edgewhisper devices clean --serial` with its serial number, and start again"
        return message, hint


def choose(serial: str | None) -> str:
    """Return the serial number of a phone; raise DeviceProblem if it is not ready or ambiguous."""
    if serial is not None and SERIAL.fullmatch(serial) is None:
        raise DeviceProblem(
            f"--serial {clean(serial)!r} is not a serial number",
            "`adb devices` lists them: 8A1X0123, or 192.168.1.7:5555",
        )
    phones = attached()
    known = ", ".join(f"{name} ({state})" for name, state in phones.items()) or "no phones"
    if serial is not None and serial not in phones:
        raise DeviceProblem(
            f"{serial} is not attached; adb lists {known}",
            f"plug it in and switch USB debugging on; over the network, run `adb connect {serial}` "
            "first"
            if ":" in serial
            else "plug it in, and switch USB debugging on in its developer options",
        )
    if not phones:
        raise DeviceProblem(
            "no phone is attached",
            "plug one in and switch USB debugging on in its developer options; over the network, "
            "run `adb connect` with its address first",
        )
    if serial is None and len(phones) > 1:
        raise DeviceProblem(
            f"{len(phones)} phones are attached: {known}", "choose one of them with --serial"
        )
    chosen = serial or next(iter(phones))
    if phones[chosen] != "device":
        message, hint = STATES.get(phones[chosen], (f"its state is {phones[chosen]}", OTHER_STATE))
        raise DeviceProblem(f"{chosen}: {message}", hint)
    return chosen


def attached() -> dict[str, str]:
    """Return adb's phones: serial number -> state; malformed serial numbers are skipped."""
    code, output = adb("devices", "-l")
    _, listed, rest = output.partition("List of devices attached")
    if code or not listed:
        refuse("adb devices", code, output)
    phones = {}
    for line in rest.splitlines()[: MOST_PHONES + 1]:
        words = re.match(r"(\S+)\s+(no permissions|[a-z]+)\b", line)
        if words and SERIAL.fullmatch(words[1]):
            phones[words[1]] = words[2]
    return phones


def probe(serial: str) -> Phone:
    """Ask a phone for its CPU and its bundles."""
    code, output = adb("-s", serial, "shell", "-T", PROBE)
    facts = dict(line.split("=", 1) for line in map(str.strip, output.splitlines()) if "=" in line)
    if code or "machine" not in facts:
        refuse(serial, code, output)
    machine = facts.get("abi") or facts["machine"]
    cpu = next((cpu for abi, cpu in CPUS.items() if machine in (abi, cpu.machine)), None)
    if cpu is None:
        raise DeviceProblem(
            f"{serial}: its programs are for {clean(machine) or 'an unknown CPU'}, and "
            f"onnxruntime supports {' and '.join(CPUS)}",
            "bench a phone with 64-bit Android",
        )
    if "foreign" in facts:
        raise DeviceProblem(
            f"{serial}: {ROOT} there belongs to another user, or is a link", "remove it there"
        )
    return Phone(serial, cpu, tuple(filter(NAME.fullmatch, facts.get("runtimes", "").split())))


def copy_bundle(serial: str, folder: Path, home: str, say: Callable[[str], None]) -> None:
    """Copy an interpreter to a phone; it gets its final name once it is completely on disk."""
    size = size_of(folder)
    say(f"copying {size / 1e6:.0f} MB to {serial}: Python, numpy and onnxruntime (only once)")
    steps = [
        (["shell", "-T", ROOM], ANSWER_S),
        (["push", str(folder), f"{home}.part"], ANSWER_S + size / SLOWEST_BYTES_PER_S),
        (["shell", "-T", f"sync; mv {home}.part {home}"], ANSWER_S),
    ]
    for words, patience_s in steps:
        code, output = adb("-s", serial, *words, patience_s=patience_s)
        if code:
            adb("-s", serial, "shell", "-T", TIDY)
            refuse(serial, code, output)


def remove_all(serial: str) -> tuple[str, int]:
    """Remove all files ever copied to a phone; return the folder and the bytes freed. Runs in
    progress on the phone fail."""
    chosen = choose(serial)
    code, output = adb("-s", chosen, "shell", "-T", CLEAN)
    if code:
        refuse(chosen, code, output)
    kibibytes = re.match(r"\d{1,12}\b", output)
    return ROOT, 1024 * int(kibibytes[0]) if kibibytes else 0


def adb(*words: str, patience_s: float = ANSWER_S) -> tuple[int, str]:
    """Run the system's adb; return its exit code and its output, of bounded size."""
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
    timer = threading.Timer(patience_s, process.kill)
    timer.start()
    try:
        with process:
            assert process.stdout is not None
            output = process.stdout.read(MOST_OUTPUT)
            if len(output) == MOST_OUTPUT:
                process.kill()
    finally:
        process.kill()
        timer.cancel()
    return process.returncode, output.decode("utf-8", "replace")


def refuse(what: str, code: int, output: str) -> NoReturn:
    """Raise DeviceProblem for the output of a failed adb command."""
    if "No space left" in output:
        raise DeviceProblem(
            f"{what}: its storage is full (No space left on device)",
            "free 300 MB there; `edgewhisper devices clean` removes copied files",
        )
    last = last_line(output) or "no output"
    if GONE.match(last):
        raise DeviceProblem(f"{what}: the connection was lost ({last})", AGAIN)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise DeviceProblem(
        f"{what}: adb {how} ({last})", "check `adb devices -l`; `adb kill-server` may help"
    )


def size_of(folder: Path) -> int:
    """Return the total size of the files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
