"""Times one artifact on clips, in this process, and returns every sample.

Log-mel is part of the ONNX encoder graph, so it cannot be timed separately. The graph is timed as a
whole. Afterwards a second session with onnxruntime's profiler measures the log-mel nodes' share of
the kernel time, and each sample is split in that proportion. The share is measured on the first
clip's window and used for windows of all lengths. In Core ML, log-mel is a separate package.
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

from ..artifact.manifest import check_files, read_manifest
from ..audio import Pcm, read_wav
from ..machine.host import UNAVAILABLE, peak_of_phase, peak_rss_bytes, usable_cores, versions
from ..problem import RunnerProblem
from ..recognizer import Recognizer, Transcript, pad

MEL_NODES = "log_mel/"
"""Prefix of the log-mel nodes' names, set by the exporter."""

WARM_UP_CLIPS = 3
PROFILED_RUNS = 9
MOST_SUSTAINED = 500_000
"""Most clips of a sustained run, so that the result stays below the limit of a device's output."""
MOST_CACHED = 0.05
"""A file counts as dropped from the page cache if at most this share is still cached."""


def bench(
    artifact: Path,
    clips: Path,
    repeats: int = 1,
    threads: int | None = None,
    compute_units: str | None = None,
    minutes: float | None = None,
) -> dict:
    """Transcribe all clips `repeats` times and return texts, tokens and times in seconds.

    Each clip is prompted for its language in languages.json, next to the list of clips, if the
    model supports it, otherwise for the artifact's language. `load_s` covers both sessions,
    manifest and tokens, without Python's imports. `end_to_end_s` is the time from WAV file to text,
    `cpu_s` the CPU time of all cores for it; lists are in the order of measurement. `timed_s` is
    the monotonic clock before and after the runs. With `minutes`, see `sustain`.
    """
    paths = read_clips(clips)
    spoken = read_languages(clips, len(paths))
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)  # checks and imports are not timed
    native = manifest["target"] == "onnx"
    with suppress(ImportError):  # opening the artifact raises a better error
        import_module("..engines.sessions" if native else "coremltools", __package__)
    memory = {"imports": peak_of_phase()}
    started = time.perf_counter()
    recognizer = Recognizer(artifact, threads, hashed=False, compute_units=compute_units)
    load_s = time.perf_counter() - started
    memory["load"] = peak_of_phase()
    inputs = [(path, recognizer.known(code)) for path, code in zip(paths, spoken, strict=True)]
    for number, (path, language) in enumerate(inputs[:WARM_UP_CLIPS]):
        recognizer.transcribe(path, language=language)
        if number == 0:
            memory["first"] = peak_of_phase()
    if minutes is not None:
        return {"sustained": sustain(recognizer, inputs, minutes)}
    began_s = time.monotonic()
    runs = [timed(recognizer, *each) for _ in range(repeats) for each in inputs]
    timed_s = [began_s, time.monotonic()]
    transcripts = [transcript for _, _, transcript in runs]
    last, footprint = peak_rss_bytes(), peak_footprint()  # before the profiler adds its memory
    memory["run"] = peak_of_phase()
    first = read_wav(paths[0])[: recognizer.window_samples]
    window = pad(first, recognizer.windows)
    share = mel_share(artifact, window, threads) if native else None
    return {
        "load_s": [load_s],
        **stages(transcripts, share),
        "end_to_end_s": [wall for wall, _, _ in runs],
        "cpu_s": [cpu for _, cpu, _ in runs],
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
    """Return a Mac's peak physical footprint; nothing on other systems."""
    if sys.platform != "darwin":
        return {}
    from ..machine.mac import peak_footprint_bytes

    return {"peak_footprint_bytes": peak_footprint_bytes()}


def compile_first(artifact: Path, compute_units: str | None = None) -> dict[str, list[float]]:
    """Compile a Core ML artifact for this machine and load it for the first time.

    Run it in a separate process, as both take memory that later loads do not. `compile_s` is empty
    if all packages were compiled before. macOS may cache what it prepares for the Neural Engine, so
    an artifact it has loaded before is not cold.
    """
    from ..engines.coreml import UNITS, Packages, compile_packages, installed, library

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    if manifest["target"] != "coreml":
        raise RunnerProblem(
            f"{artifact}: not a Core ML artifact", "run bench; nothing has to be compiled"
        )
    opener = installed(compute_units or next(iter(UNITS)))
    library(artifact)  # importing it takes seconds that are not timed
    started = time.perf_counter()
    was_needed = compile_packages(artifact)
    compiled = time.perf_counter()
    Packages(artifact, manifest, opener)
    return {
        "compile_s": [compiled - started] if was_needed else [],
        "cold_load_s": [time.perf_counter() - compiled],
    }


def sustain(
    recognizer: Recognizer, inputs: list[tuple[Path, str | None]], minutes: float
) -> dict[str, list[float]]:
    """Transcribe the clips in a cycle for `minutes`. Returns the seconds of each transcription, and
    the monotonic clock at its start."""
    deadline = time.monotonic() + 60 * minutes
    samples: dict[str, list[float]] = {"end_to_end_s": [], "at_s": []}
    for each in cycle(inputs):
        at_s = time.monotonic()
        if at_s >= deadline or len(samples["at_s"]) >= MOST_SUSTAINED:
            break
        wall, _, _ = timed(recognizer, *each)
        samples["end_to_end_s"].append(round(wall, 6))
        samples["at_s"].append(round(at_s, 3))
    return samples


def cold_load_s(artifact: Path, threads: int | None) -> float | str:
    """Return the seconds to open an artifact whose files are not in the page cache.

    Run it in a separate process. Returns "unavailable" if the system does not drop the files from
    its cache, as on a file system in memory.
    """
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
    """Drop a file from the page cache; return whether that worked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # pages that are not on disk yet cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return cached_share(file) <= MOST_CACHED
    except OSError:
        return False
    finally:
        os.close(file)


def cached_share(file: int) -> float:
    """Return the share of an open file's pages that are in the page cache."""
    size = os.fstat(file).st_size
    if not size:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size)
        failed = libc.mincore(address, length, flags)
        del start
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in flags) / pages


