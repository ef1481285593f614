"""The command line: one file for each command, which parses its options and makes one call.

commands.py has the table of commands and the entry point `main`, options.py the options that
several commands share, and output.py what they print. Commands import everything heavy when they
run, so that `--help` is instant.
"""

from edgewhisper.cli.commands import app, main

__all__ = ["app", "main"]
