"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

SPEECH = "manifest (.jsonl), audiofolder directory, or dataset hf:OWNER/NAME[:CONFIG][:SPLIT]"
"""What --speech takes."""
MODEL = (
    "size name (tiny.en, base, ...), Hub ID, directory (Hugging Face, CTranslate2 or LoRA adapter) "
    "or .pt file"
)
"""What MODEL takes."""

DEFAULT = "the newest artifact in ./edgewhisper-runs, otherwise the embedded English model"
"""The model of the commands that need none."""

Source = Annotated[str, Argument(help=f"artifact, or checkpoint: {MODEL}")]
Json = Annotated[
    str | None,
    Option(
        "--json", help="write JSON to this file; without a file name: write only JSON to stdout"
    ),
]
Out = Annotated[
    Path | None,
    Option(help="output directory; must not exist; default: a new one in ./edgewhisper-runs"),
]
Normalizer = Annotated[
    str | None,
    Option(
        help="text normalizer for the error rates: none, whisper-basic, whisper-english, vistaar, "
        "hindi-strict, hindi-wer or bambara; default: the one for the clips' language"
    ),
]
FailIf = Annotated[
    list[str] | None,
    Option(
        metavar="LIMIT", help="exit with code 1 if a result meets this condition; may be repeated"
    ),
]
Threads = Annotated[int | None, Option(min=1, help="number of threads; default: all usable cores")]
Units = Annotated[
    str | None,
    Option(help="Core ML compute units on a Mac: all, cpu, cpu-ane or cpu-gpu; default: all"),
]