def debug_signs() -> list[str]:
    """Return why this interpreter or onnxruntime is slower than a release build."""
    runtime = sys.modules.get("onnxruntime")
    build_info: Callable[[], str] = getattr(runtime, "get_build_info", lambda: "")
    signs = {
        "python is a debug build": hasattr(sys, "gettotalrefcount"),
        "python runs with -X dev": sys.flags.dev_mode,
        "onnxruntime is a debug build": "build type=Debug" in build_info(),
    }
    return [sign for sign, holds in signs.items() if holds]


def read_clips(path: Path) -> list[Path]:
    """Read a JSON list of WAV paths, relative to the list's folder."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        clips = [path.parent / name for name in names]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunnerProblem(
            f"{path}: not a list of clips ({error})", 'write a JSON list such as ["a.wav"]'
        ) from None
    if not clips:
        raise RunnerProblem(f"{path}: the list of clips is empty", "name at least one WAV file")
    return clips


def read_languages(clips: Path, count: int) -> list[str | None]:
    """Read the language of each clip from languages.json next to the list of clips. All languages
    are None if there is no such file."""
    path = clips.parent / "languages.json"
    if not path.is_file():
        return [None] * count
    try:
        codes = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(code, str | None) for code in codes) or len(codes) != count:
            raise ValueError(f"{len(codes)} entries for {count} clips, each a code or null")
    except (OSError, ValueError, TypeError) as error:
        raise RunnerProblem(
            f"{path}: not a list of languages ({error})", 'write a JSON list such as ["en"]'
        ) from None
    return list(codes)


def timed(
    recognizer: Recognizer, path: Path, language: str | None
) -> tuple[float, float, Transcript]:
    """Transcribe one clip; return wall-clock seconds, CPU seconds and the transcript."""
    wall, cpu = time.perf_counter(), time.process_time()
    transcript = recognizer.transcribe(path, language=language)
    return time.perf_counter() - wall, time.process_time() - cpu, transcript


def stages(transcripts: list[Transcript], share: float | None) -> dict[str, list[float]]:
    """Return the samples of each stage in seconds. The encoder graph's time is split by log-mel's
    `share`; with None, log-mel was timed itself."""
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
    """Return the log-mel nodes' share of the encoder graph's kernel time."""
    import tempfile  # imported late, as it would count in every memory peak

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
    """Return the median over the runs of the time share of kernels whose node has this prefix."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    micros = np.array([kernel["dur"] for kernel in kernels], float).reshape(PROFILED_RUNS, -1)
    inside = np.array([k["name"].startswith(prefix) for k in kernels]).reshape(PROFILED_RUNS, -1)
    return float(np.median((micros * inside).sum(axis=1) / micros.sum(axis=1)))
