"""One ssh process and the agent at its other end: lines of JSON, bare bytes, and letters.

The remote command is always the same: a line for /bin/sh that finds a python3 and has it read
agent.py from standard input; names, commands and files follow as data, so that nothing of them is a
word of a shell.
The user's own configuration, keys, jump hosts and known hosts apply.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any

from devices.agent import MARK
from devices.device import DeviceProblem, clean, last_line
from devices.wheels import LEAST_PYTHON

CONFIG = "EDGEWHISPER_SSH_CONFIG"
"""In the environment: another configuration file, as `ssh -F` takes one."""
AGENT = Path(__file__).parent / "agent.py"
READ_AGENT = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"

MACS_PYTHONS = tuple(
    f"{folder}/python{version}"
    for folder in ("/opt/homebrew/bin", "/usr/local/bin", "$HOME/.local/bin")
    for version in ("3.13", "3.12", "3.11", "3")
)
"""Where Homebrew, python.org and uv put one: over ssh a Mac's PATH has neither. /usr/bin/python3 is
never started, for it is too old, or a stub that opens a window which offers to install it."""
NO_NEWER = 14
"""The first minor version that coremltools 9.0 has no wheel for; taken where no other is there."""
NO_MACS_PYTHON = "edgewhisper: this Mac has none of the pythons"


def remote() -> str:
    """What the login shell gets. On a Mac the first python3 that is new enough is taken."""
    least = LEAST_PYTHON[1]
    fits = f"import sys;sys.exit(not (3,{least})<=sys.version_info[:2]<(3,$end))"
    places = " ".join(f'"{path}"' for path in ("$(command -v python3)", *MACS_PYTHONS))
    script = (
        'if [ "$(uname 2>/dev/null)" = Darwin ]; then '
        f"for end in {NO_NEWER} 99; do for p in {places}; do "
        '[ "$p" != /usr/bin/python3 ] && [ -x "$p" ] && '
        f'"$p" -c "{fits}" </dev/null >/dev/null 2>&1 && exec "$p" -c "{READ_AGENT}" "$p"; '
        f'done; done; echo "{NO_MACS_PYTHON}" >&2; exit {NO_COMMAND}; fi; '
        f'exec python3 -c "{READ_AGENT}" python3'
    )
    return shlex.join(["/bin/sh", "-c", script])


OPTIONS: dict[str, str | int] = {
    "BatchMode": "yes",
    "ConnectTimeout": 15,
    "ServerAliveInterval": 10,
    "ServerAliveCountMax": 3,
    "LogLevel": "INFO",  # below that, ssh does not say that the other end is silent
    # what a user's file may ask for at a terminal, and what a device has no need of
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    # a connection that the user keeps open is used, but this one does not stay behind
    "ControlMaster": "no",
    "ControlPersist": "no",
}

MOST_LINE = 1 << 27
"""Of an answer: a command's output, with each character escaped."""
MOST_NOISE = 1 << 16
"""That a login shell may say before the first answer."""
MOST_WORDS = 1 << 13
"""Of what ssh says on stderr; the end is kept."""
STALL_S = 60
"""Without a byte taken."""
CLOSE_S = 10
CHUNK = 1 << 16
CUTS = re.compile("not responding|closed by|reset by|Broken pipe|timed out|unreachable")
"""What ssh says when it loses the other end."""
NO_COMMAND, CUT = 127, 255
"""Exit codes of ssh."""

UNKNOWN_KEY = (
    "its host key is not known here",
    "run `ssh {host}` once and compare the fingerprint that it shows",
)
NO_PYTHON = ("there is no python3", "install it: sudo apt-get install python3")
LETTERS = {
    NO_MACS_PYTHON: (
        f"there is no Python {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or newer beside Apple's own",
        "install one there: brew install python@3.13, or the one of python.org",
    ),
    "IDENTIFICATION HAS CHANGED": (
        "its host key is not the one that is known here",
        "find out whether it was set up anew; `ssh-keygen -R` with its name forgets the old key",
    ),
    "Host key verification failed": UNKNOWN_KEY,
    "host key is known": UNKNOWN_KEY,
    "Could not resolve hostname": (
        "there is no host of that name",
        "check the name, or give its address, as in --host pi@192.168.1.5",
    ),
    "Connection refused": (
        "nothing listens there for SSH",
        "switch SSH on there (on a Pi sudo raspi-config, Interface Options; on a Mac System "
        "Settings, General, Sharing, Remote Login), and check the port",
    ),
    "Permission denied (": (
        "it does not let you in",
        "`ssh {host}` has to work without a password: `ssh-copy-id {host}` installs your key",
    ),
    "Too many authentication failures": (
        "it does not let you in after so many keys",
        "name the right one in ~/.ssh/config: IdentityFile, and IdentitiesOnly yes",
    ),
    "timed out": ("it does not answer", "check that it is switched on and in this network"),
    "No route to host": (
        "it cannot be reached",
        "check that it is switched on and in this network",
    ),
    "Network is unreachable": ("it cannot be reached", "check this machine's network"),
    "SyntaxError": (
        "its python3 is too old",
        "install a newer system there, such as Raspberry Pi OS 12",
    ),
    "ModuleNotFoundError": ("its python3 lacks parts of the standard library", NO_PYTHON[1]),
}
"""What ssh or python3 says -> what that means, and what to do."""


