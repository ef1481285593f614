"""The ssh process that connects to the agent, and the error messages for its output.

The remote command is always the same: a line for /bin/sh that finds a python3. The user's ssh
configuration, keys, jump hosts and known hosts apply.
"""

from __future__ import annotations

import os
import re
import shlex

from devices.device import clean, last_line
from devices.link import READS_AGENT, Link
from devices.wheels import LEAST_PYTHON

CONFIG = "EDGEWHISPER_SSH_CONFIG"
"""Environment variable with the path of another ssh configuration file, passed as `ssh -F`."""
MACS_PYTHONS = tuple(
    f"{folder}/python{version}"
    for folder in ("/opt/homebrew/bin", "/usr/local/bin", "$HOME/.local/bin")
    for version in ("3.13", "3.12", "3.11", "3")
)
"""Python paths of Homebrew, python.org and uv, which are not in a Mac's PATH over ssh.
/usr/bin/python3 is never started: it is too old, or a stub that opens an installer window."""
NO_NEWER = 14
"""The first minor version without a wheel of coremltools 9.0; used only if there is no other."""
NO_MACS_PYTHON = "edgewhisper: this Mac has none of the pythons"


def remote() -> str:
    """Return the command for the login shell; on a Mac it finds a python3 that is new enough."""
    least = LEAST_PYTHON[1]
    fits = f"import sys;sys.exit(not (3,{least})<=sys.version_info[:2]<(3,$end))"
    places = " ".join(f'"{path}"' for path in ("$(command -v python3)", *MACS_PYTHONS))
    script = (
        'if [ "$(uname 2>/dev/null)" = Darwin ]; then '
        f"for end in {NO_NEWER} 99; do for p in {places}; do "
        '[ "$p" != /usr/bin/python3 ] && [ -x "$p" ] && '
        f'"$p" -c "{fits}" </dev/null >/dev/null 2>&1 && exec "$p" -c "{READS_AGENT}" "$p"; '
        f'done; done; echo "{NO_MACS_PYTHON}" >&2; exit {NO_COMMAND}; fi; '
        f'exec python3 -c "{READS_AGENT}" python3'
    )
    return shlex.join(["/bin/sh", "-c", script])


OPTIONS: dict[str, str | int] = {
    "BatchMode": "yes",
    "ConnectTimeout": 15,
    "ServerAliveInterval": 10,
    "ServerAliveCountMax": 3,
    "LogLevel": "INFO",  # at lower levels ssh does not report that the host stopped responding
    # settings of a user's file that a device does not need
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    # a shared connection of the user is used, but none is left open
    "ControlMaster": "no",
    "ControlPersist": "no",
}

CUTS = re.compile("not responding|closed by|reset by|Broken pipe|timed out|unreachable")
"""Messages of ssh when it loses the connection."""
NO_COMMAND, CUT = 127, 255
"""Exit codes of ssh."""

UNKNOWN_KEY = (
    "its host key is unknown",
    "run `ssh {host}` once and compare the fingerprint that it shows",
)
NO_PYTHON = ("there is no python3", "install it: sudo apt-get install python3")
MESSAGES = {
    NO_MACS_PYTHON: (
        f"there is no Python {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or newer except Apple's own",
        "install one there: brew install python@3.13, or from python.org",
    ),
    "IDENTIFICATION HAS CHANGED": (
        "its host key has changed",
        "check whether it was reinstalled; `ssh-keygen -R` with its name removes the old key",
    ),
    "Host key verification failed": UNKNOWN_KEY,
    "host key is known": UNKNOWN_KEY,
    "Could not resolve hostname": (
        "there is no host of that name",
        "check the name, or give its address, as in --host pi@192.168.1.5",
    ),
    "Connection refused": (
        "no SSH server is running there",
        "switch SSH on there (on a Pi sudo raspi-config, Interface Options; on a Mac System "
        "Settings, General, Sharing, Remote Login), and check the port",
    ),
    "Permission denied (": (
        "login is refused",
        "`ssh {host}` has to work without a password: `ssh-copy-id {host}` installs your key",
    ),
    "Too many authentication failures": (
        "login is refused after too many keys",
        "set the right key in ~/.ssh/config: IdentityFile, and IdentitiesOnly yes",
    ),
    "timed out": ("it does not respond", "check that it is switched on and in this network"),
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
"""Output of ssh or python3 -> error message and hint."""


class Connection(Link):
    """A link that runs agent.py in the python3 of a host."""

    def __init__(self, host: str) -> None:
        super().__init__(host, command(host), "sudo apt-get install openssh-client")

    def why(self, code: int, stderr: str) -> tuple[str, str]:
        if self.open:
            return lost(code, stderr)
        for text, message in MESSAGES.items():
            if text in stderr:
                return message
        if code == NO_COMMAND:
            return NO_PYTHON
        output = last_line(stderr) or last_line(self.noise.decode("utf-8", "replace"))
        hint = "check that `ssh {host} python3 -V` works"
        return f"ssh ended with exit code {code} ({output or 'no output'})", hint


def command(host: str) -> list[str]:
    """Return the arguments of the ssh process; the last one is the remote command."""
    config = os.environ.get(CONFIG)
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    own = ["-F", config] if config else []
    return ["ssh", *own, *options, "--", host, remote()]


def lost(code: int, stderr: str) -> tuple[str, str]:
    """Return message and hint for a connection that ended unexpectedly.

    ssh has the same exit code for a lost connection and for a remote command that was killed, but
    it prints a message only for the first.
    """
    line = next((clean(line) for line in stderr.splitlines() if CUTS.search(line)), "")
    if code < 0 or line:
        reason = f"the connection was lost ({line or f'ssh was ended by signal {-code}'})"
        return reason, "check network and power, and start again: complete files are kept"
    output = last_line(stderr) or "no output"
    how = "was killed" if code == CUT else f"ended with exit code {code} ({output})"
    return f"python3 there {how}", "probably memory ran out: close other programs there"
