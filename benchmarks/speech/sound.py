"""Read audio files of every supported format as 16 kHz mono float32."""

from __future__ import annotations

import struct
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np

from benchmarks.speech import compressed
from benchmarks.speech.containers import FORMATS, missing, with_true_length
from devices.runner.audio import SAMPLING_RATE, check_whole, checked_samples, parse_riff
from devices.runner.problem import RunnerProblem
from export.problem import Problem

KINDS = {b"OggS": "OGG", b"FORM": "AIFF", b"riff": "W64", b"RF64": "RF64"}
"""The first bytes of the formats that libsndfile cannot open if they are cut short."""
MIN_RATE, MAX_RATE = 1000, 768_000
FORMATS_HINT = "give WAV, FLAC, OGG, MP3 or M4A; convert other formats, for example with ffmpeg"
PLAIN_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
SUFFIXES = frozenset((*PLAIN_SUFFIXES, *compressed.SUFFIXES))
"""The suffixes of audio files in folders. The content of a file decides how it is read."""


def read_audio(path: str | Path, strict: bool = True) -> np.ndarray:
    """Read an audio file as samples (n,) float32 at 16 kHz in [-1, 1], channels averaged.

    "-" is standard input; pipes can be read too. Warns if channels are averaged, if the source has
    a sampling rate below 16 kHz, and if a WAV header has a placeholder for its length.

    Raises Problem for a missing or empty file, a file that is not audio, and NaN or infinite
    samples. A file that is cut short is an error if `strict`, otherwise a warning.
    """
    path = Path(path)
    try:
        content = _content(path)
        content, defect = _wav(path, content) if content[:4] == b"RIFF" else (content, None)
        if content[:4] == b"caff" and (defect := missing(content, "CAF")):
            content = with_true_length(content)
        kind = compressed.kind_of(content)
        decoded = compressed.decode(path, content, kind) if kind else _decode(path, content)
        blocks, rate, broken = decoded
        if not sum(map(len, blocks)):
            raise Problem(
                f"{path} has no samples{f' ({broken})' if broken else ''}",
                hint="record or copy it again, or leave it out",
            )
        check_whole(path, defect or broken, strict)
        return _at_16k(path, checked_samples(np.concatenate(blocks), str(path)), rate)
    except RunnerProblem as error:
        raise Problem(str(error), hint=error.hint) from error


def _content(path: Path) -> memoryview:
    """Return the bytes of a file, mapped into memory, or everything that a pipe delivers."""
    if str(path) == "-":
        return memoryview(sys.stdin.buffer.read())
    if not path.exists() or path.is_dir():
        hint = "add --live to use the microphone" if str(path) == "mic" else "check the path"
        raise Problem(f"there is no audio file {path}", hint=hint)
    try:
        if path.is_file() and path.stat().st_size:
            return np.memmap(path, np.uint8, "r").data
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise Problem(
            f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    if not content:
        raise Problem(f"{path} is empty (0 bytes)", hint="record or copy it again")
    return content


def _wav(path: Path, content: memoryview) -> tuple[memoryview, str | None]:
    """Return a WAV file whose header has the true length, and its defect or None."""
    riff = parse_riff(path, content)
    declared = struct.unpack_from("<I", content, riff.start - 4)[0]
    if declared == len(riff.data):
        return content, riff.defect
    length = min(len(riff.data), 2**32 - 1 - riff.start)
    head = bytearray(content[: riff.start])
    struct.pack_into("<I", head, 4, riff.start - 8 + length)
    struct.pack_into("<I", head, riff.start - 4, length)
    return memoryview(bytes(head) + bytes(riff.data[:length])), riff.defect


class _InMemory(BytesIO):
    """A file in memory. Seeks before the beginning, as damaged headers cause, go to byte 0."""

    def seek(self, place: int, whence: int = 0) -> int:
        start = (0, self.tell(), len(self.getbuffer()))[whence]
        return super().seek(max(0, start + place))


def _decode(path: Path, content: memoryview) -> tuple[list[np.ndarray], int, str | None]:
    """Return mono blocks of samples, the sampling rate, and why samples are missing or None."""
    import soundfile

    blocks: list[np.ndarray] = []
    try:
        file = soundfile.SoundFile(_InMemory(content))
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        kind = KINDS.get(bytes(content[:4]))
        reason = (kind and missing(content, kind)) or _reason(error)
        raise Problem(
            f"{path} is not a readable audio file ({reason})", hint=FORMATS_HINT
        ) from error
    with file:
        if file.format not in FORMATS:
            raise Problem(f"{path}: {file.format} files are not supported", hint=FORMATS_HINT)
        if not MIN_RATE <= file.samplerate <= MAX_RATE:
            raise Problem(
                f"{path}: a sampling rate of {file.samplerate} Hz is not supported; it must be "
                f"{MIN_RATE} to {MAX_RATE} Hz",
                hint="the header is damaged: copy or record it again",
            )
        if file.channels > 1:
            warnings.warn(f"{path}: {file.channels} channels, averaged to one.", stacklevel=3)
        broken = missing(content, file.format)
        try:
            # the samples of a block that cannot be decoded are lost
            while len(block := file.read(file.samplerate // 8, "float32", always_2d=True)):
                blocks.append(block[:, 0] if file.channels == 1 else block.mean(axis=1))
        except (soundfile.LibsndfileError, RuntimeError) as error:
            broken = broken or f"it cannot be decoded to its end ({_reason(error)})"
        count, declared, rate = sum(map(len, blocks)), file.frames, file.samplerate
    if broken is None and file.format == "FLAC" and count < declared < 2**62:
        broken = f"its header declares {declared} samples, but the file has {count}"
    return blocks, rate, broken


def _at_16k(path: Path, mono: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    if rate == SAMPLING_RATE:
        return mono
    if rate < SAMPLING_RATE:
        warnings.warn(
            f"{path}: recorded at {rate} Hz, resampled to {SAMPLING_RATE}; "
            f"it has nothing above {rate // 2} Hz.",
            stacklevel=3,
        )
    return np.asarray(soxr.resample(mono, rate, SAMPLING_RATE), dtype=np.float32)


def _reason(error: Exception) -> str:
    return str(error).split(": ", 1)[-1].strip().rstrip(".") or type(error).__name__
