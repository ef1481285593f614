"""WAV in, 16 kHz mono float32 out; and long audio cut where nobody speaks.

The RIFF chunks are walked by hand: the standard library's `wave` knows neither float samples nor,
before Python 3.12, the extensible header that most recorders write.
"""

import math
import struct
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .problem import RunnerProblem

Pcm = npt.NDArray[np.float32]

SAMPLING_RATE = 16_000
SILENT_PEAK = 1e-4
"""-80 dBFS, three steps of a 16-bit converter: below it a recording holds its dither, no speech."""

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_SIZE = 0x7FFF0000
"""From here on, it is what programs write when they stream a WAV into a pipe: ffmpeg 2**32 - 1, sox
and arecord somewhat less than 2**31."""

LOWEST_HZ = 80
"""Voices begin above it."""
FRAME = 160
"""10 ms: the step in which pauses are looked for."""
PAUSE_FRAMES = 20
"""0.2 s: longer than the closure of a stop consonant, which is quiet too."""
PAUSE_RISE = 4.0
"""A frame within 6 dB of the quietest one counts as pause; white noise varies by 1 dB."""

UNSCALED = ("int64", "uint16", "uint32", "uint64")
"""Integers that no sound hardware or file gives: what their full scale is cannot be known."""
LOUDEST = 16.0
"""Floats may be louder than full scale, as mixing and resampling make them, but not by 24 dB."""

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
    """What a WAV file holds."""

    header: Header
    start: int
    """The byte at which its samples begin."""
    data: memoryview
    defect: str | None = None
    """Why samples may be missing."""


