"""A link to the agent on a device: a local process (ssh or adb) with the agent at its other end.

The command on the device is always the same, a python3 that reads agent.py from standard input.
Names, commands and files follow as data, so a shell never parses them.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from devices.agent import MARK
from devices.device import DeviceProblem, clean

AGENT = Path(__file__).parent / "agent.py"
READS_AGENT = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
"""The code for the device's python3; its argument is the name by which python3 was started."""

MOST_LINE = 1 << 27
"""Most bytes of an answer: a command's output, with each character escaped."""
MOST_NOISE = 1 << 16
"""Most bytes that a login shell may print before the first answer."""
MOST_STDERR = 1 << 13
"""Bytes kept of the end of the process's stderr."""
STALL_S = 60
"""Timeout without any byte transferred."""
CLOSE_S = 10
CHUNK = 1 << 16


class Link(ABC):
    """A process with agent.py at its other end; each request is followed by its answer."""

    def __init__(self, address: str, argv: Sequence[str], install: str) -> None:
        self.address = address
        self.open = False
        """Whether the agent has answered before."""
        self.received, self.stderr, self.noise = bytearray(), bytearray(), b""
        pipe = subprocess.PIPE
        try:
            # in its own session, Ctrl-C does not kill it; close() ends it after the agent's cleanup
            self.process = subprocess.Popen(
                argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError as error:
            raise DeviceProblem(
                f"{argv[0]} cannot be started: {error.strerror}",
                f"install it here: {install}",
            ) from None
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        self.stderr_reader = threading.Thread(
            target=self.read_stderr, args=(self.process.stderr,), daemon=True
        )
        self.stderr_reader.start()
        agent = AGENT.read_bytes()
        self.send(f"{len(agent)}\n".encode() + agent)

    @abstractmethod
    def why(self, code: int, stderr: str) -> tuple[str, str]:
        """Return message and hint for a process that ended, from its exit code and its stderr."""

    def read_stderr(self, stderr: IO[bytes]) -> None:
        """Keep the end of the process's stderr."""
        with stderr:
            while block := os.read(stderr.fileno(), CHUNK):
                self.stderr += block
                del self.stderr[:-MOST_STDERR]

    # ---------------------------------------------------------------------- sending and receiving

    def send_line(self, value: dict[str, Any]) -> None:
        """Send a request as a line of JSON."""
        self.send(json.dumps(value).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send all bytes. A broken pipe is ignored here; the missing answer reports it."""
        if self.stdin.closed:
            raise self.failure("the connection was closed")
        view, pipe = memoryview(data), self.stdin.fileno()
        while view:
            if not select.select([], [pipe], [], STALL_S)[1]:
                raise self.failure(f"it accepted no data for {STALL_S} s")
            try:
                view = view[os.write(pipe, view) :]
            except BrokenPipeError:
                return

    def send_file(self, path: Path, size: int) -> None:
        """Send exactly `size` bytes; if the file has shrunk, zeros are sent and its hash fails."""
        with path.open("rb") as file:
            while size:
                block = file.read(min(size, CHUNK)) or bytes(min(size, CHUNK))
                self.send(block)
                size -= len(block)

    def answer(self, patience_s: float | None) -> dict[str, Any]:
        """Return the next answer; output of a login shell before the first one is skipped."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while True:
            line = self.line(deadline, patience_s)
            _, mark, text = line.partition(MARK.encode())
            if mark:
                break
            self.noise += line
            if self.open or len(self.noise) > MOST_NOISE:
                raise self.failure(f"it printed {clean(line.decode('utf-8', 'replace'))!r}")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self.failure("its answer is not a JSON object")
        self.open = True
        return answer

    def line(self, deadline: float | None, patience_s: float | None) -> bytes:
        """Return the next line."""
        searched = 0
        while (end := self.received.find(b"\n", searched)) < 0:
            searched = len(self.received)
            if searched > (MOST_LINE if self.open else MOST_NOISE):
                raise self.failure(f"its answer is longer than {searched} bytes")
            self.read_more(deadline, patience_s)
        line = bytes(self.received[: end + 1])
        del self.received[: end + 1]
        return line

    def read_more(self, deadline: float | None, patience_s: float | None) -> None:
        """Wait for output of the process and append it to `received`."""
        left = None if deadline is None else max(0, deadline - time.monotonic())
        if not select.select([self.stdout], [], [], left)[0]:
            raise self.failure(f"it did not answer within {patience_s:g} s")
        block = os.read(self.stdout.fileno(), CHUNK)
        if not block:
            raise self.failure()
        self.received += block

    def receive(self, file: IO[bytes], size: int) -> None:
        """Write the next bytes to a file."""
        while size:
            if not self.received:
                self.read_more(time.monotonic() + STALL_S, STALL_S)
            block = bytes(self.received[:size])
            del self.received[: len(block)]
            file.write(block)
            size -= len(block)

    # ------------------------------------------------------------------------------------- closing

    def failure(self, reason: str = "") -> DeviceProblem:
        """Close the connection; return the error for `reason`, or for how the process ended."""
        self.end(0 if reason else CLOSE_S)
        self.stderr_reader.join(CLOSE_S)
        if reason:
            return self.problem(reason, "check the device, and start again")
        return self.problem(
            *self.why(self.process.returncode, self.stderr.decode("utf-8", "replace"))
        )

    def problem(self, message: str, hint: str) -> DeviceProblem:
        """Return an error that names the address."""
        return DeviceProblem(f"{self.address}: {message}", hint.format(host=self.address))

    def close(self) -> None:
        """Close the connection after the agent's cleanup."""
        self.end(CLOSE_S)
        self.stderr_reader.join(CLOSE_S)

    def end(self, patience_s: float) -> None:
        """Close the pipes and wait for the process to end, or kill it."""
        for pipe in (self.stdin, self.stdout):
            pipe.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
