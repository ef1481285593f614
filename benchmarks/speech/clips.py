"""Clips and the manifests that list them.

A manifest is a JSON-lines file with `audio` (relative to the manifest), `text`, `lang` and
optionally `speaker` and `duration` in seconds. Instead of a manifest you can pass a folder in
audiofolder format (audiofolder.py) or a dataset of the Hugging Face hub,
hf:OWNER/NAME[:CONFIG][:SPLIT] (hub.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from benchmarks.speech.sound import SUFFIXES, read_audio
from export.problem import Problem


@dataclass(frozen=True)
class Clip:
    """One utterance: its audio file, its text and its language."""

    audio: Path
    text: str
    lang: str = "en"
    speaker: str | None = None
    duration_s: float | None = None
    line: str | None = field(default=None, compare=False)
    """Its place in a manifest, such as "train.jsonl, line 3"."""

    def pcm(self) -> np.ndarray:
        """Return the samples (n,) float32 at 16 kHz.

        Raises Problem as read_audio does, with `line` in front of the message.
        """
        try:
            return read_audio(self.audio)
        except Problem as error:
            if self.line is None:
                raise
            raise Problem(f"{self.line}: {error}", hint=error.hint) from error


class Samples(Sequence[np.ndarray]):
    """The samples of clips, read on access, so that hours of speech need no memory."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Samples:
        if isinstance(index, slice):
            return Samples(self.clips[index])
        return self.clips[index].pcm()


def read_manifest(path: str | Path, need_texts: bool = True) -> list[Clip]:
    """Return the clips of a manifest, an audiofolder or a dataset of the hub, in order.

    Without `need_texts`, clips that have no `text` get an empty one, and a folder needs no
    metadata. Raises Problem for a missing file, no clips or an invalid line (with its number), and
    as read_folder and hub.fetch do.
    """
    if str(path).startswith("hf:"):
        from benchmarks.speech import hub

        path = hub.fetch(str(path))
    path = Path(path)
    if path.is_dir():
        from benchmarks.speech.audiofolder import read_folder

        return [Clip(**fields) for fields in read_folder(path, need_texts)]
    _refuse_other_kinds(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Problem(
            f"the manifest {path} cannot be read: {error.strerror}",
            hint="name a JSON-lines file with `audio` and `text` on every line, or a directory "
            "with metadata.csv",
        ) from error
    except UnicodeDecodeError as error:
        raise Problem(f"the manifest {path} is not UTF-8 text", hint="save it as UTF-8") from error
    clips = [
        _clip(path, number, line, need_texts)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not clips:
        raise Problem(
            f"the manifest {path} names no clips",
            hint='a line looks like {"audio": "a.wav", "text": "three one", "lang": "en"}',
        )
    return clips


def _refuse_other_kinds(path: Path) -> None:
    """Raise Problem for a table or an audio file in place of a manifest."""
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".csv", ".tsv"):
        raise Problem(
            f"{path} is a {suffix[1:].upper()} file, not a manifest",
            hint="save it as metadata.csv in the directory of its audio files, with the columns "
            "`file_name` and `text`, and name that directory",
        )
    if path.is_file() and suffix in SUFFIXES:
        raise Problem(
            f"{path} is an audio file, not a manifest",
            hint="name a directory of audio files with metadata.csv, or a .jsonl manifest",
        )


def _clip(path: Path, number: int, line: str, need_text: bool) -> Clip:
    where = f"{path}, line {number}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise Problem(
            f"{where}: not JSON ({error.msg} at column {error.colno})",
            hint='a line looks like {"audio": "a.wav", "text": "three one", "lang": "en"}',
        ) from error
    if not isinstance(row, dict):
        raise Problem(
            f"{where}: a {type(row).__name__}, not an object", hint="write an object, {...}"
        )
    if not need_text:
        row.setdefault("text", "")
    for key in ("audio", "text"):
        if not isinstance(row.get(key), str):
            raise Problem(
                f"{where}: `{key}` is {row.get(key)!r}, not a string",
                hint=f"give every line `audio` and `text`; `{key}` is wrong or missing here",
            )
    audio = path.parent / row["audio"]
    if not audio.is_file():
        raise Problem(
            f"{where}: there is no file {audio}", hint="paths are relative to the manifest"
        )
    duration = row.get("duration")
    return Clip(
        audio=audio,
        text=row["text"],
        lang=str(row.get("lang", "en")),
        speaker=row.get("speaker"),
        duration_s=float(duration) if isinstance(duration, int | float) else None,
        line=where,
    )