def read_wav(path: str | Path, strict: bool = True) -> Pcm:
    """Return the samples of a 16 kHz WAV file, shape (samples,), within [-1, 1]; of "-", what comes
    through standard input.

    8-bit unsigned, 16/24/32-bit signed and 32/64-bit float samples are read; channels are
    averaged, with a warning. Raises RunnerProblem for everything that is not such a file, and
    where `strict`, for one that is cut short; otherwise that is a warning.
    """
    path = Path(path)
    riff = parse_riff(path, memoryview(read_bytes(path)))  # its slices are no copies
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
    """Refuse a file that is cut short, or warn of it: words may be missing."""
    if defect is None:
        return
    if strict:
        raise RunnerProblem(f"{path}: {defect}", "copy or record it again")
    warnings.warn(f"{path}: {defect}; its text may be incomplete", stacklevel=3)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, or raise the letter that says why it cannot be read."""
    try:
        return sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except FileNotFoundError:
        raise RunnerProblem(f"{path}: there is no such file", "check the path") from None
    except OSError as error:
        raise RunnerProblem(f"{path}: {error.strerror}", "give a readable WAV file") from None


def parse_riff(path: Path, content: memoryview) -> Riff:
    """Walk the chunks of a RIFF file to its samples."""
    if not content:
        raise RunnerProblem(f"{path}: the file is empty (0 bytes)", "record or copy it again")
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        kind = next((k for m, k in OTHER_CONTAINERS.items() if content[: len(m)] == m), "not audio")
        raise RunnerProblem(f"{path}: wanted a WAV file, found {kind}", convert(path))
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
    """Return the samples of a data chunk whose header says `size`, which may be wrong.

    Writers that cannot go back to the header leave a placeholder there; others append without
    changing it. Then the samples go on to the end of the file.
    """
    rest = content[start:]
    if size >= UNKNOWN_SIZE:
        return Riff(header, start, rest)
    if (not size and rest and not are_chunks(rest)) or (size > 2**30 and size > 10 * len(rest)):
        warnings.warn(
            f"{path.name}: its header promises {size} bytes of sound; all {len(rest)} are read",
            stacklevel=4,
        )
        return Riff(header, start, rest)
    short = size > len(rest)
    if not short and are_chunks(rest[size + size % 2 :]):
        return Riff(header, start, rest[:size])
    promise = f"its header promises {size} bytes of sound and {len(rest)} are there"
    return Riff(header, start, rest, f"{'truncated' if short else 'damaged'} WAV file, {promise}")


def are_chunks(content: memoryview) -> bool:
    """Tell whether bytes are nothing but RIFF chunks, or padding."""
    place = 0
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        if not all(32 <= byte < 127 for byte in name):
            break
        place += 8 + size + size % 2
    return place >= len(content) or len(content) - place < 8 or not any(content[place:])


def parse_header(path: Path, body: memoryview) -> Header:
    """Read a `fmt ` chunk; the extensible form keeps the real coding in its GUID."""
    if len(body) < 16:
        raise RunnerProblem(
            f"{path}: truncated WAV file, {len(body)} of 16 header bytes", "copy it again"
        )
    coding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if coding == EXTENSIBLE and len(body) >= 26:
        (coding,) = struct.unpack_from("<H", body, 24)
    return Header(coding, channels, rate, bits)


def check_header(path: Path, header: Header) -> None:
    """Raise the letter for a coding or sampling rate that the runner does not read."""
    known = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
    if header.bits not in known.get(header.coding, ()) or header.channels < 1:
        raise RunnerProblem(
            f"{path}: WAV coding {header.coding} with {header.bits} bits and {header.channels} "
            "channels is not read; PCM of 8, 16, 24, 32 bits and float are",
            convert(path),
        )
    if header.rate != SAMPLING_RATE:
        raise RunnerProblem(
            f"{path}: sampled at {header.rate} Hz, the model listens at {SAMPLING_RATE} Hz",
            convert(path),
        )


def to_float(header: Header, data: memoryview) -> Pcm:
    """Scale raw little-endian samples to [-1, 1], in one array."""
    if header.coding == FLOAT:
        return np.frombuffer(data, f"<f{header.bits // 8}").astype(np.float32)
    if header.bits == 24:  # into the upper three bytes of int32
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        pcm, bits = wide.view("<i4")[:, 0].astype(np.float32), 32
    else:
        kind = "u1" if header.bits == 8 else f"<i{header.bits // 8}"
        pcm, bits = np.frombuffer(data, kind).astype(np.float32), header.bits
    if header.bits == 8:  # the one unsigned width
        pcm -= 128
    pcm *= np.float32(2.0 ** (1 - bits))
    return pcm


def checked_samples(given: Any, name: str = "the samples") -> Pcm:
    """Return samples as the models take them: float32 (samples,), full scale 1.0, 16 kHz mono.

    `given` is an array (samples,), (samples, 1) or (1, samples) of floats, or of int16, int32, int8
    or uint8, which are scaled by their full scale. Everything that is transcribed, evaluated or
    trained on goes through here. Raises RunnerProblem: no such array, several channels, no
    samples, NaN or infinite ones, floats that are not scaled to [-1, 1].
    """
    if not isinstance(given, np.ndarray):
        raise RunnerProblem(
            f"{name}: a {type(given).__name__} is no NumPy array",
            "give a NumPy array of 16 kHz samples (float32 in [-1, 1], or int16), or a path",
        )
    if given.dtype.kind not in "fiu" or given.dtype.name in UNSCALED:
        raise RunnerProblem(
            f"{name}: samples of dtype {given.dtype} have no known scale",
            "give float32 in [-1, 1], or int16",
        )
    if given.ndim == 0 or given.size != max(given.shape):
        raise RunnerProblem(
            f"{name}: an array of shape {given.shape} is not one channel",
            "give one channel, such as `samples.mean(axis=1)` of (samples, channels)",
        )
    if not given.size:
        raise RunnerProblem(f"{name}: there are no samples", "record or copy it again")
    samples = np.asarray(given.reshape(-1), np.float32)
    if given.dtype.kind == "f":
        return check_floats(samples, name)
    if given.dtype.kind == "u":
        samples = samples - np.float32(128)
    return samples * np.float32(2.0 ** (1 - 8 * given.dtype.itemsize))


def check_floats(samples: Pcm, name: str) -> Pcm:
    """Refuse floats that are not finite, or not scaled to [-1, 1]."""
    bad = int(np.count_nonzero(~np.isfinite(samples)))
    if bad:
        raise RunnerProblem(
            f"{name}: {bad} of {samples.size} samples are NaN or infinite",
            "the recording is damaged: write it again with finite samples",
        )
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise RunnerProblem(
            f"{name}: floats of up to {peak:.6g}, where full scale is 1.0",
            "divide them by their full scale, such as 32768 for 16-bit samples",
        )
    return samples


def convert(path: Path) -> str:
    """Return the command that turns anything into what read_wav takes."""
    if str(path) == STDIN:
        return f"ffmpeg -i SOUND -ar {SAMPLING_RATE} -ac 1 -f wav -"
    return f"ffmpeg -i {path.name} -ar {SAMPLING_RATE} -ac 1 {path.stem}-16k.wav"


def is_silent(pcm: Pcm) -> bool:
    """Tell whether no sample reaches SILENT_PEAK."""
    return not pcm.size or float(np.abs(pcm).max()) < SILENT_PEAK


def is_hum(pcm: Pcm) -> bool:
    """Tell whether nothing but an offset or mains hum is in a window: from sample to sample, these
    change by less than SILENT_PEAK, and so does silence."""
    return len(pcm) < 2 or is_silent(np.diff(pcm))


def split(pcm: Pcm, window_samples: int) -> list[slice]:
    """Cut audio into pieces of at most `window_samples`, in pauses wherever there is one.

    The pieces touch and cover every sample once, so no word is lost or doubled at a seam.
    """
    pieces, start = [], 0
    while len(pcm) - start > window_samples:
        stop = start + find_cut(pcm[start : start + window_samples])
        pieces.append(slice(start, stop))
        start = stop
    return [*pieces, slice(start, len(pcm))]


def shortest(windows: Sequence[int], samples: int) -> int:
    """Return the first of the ascending windows that holds so many samples, or the last one."""
    return next((window for window in windows if window >= samples), windows[-1])


def find_cut(window: Pcm) -> int:
    """Return the sample at which to end a piece that begins with this full window.

    The middle of the longest pause in the later half; where none of 0.2 s is there, of the
    longest one from the first eighth on; in speech without any pause, the quietest frame of the
    later half.
    """
    count = len(window) // FRAME
    if count < 8:
        return len(window)
    audible = without_hum(window[: count * FRAME])
    power = np.square(audible).reshape(count, FRAME).mean(axis=1)  # (frames,)
    quiet = power <= max(PAUSE_RISE * float(power.min()), SILENT_PEAK**2)
    for begin, shortest in ((count // 2, PAUSE_FRAMES), (count // 8, 2)):
        length, middle = longest_run(quiet[begin:])
        if length >= shortest:
            return round((begin + middle) * FRAME)
    return (count // 2 + int(power[count // 2 :].argmin())) * FRAME + FRAME // 2


def without_hum(pcm: Pcm) -> Pcm:
    """Return the sound without what lies below LOWEST_HZ: an offset, or mains hum."""
    spectrum = np.fft.rfft(pcm)
    spectrum[: math.ceil(LOWEST_HZ * len(pcm) / SAMPLING_RATE)] = 0
    return np.fft.irfft(spectrum, len(pcm)).astype(np.float32)


def longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """Return length and middle of the longest stretch of true flags, the last of equals."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    best, middle = 0, 0.0
    for begin, end in edges.reshape(-1, 2):
        if end - begin >= best:
            best, middle = int(end - begin), (begin + end) / 2
    return best, middle
