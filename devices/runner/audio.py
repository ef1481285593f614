"""WAV in, 16 kHz mono float32 out; and long audio cut where nobody speaks.

The RIFF chunks are walked by hand: the standard library's `wave` knows neither float samples nor,
before Python 3.12, the extensible header that most recorders write.
"""

import struct
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

FRAME = 160
"""10 ms: the step in which pauses are looked for."""
PAUSE_FRAMES = 20
"""0.2 s: longer than the closure of a stop consonant, which is quiet too."""
PAUSE_RISE = 4.0
"""A frame within 6 dB of the quietest one counts as pause; white noise varies by 1 dB."""

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


def read_wav(path: str | Path) -> Pcm:
    """Return the samples of a 16 kHz WAV file, shape (samples,), within [-1, 1]; of "-", what comes
    through standard input.

    8-bit unsigned, 16/24/32-bit signed and 32/64-bit float samples are read; channels are
    averaged, with a warning. Raises RunnerProblem for everything that is not such a file.
    """
    path = Path(path)
    header, data = parse_riff(path, memoryview(read_bytes(path)))  # its slices are no copies
    check_header(path, header)
    width = header.bits // 8 * header.channels
    samples = to_float(header, data[: len(data) // width * width])
    if header.channels > 1:
        warnings.warn(f"{path.name}: {header.channels} channels averaged into one", stacklevel=2)
        samples = samples.reshape(-1, header.channels).mean(axis=1, dtype=np.float32)
    return check_samples(path, samples)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, or raise the letter that says why it cannot be read."""
    try:
        return sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except FileNotFoundError:
        raise RunnerProblem(f"{path}: there is no such file", "check the path") from None
    except OSError as error:
        raise RunnerProblem(f"{path}: {error.strerror}", "give a readable WAV file") from None


def parse_riff(path: Path, content: memoryview) -> tuple[Header, memoryview]:
    """Walk the chunks of a RIFF file and return its header and its raw sample bytes."""
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
            return header, check_size(path, header, body, size)
        position += 8 + size + size % 2
    missing = "fmt" if header is None else "data"
    raise RunnerProblem(f"{path}: truncated WAV file, no `{missing}` chunk", "copy it again")


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


def check_size(path: Path, header: Header, body: memoryview, size: int) -> memoryview:
    """Refuse a data chunk that is shorter than it says: words would be missing."""
    if len(body) < size < UNKNOWN_SIZE:
        raise RunnerProblem(
            f"{path}: truncated WAV file, its header promises {size} bytes of sound and "
            f"{len(body)} are there",
            "copy or record it again",
        )
    return body


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


def check_samples(path: Path, samples: Pcm) -> Pcm:
    """Refuse audio without samples or with samples that are not numbers."""
    if not samples.size:
        raise RunnerProblem(f"{path}: the WAV file holds no samples", "record or copy it again")
    bad = int(np.count_nonzero(~np.isfinite(samples)))
    if bad:
        raise RunnerProblem(
            f"{path}: {bad} of {samples.size} samples are NaN or infinite",
            "the recording is damaged: write it again with finite samples",
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
    power = np.square(window[: count * FRAME]).reshape(count, FRAME).mean(axis=1)  # (frames,)
    quiet = power <= max(PAUSE_RISE * float(power.min()), SILENT_PEAK**2)
    for begin, shortest in ((count // 2, PAUSE_FRAMES), (count // 8, 2)):
        length, middle = longest_run(quiet[begin:])
        if length >= shortest:
            return round((begin + middle) * FRAME)
    return (count // 2 + int(power[count // 2 :].argmin())) * FRAME + FRAME // 2


def longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """Return length and middle of the longest stretch of true flags, the last of equals."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    best, middle = 0, 0.0
    for begin, end in edges.reshape(-1, 2):
        if end - begin >= best:
            best, middle = int(end - begin), (begin + end) / 2
    return best, middle
