"""`edgewhisper recipes`: the included recipes."""

from __future__ import annotations

from edgewhisper.cli.output import say


def recipes_cli() -> None:
    """List the included recipes.

    "searched" lists the fields that a search for a target may change.
    """
    from edgewhisper.recipe import available, searchable, summary

    width = max(map(len, available()))
    for name in available():
        say(f"{name:{width}} {summary(name)}")
        if searchable(name):
            say(f"{'':{width}} searched: {', '.join(searchable(name))}")
