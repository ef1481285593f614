"""A machine over SSH: Linux or macOS and a python3 are all that it needs.

Files go there once, by their hash; numpy and onnxruntime go with them where they are missing.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from devices.connection import Connection
from devices.device import (
    RUNNER,
    Device,
    DeviceProblem,
    Env,
    Finished,
    clean,
    last_line,
    run_runner,
)
from devices.wheels import LEAST_PYTHON, NAMES, Target, download, in_range, listed

ANSWER_S = 60
"""That the agent may take for an answer, beside the time of a command or of copying."""
SLOWEST_BYTES_PER_S = 50_000
MOST_STDOUT = 1 << 24
"""Of a command there."""
MOST_PULLED = 1 << 30
TELL_BYTES = 1_000_000
"""Copies of more than this are announced."""
FREE = "see that there are 300 MB free there; `edgewhisper devices clean` removes what was copied"
LEAST_MACOS = 14
"""Of onnxruntime's wheels."""
HOST = re.compile(r"[^\s\x00-\x20\x7f'\"`$\\;&|<>(){}*?!#~]{1,255}")
"""Nothing that a shell reads, should the user's own ssh configuration pass it to one."""


class SshDevice(Device):
    """A machine with Linux or macOS and python3 that the system's ssh can reach."""

    def __init__(
        self, host: str, name: str = "ssh", say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.host, self.name, self.say = checked(host), name, say
        self.runtime: str | None = None
        """The unpacked wheels that commands use; None until that is known, empty for its own."""
        self.sent_bytes = 0
        """Of files, since the connection was made."""
        self.far = Connection(self.host)
        try:
            self.facts = self.ask("hello")
            self.python = clean(str(self.facts.get("command", "python3")))
        except BaseException:
            self.close()
            raise

    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Run a command in the work folder there."""
        self.prepare()
        return self.start(argv, {"PYTHONDONTWRITEBYTECODE": "1", **(env or {})}, timeout_s)

    def start(self, argv: Sequence[str], env: Env, timeout_s: float | None) -> Finished:
        """Run a command with what is there."""
        found = self.ask(
            "run",
            patience_s=None if timeout_s is None else timeout_s + ANSWER_S,
            argv=list(argv),
            env=dict(env or {}),
            runtime=self.runtime or "",
            timeout_s=timeout_s,
            most=MOST_STDOUT,
        )
        done = Finished(
            field(found, "exit_code", int),
            field(found, "stdout", str)[:MOST_STDOUT],
            field(found, "stderr", str),
        )
        if found.get("ended") == "timeout":
            raise self.problem(
                f"{argv[0]} did not end within {timeout_s:g} s",
                "bench fewer clips or repeats, or allow more time",
            )
        if found.get("ended") != "itself":
            raise self.problem(
                f"{argv[0]} said more than {MOST_STDOUT / 1e6:.0f} MB", "bench fewer clips at once"
            )
        return done

    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder; what is there already, under any name, is not sent again."""
        self.prepare()
        self.place(files_of(Path(local), self.inside(remote)))

    def place(self, files: dict[str, Path]) -> list[str]:
        """Copy files to their names in the work folder; return their hashes."""
        hashed = [(name, *hashed_file(path)) for name, path in files.items()]
        offered = {
            digest: (path, size)
            for (_, digest, size), path in zip(hashed, files.values(), strict=True)
        }
        self.far.send_line({"do": "push", "files": hashed})
        missing = field(self.answer(ANSWER_S), "missing", list)
        if not all(isinstance(digest, str) and digest in offered for digest in missing):
            raise self.far.failure("it asked for files that it was not offered")
        total = sum(offered[digest][1] for digest in missing)
        if total > TELL_BYTES:
            self.say(f"copying {total / 1e6:.1f} MB to {self.host}")
        try:
            for digest in missing:
                self.far.send_file(*offered[digest])
        except OSError as error:
            raise self.far.failure(f"{error.filename} cannot be read: {error.strerror}") from None
        self.sent_bytes += total
        self.answer(ANSWER_S + total / SLOWEST_BYTES_PER_S)
        return list(offered)

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file or a folder from the device, 1 GiB at most."""
        self.far.send_line({"do": "pull", "name": self.inside(remote)})
        found = self.answer(ANSWER_S)
        files = field(found, "files", list)
        if not all(is_file_entry(entry) for entry in files):
            raise self.far.failure(f"its list of files of {clean(remote)} is none")
        if sum(size for _, size in files) > MOST_PULLED:
            raise self.far.failure(f"{remote} is larger than {MOST_PULLED / 2**30:.0f} GiB")
        try:
            for name, size in files:
                target = Path(local) / self.inside(name) if found.get("folder") else Path(local)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    self.far.receive(file, size)
        except OSError as error:
            raise self.far.failure(f"{local} cannot be written: {error.strerror}") from None
        self.answer(ANSWER_S)

    def describe(self) -> dict[str, Any]:
        """Return what the runner reads about the machine there."""
        self.push(RUNNER, "runner")
        found: dict[str, Any] = clean(run_runner(self, ["describe"], timeout_s=ANSWER_S))
        field(found, "emulated", bool)
        return found

    def clean(self) -> tuple[str, int]:
        """Remove all that was ever copied; return the folder and its bytes."""
        found = self.ask("clean")
        return clean(field(found, "folder", str)), field(found, "bytes", int)

    def close(self) -> None:
        """End the connection; the agent removes the work folder."""
        self.far.close()

    # --------------------------------------------------------------------------- the runtime

    def prepare(self) -> None:
        """See, once, that what is needed can be imported there; push it where not."""
        if self.runtime is not None:
            return
        target = self.target()
        if in_range(field(self.facts, "versions", dict), self.more) and self.imports() is None:
            self.runtime = ""
            return
        if target.name not in field(self.facts, "runtimes", list):
            self.install(target)
        self.runtime = target.name

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
        return Target(python, machine, release, system, self.more)

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
        return self.libraries if self.facts.get("system") == "Darwin" else ()

    def imports(self, env: Env = None) -> str | None:
        """Import what is needed there; return why that fails, or None."""
        code = f"import {', '.join((*NAMES, *self.more))}"
        done = self.start([self.python, "-c", code], env, None)
        why = last_line(done.stderr) or f"exit code {done.exit_code}"
        return why if done.exit_code else None

    def install(self, target: Target) -> None:
        """Fetch wheels here, unpack them there and try them before they get their name."""
        what = listed((*NAMES, *self.more))
        self.say(f"{self.host} lacks {what}: fetching them for {target.machine}")
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

    # ------------------------------------------------------------------------- the protocol

    def ask(self, do: str, patience_s: float | None = ANSWER_S, **request: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.far.send_line({"do": do, **request})
        return self.answer(patience_s)

    def answer(self, patience_s: float | None) -> dict[str, Any]:
        """Return the agent's next answer, or raise its letter."""
        found = self.far.answer(patience_s)
        if "error" in found:
            raise self.problem(clean(str(found["error"])), clean(str(found.get("hint", ""))))
        return found

    def inside(self, remote: str) -> str:
        """Return a name that does not lead out of the work folder, in either direction."""
        path = PurePosixPath(remote)
        if path.is_absolute() or ".." in path.parts or "\0" in remote:
            raise self.problem(f"{clean(remote)} lies outside the work folder")
        return str(path)

    def problem(self, message: str, hint: str = "") -> DeviceProblem:
        return DeviceProblem(f"{self.host}: {message}", hint)


def checked(host: str) -> str:
    """Return the host, if it is a name that ssh cannot take for anything else."""
    if host.startswith("-") or "@-" in host or HOST.fullmatch(host) is None:
        raise DeviceProblem(
            f"--host {clean(host)!r} is no name of a host",
            "name it as you would to ssh: pi@raspberrypi.local, or an alias of your ~/.ssh/config",
        )
    return host


def field(found: dict[str, Any], name: str, kind: type) -> Any:
    """Return a field of an answer, which the other end may have made up."""
    if not isinstance(found.get(name), kind):
        raise DeviceProblem(f"the device's answer has no {name}", "start again")
    return found[name]


def is_file_entry(entry: Any) -> bool:
    """Whether it is a name and a size."""
    match entry:
        case [str(), int(size)]:
            return size >= 0
    return False


def files_of(local: Path, remote: str) -> dict[str, Path]:
    """Return the files to copy: name there -> file here."""
    if not local.is_dir():
        return {remote: local}
    paths = [path for path in sorted(local.rglob("*")) if path.is_file()]
    return {
        str(PurePosixPath(remote, path.relative_to(local).as_posix())): path
        for path in paths
        if "__pycache__" not in path.parts
    }


def hashed_file(path: Path) -> tuple[str, int]:
    """Return a file's hash and size."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise DeviceProblem(f"{path} cannot be copied: {error.strerror}") from None
