"""The ssh process that leads to the agent, and what its words mean.

The remote command is always the same: a line for /bin/sh that finds a python3 there.
The user's own configuration, keys, jump hosts and known hosts apply.
"""

from __future__ import annotations

import os
import re
import shlex

from devices.device import clean, last_line
from devices.link import READS_AGENT, Link
from devices.wheels import LEAST_PYTHON

CONFIG = "EDGEWHISPER_SSH_CONFIG"
"""In the environment: another configuration file, as `ssh -F` takes one."""
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


class Connection(Link):
    """Runs agent.py in the python3 of a host."""

    def __init__(self, host: str) -> None:
        super().__init__(host, command(host), "sudo apt-get install openssh-client")

    def why(self, code: int, words: str) -> tuple[str, str]:
        if self.open:
            return cut(code, words)
        for sign, letter in LETTERS.items():
            if sign in words:
                return letter
        if code == NO_COMMAND:
            return NO_PYTHON
        said = last_line(words) or last_line(self.noise.decode("utf-8", "replace"))
        hint = "see whether `ssh {host} python3 -V` works"
        return f"ssh ended with exit code {code} ({said or 'it said nothing'})", hint


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
