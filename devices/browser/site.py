"""A web server for one page, which is served only to clients that know its random URL.

It listens on one address of this machine. Every path begins with a random token. Requests without
the token, or with another Host header (as in DNS rebinding), get status 404. Names are looked up in
a table, so no path of a request reaches the file system. Pages send JSON of limited size, and each
job has one answer.

The page of a bench posts `hello` with a description of its browser and gets an id. It posts `next`
until it gets a job, `alive` while it runs, and `answer` at the end. The page that transcribes posts
nothing.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from devices.device import DeviceProblem

MESSAGES = ("hello", "next", "alive", "answer")
"""What a page posts during a bench."""
MOST_BODY_BYTES = 16 * 2**20
MOST_CONNECTIONS = 32
SAME = ("user_agent", "cores")
"""Entries of `hello` by which a returning browser is recognized."""
SOCKET_S = 30
"""Timeout of an idle connection."""
SILENT_S = 60
"""A page that sends nothing for this long counts as gone."""
HOLD_S = 5.0
"""`next` is answered after this time even if there is no job."""

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}

HEADERS = {
    # both enable threads in the page, in browsers that treat its address as secure
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
    """Serves from its creation until `close()`."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        listen: str | None = None,
        table: Mapping[str, bytes | Path] | None = None,
        messages: tuple[str, ...] = MESSAGES,
        certificate: Path | None = None,
    ) -> None:
        """`table` has the content of each name, `messages` those that pages may post. With a
        certificate, the site is served over https."""
        address, port = where(listen)
        context = None if certificate is None else encrypted(certificate)
        try:
            super().__init__((address, port), Handler)
        except OSError as error:
            raise DeviceProblem(
                f"cannot serve on {address} port {port} ({error.strerror})",
                "give --listen an address of this machine, with another port or none",
            ) from None
        if context is not None:
            # the handshake is part of the first read, in the connection's own thread
            self.socket = context.wrap_socket(self.socket, True, do_handshake_on_connect=False)
        self.token = secrets.token_urlsafe(18)
        self.authority = f"{address}:{self.server_address[1]}"
        self.url = f"{'http' if context is None else 'https'}://{self.authority}/{self.token}/"
        self.table, self.messages = dict(table or {}), messages
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.change = threading.Condition()
        self.page: str | None = None
        self.about: Any = None
        self.job: dict[str, Any] | None = None
        self.answer: dict[str, Any] | None = None
        self.answered = ""
        """The id of the last answered job."""
        self.last_seen_s, self.ended, self.end_sent = 0.0, False, False
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def server_bind(self) -> None:
        """Bind like a TCP server; an HTTP server would look up this machine's name, and wait."""
        TCPServer.server_bind(self)

    # ------------------------------------------------------------------------------ for the owner

    def visitor(self, most_s: float) -> Any:
        """Wait for a page; return its description of the browser."""
        self.wait(lambda: self.page is not None, most_s, self.nobody)
        return self.about

    def ask(self, work: dict[str, Any], most_s: float) -> Any:
        """Give the page a job and return its answer."""
        with self.change:
            self.job, self.answer = {"id": secrets.token_urlsafe(9), "work": work}, None
            self.last_seen_s = time.monotonic()
            self.change.notify_all()
        try:
            self.wait(lambda: self.answer is not None, most_s, self.silent)
            return self.answer
        finally:
            self.job = None

    def wait(
        self, ready: Callable[[], bool], most_s: float, problem: Callable[[float], DeviceProblem]
    ) -> None:
        """Wait until `ready()`; raise `problem` after `most_s`, or if a page with a job is gone."""
        until = time.monotonic() + most_s
        with self.change:
            while not ready():
                now = time.monotonic()
                if self.ended:
                    raise DeviceProblem("browser: the site was closed before the page was done")
                if now > until or (self.job is not None and now > self.last_seen_s + SILENT_S):
                    raise problem(now - self.last_seen_s)
                self.change.wait(0.5)

    def nobody(self, _: float) -> DeviceProblem:
        """Return the error if no page was opened."""
        return DeviceProblem(
            f"browser: {self.url} was not opened",
            "open it on a device of the same network; if a firewall here blocks it, choose "
            "another address with --listen ADDRESS[:PORT]",
        )

    def silent(self, silent_s: float) -> DeviceProblem:
        """Return the error if a page with a job is gone."""
        return DeviceProblem(
            f"browser: the page sent no answer; its last message came {silent_s:.0f} s ago",
            "keep it in the foreground and the screen on; if that does not help, the browser may "
            "have run out of memory: bench a smaller artifact",
        )

    def close(self) -> None:
        """Tell the page that it is done, waiting at most two seconds, and stop serving."""
        with self.change:
            if self.ended:
                return
            self.ended = True
            self.change.notify_all()
            alive = self.page is not None and time.monotonic() < self.last_seen_s + 2 * HOLD_S
            if alive:
                self.change.wait_for(lambda: self.end_sent, 2)
        self.shutdown()
        self.server_close()

    # ---------------------------------------------------------------------------------- for pages

    def receive(self, name: str, message: dict[str, Any]) -> tuple[int, Any]:
        """Return status and content of the response to a page's message."""
        with self.change:
            if name == "hello":
                return self.hello(message)
            if self.page is None or message.get("page") != self.page:
                return 409, {"problem": "another page has taken over; close this one"}
            self.last_seen_s = time.monotonic()
            if name == "next":
                return 200, self.next()
            if name == "answer":
                return self.take(message)
            return 200, {}

    def hello(self, message: dict[str, Any]) -> tuple[int, Any]:
        """Accept a new page, unless another one is running a job. After the first round it must be
        the same browser."""
        if self.job is not None and time.monotonic() < self.last_seen_s + 2 * HOLD_S:
            return 409, {"problem": "another page is running"}
        if self.answered and any(message.get(name) != self.about.get(name) for name in SAME):
            return 409, {"problem": "another browser is being measured"}
        self.page, self.about = secrets.token_urlsafe(9), message
        self.last_seen_s = time.monotonic()
        self.change.notify_all()
        return 200, {"page": self.page}

    def next(self) -> dict[str, Any]:
        """Return the open job, even if it was sent before: a page that asks did not get it."""
        self.change.wait_for(lambda: self.ended or self.open_job(), HOLD_S)
        if self.ended:
            self.end_sent = True
            self.change.notify_all()
            return {"end": True}
        return self.job or {} if self.open_job() else {}

    def open_job(self) -> bool:
        """Return whether there is a job without an answer."""
        return self.job is not None and self.answer is None

    def take(self, message: dict[str, Any]) -> tuple[int, Any]:
        """Accept one answer per job; a page repeats it if our response was lost."""
        if self.answered and message.get("job") == self.answered:
            return 200, {}
        if self.job is None or self.answer is not None or message.get("job") != self.job["id"]:
            return 409, {"problem": "no job is waiting for this answer"}
        self.answer, self.answered = message, self.job["id"]
        self.change.notify_all()
        return 200, {}

    # ---------------------------------------------------------------------------------- connections

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a request; connections beyond MOST_CONNECTIONS are closed at once."""
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
        """Ignore connections that a page closes early."""


class Handler(BaseHTTPRequestHandler):
    """Handles one request."""

    server: Site
    timeout = SOCKET_S
    server_version, sys_version = "edgewhisper", ""

    def do_GET(self) -> None:
        content = self.server.table.get(self.known_name() or "")
        if content is None:
            return self.reply(404, b"")
        kind = CONTENT_TYPES.get(Path(self.page_name()).suffix, "application/octet-stream")
        if isinstance(content, bytes):
            return self.reply(200, content, kind)
        with content.open("rb") as file:
            self.head(200, content.stat().st_size, kind)
            shutil.copyfileobj(file, self.wfile)

    def do_POST(self) -> None:
        if self.known_name() not in self.server.messages:
            return self.reply(404, b"")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 10):
            return self.reply(411, b"")
        if int(length) > MOST_BODY_BYTES:
            return self.reply(413, b"")
        status: int = 400
        answer: Any = {}
        with suppress(ValueError, RecursionError):
            message = json.loads(self.rfile.read(int(length)))
            if isinstance(message, dict):
                status, answer = self.server.receive(str(self.known_name()), message)
        self.reply(status, json.dumps(answer).encode(), "application/json")

    def known_name(self) -> str | None:
        """Return the requested name, or None if the token or the Host header is wrong."""
        token, slash, _ = self.path.removeprefix("/").partition("/")
        host = "|".join(self.headers.get_all("Host", []))
        asked, expected = f"{host}/{token}{slash}", f"{self.server.authority}/{self.server.token}/"
        return self.page_name() if hmac.compare_digest(asked.encode(), expected.encode()) else None

    def page_name(self) -> str:
        """Return the path after the token; the default is page.html."""
        return self.path.removeprefix("/").partition("/")[2] or "page.html"

    def head(self, status: int, length: int, kind: str) -> None:
        """Send status and headers."""
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        # the URL is new for every server, so its contents never change
        fixed = status == 200 and self.command == "GET"
        self.send_header("Cache-Control", "private, max-age=86400" if fixed else "no-store")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, status: int, content: bytes, kind: str = "text/plain") -> None:
        """Send a response."""
        self.head(status, len(content), kind)
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer malformed requests like those without the token."""
        self.reply(404, b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: paths contain the token."""


def where(listen: str | None) -> tuple[str, int]:
    """Return address and port of ADDRESS[:PORT]. The default is this machine's address in the local
    network, and any free port."""
    address, _, port = (listen or local_address()).partition(":")
    try:
        if ipaddress.IPv4Address(address).is_unspecified:
            raise ValueError
        if port and not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ValueError
    except ValueError:
        raise DeviceProblem(
            f"--listen {listen!r} is not an IPv4 address of one interface, with an optional port",
            "give this machine's address in the phone's network, such as 192.168.1.5 or "
            "192.168.1.5:8000",
        ) from None
    return address, int(port or 0)


def encrypted(certificate: Path) -> ssl.SSLContext:
    """Return the settings of https with a PEM file that has a private key and its certificate.
    Raises DeviceProblem if the file cannot be loaded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # with an empty password, OpenSSL does not ask for one on the terminal
        context.load_cert_chain(certificate, password="")
    except OSError as error:
        raise DeviceProblem(
            f"--certificate {certificate}: not a PEM file with a private key and its certificate "
            f"({error.strerror or error})",
            "write the key without a password and the certificate into one file, see docs/run.md",
        ) from None
    return context


def local_address() -> str:
    """Return the address from which this machine reaches others. Nothing is sent: UDP has no
    handshake, and 192.0.2.1 is reserved for documentation."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            raise DeviceProblem(
                "this machine has no network, so no phone could open the page",
                "connect it, or choose an address with --listen",
            ) from None
        return str(probe.getsockname()[0])
