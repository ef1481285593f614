"""A process that leads to the agent on a device: lines of JSON, bare bytes, and letters.

What is started there is always the same, a python3 that reads agent.py from standard input; names,
commands and files follow as data, so that nothing of them is a word of a shell.
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
"""What python3 there is given, and behind it the name by which it was started."""

MOST_LINE = 1 << 27
"""Of an answer: a command's output, with each character escaped."""
MOST_NOISE = 1 << 16
"""That a login shell may say before the first answer."""
MOST_WORDS = 1 << 13
"""Of what the process says on stderr; the end is kept."""
STALL_S = 60
"""Without a byte taken."""
CLOSE_S = 10
CHUNK = 1 << 16


class Link(ABC):
    """A process at whose other end agent.py runs; requests and answers take turns."""

    def __init__(self, address: str, argv: Sequence[str], install: str) -> None:
        self.address = address
        self.open = False
        """Whether the agent has ever answered."""
        self.heard, self.words, self.noise = bytearray(), bytearray(), b""
        pipe = subprocess.PIPE
        try:
            # a session of its own: Ctrl-C ends it through close(), when the agent has cleaned up
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
        self.listener = threading.Thread(
            target=self.listen, args=(self.process.stderr,), daemon=True
        )
        self.listener.start()
        agent = AGENT.read_bytes()
        self.send(f"{len(agent)}\n".encode() + agent)

    @abstractmethod
    def why(self, code: int, words: str) -> tuple[str, str]:
        """The letter for a process that has ended by itself, by its exit code and its words."""

    def listen(self, stderr: IO[bytes]) -> None:
        """Keep the end of what the process says."""
        with stderr:
            while block := os.read(stderr.fileno(), CHUNK):
                self.words += block
                del self.words[:-MOST_WORDS]

    # ---------------------------------------------------------------------------- to and fro

    def send_line(self, value: dict[str, Any]) -> None:
        self.send(json.dumps(value).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send all of it. Where nobody listens any more, the answer that is missing tells it."""
        if self.stdin.closed:
            raise self.failure("the connection was closed")
        view, pipe = memoryview(data), self.stdin.fileno()
        while view:
            if not select.select([], [pipe], [], STALL_S)[1]:
                raise self.failure(f"it took nothing for {STALL_S} s")
            try:
                view = view[os.write(pipe, view) :]
            except BrokenPipeError:
                return

    def send_file(self, path: Path, size: int) -> None:
        """Send exactly so many bytes; where the file has shrunk, its hash there is wrong."""
        with path.open("rb") as file:
            while size:
                block = file.read(min(size, CHUNK)) or bytes(min(size, CHUNK))
                self.send(block)
                size -= len(block)

    def answer(self, patience_s: float | None) -> dict[str, Any]:
        """Return the next answer; what a login shell has said before the first one is passed."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while True:
            line = self.line(deadline, patience_s)
            _, mark, text = line.partition(MARK.encode())
            if mark:
                break
            self.noise += line
            if self.open or len(self.noise) > MOST_NOISE:
                raise self.failure(f"it said {clean(line.decode('utf-8', 'replace'))!r}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.failure("its answer is no JSON object")
        self.open = True
        return found

    def line(self, deadline: float | None, patience_s: float | None) -> bytes:
        """Return the next line."""
        searched = 0
        while (end := self.heard.find(b"\n", searched)) < 0:
            searched = len(self.heard)
            if searched > (MOST_LINE if self.open else MOST_NOISE):
                raise self.failure(f"its answer is longer than {searched} bytes")
            self.hear(deadline, patience_s)
        line = bytes(self.heard[: end + 1])
        del self.heard[: end + 1]
        return line

    def hear(self, deadline: float | None, patience_s: float | None) -> None:
        """Wait for something to be said."""
        left = None if deadline is None else max(0, deadline - time.monotonic())
        if not select.select([self.stdout], [], [], left)[0]:
            raise self.failure(f"it did not answer within {patience_s:g} s")
        block = os.read(self.stdout.fileno(), CHUNK)
        if not block:
            raise self.failure()
        self.heard += block

    def receive(self, file: IO[bytes], size: int) -> None:
        """Write the next bytes to a file."""
        while size:
            if not self.heard:
                self.hear(time.monotonic() + STALL_S, STALL_S)
            block = bytes(self.heard[:size])
            del self.heard[: len(block)]
            file.write(block)
            size -= len(block)

    # ------------------------------------------------------------------------------- its end

    def failure(self, found: str = "") -> DeviceProblem:
        """End the connection; return the letter that says why: what was found, or the process's
        own words."""
        self.end(0 if found else CLOSE_S)
        self.listener.join(CLOSE_S)
        if found:
            return self.letter(found, "check the machine there, and start again")
        return self.letter(
            *self.why(self.process.returncode, self.words.decode("utf-8", "replace"))
        )

    def letter(self, found: str, hint: str) -> DeviceProblem:
        return DeviceProblem(f"{self.address}: {found}", hint.format(host=self.address))

    def close(self) -> None:
        """End the connection, when the agent has cleaned up."""
        self.end(CLOSE_S)
        self.listener.join(CLOSE_S)

    def end(self, patience_s: float) -> None:
        """Close the pipes and wait for the process to end, or kill it."""
        for pipe in (self.stdin, self.stdout):
            pipe.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
