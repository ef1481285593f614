"""The web site that one page is served from, for holders of its address only.

It listens on one address of this machine. Everything stands behind a random token, the first part
of every path; without it, or under another host name (as a foreign page would ask that points its
own name here), the answer is 404 whatever is asked for. Names are looked up in a table; no path of
a request reaches the file system. What a page sends is JSON of limited size, and one answer is
taken for a job.

A page posts `hello` with what it knows about its browser and gets a number; it posts `next` until
it is given a job, `alive` while it works, and `answer`.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from devices.device import DeviceProblem

MOST_BODY_BYTES = 16 * 2**20
MOST_CONNECTIONS = 32
SAME = ("user_agent", "cores")
"""By what a browser that comes again is known."""
SOCKET_S = 30
"""A connection that is silent for so long is closed."""
SILENT_S = 60
"""A page that is silent for so long is gone."""
HOLD_S = 5.0
"""`next` is answered after so long even where there is no job."""

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}

HEADERS = {
    # both give the page threads, in browsers that take its address for a secure one
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
        "connect-src 'self'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Site(ThreadingHTTPServer):
    """Serves from the moment it is made until it is closed."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listen: str | None = None) -> None:
        address, port = where(listen)
        try:
            super().__init__((address, port), Handler)
        except OSError as error:
            raise DeviceProblem(
                f"nothing can be served on {address} port {port} ({error.strerror})",
                "give --listen an address of this machine, and another port or none",
            ) from None
        self.token = secrets.token_urlsafe(18)
        self.authority = f"{address}:{self.server_address[1]}"
        self.url = f"http://{self.authority}/{self.token}/"
        self.table: dict[str, bytes | Path] = {}
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.change = threading.Condition()
        self.page: str | None = None
        self.about: Any = None
        self.job: dict[str, Any] | None = None
        self.answer: dict[str, Any] | None = None
        self.answered = ""
        """The job that the last answer was to."""
        self.seen, self.ended, self.told = 0.0, False, False
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def server_bind(self) -> None:
        """As a TCP server does; an HTTP server would ask for this machine's name, and wait."""
        TCPServer.server_bind(self)

    # ------------------------------------------------------------------- for who has made the site

    def visitor(self, most_s: float) -> Any:
        """Return what the page said about its browser; wait until one comes."""
        self.wait(lambda: self.page is not None, most_s, self.nobody)
        return self.about

    def ask(self, work: dict[str, Any], most_s: float) -> Any:
        """Give the page a job and return its answer."""
        with self.change:
            self.job, self.answer = {"id": secrets.token_urlsafe(9), "work": work}, None
            self.seen = time.monotonic()
            self.change.notify_all()
        try:
            self.wait(lambda: self.answer is not None, most_s, self.silent)
            return self.answer
        finally:
            self.job = None

    def wait(
        self, ready: Callable[[], bool], most_s: float, letter: Callable[[float], DeviceProblem]
    ) -> None:
        """Wait until something is so; raise the letter after `most_s`, or where a page that has a
        job is silent."""
        until = time.monotonic() + most_s
        with self.change:
            while not ready():
                now = time.monotonic()
                if self.ended:
                    raise DeviceProblem("browser: the site was closed before the page was done")
                if now > until or (self.job is not None and now > self.seen + SILENT_S):
                    raise letter(now - self.seen)
                self.change.wait(0.5)

    def nobody(self, _: float) -> DeviceProblem:
        return DeviceProblem(
            f"browser: nobody has opened {self.url}",
            "open it on a device of the same network; a firewall here may keep it out, and "
            "--listen ADDRESS[:PORT] chooses where it is served",
        )

    def silent(self, silent_s: float) -> DeviceProblem:
        return DeviceProblem(
            f"browser: the page gave no answer, and was last heard {silent_s:.0f} s ago",
            "keep it in front and the screen on; if it stays so, the browser may have ended it for "
            "its memory: bench a smaller artifact",
        )

    def close(self) -> None:
        """Tell the page that there is no more, for two seconds at most, and serve no longer."""
        with self.change:
            if self.ended:
                return
            self.ended = True
            self.change.notify_all()
            heard = self.page is not None and time.monotonic() < self.seen + 2 * HOLD_S
            if heard:
                self.change.wait_for(lambda: self.told, 2)
        self.shutdown()
        self.server_close()

    # ---------------------------------------------------------------------------------- for pages

    def heard(self, name: str, said: dict[str, Any]) -> tuple[int, Any]:
        """Return status and content of the answer to a page that says something."""
        with self.change:
            if name == "hello":
                return self.hello(said)
            if self.page is None or said.get("page") != self.page:
                return 409, {"problem": "another page has taken over; close this one"}
            self.seen = time.monotonic()
            if name == "next":
                return 200, self.next()
            if name == "answer":
                return self.take(said)
            return 200, {}

    def hello(self, said: dict[str, Any]) -> tuple[int, Any]:
        """A later page takes over, but not while another one works, for a run would be lost; and
        when a round is done only one of the same browser."""
        if self.job is not None and time.monotonic() < self.seen + 2 * HOLD_S:
            return 409, {"problem": "another page is at work"}
        if self.answered and any(said.get(name) != self.about.get(name) for name in SAME):
            return 409, {"problem": "another browser is being measured"}
        self.page, self.about, self.seen = secrets.token_urlsafe(9), said, time.monotonic()
        self.change.notify_all()
        return 200, {"page": self.page}

    def next(self) -> dict[str, Any]:
        """The job, also if it was given before: a page that asks does not have it."""
        self.change.wait_for(lambda: self.ended or self.open_job(), HOLD_S)
        if self.ended:
            self.told = True
            self.change.notify_all()
            return {"end": True}
        return self.job or {} if self.open_job() else {}

    def open_job(self) -> bool:
        return self.job is not None and self.answer is None

    def take(self, said: dict[str, Any]) -> tuple[int, Any]:
        """One answer to each job, which may come again where ours was lost on its way."""
        if self.answered and said.get("job") == self.answered:
            return 200, {}
        if self.job is None or self.answer is not None or said.get("job") != self.job["id"]:
            return 409, {"problem": "nobody waits for this answer"}
        self.answer, self.answered = said, self.job["id"]
        self.change.notify_all()
        return 200, {}

    # ---------------------------------------------------------------------------------- connections

    def process_request(self, request: Any, client_address: Any) -> None:
        """As many connections at a time as one page needs; others are closed at once."""
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that goes away in the middle is no error of ours, and prints none."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Site
    timeout = SOCKET_S
    server_version, sys_version = "edgewhisper", ""

    def do_GET(self) -> None:
        content = self.server.table.get(self.known_name() or "")
        if content is None:
            return self.reply(404, b"")
        kind = KINDS.get(Path(self.page_name()).suffix, "application/octet-stream")
        if isinstance(content, bytes):
            return self.reply(200, content, kind)
        with content.open("rb") as file:
            self.head(200, content.stat().st_size, kind)
            shutil.copyfileobj(file, self.wfile)

    def do_POST(self) -> None:
        if self.known_name() not in ("hello", "next", "alive", "answer"):
            return self.reply(404, b"")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 10):
            return self.reply(411, b"")
        if int(length) > MOST_BODY_BYTES:
            return self.reply(413, b"")
        status: int = 400
        answer: Any = {}
        with suppress(ValueError, RecursionError):
            said = json.loads(self.rfile.read(int(length)))
            if isinstance(said, dict):
                status, answer = self.server.heard(str(self.known_name()), said)
        self.reply(status, json.dumps(answer).encode(), "application/json")

    def known_name(self) -> str | None:
        """Return the name that is asked for, or None to who does not hold the address."""
        token, slash, _ = self.path.removeprefix("/").partition("/")
        host = "|".join(self.headers.get_all("Host", []))
        asked, held = f"{host}/{token}{slash}", f"{self.server.authority}/{self.server.token}/"
        return self.page_name() if hmac.compare_digest(asked.encode(), held.encode()) else None

    def page_name(self) -> str:
        return self.path.removeprefix("/").partition("/")[2] or "page.html"

    def head(self, status: int, length: int, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        # the address is new for every bench, so what it names never changes
        fixed = status == 200 and self.command == "GET"
        self.send_header("Cache-Control", "private, max-age=86400" if fixed else "no-store")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, status: int, content: bytes, kind: str = "text/plain") -> None:
        self.head(status, len(content), kind)
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is no request that a page makes gets the same answer as one without the token."""
        self.reply(404, b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Addresses hold the token: nothing is logged."""


def where(listen: str | None) -> tuple[str, int]:
    """Return address and port of ADDRESS[:PORT]; by default the address that the local network
    sees, and any port."""
    address, _, port = (listen or seen_address()).partition(":")
    try:
        if ipaddress.IPv4Address(address).is_unspecified:
            raise ValueError
        if port and not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ValueError
    except ValueError:
        raise DeviceProblem(
            f"--listen {listen!r} is not one IPv4 address of this machine, with a port or without",
            "take the one that the phone's network knows, as 192.168.1.5 or 192.168.1.5:8000",
        ) from None
    return address, int(port or 0)


def seen_address() -> str:
    """Return the address of this machine by which it would reach others. Nothing is sent: UDP has
    no handshake, and 192.0.2.1 is of a network that exists in documents only."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            raise DeviceProblem(
                "this machine seems to be in no network, so no phone could open the page",
                "connect it, or choose an address by --listen",
            ) from None
        return str(probe.getsockname()[0])
