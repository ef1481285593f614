"""A helper process that runs alongside this one and ends when this one ends.

It is forked, before large modules are imported. A fork needs no interpreter that can be started by
name, which a phone's bundle lacks, and no file: the result comes back through a pipe. A second
pipe, whose write end only this process holds, tells the helper that this process has ended.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

PATIENCE_S = 45
"""Timeout for the result; one sample on a phone or a Mac may take 20 s."""
PR_SET_PDEATHSIG = 1
READY = b"r"
HELD: set[int] = set()
"""Pipe ends that only this process may hold; a new helper closes its copies."""


class HelperProcess:
    """A forked process that runs `task(stop)` and sends back the bytes that it returns.

    `stop` is a file descriptor. It becomes readable when the result is requested, and when this
    process has ended. With `own_session` the helper survives a kill of this process's group.
    """

    def __init__(self, task: Callable[[int], bytes], own_session: bool = False) -> None:
        stop, request = os.pipe()
        result, output = os.pipe()
        HELD.update((request, result))
        self.request, self.result = request, result
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for end in HELD:
                    os.close(end)
                detach(own_session)
                send(output, READY)
                send(output, task(stop))
            finally:
                os._exit(0)
        os.close(stop)
        os.close(output)
        os.read(result, len(READY))  # until then, a kill of this process also hits the helper

    def finish(self, patience_s: float = PATIENCE_S) -> bytes:
        """Request the result and wait for it; return empty bytes after the timeout."""
        self.release(self.request)
        deadline, received = time.monotonic() + patience_s, bytearray()
        while select.select([self.result], [], [], max(0, deadline - time.monotonic()))[0]:
            block = os.read(self.result, 1 << 16)
            if not block:
                break
            received += block
        else:
            received.clear()
            os.kill(self.pid, signal.SIGKILL)
        self.release(self.result)
        os.waitpid(self.pid, 0)
        return bytes(received)

    def release(self, end: int) -> None:
        HELD.discard(end)
        os.close(end)


def can_fork() -> bool:
    """Return whether this system can fork."""
    return hasattr(os, "fork")


def detach(own_session: bool) -> None:
    """Detach from the parent's standard streams, and ignore Ctrl-C, which the parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    if own_session:
        os.setsid()
    else:
        die_with_parent()


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, whatever it is doing."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def send(pipe: int, data: bytes) -> None:
    """Write all bytes, unless the reader is gone."""
    with suppress(BrokenPipeError):
        while data:
            data = data[os.write(pipe, data) :]
