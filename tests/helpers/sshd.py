"""A real sshd on a loopback port. Keys, configuration and the home folder are in one folder, and
tests choose the programs on its PATH."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from devices import connection

SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
SSHD = shutil.which("sshd", path=SBIN)
MISSING = (
    "sshd is missing: sh tests/helpers/system-packages.sh 'test -x /usr/sbin/sshd' openssh-server"
)
EXISTS = SSHD is not None and shutil.which("ssh") is not None


class Server:
    """An sshd, the host names that connect to it, and its python3."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.bin = folder, folder / "home", folder / "bin"
        self.known, self.config = folder / "known_hosts", folder / "ssh_config"
        for place in (self.home, self.bin):
            place.mkdir()
        for name in ("host", "id", "other"):
            made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(made, check=True)
        (folder / "authorized_keys").write_text((folder / "id.pub").read_text())
        self.port = free_port()
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"SetEnv HOME={self.home} PATH={self.bin} OMP_NUM_THREADS=7\n"
        )
        self.known.write_text(self.key_line("host"))
        self.add("pi")
        self.add("jump", ProxyJump="pi")
        self.process = self.start()
        self.log_in()

    def log_in(self) -> None:
        """Skip the test if a plain ssh cannot log in, for example with a locked account."""
        self.python()
        plain = ["ssh", "-F", self.config, "-o", "BatchMode=yes", "pi", "true"]
        done = subprocess.run(plain, capture_output=True, text=True, timeout=60)
        if done.returncode:
            self.stop()
            said = (self.folder / "log").read_text().strip().splitlines()
            pytest.skip(f"sshd here lets nobody in: {done.stderr.strip()} {said[-3:]}")

    def start(self) -> subprocess.Popen:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # needed by an sshd of root
        argv = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return process
            time.sleep(0.05)
        process.kill()
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def key_line(self, name: str) -> str:
        """Return a line of known_hosts."""
        kind, key, *_ = (self.folder / f"{name}.pub").read_text().split()
        return f"[127.0.0.1]:{self.port} {kind} {key}\n"

    def add(self, name: str, **options: object) -> None:
        """Add another name for the server to the user's configuration."""
        usual = {
            "HostName": "127.0.0.1",
            "Port": self.port,
            "IdentityFile": self.folder / "id",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.known,
        }
        lines = [f"{option} {value}" for option, value in (usual | options).items()]
        with self.config.open("a") as file:
            file.write("\n  ".join([f"Host {name}", *lines]) + "\n")

    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reset the device, and set the configuration to connect to it."""
        monkeypatch.setenv(connection.CONFIG, str(self.config))
        self.reset()

    def reset(self) -> None:
        """Create an empty home folder, and a python3 like this one."""
        while self.home.exists():  # an agent may still be cleaning up in it
            shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.python()

    def python(self, code: str = "", options: str = "", before: str = ":") -> None:
        """Make a python3 that first runs some code, and a login shell that runs a command."""
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(code)
        before += f"\nexport PYTHONPATH={site}${{PYTHONPATH:+:$PYTHONPATH}}"
        self.script(before, [sys.executable, *options.split()])

    def script(self, before: str, interpreter: Sequence[str]) -> None:
        """Make python3 a script that executes an interpreter."""
        path = self.bin / "python3"
        path.write_text(f'#!/bin/sh\n{before}\nexec {shlex.join(interpreter)} "$@"\n')
        path.chmod(0o755)

    @property
    def private(self) -> Path:
        return self.home / ".cache/edgewhisper"

    def stored(self) -> int:
        """Return the number of files in the store."""
        return len(list((self.private / "store").glob("*")))

    def working(self) -> list[Path]:
        """Return the work folders."""
        return [path for path in (self.private / "work").glob("*") if path.is_dir()]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
