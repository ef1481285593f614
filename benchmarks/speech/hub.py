"""Data sets of the Hugging Face hub as speech: hf:OWNER/NAME[:CONFIG][:SPLIT], SPLIT[:N] for the
first N clips.

The `datasets` library streams the rows; sound files are kept as they come, undecoded, beside a
manifest in a cache of ours. So training reads every clip as often as it likes, an interrupted run
finds the same clips again, and the next run needs no network. Sound is decoded by speech.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.speech import columns
from export.files import cached, new_directory
from export.problem import Problem
from export.prompt import language_code

PREFIX = "hf:"
SOURCE = re.compile(
    r"hf:(?P<repository>\w[\w.-]*/\w[\w.-]*)"
    r"(?::(?P<config>[^:\[]*))?(?::(?P<split>[^:\[]+)(?:\[:(?P<first>[1-9][0-9]*)\])?)?"
)
INSIDE = ("zip://", "tar://")
SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass(frozen=True)
class Source:
    """What hf:... asks for."""

    repository: str
    config: str | None
    split: str | None
    first: int | None

    @property
    def folder(self) -> str:
        """Where its clips are in the cache."""
        parts = [self.config or "default", self.split or "only", str(self.first or "all")]
        plain = [re.sub(r"[^\w.-]", "_", part) for part in parts]
        return "--".join([*self.repository.split("/"), *plain])


def parse(text: str) -> Source:
    """Raises Problem where the text is not hf:OWNER/NAME[:CONFIG][:SPLIT]."""
    found = SOURCE.fullmatch(text)
    if found is None:
        raise Problem(
            f"{text!r} does not name a data set",
            hint="write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, hf:OWNER/NAME:CONFIG:SPLIT or, where "
            "there is no configuration, hf:OWNER/NAME::SPLIT; SPLIT[:100] takes 100 clips",
        )
    first = found["first"]
    return Source(
        found["repository"], found["config"] or None, found["split"], int(first) if first else None
    )


def cache() -> Path:
    return cached("speech")


def fetch(text: str) -> Path:
    """The manifest of the clips, which are fetched the first time they are asked for.

    Raises Problem: not a data set's name, the library is missing, the data set, configuration or
    split is not there, columns by other names, no clips, or the network stopped.
    """
    source = parse(text)
    folder = cache() / source.folder
    manifest = folder / "manifest.jsonl"
    if manifest.is_file():
        return manifest
    stream = open_stream(text, source)
    try:
        with new_directory(folder) as temporary:
            write(text, source, stream, temporary)
    except Problem:
        if not manifest.is_file():  # else another process of the same run was here first
            raise
    return manifest


def open_stream(text: str, source: Source) -> Any:
    """The split's rows, nothing fetched yet but what says which there are."""
    try:
        import datasets
    except ImportError as error:
        raise Problem(
            f"{text} is read by the library datasets, which is not installed",
            hint="pip install 'edgewhisper[data]'",
        ) from error
    try:
        splits = datasets.load_dataset(source.repository, source.config, streaming=True)
    except Exception as error:  # whatever network, hub and builders raise, it is told in one way
        raise Problem(
            f"{text}: the data set cannot be opened ({reason(error)})",
            hint="check its name, its configuration (hf:OWNER/NAME:CONFIG), the network and, for "
            "one with conditions, `hf auth login`",
        ) from error
    names = list(splits)
    wanted = source.split or (names[0] if len(names) == 1 else None)
    if wanted not in names:
        what = "no split is named" if wanted is None else f"there is no split {wanted!r}"
        raise Problem(
            f"{text}: {what}; the data set has {', '.join(names) or 'none'}",
            hint=f"write hf:{source.repository}:{source.config or ''}:{names[0] if names else ''}",
        )
    return splits[wanted]


