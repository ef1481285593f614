"""A browser as a device: it opens a page that takes the place of the runner."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from devices.device import DeviceProblem, Env, Finished
from devices.local import LocalDevice
from devices.runner.__main__ import parser
from devices.runner.problem import RunnerProblem

from . import job, ort_web
from .site import Site

PAGE = ("page.html", "bench.js", "recognizer.js")
VISIT_S = 900.0
"""Timeout for the page to be opened."""
ROUND_S = 4 * 3600.0
"""Timeout of a round."""


class BrowserDevice(LocalDevice):
    """A browser. Pushed files stay in a private folder on this machine, and the page loads them.
    Each round runs in a new worker of the page, as it runs in a new process on other devices."""

    name = "browser"
    lacks = ("compute_units", "minutes", "pin", "governor")

    def __init__(
        self,
        address: str | None = None,
        name: str = "browser",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.about: dict[str, Any] = {}
        here = Path(__file__).parent
        try:
            runtime = ort_web.files(ort_web.cache_folder(), say)
            self.site = Site(address)
        except BaseException:
            super().close()
            raise
        try:
            self.site.table |= {name: (here / name).read_bytes() for name in PAGE} | runtime
            url = self.site.url
            say(f"open this on the phone, and keep it in the foreground until it is done:\n{url}")
            say(qr_code(url))
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        """Return the page's description of its browser; wait for the page if necessary."""
        self.about = self.about or job.about(self.site.visitor(VISIT_S))
        return self.about

    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Have the page execute a command of the runner; only `bench` is supported."""
        options = parser().parse_args(argv[3:]) if argv[1:3] == ["-m", "runner"] else None
        if options is None or options.command != "bench" or options.repeats != 1:
            raise DeviceProblem(f"browser: a page cannot run {' '.join(argv[2:5])}")
        for name in self.lacks:
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise DeviceProblem(
                    f"browser: {option} {getattr(options, name)}: not supported in a browser",
                    f"leave {option} out",
                )
        clips = self.work / options.clips
        try:
            made = job.make(self.work, str(options.artifact), clips, options.threads)
        except RunnerProblem as problem:
            raise DeviceProblem(f"browser: {problem}", problem.hint) from None
        self.site.table |= made.files
        answer = self.site.ask(made.work, timeout_s or ROUND_S)
        return Finished(0, json.dumps(job.answered(made, answer)), "")

    def close(self) -> None:
        """Tell the page that it is done, stop serving and remove the folder."""
        self.site.close()
        super().close()


def qr_code(address: str) -> str:
    """Return an address as a QR code of characters. Colours are set explicitly, because some phones
    cannot read an inverted code."""
    import segno

    drawn = io.StringIO()
    segno.make(address, error="l").terminal(drawn, compact=True)
    return "\n".join(f"\x1b[97;40m{line}\x1b[0m" for line in drawn.getvalue().splitlines())
