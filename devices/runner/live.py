"""Transcribes sound while it is recorded, from standard input or a microphone.

The sound since the last finished segment is transcribed again every second. Words on which two
passes in a row agree are the partial result; the words after them are tentative (local agreement,
Macháček et al. 2023, arXiv:2307.14743). A pause, or a full window, finishes the segment.
"""

import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .audio import FRAME, SAMPLING_RATE, STDIN, find_cut, is_silent, quiet_power
from .audio.wav import Header, check_header, parse_riff, to_float
from .batch import Job
from .interfaces import Pcm
from .problem import RunnerProblem
from .writers import Row, write

MICROPHONE = "mic"
RAW = Header(coding=1, channels=1, rate=SAMPLING_RATE, bits=16)
"""Samples without a WAV header."""
RECORDERS = {
    "arecord": "-q -t raw -f S16_LE -r 16000 -c 1",
    "parec": "--raw --format=s16le --rate=16000 --channels=1",
    "rec": "-q -t raw -e signed -b 16 -r 16000 -c 1 -",
}
"""Programs that write the microphone's samples to standard output (ALSA, PulseAudio, SoX)."""
STEP_S = 1.0
PAUSE_S = 0.6
MOST_HEADER = 4096
CHUNK_BYTES = 2**16


@dataclass(frozen=True)
class Result:
    """The text from `start_s` to `end_s`, in seconds from the start of the recording. Unless
    `final`, `text` is what two passes agree on, and `tentative` is the text after it."""

    start_s: float
    end_s: float
    text: str
    tentative: str = ""
    final: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the entries for the JSON output."""
        return asdict(self)


class Live:
    """Transcribes a growing recording. `recognise` returns the text of up to a window of
    samples."""

    def __init__(self, recognise: Callable[[Pcm], str], window_samples: int) -> None:
        self.recognise, self.window_samples = recognise, window_samples
        self.buffer: Pcm = np.zeros(0, np.float32)
        self.begin = self.heard = 0
        """Number of samples before the buffer, and of those in it that were transcribed."""
        self.before = ""

    def feed(self, pcm: Pcm) -> Iterator[Result]:
        """Add samples and yield the results that they give."""
        self.buffer = np.concatenate([self.buffer, pcm])
        while len(self.buffer) >= self.window_samples:
            yield from self.finish(find_cut(self.buffer[: self.window_samples]))
        if len(self.buffer) - self.heard >= STEP_S * SAMPLING_RATE:
            yield from self.listen()

    def listen(self) -> Iterator[Result]:
        """Transcribe the buffer; yield a partial result, or in a pause the final one."""
        text, self.heard = self.recognise(self.buffer), len(self.buffer)
        if text and in_pause(self.buffer):
            yield self.result(len(self.buffer), text, final=True)
            self.drop(len(self.buffer))
        elif text:
            agreed = agreement(self.before, text)
            yield self.result(len(self.buffer), agreed.strip(), text[len(agreed) :])
        self.before = text if len(self.buffer) else ""

    def finish(self, stop: int | None = None) -> Iterator[Result]:
        """Yield the final result of the buffer up to a sample, or of all of it."""
        stop = len(self.buffer) if stop is None else stop
        if stop and (text := self.recognise(self.buffer[:stop])):
            yield self.result(stop, text, final=True)
        self.drop(stop)
        self.before = ""

    def drop(self, stop: int) -> None:
        """Remove the samples of a finished segment."""
        self.buffer, self.begin = self.buffer[stop:], self.begin + stop
        self.heard = 0

    def result(self, stop: int, text: str, tentative: str = "", final: bool = False) -> Result:
        """Return a result for the buffer up to a sample."""
        start_s, end_s = (n / SAMPLING_RATE for n in (self.begin, self.begin + stop))
        return Result(start_s, end_s, text, tentative, final)


def agreement(before: str, text: str) -> str:
    """Return the common beginning of two texts, up to the last whole word if they have words."""
    pairs = zip(f"{before} ", f"{text} ", strict=False)
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if " " in text or text.isascii():
        common = common[: common.rfind(" ") + 1]
    return common[: len(text)]


def in_pause(pcm: Pcm) -> bool:
    """Return whether the sound ends in a pause of PAUSE_S after something louder."""
    tail = round(PAUSE_S * SAMPLING_RATE)
    if len(pcm) <= tail:
        return False
    power = np.square(pcm[len(pcm) % FRAME :]).reshape(-1, FRAME).mean(axis=1)
    return is_silent(pcm[-tail:]) or float(np.square(pcm[-tail:]).mean()) < quiet_power(power)


# -------------------------------------------------------------------------------------- recordings


def run(recognizer: Any, source: Path, **options: Any) -> Iterator[Result]:
    """Yield the results of a recording: "-" is standard input, "mic" the microphone.

    `recognizer` is a Recognizer and `options` are those of its transcribe(). A detected language is
    kept after the first final result. Raises RunnerProblem for other sources, for a WAV header of
    another sampling rate, and if there is no program that records.
    """
    language = options.pop("language", None)
    detected: str | None = None
    settled: str | None = None

    def recognise(pcm: Pcm) -> str:
        nonlocal detected
        transcript = recognizer.transcribe(pcm, language=settled or language, **options)
        detected = transcript.language
        return str(transcript.text)

    live = Live(recognise, recognizer.window_samples)
    with opened(source) as stream:
        try:
            for pcm in latest(chunks(source, stream)):
                for result in live.feed(pcm):
                    yield result
                    settled = settled or (detected if result.final else None)
        except KeyboardInterrupt:  # ends the recording
            pass
        yield from live.finish()


def transcript(
    recognizer: Any, jobs: Sequence[Job], show: Callable[[Result], None], **options: Any
) -> Row:
    """Transcribe the one recording of `jobs`, call `show` with each result, write the outputs and
    return the final results as Transcript.as_dict() does."""
    if len(jobs) != 1:
        raise RunnerProblem(
            f"--live: {len(jobs)} inputs were given", f"give {STDIN} or {MICROPHONE}"
        )
    finals = []
    for result in run(recognizer, jobs[0].path, **options):
        show(result)
        finals += [result] if result.final else []
    segments = [{"start_s": r.start_s, "end_s": r.end_s, "text": r.text} for r in finals]
    row = {"audio": str(jobs[0].path), "text": " ".join(r.text for r in finals)}
    write({**row, "segments": segments}, jobs[0].outputs)
    return {**row, "segments": segments}


@contextmanager
def opened(source: Path) -> Iterator[BinaryIO]:
    """Yield the stream of a source: "-" or "mic"."""
    if str(source) == STDIN:
        yield sys.stdin.buffer
        return
    if str(source) != MICROPHONE:
        raise RunnerProblem(
            f"--live: {source} is neither {STDIN} nor {MICROPHONE}",
            f"give {STDIN} for samples on standard input or {MICROPHONE} for the microphone, or "
            "leave out --live",
        )
    program = next((name for name in RECORDERS if shutil.which(name)), None)
    if program is None:
        raise RunnerProblem(
            f"the microphone needs one of the programs {', '.join(RECORDERS)}",
            "install alsa-utils, pulseaudio-utils or sox, or pipe samples to `-`",
        )
    command = [program, *RECORDERS[program].split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        try:
            yield recorder.stdout  # type: ignore[misc]
        finally:
            recorder.terminate()


def chunks(source: Path, stream: Any) -> Iterator[Pcm]:
    """Yield the samples of a stream as they arrive: WAV, or without a header 16 bits at 16 kHz."""
    rest, header = stream.read(12), RAW
    if rest[:4] == b"RIFF":
        while b"data" not in rest[12:-7] and len(rest) < MOST_HEADER:
            if not (more := stream.read(2)):
                break
            rest += more
        riff = parse_riff(source, memoryview(rest))
        header, rest = riff.header, rest[riff.start :]
        check_header(source, header)
    width = header.bits // 8 * header.channels
    while True:
        whole = len(rest) // width * width
        if whole:
            samples = to_float(header, memoryview(rest[:whole]))
            yield samples.reshape(-1, header.channels).mean(axis=1, dtype=np.float32)
        more = stream.read1(CHUNK_BYTES)
        if not more:
            return
        rest = rest[whole:] + more


def latest(parts: Iterator[Pcm]) -> Iterator[Pcm]:
    """Yield what has arrived since the last time, joined. A thread reads, so that no sound is lost
    while the model works, and a slow machine transcribes less often."""
    arrived: queue.Queue[Pcm | BaseException | None] = queue.Queue()

    def read() -> None:
        try:
            for part in parts:
                arrived.put(part)
            arrived.put(None)
        except (RunnerProblem, OSError) as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        waiting = [arrived.get()]
        while not arrived.empty():
            waiting.append(arrived.get())
        samples = [part for part in waiting if isinstance(part, np.ndarray)]
        if samples:
            yield np.concatenate(samples)
        if isinstance(waiting[-1], BaseException):
            raise waiting[-1]
        if waiting[-1] is None:
            return