def write(text: str, source: Source, stream: Any, folder: Path) -> None:
    """Sound files and manifest.jsonl of a split's rows."""
    names = stream.column_names or list(next(rows(text, stream), {}))
    if not names:
        raise Problem(f"{text} holds no clips", hint="name another split")
    sound, said = sound_column(stream.features, names, text), columns.text_column(names, text)
    lang, speaker = columns.find(names, columns.LANG), columns.find(names, columns.SPEAKER)
    stream = undecoded(stream, sound)
    stream = stream.select_columns([name for name in (sound, said, lang, speaker) if name])
    stream = stream if source.first is None else stream.take(source.first)
    configured = source.config if source.config and columns.is_language(source.config) else None
    spoken = columns.TEXT_BY_LANGUAGE.get(said) or configured or "en"
    lines = []
    for number, row in enumerate(watched(text, source, stream), start=1):
        where = f"{text}, row {number}"
        if not isinstance(row[said], str):
            raise Problem(
                f"{where}: `{said}` is {row[said]!r}, not a string", hint="name another data set"
            )
        name = f"{number:06}{suffix(row[sound])}"
        (folder / name).write_bytes(sound_bytes(row[sound], sound, where))
        language = str(row[lang]) if lang and isinstance(row[lang], str) else spoken
        line = {"audio": name, "text": row[said], "lang": language_code(language)}
        lines.append(line | ({"speaker": str(row[speaker])} if speaker else {}))
    if not lines:
        raise Problem(f"{text} holds no clips", hint="name another split")
    told = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "manifest.jsonl").write_text(told + "\n", encoding="utf-8")


def sound_column(features: Any, names: list[str], text: str) -> str:
    """The column of the library's Audio type, or the one that is called audio."""
    typed = [name for name, kind in (features or {}).items() if type(kind).__name__ == "Audio"]
    if typed or "audio" in names:
        return "audio" if "audio" in names else typed[0]
    raise Problem(
        f"{text}: no column holds audio; there are {columns.listed(names)}",
        hint="name a data set, or a configuration of it, with a column of type Audio",
    )


def undecoded(stream: Any, sound: str) -> Any:
    """The same rows with sound as {"bytes", "path"}: decoding is our business."""
    import datasets

    if stream.features is None:
        return stream
    return stream.cast_column(sound, datasets.Audio(decode=False))


def watched(text: str, source: Source, stream: Any) -> Iterable[dict[str, Any]]:
    """The rows, with a bar on stderr where somebody watches; its length where it is known."""
    from rich.console import Console
    from rich.progress import track

    return track(
        rows(text, stream),
        description=f"fetching {source.repository}",
        total=source.first,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def rows(text: str, stream: Any) -> Iterator[dict[str, Any]]:
    """A stream's rows; what stops it becomes a letter with the number of rows that came."""
    count = 0
    try:
        for row in stream:
            yield row
            count += 1
    except Exception as error:  # as in open_stream
        raise Problem(
            f"{text}: fetching stopped after {count} clips ({reason(error)})",
            hint="check the network and run the command again",
        ) from error


def suffix(sound: Any) -> str:
    """The file's ending, where it is a plain one; what a file is, its content says."""
    path = sound.get("path") if isinstance(sound, dict) else sound
    ending = PurePosixPath(str(path).split("::")[0]).suffix.lower() if path else ""
    return ending if SUFFIX.fullmatch(ending) else ""


def sound_bytes(sound: Any, column: str, where: str) -> bytes:
    """A row's sound file: in the row itself, or in the data set's repository and nowhere else."""
    held = sound if isinstance(sound, dict) else {"path": sound}
    if isinstance(held.get("bytes"), bytes):
        return held["bytes"]
    path = held.get("path")
    if not isinstance(path, str) or not on_the_hub(path):
        raise Problem(
            f"{where}: `{column}` holds no sound, but the path {path!r}, which is not on the hub",
            hint="read a folder on this machine by its own path, without hf:",
        )
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # as in open_stream
        raise Problem(
            f"{where}: {path} cannot be fetched ({reason(error)})",
            hint="check the network and run the command again",
        ) from error


def on_the_hub(path: str) -> bool:
    """Whether a row's path leads to the hub: a data set must not name files of this machine."""
    *within, place = path.split("::")
    return place.startswith("hf://") and all(part.startswith(INSIDE) for part in within)


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
