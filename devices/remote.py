"""A device on which the agent runs; each file is sent once, identified by its hash."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from devices.device import RUNNER, Device, DeviceProblem, Env, Finished, clean, run_runner
from devices.link import Link

ANSWER_S = 60
"""Timeout of the agent's answer, in addition to the time of a command or of copying."""
SLOWEST_BYTES_PER_S = 50_000
MOST_STDOUT = 1 << 24
"""Most output of a command, in bytes."""
MOST_PULLED = 1 << 30
TELL_BYTES = 1_000_000
"""Copies of more bytes than this print a progress line."""


class RemoteDevice(Device):
    """A machine that is reached through a Link."""

    def __init__(self, link: Link, name: str, say: Callable[[str], None]) -> None:
        self.link, self.name, self.say, self.address = link, name, say, link.address
        self.runtime: str | None = None
        """The unpacked wheels that commands use; None if not known yet, "" for installed ones."""
        self.sent_bytes = 0
        """Bytes of the files sent since the connection was opened."""
        try:
            self.facts = self.ask("hello")
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def prepare(self) -> None:
        """Ensure, once, that the device's `python` can import numpy and onnxruntime."""

    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Run a command in the device's work folder."""
        self.prepare()
        return self.start(argv, {"PYTHONDONTWRITEBYTECODE": "1", **(env or {})}, timeout_s)

    def start(self, argv: Sequence[str], env: Env, timeout_s: float | None) -> Finished:
        """Run a command without preparing the runtime."""
        answer = self.ask(
            "run",
            patience_s=None if timeout_s is None else timeout_s + ANSWER_S,
            argv=list(argv),
            env=dict(env or {}),
            runtime=self.runtime or "",
            timeout_s=timeout_s,
            most=MOST_STDOUT,
        )
        done = Finished(
            field(answer, "exit_code", int),
            field(answer, "stdout", str)[:MOST_STDOUT],
            field(answer, "stderr", str),
        )
        if answer.get("ended") == "timeout":
            raise self.problem(
                f"{argv[0]} did not end within {timeout_s:g} s",
                "bench fewer clips or repeats, or allow more time",
            )
        if answer.get("ended") != "itself":
            raise self.problem(
                f"{argv[0]} printed more than {MOST_STDOUT / 1e6:.0f} MB",
                "bench fewer clips at once",
            )
        return done

    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder; files that are already there, under any name, are not sent."""
        self.prepare()
        self.place(files_of(Path(local), self.inside(remote)))

    def place(self, files: dict[str, Path]) -> list[str]:
        """Copy files to their names in the work folder; return their hashes."""
        hashed = [(name, *hashed_file(path)) for name, path in files.items()]
        offered = {
            digest: (path, size)
            for (_, digest, size), path in zip(hashed, files.values(), strict=True)
        }
        self.link.send_line({"do": "push", "files": hashed})
        missing = field(self.answer(ANSWER_S), "missing", list)
        if not all(isinstance(digest, str) and digest in offered for digest in missing):
            raise self.link.failure("it requested files that were not offered")
        total = sum(offered[digest][1] for digest in missing)
        if total > TELL_BYTES:
            self.say(f"copying {total / 1e6:.1f} MB to {self.address}")
        try:
            for digest in missing:
                self.link.send_file(*offered[digest])
        except OSError as error:
            raise self.link.failure(f"{error.filename} cannot be read: {error.strerror}") from None
        self.sent_bytes += total
        self.answer(ANSWER_S + total / SLOWEST_BYTES_PER_S)
        return list(offered)

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file or a folder from the device, at most 1 GiB."""
        self.link.send_line({"do": "pull", "name": self.inside(remote)})
        answer = self.answer(ANSWER_S)
        files = field(answer, "files", list)
        if not all(is_file_entry(entry) for entry in files):
            raise self.link.failure(f"its list of the files of {clean(remote)} is malformed")
        if sum(size for _, size in files) > MOST_PULLED:
            raise self.link.failure(f"{remote} is larger than {MOST_PULLED / 2**30:.0f} GiB")
        try:
            for name, size in files:
                target = Path(local) / self.inside(name) if answer.get("folder") else Path(local)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    self.link.receive(file, size)
        except OSError as error:
            raise self.link.failure(f"{local} cannot be written: {error.strerror}") from None
        self.answer(ANSWER_S)

    def describe(self) -> dict[str, Any]:
        """Return the runner's description of the machine."""
        self.push(RUNNER, "runner")
        machine: dict[str, Any] = clean(run_runner(self, ["describe"], timeout_s=ANSWER_S))
        field(machine, "emulated", bool)
        return machine

    def clean(self) -> tuple[str, int]:
        """Remove all files ever copied to the device; return the folder and the bytes freed."""
        answer = self.ask("clean")
        return clean(field(answer, "folder", str)), field(answer, "bytes", int)

    def close(self) -> None:
        """Close the connection; the agent removes the work folder."""
        self.link.close()

    # ------------------------------------------------------------------------- the protocol

    def ask(self, do: str, patience_s: float | None = ANSWER_S, **request: Any) -> dict[str, Any]:
        """Send a request and return the agent's answer."""
        self.link.send_line({"do": do, **request})
        return self.answer(patience_s)

    def answer(self, patience_s: float | None) -> dict[str, Any]:
        """Return the agent's next answer; raise DeviceProblem if it is an error."""
        answer = self.link.answer(patience_s)
        if "error" in answer:
            raise self.problem(clean(str(answer["error"])), clean(str(answer.get("hint", ""))))
        return answer

    def inside(self, remote: str) -> str:
        """Return a name; raise DeviceProblem if it is outside the work folder. Names sent to the
        device and names received from it are checked."""
        path = PurePosixPath(remote)
        if path.is_absolute() or ".." in path.parts or "\0" in remote:
            raise self.problem(f"{clean(remote)} is outside the work folder")
        return str(path)

    def problem(self, message: str, hint: str = "") -> DeviceProblem:
        return DeviceProblem(f"{self.address}: {message}", hint)


def field(answer: dict[str, Any], name: str, kind: type) -> Any:
    """Return an entry of an answer; raise DeviceProblem if it is missing or of another type."""
    if not isinstance(answer.get(name), kind):
        raise DeviceProblem(f"the device's answer has no valid {name}", "start again")
    return answer[name]


def is_file_entry(entry: Any) -> bool:
    """Return whether an entry is a name and a size."""
    match entry:
        case [str(), int(size)]:
            return size >= 0
    return False


def files_of(local: Path, remote: str) -> dict[str, Path]:
    """Return the files to copy: name on the device -> local file."""
    if not local.is_dir():
        return {remote: local}
    paths = [path for path in sorted(local.rglob("*")) if path.is_file()]
    return {
        str(PurePosixPath(remote, path.relative_to(local).as_posix())): path
        for path in paths
        if "__pycache__" not in path.parts
    }


def hashed_file(path: Path) -> tuple[str, int]:
    """Return a file's SHA-256 and size."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise DeviceProblem(f"{path} cannot be copied: {error.strerror}") from None
