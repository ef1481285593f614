"""Time one artifact on clips, in this process, and keep every sample.

Log-mel is part of the ONNX encoder graph, so its time cannot be taken from outside. The graph runs
whole and is timed whole; afterwards a second session with onnxruntime's profiler says which share
of the kernel time belongs to the log-mel nodes, and each sample is divided in that proportion. It
is that of the first clip's window, also where other clips take a window of another length. In Core
ML log-mel is a package of its own.
"""

import json
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np

from .audio import Pcm, read_wav
from .contract import check_files, read_manifest
from .machine import peak_rss_bytes, versions
from .problem import RunnerProblem
from .recognizer import Recognizer, Transcript, pad

MEL_NODES = "log_mel/"
"""The exporter names the log-mel nodes so."""

WARM_UP_CLIPS = 3
PROFILED_RUNS = 9


def bench(
    artifact: Path,
    clips: Path,
    repeats: int = 1,
    threads: int | None = None,
    compute_units: str | None = None,
) -> dict:
    """Transcribe all clips `repeats` times and return texts, tokens and times, in seconds.

    Each is prompted for its language, as languages.json beside the list says it, where the model
    can be told of that; otherwise for the one that the artifact is made for.
    `load_s` is both sessions, manifest and tokens, without Python's imports; `end_to_end_s` goes
    from the WAV file to the text, and `cpu_s` is the time of all cores for the same work; lists are
    in the order of measurement.
    """
    paths = read_clips(clips)
    spoken = read_languages(clips, len(paths))
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)  # before the clock starts, and so are the imports
    native = manifest["target"] == "onnx"
    with suppress(ImportError):  # of which opening it tells more
        import_module(".sessions" if native else "coremltools", __package__)
    started = time.perf_counter()
    recognizer = Recognizer(artifact, threads, hashed=False, compute_units=compute_units)
    load_s = time.perf_counter() - started
    work = [(path, recognizer.known(code)) for path, code in zip(paths, spoken, strict=True)]
    for path, language in work[:WARM_UP_CLIPS]:
        recognizer.transcribe(path, language=language)
    done = [timed(recognizer, *each) for _ in range(repeats) for each in work]
    transcripts = [transcript for _, _, transcript in done]
    peak, footprint = peak_rss_bytes(), peak_footprint()  # before the profiler takes its own
    first = read_wav(paths[0])[: recognizer.window_samples]
    window = pad(first, recognizer.windows)
    share = mel_share(artifact, window, threads) if native else None
    return {
        "load_s": [load_s],
        **stages(transcripts, share),
        "end_to_end_s": [wall for wall, _, _ in done],
        "cpu_s": [cpu for _, cpu, _ in done],
        "mel_share": share,
        "peak_rss_bytes": peak,
        **footprint,
        "tokens": [transcript.tokens for transcript in transcripts[-len(paths) :]],
        "texts": [transcript.text for transcript in transcripts[-len(paths) :]],
        "versions": versions() if native else versions("coremltools"),
    }


def peak_footprint() -> dict[str, int | str]:
    """Return what a Mac tells beside resident memory."""
    if sys.platform != "darwin":
        return {}
    from .mac import peak_footprint_bytes

    return {"peak_footprint_bytes": peak_footprint_bytes()}


def compile_first(artifact: Path, compute_units: str | None = None) -> dict[str, list[float]]:
    """Compile a Core ML artifact for this machine and load it for the first time: in a process of
    its own, for both take memory that no later load does. `compile_s` is empty where all packages
    had been compiled before.

    The system may keep what a first load makes of a package for the Neural Engine, and then an
    artifact that it has met before is no new one to it.
    """
    from .coreml import UNITS, Packages, compile_packages, installed, library

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

    from .sessions import encode, open_session, session_options

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
