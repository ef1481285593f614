"""`edgewhisper serve`: a page that transcribes in a browser."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.output import say

Artifact = Annotated[Path, Argument(help="artifact in the ONNX layout native")]
Listen = Annotated[
    str | None,
    Option(
        metavar="ADDRESS[:PORT]",
        help="address of this machine to serve on; default: its address on the local network",
    ),
]
Certificate = Annotated[
    Path | None,
    Option(
        help="PEM file with a private key and a certificate, to serve over https; other devices "
        "can then use their microphone"
    ),
]


def serve_cli(artifact: Artifact, listen: Listen = None, certificate: Certificate = None) -> None:
    """Serve a web page that transcribes audio in the browser.

    The page records audio or reads audio files. The browser of a phone or computer on the
    same network runs the artifact. No audio is uploaded. Ctrl-C ends the server.
    """
    from devices.browser.device import qr_code
    from devices.browser.transcribe import open_site

    site = open_site(artifact, listen, certificate, say)
    try:
        say(f"open this on a phone or computer; Ctrl-C ends it:\n{site.url}")
        say(qr_code(site.url))
        threading.Event().wait()
    except KeyboardInterrupt:
        say("ended")
    finally:
        site.close()
