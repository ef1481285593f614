"""Time one artifact on clips, in this process, and keep every sample.

Log-mel is part of the ONNX encoder graph, so its time cannot be taken from outside. The graph runs
whole and is timed whole; afterwards a second session with onnxruntime's profiler says which share
of the kernel time belongs to the log-mel nodes, and each sample is divided in that proportion. It
is that of the first clip's window, also where other clips take a window of another length. In Core
ML log-mel is a package of its own.
"""

import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import cycle
from pathlib import Path

import numpy as np

from ..audio import Pcm, read_wav
from ..engines.contract import check_files, read_manifest
from ..machine.host import UNAVAILABLE, peak_of_phase, peak_rss_bytes, usable_cores, versions
from ..problem import RunnerProblem
from ..recognizer import Recognizer, Transcript, pad

MEL_NODES = "log_mel/"
"""The exporter names the log-mel nodes so."""

WARM_UP_CLIPS = 3
PROFILED_RUNS = 9
MOST_SUSTAINED = 500_000
"""Clips of a sustained run: more would not come through what a device may say."""
MOST_CACHED = 0.05
"""Share of a file that may be in memory where it counts as forgotten."""


def bench(
    artifact: Path,
    clips: Path,
    repeats: int = 1,
    threads: int | None = None,
    compute_units: str | None = None,
    minutes: float | None = None,
) -> dict:
    """Transcribe all clips `repeats` times and return texts, tokens and times, in seconds.

    Each is prompted for its language, as languages.json beside the list says it, where the model
    can be told of that; otherwise for the one that the artifact is made for.
    `load_s` is both sessions, manifest and tokens, without Python's imports; `end_to_end_s` goes
    from the WAV file to the text, and `cpu_s` is the time of all cores for the same work; lists are
    in the order of measurement. `timed_s` is where the monotonic clock stood before and after.
    With `minutes`, clips are instead transcribed on and on for so long: see `sustain`.
    """
    paths = read_clips(clips)
    spoken = read_languages(clips, len(paths))
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)  # before the clock starts, and so are the imports
    native = manifest["target"] == "onnx"
    with suppress(ImportError):  # of which opening it tells more
        import_module("..engines.sessions" if native else "coremltools", __package__)
    memory = {"imports": peak_of_phase()}
    started = time.perf_counter()
    recognizer = Recognizer(artifact, threads, hashed=False, compute_units=compute_units)
    load_s = time.perf_counter() - started
    memory["load"] = peak_of_phase()
    work = [(path, recognizer.known(code)) for path, code in zip(paths, spoken, strict=True)]
    for number, (path, language) in enumerate(work[:WARM_UP_CLIPS]):
        recognizer.transcribe(path, language=language)
        if number == 0:
            memory["first"] = peak_of_phase()
    if minutes is not None:
        return {"sustained": sustain(recognizer, work, minutes)}
    began_s = time.monotonic()
    done = [timed(recognizer, *each) for _ in range(repeats) for each in work]
    timed_s = [began_s, time.monotonic()]
    transcripts = [transcript for _, _, transcript in done]
    last, footprint = peak_rss_bytes(), peak_footprint()  # before the profiler takes its own
    memory["run"] = peak_of_phase()
    first = read_wav(paths[0])[: recognizer.window_samples]
    window = pad(first, recognizer.windows)
    share = mel_share(artifact, window, threads) if native else None
    return {
        "load_s": [load_s],
        **stages(transcripts, share),
        "end_to_end_s": [wall for wall, _, _ in done],
        "cpu_s": [cpu for _, cpu, _ in done],
        "timed_s": timed_s,
        "mel_share": share,
        "peak_rss_bytes": max([p for p in memory.values() if p != UNAVAILABLE], default=last),
        **footprint,
        "memory_bytes_by_phase": memory,
        "threads": threads or usable_cores(),
        "debug": debug_signs(),
        "tokens": [transcript.tokens for transcript in transcripts[-len(paths) :]],
        "texts": [transcript.text for transcript in transcripts[-len(paths) :]],
        "versions": versions() if native else versions("coremltools"),
    }


def peak_footprint() -> dict[str, int | str]:
    """Return what a Mac tells beside resident memory."""
    if sys.platform != "darwin":
        return {}
    from ..machine.mac import peak_footprint_bytes

    return {"peak_footprint_bytes": peak_footprint_bytes()}


def compile_first(artifact: Path, compute_units: str | None = None) -> dict[str, list[float]]:
    """Compile a Core ML artifact for this machine and load it for the first time: in a process of
    its own, for both take memory that no later load does. `compile_s` is empty where all packages
    had been compiled before.

    The system may keep what a first load makes of a package for the Neural Engine, and then an
    artifact that it has met before is no new one to it.
    """
    from ..engines.coreml import UNITS, Packages, compile_packages, installed, library

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    if manifest["target"] != "coreml":
        raise RunnerProblem(f"{artifact}: it is no Core ML artifact", "bench it as it is")
    opener = installed(compute_units or next(iter(UNITS)))
    library(artifact)  # takes seconds, and not those that are asked for
    started = time.perf_counter()
    was_needed = compile_packages(artifact)
    compiled = time.perf_counter()
    Packages(artifact, manifest, opener)
    return {
        "compile_s": [compiled - started] if was_needed else [],
        "cold_load_s": [time.perf_counter() - compiled],
    }


