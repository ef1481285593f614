"""A process beside this one: forked before anything large is imported, and gone when this one is.

A fork needs no interpreter that can be started by its name, which a phone's bundle has not, and no
file: what it found comes through a pipe. Another pipe, whose other end only this process holds,
tells it that this process has ended, by whatever cause.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

PATIENCE_S = 45
"""For the answer of a process that was asked for it; a phone's or a Mac's sample may take 20 s."""
PR_SET_PDEATHSIG = 1
READY = b"r"
HELD: set[int] = set()
"""Ends of pipes that only this process may hold."""


class Beside:
    """A process that does `work(asked)` and whose answer are the bytes that it returns.

    `asked` becomes readable when the answer is wanted, and when this process has ended. What has
    `own_session` is out of reach for who kills this one with all that it has started.
    """

    def __init__(self, work: Callable[[int], bytes], own_session: bool = False) -> None:
        asked, ask = os.pipe()
        answer, tell = os.pipe()
        HELD.update((ask, answer))
        self.ask, self.answer = ask, answer
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for end in HELD:
                    os.close(end)
                detach(own_session)
                send(tell, READY)
                send(tell, work(asked))
            finally:
                os._exit(0)
        os.close(asked)
        os.close(tell)
        os.read(answer, len(READY))  # until then, what kills this process kills that one too

    def finish(self, patience_s: float = PATIENCE_S) -> bytes:
        """Ask for the answer and wait for it; nothing where there is none."""
        self.release(self.ask)
        ends, said = time.monotonic() + patience_s, bytearray()
        while select.select([self.answer], [], [], max(0, ends - time.monotonic()))[0]:
            block = os.read(self.answer, 1 << 16)
            if not block:
                break
            said += block
        else:
            said.clear()
            os.kill(self.pid, signal.SIGKILL)
        self.release(self.answer)
        os.waitpid(self.pid, 0)
        return bytes(said)

    def release(self, end: int) -> None:
        HELD.discard(end)
        os.close(end)


def possible() -> bool:
    """Say whether this system can fork."""
    return hasattr(os, "fork")


def detach(own_session: bool) -> None:
    """Let go of what the other process says and hears, and of Ctrl-C, which is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    if own_session:
        os.setsid()
    else:
        die_with_parent()


def die_with_parent() -> None:
    """Have Linux kill this process when the other one ends, also in the middle of something."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def send(pipe: int, said: bytes) -> None:
    """Write all of it, as long as somebody reads."""
    with suppress(BrokenPipeError):
        while said:
            said = said[os.write(pipe, said) :]
