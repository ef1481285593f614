"""Decode AAC and MP4, QuickTime and Matroska files (M4A, MP4, MOV, WebM, MKV) with PyAV.

PyAV contains FFmpeg's libraries. It is optional: `pip install 'edgewhisper[audio]'`. FFmpeg is
given the bytes and the name of the container, so a file cannot make it open other files.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np

from benchmarks.speech.containers import missing
from export.problem import Problem

CONTAINERS = {"MP4": "mov", "AAC": "aac", "Matroska": "matroska"}
"""The supported formats, and FFmpeg's names of them."""
SUFFIXES = (".m4a", ".m4b", ".mp4", ".mov", ".aac", ".3gp", ".webm", ".mka", ".mkv")


def kind_of(content: memoryview) -> str | None:
    """Return the format of a file by its first bytes, or None if it is not one of CONTAINERS."""
    if content[4:8] == b"ftyp":
        return "MP4"
    if content[:4] == b"\x1aE\xdf\xa3":
        return "Matroska"
    # an ADTS header: 12 bits of one, then the layer, which is 0 for AAC and never for MP3
    adts = len(content) > 1 and content[0] == 0xFF and content[1] & 0xF6 == 0xF0
    return "AAC" if adts else None


def decode(path: Path, content: memoryview, kind: str) -> tuple[list[np.ndarray], int, str | None]:
    """Return mono blocks of samples of the first audio stream, the sampling rate, and why samples
    are missing or None."""
    try:
        import av
    except ImportError as error:
        raise Problem(
            f"{path}: reading {kind} files needs PyAV",
            hint="pip install 'edgewhisper[audio]', or convert it, for example with ffmpeg",
        ) from error
    blocks: list[np.ndarray] = []
    broken = missing(content, kind)
    try:
        with av.open(BytesIO(content), "r", format=CONTAINERS[kind]) as container:
            if not container.streams.audio:
                raise Problem(f"{path} has no audio stream", hint="give a file with audio")
            stream = container.streams.audio[0]
            if stream.channels > 1:
                warnings.warn(f"{path}: {stream.channels} channels, averaged to one.", stacklevel=4)
            floats = av.AudioResampler(format="fltp")
            try:
                for frame in container.decode(stream):
                    blocks += [part.to_ndarray().mean(axis=0) for part in floats.resample(frame)]
            except av.FFmpegError as error:
                broken = broken or f"it cannot be decoded to its end ({error.strerror})"
            return blocks, int(stream.rate), broken
    except av.FFmpegError as error:
        reason = broken or error.strerror
        raise Problem(
            f"{path} is not a readable {kind} file ({reason})", hint="copy or record it again"
        ) from error