def sustain(
    recognizer: Recognizer, work: list[tuple[Path, str | None]], minutes: float
) -> dict[str, list[float]]:
    """Transcribe clips, one after the other and again from the first, for so many minutes.

    Returns each one's seconds, and where the monotonic clock stood when it began.
    """
    ends_s = time.monotonic() + 60 * minutes
    found: dict[str, list[float]] = {"end_to_end_s": [], "at_s": []}
    for each in cycle(work):
        at_s = time.monotonic()
        if at_s >= ends_s or len(found["at_s"]) >= MOST_SUSTAINED:
            return found
        wall, _, _ = timed(recognizer, *each)
        found["end_to_end_s"].append(round(wall, 6))
        found["at_s"].append(round(at_s, 3))
    return found


def cold_load_s(artifact: Path, threads: int | None) -> float | str:
    """Return the seconds to open an artifact none of whose files is in memory; for a process of its
    own. "unavailable" where the system keeps them, as one without disk does."""
    manifest = read_manifest(artifact)
    if manifest["target"] != "onnx":
        return UNAVAILABLE
    check_files(artifact, manifest)
    import_module("..engines.sessions", __package__)
    if not all(dropped(path) for path in artifact.rglob("*") if path.is_file()):
        return UNAVAILABLE
    started = time.perf_counter()
    Recognizer(artifact, threads, hashed=False)
    return time.perf_counter() - started


def dropped(path: Path) -> bool:
    """Have the system forget a file that it has in memory; say whether it did."""
    if not hasattr(os, "posix_fadvise"):
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # what is not on the disk yet stays in memory
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return cached_share(file) <= MOST_CACHED
    except OSError:
        return False
    finally:
        os.close(file)


def cached_share(file: int) -> float:
    """Return the share of an open file's pages that are in memory."""
    size = os.fstat(file).st_size
    if not size:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size)
        failed = libc.mincore(address, length, found)
        del start
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in found) / pages


def debug_signs() -> list[str]:
    """Return what makes this interpreter or onnxruntime slower than those that are used."""
    runtime = sys.modules.get("onnxruntime")
    told: Callable[[], str] = getattr(runtime, "get_build_info", lambda: "")
    signs = {
        "python is a debug build": hasattr(sys, "gettotalrefcount"),
        "python runs with -X dev": sys.flags.dev_mode,
        "onnxruntime is a debug build": "build type=Debug" in told(),
    }
    return [sign for sign, found in signs.items() if found]


def read_clips(path: Path) -> list[Path]:
    """Read a JSON list of WAV paths, relative to the list's folder."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        clips = [path.parent / name for name in names]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunnerProblem(f"{path}: no list of clips ({error})", 'write ["a.wav"]') from None
    if not clips:
        raise RunnerProblem(f"{path}: the list of clips is empty", "name at least one WAV file")
    return clips


def read_languages(clips: Path, count: int) -> list[str | None]:
    """Read what is spoken in each clip; None for all of them where the list is not there."""
    path = clips.parent / "languages.json"
    if not path.is_file():
        return [None] * count
    try:
        codes = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(code, str | None) for code in codes) or len(codes) != count:
            raise ValueError(f"{len(codes)} entries for {count} clips, each a code or null")
    except (OSError, ValueError, TypeError) as error:
        raise RunnerProblem(f"{path}: no list of languages ({error})", 'write ["en"]') from None
    return list(codes)


def timed(
    recognizer: Recognizer, path: Path, language: str | None
) -> tuple[float, float, Transcript]:
    """Return the seconds from WAV file to text by the wall and of all cores, and the transcript."""
    wall, cpu = time.perf_counter(), time.process_time()
    transcript = recognizer.transcribe(path, language=language)
    return time.perf_counter() - wall, time.process_time() - cpu, transcript


def stages(transcripts: list[Transcript], share: float | None) -> dict[str, list[float]]:
    """Return the samples of each stage; the encoder graph is divided by log-mel's share, or as it
    was timed."""
    graph = [seconds for transcript in transcripts for seconds in transcript.graph_s]
    mel = [seconds for transcript in transcripts for seconds in transcript.mel_s]
    mel = mel if share is None else [share * seconds for seconds in graph]
    return {
        "mel_s": mel,
        "encoder_s": [whole - part for whole, part in zip(graph, mel, strict=True)],
        "prompt_s": [s for transcript in transcripts for s in transcript.prompt_s],
        "per_token_s": [s for transcript in transcripts for s in transcript.per_token_s],
    }


def mel_share(artifact: Path, window: Pcm, threads: int | None) -> float:
    """Return the share of the encoder graph's kernel time that the log-mel nodes take."""
    import tempfile  # here, for it would count in every peak of memory

    from ..engines.sessions import encode, open_session, session_options

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "encoder")
        session = open_session(artifact / "encoder.onnx", options)
        for _ in range(PROFILED_RUNS):
            encode(session, window)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return share_of(events, MEL_NODES)


def share_of(events: list[dict], prefix: str) -> float:
    """Return the median share, over the runs, of kernels whose node's name has this prefix."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    micros = np.array([kernel["dur"] for kernel in kernels], float).reshape(PROFILED_RUNS, -1)
    inside = np.array([k["name"].startswith(prefix) for k in kernels]).reshape(PROFILED_RUNS, -1)
    return float(np.median((micros * inside).sum(axis=1) / micros.sum(axis=1)))
