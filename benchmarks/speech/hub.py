"""Datasets of the Hugging Face hub as manifests: hf:OWNER/NAME[:CONFIG][:SPLIT].

SPLIT[:N] takes the first N clips. The `datasets` library streams the rows. The audio files are
stored undecoded, with a manifest, in the user's cache: training can read clips repeatedly, an
interrupted run gets the same clips again, and the next run needs no network. sound.py decodes them.
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

SOURCE = re.compile(
    r"hf:(?P<repository>\w[\w.-]*/\w[\w.-]*)"
    r"(?::(?P<config>[^:\[]*))?(?::(?P<split>[^:\[]+)(?:\[:(?P<first>[1-9][0-9]*)\])?)?"
)
INSIDE = ("zip://", "tar://")
SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass(frozen=True)
class Source:
    """The parts of an hf:... name."""

    repository: str
    config: str | None
    split: str | None
    first: int | None

    @property
    def folder(self) -> str:
        """The name of its folder in the cache."""
        parts = [self.config or "default", self.split or "only", str(self.first or "all")]
        plain = [re.sub(r"[^\w.-]", "_", part) for part in parts]
        return "--".join([*self.repository.split("/"), *plain])


def parse(text: str) -> Source:
    """Parse hf:OWNER/NAME[:CONFIG][:SPLIT]. Raises Problem for anything else."""
    match = SOURCE.fullmatch(text)
    if match is None:
        raise Problem(
            f"{text!r} is not the name of a dataset",
            hint="write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, hf:OWNER/NAME:CONFIG:SPLIT or, "
            "without a configuration, hf:OWNER/NAME::SPLIT; SPLIT[:100] takes 100 clips",
        )
    first = match["first"]
    return Source(
        match["repository"], match["config"] or None, match["split"], int(first) if first else None
    )


def cache() -> Path:
    return cached("speech")


def fetch(text: str) -> Path:
    """Return the path of a dataset's manifest; its clips are downloaded on first use.

    Raises Problem for an invalid name, a missing library, an unknown dataset, configuration or
    split, unknown column names, no clips, or a network failure.
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
        if not manifest.is_file():  # otherwise another process of the same run finished first
            raise
    return manifest


def open_stream(text: str, source: Source) -> Any:
    """Return the stream of a split's rows; only the list of splits is downloaded."""
    try:
        import datasets
    except ImportError as error:
        raise Problem(
            f"{text} needs the library datasets, which is not installed",
            hint="pip install 'edgewhisper[data]'",
        ) from error
    try:
        splits = datasets.load_dataset(source.repository, source.config, streaming=True)
    except Exception as error:  # network, hub and builders raise exceptions of many kinds
        raise Problem(
            f"{text}: the dataset cannot be opened ({reason(error)})",
            hint="check its name, its configuration (hf:OWNER/NAME:CONFIG), the network and, for a "
            "gated one, `hf auth login`",
        ) from error
    names = list(splits)
    split = source.split or (names[0] if len(names) == 1 else None)
    if split not in names:
        what = "no split is given" if split is None else f"there is no split {split!r}"
        raise Problem(
            f"{text}: {what}; the dataset has {', '.join(names) or 'none'}",
            hint=f"write hf:{source.repository}:{source.config or ''}:{names[0] if names else ''}",
        )
    return splits[split]


def write(text: str, source: Source, stream: Any, folder: Path) -> None:
    """Write the audio files and manifest.jsonl of a split's rows."""
    names = stream.column_names or list(next(rows(text, stream), {}))
    if not names:
        raise Problem(f"{text} has no clips", hint="choose another split")
    sound, sentence = sound_column(stream.features, names, text), columns.text_column(names, text)
    lang, speaker = columns.find(names, columns.LANG), columns.find(names, columns.SPEAKER)
    stream = undecoded(stream, sound)
    stream = stream.select_columns([name for name in (sound, sentence, lang, speaker) if name])
    stream = stream if source.first is None else stream.take(source.first)
    configured = source.config if source.config and columns.is_language(source.config) else None
    default = columns.TEXT_BY_LANGUAGE.get(sentence) or configured or "en"
    lines = []
    for number, row in enumerate(with_progress(text, source, stream), start=1):
        where = f"{text}, row {number}"
        if not isinstance(row[sentence], str):
            raise Problem(
                f"{where}: `{sentence}` is {row[sentence]!r}, not a string",
                hint="choose another dataset",
            )
        name = f"{number:06}{suffix(row[sound])}"
        (folder / name).write_bytes(sound_bytes(row[sound], sound, where))
        language = str(row[lang]) if lang and isinstance(row[lang], str) else default
        line = {"audio": name, "text": row[sentence], "lang": language_code(language)}
        lines.append(line | ({"speaker": str(row[speaker])} if speaker else {}))
    if not lines:
        raise Problem(f"{text} has no clips", hint="choose another split")
    manifest = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "manifest.jsonl").write_text(manifest + "\n", encoding="utf-8")


def sound_column(features: Any, names: list[str], text: str) -> str:
    """Return the column named audio, or the first of the library's type Audio."""
    typed = [name for name, kind in (features or {}).items() if type(kind).__name__ == "Audio"]
    if typed or "audio" in names:
        return "audio" if "audio" in names else typed[0]
    raise Problem(
        f"{text}: no column for the audio; the columns are {columns.listed(names)}",
        hint="choose a dataset, or a configuration of it, with a column of type Audio",
    )


def undecoded(stream: Any, sound: str) -> Any:
    """Return the stream with undecoded sound, {"bytes", "path"}; sound.py decodes it."""
    import datasets

    if stream.features is None:
        return stream
    return stream.cast_column(sound, datasets.Audio(decode=False))


def with_progress(text: str, source: Source, stream: Any) -> Iterable[dict[str, Any]]:
    """Return the rows, with a progress bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(
        rows(text, stream),
        description=f"downloading {source.repository}",
        total=source.first,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def rows(text: str, stream: Any) -> Iterator[dict[str, Any]]:
    """Yield a stream's rows. Raises Problem, with the number of rows, if the stream fails."""
    count = 0
    try:
        for row in stream:
            yield row
            count += 1
    except Exception as error:  # as in open_stream
        raise Problem(
            f"{text}: the download stopped after {count} clips ({reason(error)})",
            hint="check the network and run the command again",
        ) from error


def suffix(sound: Any) -> str:
    """Return the file's extension if it is a plain one; readers go by the content, not by it."""
    path = sound.get("path") if isinstance(sound, dict) else sound
    ending = PurePosixPath(str(path).split("::")[0]).suffix.lower() if path else ""
    return ending if SUFFIX.fullmatch(ending) else ""


def sound_bytes(sound: Any, column: str, where: str) -> bytes:
    """Return a row's audio file, from the row itself or from the dataset's repository only."""
    held = sound if isinstance(sound, dict) else {"path": sound}
    if isinstance(held.get("bytes"), bytes):
        return held["bytes"]
    path = held.get("path")
    if not isinstance(path, str) or not on_the_hub(path):
        raise Problem(
            f"{where}: `{column}` has no sound, but the path {path!r}, which is not on the hub",
            hint="read a folder on this machine by its own path, without hf:",
        )
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # as in open_stream
        raise Problem(
            f"{where}: {path} cannot be downloaded ({reason(error)})",
            hint="check the network and run the command again",
        ) from error


def on_the_hub(path: str) -> bool:
    """Return whether a path is on the hub; a dataset must not name files of this machine."""
    *within, place = path.split("::")
    return place.startswith("hf://") and all(part.startswith(INSIDE) for part in within)


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
