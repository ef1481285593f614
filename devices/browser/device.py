"""A browser as a device: it opens one page, which stands for the runner there."""

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

PAGE = ("page.html", "bench.js")
VISIT_S = 900.0
"""So long a page is waited for."""
ROUND_S = 4 * 3600.0


class BrowserDevice(LocalDevice):
    """What is pushed stays in a private folder here, and the page loads it from there.

    Each round is a worker of its own in the page, as it is a process elsewhere.
    """

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
            say(f"open this on the phone, and leave it in front until it is done:\n{url}")
            say(qr_code(url))
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        """Return what the page says about its browser; wait for it at first."""
        self.about = self.about or job.about(self.site.visitor(VISIT_S))
        return self.about

    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Let the page do what the runner is asked for; it knows `bench` only."""
        asked = parser().parse_args(argv[3:]) if argv[1:3] == ["-m", "runner"] else None
        if asked is None or asked.command != "bench" or asked.repeats != 1:
            raise DeviceProblem(f"browser: a page cannot run {' '.join(argv[2:5])}")
        for name in self.lacks:
            if getattr(asked, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise DeviceProblem(
                    f"browser: {option} {getattr(asked, name)}: a page cannot do that",
                    f"leave {option} out",
                )
        try:
            made = job.make(self.work, str(asked.artifact), self.work / asked.clips, asked.threads)
        except RunnerProblem as problem:
            raise DeviceProblem(f"browser: {problem}", problem.hint) from None
        self.site.table |= made.files
        said = self.site.ask(made.work, timeout_s or ROUND_S)
        return Finished(0, json.dumps(job.answered(made, said)), "")

    def close(self) -> None:
        """Tell the page that it is over; end the site, remove the folder."""
        self.site.close()
        super().close()


def qr_code(address: str) -> str:
    """Return an address as a picture of characters, white and black whatever a terminal's own
    colours are: a phone may not read it the other way round."""
    import segno

    drawn = io.StringIO()
    segno.make(address, error="l").terminal(drawn, compact=True)
    return "\n".join(f"\x1b[97;40m{line}\x1b[0m" for line in drawn.getvalue().splitlines())