class Connection:
    """An ssh process that runs agent.py; requests and answers take turns."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.open = False
        """Whether the agent has ever answered."""
        self.heard, self.words, self.noise = bytearray(), bytearray(), b""
        pipe = subprocess.PIPE
        try:
            # a session of its own: Ctrl-C ends it through close(), when the agent has cleaned up
            self.ssh = subprocess.Popen(
                command(host), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError as error:
            raise DeviceProblem(
                f"ssh cannot be started: {error.strerror}",
                "install it here: sudo apt-get install openssh-client",
            ) from None
        assert self.ssh.stdin and self.ssh.stdout and self.ssh.stderr
        self.stdin, self.stdout = self.ssh.stdin, self.ssh.stdout
        os.set_blocking(self.stdin.fileno(), False)
        self.listener = threading.Thread(target=self.listen, args=(self.ssh.stderr,), daemon=True)
        self.listener.start()
        agent = AGENT.read_bytes()
        self.send(f"{len(agent)}\n".encode() + agent)

    def listen(self, stderr: IO[bytes]) -> None:
        """Keep the end of what ssh says."""
        with stderr:
            while block := os.read(stderr.fileno(), CHUNK):
                self.words += block
                del self.words[:-MOST_WORDS]

    # ---------------------------------------------------------------------------- to and fro

    def send_line(self, value: dict[str, Any]) -> None:
        self.send(json.dumps(value).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send all of it. Where nobody listens any more, the answer that is missing tells it."""
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
        """End the connection; return the letter that says why, by ssh's words if by no others."""
        self.end(0 if found else CLOSE_S)
        self.listener.join(CLOSE_S)
        code, words = self.ssh.returncode, self.words.decode("utf-8", "replace")
        if found:
            return self.letter(found, "check the machine there, and start again")
        if self.open:
            return self.letter(*cut(code, words))
        for sign, letter in LETTERS.items():
            if sign in words:
                return self.letter(*letter)
        if code == NO_COMMAND:
            return self.letter(*NO_PYTHON)
        said = last_line(words) or last_line(self.noise.decode("utf-8", "replace"))
        hint = f"see whether `ssh {self.host} python3 -V` works"
        return self.letter(f"ssh ended with exit code {code} ({said or 'it said nothing'})", hint)

    def letter(self, found: str, hint: str) -> DeviceProblem:
        return DeviceProblem(f"{self.host}: {found}", hint.format(host=self.host))

    def close(self) -> None:
        """End the connection, when the agent has cleaned up."""
        self.end(CLOSE_S)
        self.listener.join(CLOSE_S)

    def end(self, patience_s: float) -> None:
        """Close the pipes and wait for ssh to end, or kill it."""
        for pipe in (self.stdin, self.stdout):
            pipe.close()
        try:
            self.ssh.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.ssh.kill()
            self.ssh.wait()


def command(host: str) -> list[str]:
    """The words of the ssh process; the last one is what the login shell there gets."""
    config = os.environ.get(CONFIG)
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    own = ["-F", config] if config else []
    return ["ssh", *own, *options, "--", host, remote()]


def cut(code: int, words: str) -> tuple[str, str]:
    """The letter for a connection that has ended while it was needed; ssh's exit code is the same
    for one that was cut, which it says, and for a command that was killed there."""
    line = next((clean(line) for line in words.splitlines() if CUTS.search(line)), "")
    if code < 0 or line:
        found = f"the connection was cut ({line or f'ssh was ended by signal {-code}'})"
        return found, "check the network and its power, and start again: whole files are kept"
    said = last_line(words) or "it said nothing"
    how = "was killed" if code == CUT else f"ended with exit code {code} ({said})"
    return f"python3 there {how}", "mostly memory has run out: close other programs there"
