"""A headless Chromium that opens one address and can reach only this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

PROGRAM = which("chromium") or which("chromium-browser")
MISSING = "there is no chromium; `make test-devices` installs it where it may"
FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root, in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
)


@contextmanager
def opened(
    address: str, profile: Path, hosts: str = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
) -> Iterator:
    """Run the browser on a page; its profile is stored in the given folder."""
    words = [str(PROGRAM), *FLAGS, f"--user-data-dir={profile}", f"--host-resolver-rules={hosts}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*words, address], start_new_session=True, **quiet)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
