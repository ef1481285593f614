"""Speech: manifests of clips, and audio as the models want it (16 kHz mono float32).

A manifest is JSON lines: `audio` (relative to the manifest), `text`, `lang`, and optionally
`speaker` and `duration` in seconds. Where a manifest is asked for, a folder in audiofolder form
(audiofolder.py) or a data set of the hub, hf:OWNER/NAME[:CONFIG][:SPLIT] (hub.py), does as well.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from devices.runner.audio import parse_riff
from devices.runner.problem import RunnerProblem
from export.problem import Problem

SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Clip:
    """One utterance: where its audio is, and what is said in it."""

    audio: Path
    text: str
    lang: str = "en"
    speaker: str | None = None
    duration_s: float | None = None

    def pcm(self) -> np.ndarray:
        """(samples,) float32 at 16 kHz; see read_audio."""
        return read_audio(self.audio)


def read_manifest(path: str | Path) -> list[Clip]:
    """The clips of a manifest, a folder or a data set of the hub, in its order.

    Raises Problem: no such file, no clips, or a bad line, with its number; for the other forms as
    read_folder and hub.fetch do.
    """
    if str(path).startswith("hf:"):
        from benchmarks import hub

        path = hub.fetch(str(path))
    path = Path(path)
    if path.is_dir():
        from benchmarks.audiofolder import read_folder

        return read_folder(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Problem(
            f"the manifest {path} cannot be read: {error.strerror}",
            hint="name a JSON-lines file with `audio` and `text` on every line",
        ) from error
    except UnicodeDecodeError as error:
        raise Problem(f"the manifest {path} is not UTF-8 text", hint="save it as UTF-8") from error
    clips = [
        _clip(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not clips:
        raise Problem(
            f"the manifest {path} names no clips",
            hint='a line looks like {"audio": "a.wav", "text": "three one", "lang": "en"}',
        )
    return clips


def _clip(path: Path, number: int, line: str) -> Clip:
    where = f"{path}, line {number}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise Problem(
            f"{where}: not JSON ({error.msg} at column {error.colno})",
            hint='a line looks like {"audio": "a.wav", "text": "three one", "lang": "en"}',
        ) from error
    if not isinstance(row, dict):
        raise Problem(f"{where}: a {type(row).__name__}, not an object", hint="use {...}")
    for field in ("audio", "text"):
        if not isinstance(row.get(field), str):
            raise Problem(
                f"{where}: `{field}` is {row.get(field)!r}, not a string",
                hint=f"give every line `audio` and `text`; `{field}` is wrong or missing here",
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
    )


def read_audio(path: str | Path) -> np.ndarray:
    """Any sound file -> (samples,) float32 at 16 kHz, channels averaged, in [-1, 1] as stored; "-"
    is standard input.

    Warns when it mixes channels down or when the source has less than 16 kHz.
    Raises Problem: no such file, not audio or cut short, empty, NaN or infinite samples.
    """
    import soundfile

    path = Path(path)
    from_stdin = str(path) == "-"
    if not from_stdin and not path.is_file():
        raise Problem(f"there is no audio file {path}", hint="check the path")
    source = BytesIO(sys.stdin.buffer.read()) if from_stdin else path
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise Problem(
            f"{path} is not audio that can be read ({_reason(error)})",
            hint="give WAV, FLAC, OGG or MP3; convert other formats, for example with ffmpeg",
        ) from error
    _check_whole(path, source.getbuffer() if isinstance(source, BytesIO) else _content(path))
    if len(samples) == 0:
        raise Problem(f"{path} holds no samples", hint="record it again, or leave it out")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).any(axis=1).sum())
        raise Problem(
            f"{path}: {bad} of {len(samples)} samples are NaN or infinite",
            hint="the recording is damaged: write it again with finite samples",
        )
    return _mono_16k(path, samples, rate)


def _content(path: Path) -> memoryview:
    """The bytes of a file, which are read where they are looked at."""
    return np.memmap(path, np.uint8, "r").data


def _check_whole(path: Path, content: memoryview) -> None:
    """libsndfile reads what is there of a WAV file that was cut short; words would be missing."""
    if content[:4] == b"RIFF":
        try:
            parse_riff(path, content)
        except RunnerProblem as error:
            raise Problem(str(error), hint=error.hint) from error


def _mono_16k(path: Path, samples: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    if samples.shape[1] > 1:
        warnings.warn(f"{path}: {samples.shape[1]} channels, averaged to one.", stacklevel=4)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if rate == SAMPLING_RATE:
        return mono
    if rate < SAMPLING_RATE:
        warnings.warn(
            f"{path}: recorded at {rate} Hz, resampled to {SAMPLING_RATE}; "
            f"it has nothing above {rate // 2} Hz.",
            stacklevel=4,
        )
    return np.asarray(soxr.resample(mono, rate, SAMPLING_RATE), dtype=np.float32)


def _reason(error: Exception) -> str:
    return str(error).split(": ", 1)[-1].strip().rstrip(".") or type(error).__name__
