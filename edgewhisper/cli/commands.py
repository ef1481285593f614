"""The table of commands and the entry point.

Libraries raise; only `main` prints errors and exits. An exception with a `hint` is an error of the
user's: its message states what was asked and found, its hint what to do next.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from edgewhisper.cli.bench import bench_cli
from edgewhisper.cli.compare import compare_cli
from edgewhisper.cli.compress import compress_cli
from edgewhisper.cli.demo import demo_cli
from edgewhisper.cli.devices import devices_app
from edgewhisper.cli.eval import eval_cli
from edgewhisper.cli.export import export_cli
from edgewhisper.cli.inspect import inspect_cli
from edgewhisper.cli.output import print_error
from edgewhisper.cli.recipes import recipes_cli
from edgewhisper.cli.report import report_cli
from edgewhisper.cli.serve import serve_cli
from edgewhisper.cli.transcribe import transcribe_cli
from edgewhisper.cli.verify import verify_cli

COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress_cli,
    "export": export_cli,
    "bench": bench_cli,
    "eval": eval_cli,
    "transcribe": transcribe_cli,
    "serve": serve_cli,
    "inspect": inspect_cli,
    "verify": verify_cli,
    "compare": compare_cli,
    "report": report_cli,
    "demo": demo_cli,
    "recipes": recipes_cli,
}
"""In the order of `--help`."""
STANDALONE = {"--json": "-", "--time": "5"}
"""Options that may be given without a value, and their value then: stdout, 5 seconds."""
INTERRUPTED = 130
"""The exit code of programs that Ctrl-C has ended."""

HELP = """Compress a Whisper model, export it, and measure it on a device.

compress makes a checkpoint smaller. export turns a checkpoint into an artifact: files that a device
can run. bench measures artifacts and writes results. By default, their outputs go to
./edgewhisper-runs.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(devices_app, name="devices")


def main() -> None:
    """Run the command line. Prints errors that have a hint as two lines, and exits with 1."""
    warnings.showwarning = show_warning
    try:
        app(with_values(sys.argv[1:]), standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns the first into the second
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "hint"):
            raise
        print_error(error)
        sys.exit(1)


def with_values(arguments: list[str]) -> list[str]:
    """Return the arguments with a value after each STANDALONE option, which the parser needs."""
    result: list[str] = []
    for position, word in enumerate(arguments):
        result.append(word)
        following = arguments[position + 1 : position + 2]
        if word in STANDALONE and (not following or following[0].startswith("--")):
            result.append(STANDALONE[word])
    return result


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line. Deprecation warnings of libraries are not for the user."""
    if not isinstance(message, DeprecationWarning | FutureWarning):
        typer.echo(f"note:  {message}", err=True)
