"""A device at whose other end the agent runs: files go there once, by their hash."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from devices.device import RUNNER, Device, DeviceProblem, Env, Finished, clean, run_runner
from devices.link import Link

ANSWER_S = 60
"""That the agent may take for an answer, beside the time of a command or of copying."""
SLOWEST_BYTES_PER_S = 50_000
MOST_STDOUT = 1 << 24
"""Of a command there."""
MOST_PULLED = 1 << 30
TELL_BYTES = 1_000_000
"""Copies of more than this are announced."""


class RemoteDevice(Device):
    """A machine that a link leads to."""

    def __init__(self, far: Link, name: str, say: Callable[[str], None]) -> None:
        self.far, self.name, self.say, self.address = far, name, say, far.address
        self.runtime: str | None = None
        """The unpacked wheels that commands use; None until that is known, empty for its own."""
        self.sent_bytes = 0
        """Of files, since the connection was made."""
        try:
            self.facts = self.ask("hello")
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def prepare(self) -> None:
        """See to it, once, that `python` there can import numpy and onnxruntime."""

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
            self.say(f"copying {total / 1e6:.1f} MB to {self.address}")
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
        return DeviceProblem(f"{self.address}: {message}", hint)


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
