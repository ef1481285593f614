"""`edgewhisper verify`: check an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.options import MODEL, SPEECH, Json, Threads
from edgewhisper.cli.output import emit, print_table


def verify_cli(
    artifact: Annotated[Path, Argument(help="directory written by `edgewhisper export`")],
    speech: Annotated[
        Path | None, Option(help=f"clips that export used in the gate: {SPEECH}")
    ] = None,
    checkpoint: Annotated[
        str | None, Option(help=f"also run the gate again with this checkpoint: {MODEL}")
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Check the files, graphs and text of an artifact.

    With --speech, the artifact must give the same text as in the gate of export.
    """
    from edgewhisper.verify import verify

    report = verify(artifact, speech, checkpoint, threads)
    emit(report.as_dict(), json_file)
    if json_file != "-":
        print_table(report.rows)
    if report.error is not None:
        raise report.error
