"""Writes transcripts to files: text, subtitles, tables and JSON.

    txt    one segment per line
    srt    SubRip subtitles
    vtt    WebVTT subtitles
    tsv    start and end in milliseconds and the text, with a header
    json   all that Transcript.as_dict() returns, and the path of the audio

The formats are those of OpenAI's program, except for JSON, whose keys have units.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .problem import RunnerProblem

Row = dict[str, Any]
"""A transcript as a dictionary: text, language and segments."""


def txt(row: Row) -> str:
    """Return one line per segment, or the whole text if there are no segments."""
    return lines([segment["text"] for segment in row.get("segments", [])] or [row["text"]])


def srt(row: Row) -> str:
    """Return SubRip subtitles."""
    blocks = [
        f"{number}\n{span(segment, ',')}\n{segment['text'].replace('-->', '->')}\n"
        for number, segment in enumerate(row["segments"], start=1)
    ]
    return lines(blocks)


def vtt(row: Row) -> str:
    """Return WebVTT subtitles; `&` and `<` would begin markup and are escaped."""
    blocks = [f"{span(segment, '.')}\n{escaped(segment['text'])}\n" for segment in row["segments"]]
    return lines(["WEBVTT\n", *blocks])


def tsv(row: Row) -> str:
    """Return a table with start and end in milliseconds."""
    rows = [
        f"{milliseconds(segment['start_s'])}\t{milliseconds(segment['end_s'])}\t"
        f"{segment['text'].replace(chr(9), ' ')}"
        for segment in row["segments"]
    ]
    return lines(["start\tend\ttext", *rows])


def as_json(row: Row) -> str:
    """Return the transcript as indented JSON."""
    return json.dumps(row, ensure_ascii=False, indent=2) + "\n"


FORMATS: dict[str, Callable[[Row], str]] = {
    "txt": txt,
    "srt": srt,
    "vtt": vtt,
    "json": as_json,
    "tsv": tsv,
}
"""Format, which is also the suffix of its files -> the function that returns a file's content."""
TIMED = frozenset(("srt", "vtt", "tsv"))
"""Formats that need the times of segments."""


def formats_of(names: Sequence[str]) -> list[str]:
    """Return the formats of `--output`, which may be repeated and may list several, as in
    "txt,srt". Raises RunnerProblem for an unknown format."""
    formats = [name.strip() for value in names for name in value.split(",")]
    if unknown := [name for name in formats if name not in FORMATS]:
        raise RunnerProblem(
            f"output format {unknown[0]!r} is not known", f"choose from {', '.join(FORMATS)}"
        )
    return list(dict.fromkeys(formats))


def write(row: Row, outputs: dict[str, Path]) -> None:
    """Write a transcript in each format to its file, whole or not at all.

    Raises RunnerProblem if a file cannot be written.
    """
    for name, path in outputs.items():
        temporary = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(FORMATS[name](row), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise RunnerProblem(
                f"{path} cannot be written: {error.strerror}",
                "check the free space and the permissions there, or use --output-dir",
            ) from None


def lines(rows: Sequence[str]) -> str:
    """Return the rows with a line break after each."""
    return "".join(f"{row}\n" for row in rows)


def span(segment: Row, mark: str) -> str:
    """Return the times of a subtitle; `mark` separates seconds and milliseconds."""
    return f"{clock(segment['start_s'], mark)} --> {clock(segment['end_s'], mark)}"


def clock(seconds: float, mark: str) -> str:
    """Return a time as hours, minutes, seconds and milliseconds: 00:01:02.345."""
    minutes, rest = divmod(milliseconds(seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


def milliseconds(seconds: float) -> int:
    """Return a time in whole milliseconds."""
    return round(1000 * seconds)


def escaped(text: str) -> str:
    """Return a text without the characters that WebVTT reads as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
