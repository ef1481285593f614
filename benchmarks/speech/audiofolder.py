"""Read folders in Hugging Face's audiofolder format: audio files with metadata.csv or .jsonl.

Every row has a file (`file_name`, relative to the folder) and its text (`text`, `sentence` or
`transcription`). `lang` (or `locale`, `language`), `speaker` and `duration` are optional. Where
texts are not needed, the folder needs neither texts nor metadata.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.speech import columns
from benchmarks.speech.sound import SUFFIXES
from export.problem import Problem
from export.prompt import language_code

NAMES = ("metadata.csv", "metadata.jsonl")
FILE = "file_name"


def read_folder(folder: Path, need_texts: bool = True) -> list[dict[str, Any]]:
    """Return the fields of each Clip of a folder, in the order of its metadata.

    Without `need_texts`, missing texts are empty, and without metadata all audio files are clips.
    Raises Problem for missing or duplicate metadata, no rows, unknown column names, an invalid row
    (with its number), and a file that is missing or outside the folder.
    """
    if not need_texts and (files := audio_files(folder)):
        return [{"audio": path, "text": ""} for path in files]
    path = metadata_file(folder)
    try:
        rows = list((_csv if path.suffix == ".csv" else _jsonl)(path, need_texts))
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}", hint="check the file") from error
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 text", hint="save it as UTF-8") from error
    except csv.Error as error:
        raise Problem(f"{path} is not CSV ({error})", hint="write it again") from error
    if not rows:
        raise Problem(f"{path} names no clips", hint=f"give it rows with `{FILE}` and `text`")
    return [_clip(path, number, row, need_texts) for number, row in rows]


def audio_files(folder: Path) -> list[Path]:
    """Return the audio files of a folder and its folders, none if one of them has metadata."""
    if any(next(folder.rglob(name), None) for name in NAMES):
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def metadata_file(folder: Path) -> Path:
    """Return the folder's only metadata file."""
    files = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(files) == 1:
        return files[0]
    if files:
        raise Problem(f"{folder} has both {' and '.join(NAMES)}", hint="delete one of them")
    splits = sorted({str(path.parent) for name in NAMES for path in folder.glob(f"*/{name}")})
    if splits:
        raise Problem(
            f"{folder} has no metadata of its own, but {len(splits)} of its folders have some",
            hint=f"name one of {', '.join(splits)}",
        )
    raise Problem(
        f"{folder} is a folder without {' or '.join(NAMES)}",
        hint=f"add one with the columns `{FILE}` and `text`, or name a manifest in it",
    )


def _csv(path: Path, need_texts: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row); cells that are missing in a short line are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if names:
            _check_columns(names, str(path), need_texts)
        for row in reader:
            yield reader.line_num, {name: row[name] for name in names if row[name] is not None}


def _jsonl(path: Path, need_texts: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise Problem(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})",
                hint=f'a line looks like {{"{FILE}": "a.wav", "text": "three one"}}',
            ) from error
        if not isinstance(row, dict):
            raise Problem(
                f"{path}, line {number}: a {type(row).__name__}, not an object",
                hint="write an object, {...}",
            )
        _check_columns(row, f"{path}, line {number}", need_texts)
        yield number, row


def _check_columns(names: Any, where: str, need_texts: bool) -> None:
    if FILE not in names:
        raise Problem(
            f"{where}: no column `{FILE}`; the columns are {columns.listed(names)}",
            hint=f"name the column of audio files `{FILE}`",
        )
    if need_texts:
        columns.text_column(names, where)


def _clip(path: Path, number: int, row: dict[str, Any], need_text: bool) -> dict[str, Any]:
    where = f"{path}, line {number}"
    text = columns.find(row, columns.TEXTS) or columns.TEXT[0]
    lang, speaker = columns.find(row, columns.LANG), columns.find(row, columns.SPEAKER)
    default = columns.TEXT_BY_LANGUAGE.get(text, "en")
    return {
        "audio": _audio(path.parent, _string(row, FILE, where), where),
        "text": _string(row, text, where) if need_text or text in row else "",
        "lang": language_code(str(row[lang])) if lang and row[lang] else default,
        "speaker": str(row[speaker]) if speaker and row[speaker] is not None else None,
        "duration_s": _seconds(row.get("duration")),
    }


def _string(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise Problem(
            f"{where}: `{name}` is {row.get(name)!r}, not a string",
            hint=f"give every row its `{name}`",
        )
    return row[name]


def _audio(folder: Path, name: str, where: str) -> Path:
    """Return the path of an audio file in the folder.

    The name is checked, not the target of a link: downloaded folders have links into a cache.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise Problem(
            f"{where}: the file {name!r} is outside the folder",
            hint="keep the audio files in the folder, or write a manifest with their paths",
        )
    if not (folder / name).is_file():
        raise Problem(f"{where}: there is no file {folder / name}", hint="check `file_name`")
    return folder / name


def _seconds(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
