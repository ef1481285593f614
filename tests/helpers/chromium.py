"""A headless Chromium that opens one address and can reach only this machine."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

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
ONLY_HERE = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


@contextmanager
def opened(
    address: str, profile: Path, hosts: str = ONLY_HERE, *flags: str, **process_options: Any
) -> Iterator[subprocess.Popen]:
    """Run the browser on a page; its profile is stored in the given folder."""
    words = [str(PROGRAM), *FLAGS, f"--user-data-dir={profile}", f"--host-resolver-rules={hosts}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [*words, *flags, address], start_new_session=True, **quiet, **process_options
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def driven(address: str, profile: Path, *flags: str, hosts: str = ONLY_HERE) -> Iterator[Tab]:
    """Run the browser on a page that the test drives over the DevTools protocol, which uses the
    file descriptors 3 and 4."""
    commands, to_browser = os.pipe()
    from_browser, events = os.pipe()

    def place() -> None:
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands, events)]
        for one, number in zip(high, (3, 4), strict=True):
            os.dup2(one, number)

    with (
        os.fdopen(to_browser, "wb", 0) as writer,
        os.fdopen(from_browser, "rb", 0) as reader,
        opened(
            "about:blank",
            profile,
            hosts,
            "--remote-debugging-pipe",
            *flags,
            close_fds=False,
            preexec_fn=place,
        ),
    ):
        os.close(commands)
        os.close(events)
        tab = Tab(writer, reader)
        tab.call("Page.navigate", url=address)
        yield tab


class Tab:
    """The first tab of a browser."""

    def __init__(self, writer: Any, reader: Any) -> None:
        self.writer, self.reader, self.number, self.held = writer, reader, 0, b""
        self.session: dict[str, str] = {}
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters: Any) -> Any:
        """Return the result of a command; events are ignored."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.writer.write(json.dumps(command).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def message(self) -> Any:
        """Return the next message of the browser."""
        while b"\0" not in self.held:
            more = self.reader.read(2**16)
            assert more, "the browser has ended"
            self.held += more
        first, _, self.held = self.held.partition(b"\0")
        return json.loads(first)

    def js(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, most_s: float = 120) -> Any:
        """Return the value of an expression once it is true."""
        until = time.monotonic() + most_s
        while not (value := self.js(expression)):
            assert time.monotonic() < until, self.js("document.body.innerText")
            time.sleep(0.1)
        return value

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path, width: int, height: int) -> None:
        """Write a PNG of the page in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
