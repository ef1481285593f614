"""Reads WAV files into 16 kHz mono float32 samples.

The RIFF chunks are parsed here, because the standard library's `wave` supports neither float
samples nor, before Python 3.12, the extensible header that most recorders write.
"""

import struct
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..interfaces import Pcm
from ..problem import RunnerProblem
from .samples import SAMPLING_RATE, checked_samples

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_SIZE = 0x7FFF0000
"""Data sizes from here on are placeholders of programs that stream a WAV file into a pipe: ffmpeg
writes 2**32 - 1, sox and arecord write slightly less than 2**31."""


STDIN = "-"

OTHER_CONTAINERS = {
    b"OggS": "an Ogg file",
    b"fLaC": "a FLAC file",
    b"ID3": "an MP3 file",
    b"\xff\xfb": "an MP3 file",
    b"caff": "a CAF file",
    b"FORM": "an AIFF file",
}


@dataclass(frozen=True)
class Header:
    """The `fmt ` chunk of a WAV file."""

    coding: int
    channels: int
    rate: int
    bits: int


@dataclass(frozen=True)
class Riff:
    """The content of a WAV file."""

    header: Header
    start: int
    """Offset of the first sample in bytes."""
    data: memoryview
    defect: str | None = None
    """Why samples may be missing, for an error message."""


def read_wav(path: str | Path, strict: bool = True) -> Pcm:
    """Return the samples (samples,) of a 16 kHz WAV file, within [-1, 1]; "-" is standard input.

    8-bit unsigned, 16/24/32-bit signed and 32/64-bit float samples are supported; channels are
    averaged, with a warning. Raises RunnerProblem for any other file. A truncated file raises
    RunnerProblem if `strict`, otherwise it gives a warning.
    """
    path = Path(path)
    riff = parse_riff(path, memoryview(read_bytes(path)))  # slices of a memoryview copy nothing
    check_whole(path, riff.defect, strict)
    check_header(path, riff.header)
    width = riff.header.bits // 8 * riff.header.channels
    samples = to_float(riff.header, riff.data[: len(riff.data) // width * width])
    if riff.header.channels > 1:
        channels = riff.header.channels
        warnings.warn(f"{path.name}: {channels} channels averaged into one", stacklevel=2)
        samples = samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return checked_samples(samples, str(path))


def check_whole(path: Path, defect: str | None, strict: bool) -> None:
    """Raise RunnerProblem for a defect if `strict`, otherwise warn: words may be missing."""
    if defect is None:
        return
    if strict:
        raise RunnerProblem(f"{path}: {defect}", "copy or record it again")
    warnings.warn(f"{path}: {defect}; its text may be incomplete", stacklevel=3)


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file or of standard input; raise RunnerProblem if unreadable."""
    try:
        return sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except FileNotFoundError:
        raise RunnerProblem(f"{path}: there is no such file", "check the path") from None
    except OSError as error:
        raise RunnerProblem(f"{path}: {error.strerror}", "give a readable WAV file") from None


def parse_riff(path: Path, content: memoryview) -> Riff:
    """Parse the chunks of a RIFF file up to its samples."""
    if not content:
        raise RunnerProblem(f"{path}: the file is empty (0 bytes)", "record or copy it again")
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        kind = next((k for m, k in OTHER_CONTAINERS.items() if content[: len(m)] == m), "not audio")
        raise RunnerProblem(f"{path}: expected a WAV file, found {kind}", convert(path))
    header, position = None, 12
    while position + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, position)
        body = content[position + 8 : position + 8 + size]
        if name == b"fmt ":
            header = parse_header(path, body)
        elif name == b"data" and header is not None:
            return sized(path, header, content, position + 8, size)
        position += 8 + size + size % 2
    missing = "fmt" if header is None else "data"
    raise RunnerProblem(f"{path}: truncated WAV file, no `{missing}` chunk", "copy it again")


def sized(path: Path, header: Header, content: memoryview, start: int, size: int) -> Riff:
    """Return the samples of a data chunk; the `size` in its header may be wrong.

    Programs that cannot seek back leave a placeholder in the header, others append samples without
    updating it. The samples then extend to the end of the file.
    """
    rest = content[start:]
    if size >= UNKNOWN_SIZE:
        return Riff(header, start, rest)
    if (not size and rest and not are_chunks(rest)) or (size > 2**30 and size > 10 * len(rest)):
        warnings.warn(
            f"{path.name}: its header promises {size} bytes of audio; all {len(rest)} are read",
            stacklevel=4,
        )
        return Riff(header, start, rest)
    short = size > len(rest)
    if not short and are_chunks(rest[size + size % 2 :]):
        return Riff(header, start, rest[:size])
    promise = f"its header promises {size} bytes of audio and the file has {len(rest)}"
    return Riff(header, start, rest, f"{'truncated' if short else 'damaged'} WAV file, {promise}")


def are_chunks(content: memoryview) -> bool:
    """Return whether bytes consist of RIFF chunks or padding only."""
    place = 0
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        if not all(32 <= byte < 127 for byte in name):
            break
        place += 8 + size + size % 2
    return place >= len(content) or len(content) - place < 8 or not any(content[place:])


def parse_header(path: Path, body: memoryview) -> Header:
    """Parse a `fmt ` chunk; the extensible form has the actual coding in its GUID."""
    if len(body) < 16:
        raise RunnerProblem(
            f"{path}: truncated WAV file, {len(body)} of 16 header bytes", "copy it again"
        )
    coding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if coding == EXTENSIBLE and len(body) >= 26:
        (coding,) = struct.unpack_from("<H", body, 24)
    return Header(coding, channels, rate, bits)


def check_header(path: Path, header: Header) -> None:
    """Raise RunnerProblem for an unsupported coding or sampling rate."""
    known = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
    if header.bits not in known.get(header.coding, ()) or header.channels < 1:
        raise RunnerProblem(
            f"{path}: WAV coding {header.coding} with {header.bits} bits and {header.channels} "
            "channels is not supported; 8, 16, 24 and 32-bit PCM and float are",
            convert(path),
        )
    if header.rate != SAMPLING_RATE:
        raise RunnerProblem(
            f"{path}: sampled at {header.rate} Hz, the model needs {SAMPLING_RATE} Hz",
            convert(path),
        )


def to_float(header: Header, data: memoryview) -> Pcm:
    """Convert raw little-endian samples to float32 in [-1, 1], shape (samples,)."""
    if header.coding == FLOAT:
        return np.frombuffer(data, f"<f{header.bits // 8}").astype(np.float32)
    if header.bits == 24:  # put into the upper three bytes of an int32
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        pcm, bits = wide.view("<i4")[:, 0].astype(np.float32), 32
    else:
        kind = "u1" if header.bits == 8 else f"<i{header.bits // 8}"
        pcm, bits = np.frombuffer(data, kind).astype(np.float32), header.bits
    if header.bits == 8:  # the only unsigned width
        pcm -= 128
    pcm *= np.float32(2.0 ** (1 - bits))
    return pcm


def convert(path: Path) -> str:
    """Return the ffmpeg command that converts a file to what read_wav supports."""
    if str(path) == STDIN:
        return f"ffmpeg -i SOUND -ar {SAMPLING_RATE} -ac 1 -f wav -"
    return f"ffmpeg -i {path.name} -ar {SAMPLING_RATE} -ac 1 {path.stem}-16k.wav"
