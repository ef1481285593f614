"""`edgewhisper demo`: the three stages on one model."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from edgewhisper.cli.options import MODEL
from edgewhisper.cli.output import print_results, say


def demo_cli(
    model: Annotated[
        str | None,
        Option(help=f"digits (embedded, needs no network), or a {MODEL}; default: tiny.en"),
    ] = None,
) -> None:
    """Run compress, export and bench on Whisper tiny.en.

    The output is a table that compares the int8 artifact with the uncompressed model.
    """
    from edgewhisper.demo import demo

    outcome = demo(model, say)
    print_results(outcome.results, None)
    say(f"wrote {outcome.path}; for a page about it, run: edgewhisper report {outcome.path}")
