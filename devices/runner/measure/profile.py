"""Profiles an artifact's graphs: the time of each part, and the machine's copy rate.

Whole runs are timed without the profiler. The same runs with the profiler then give each part's
share of the kernel time. The exporter names nodes after the parts of the model they belong to
(stem/, layers.3/feed_forward/, ...). The copy rate, for blocks of the decoder's size, is the upper
bound of the decoder's speed.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.manifest import check_files, read_manifest
from ..audio import SAMPLING_RATE, Pcm
from ..engines.sessions import Sessions, open_session, session_options
from ..machine.host import usable_cores, versions
from ..problem import RunnerProblem
from ..recognizer import Recognizer, Transcript, pad

PARTS = {
    "log_mel": "log-mel",
    "stem": "stem",
    "cross": "cross keys and values",
    "feed_forward": "feed-forward",
    "encoder_attn": "cross-attention",
    "layers": "self-attention",
    "look_up": "look-up",
    "logits": "logits",
}
OTHER = "other"
CONTEXT = 32
"""Context length of the last timed step, as in a manifest's `macs`."""
RUNS = 7
COPIES = 20


def profile(artifact: Path, seconds: float, threads: int | None = None) -> dict[str, Any]:
    """Return seconds per window and token, the shares of their parts, and the copy rate.

    The audio is noise of `seconds`, at most one window. Tokens are forced, so that every run does
    the same work whatever the model outputs.
    """
    check_files(artifact, read_manifest(artifact))
    recognizer = Recognizer(artifact, threads, guards=False, hashed=False)
    sessions = recognizer.engine
    if not isinstance(sessions, Sessions):
        raise RunnerProblem(
            f"{artifact}: not an ONNX artifact; only onnxruntime times the parts of graphs",
            "time the whole artifact with `edgewhisper bench`",
        )
    count = min(recognizer.window_samples, max(1, round(seconds * SAMPLING_RATE)))
    pcm = noise(count)
    window(recognizer, pcm)  # warms up
    times = [window(recognizer, pcm) for _ in range(RUNS)]
    encoder, decoder = profiled(recognizer, sessions, pcm, threads)
    return {
        "samples": pad(pcm, recognizer.windows).shape[1],
        "context": CONTEXT,
        "threads": threads or usable_cores(),
        "encoder_s": [s for run in times for s in run.graph_s],
        "token_s": [s for run in times for s in run.per_token_s],
        "encoder_shares": shares(encoder),
        "token_shares": shares(decoder),
        "bytes_per_s": copy_rate(
            (artifact / "decoder.onnx").stat().st_size, threads or usable_cores()
        ),
        "versions": versions(),
    }


def noise(samples: int) -> Pcm:
    return (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


def window(recognizer: Recognizer, pcm: Pcm) -> Transcript:
    """Encode one window, feed the prompt, then one token again and again up to CONTEXT tokens."""
    times = Transcript()
    step = recognizer.decoder_over(pcm, times)
    prompt = recognizer.rules.prompt
    step(prompt)
    for _ in range(min(CONTEXT - len(prompt), recognizer.rules.max_new_tokens)):
        step((prompt[0],))
    return times


def profiled(
    recognizer: Recognizer, sessions: Sessions, pcm: Pcm, threads: int | None
) -> list[list[dict]]:
    """Return the profiler's events of encoder and decoder over RUNS windows."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoder", "decoder"):
            options = session_options(threads, arena=name == "encoder")  # as Sessions does
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / name)
            session = open_session(recognizer.folder / f"{name}.onnx", options)
            setattr(sessions, name, session)
        sessions.mapped = []  # those of the replaced sessions
        for _ in range(RUNS):
            window(recognizer, pcm)
        files = [s.end_profiling() for s in (sessions.encoder, sessions.decoder)]
        return [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]


def shares(events: Sequence[dict]) -> dict[str, float]:
    """Return each part's share of the kernel time, largest first."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    micros: dict[str, float] = {}
    for kernel in kernels:
        part = part_of(kernel["name"])
        micros[part] = micros.get(part, 0.0) + kernel["dur"]
    total = sum(micros.values()) or 1.0
    return {name: spent / total for name, spent in sorted(micros.items(), key=lambda x: -x[1])}


def part_of(node: str) -> str:
    """Return the part of the model a node belongs to, from the innermost known scope of its
    name."""
    scopes = [scope.split(".")[0] for scope in node.split("/")[:-1]]
    return next((PARTS[scope] for scope in reversed(scopes) if scope in PARTS), OTHER)


def copy_rate(block_bytes: int, threads: int) -> float:
    """Return the bytes per second, read and written, of copying blocks of `block_bytes`. Small
    blocks stay in the CPU caches, as the weights of a small decoder do."""
    each = max(2**18, block_bytes // threads)
    blocks = [(np.ones(each, np.uint8), np.zeros(each, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(COPIES):
            np.copyto(pair[1], pair[0])

    return 2 * each * threads * COPIES / best(lambda: in_threads(copy, blocks))


def in_threads(function: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call a function on every item, each in its own thread."""
    workers = [threading.Thread(target=function, args=(item,)) for item in items[1:]]
    for worker in workers:
        worker.start()
    function(items[0])
    for worker in workers:
        worker.join()


def best(function: Callable[[], object]) -> float:
    """Return the shortest of RUNS times in seconds: disturbances only make a run longer."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)
