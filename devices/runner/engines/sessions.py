"""Runs an ONNX artifact's encoder and decoder in onnxruntime.

Memory: onnxruntime parses a graph's file and packs its weights; large weights are in a separate
file that is mapped. Memory that only loading needs is returned after each of the two. The decoder
is loaded first, because it takes most. It has no arena, which would keep the memory of packing.
Memory patterns are off, because onnxruntime would plan one block for every length of the past.
"""

import threading
import time
from collections.abc import Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..artifact.tensors import check_session
from ..interfaces import Logits, Pcm, Transcript
from ..machine.host import (
    Mapping,
    give_back_memory,
    mapped,
    return_large_blocks,
    unmap_pages,
    usable_cores,
)
from ..problem import RunnerProblem, running

MOST_IDS = 32
"""Most tokens per decoder step."""

OPENING = threading.Lock()
"""Held while files are mapped. Sessions must know which mappings are theirs: once others close
theirs, unmap_pages would erase whatever memory follows at those addresses."""

PRODUCT = (
    b'\x08\t:[\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x00Z\x13\n\x01a\x12\x0e\n\x0c'
    b"\x08\x02\x12\x08\n\x02\x08\x01\n\x02\x08\x02Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02"
    b"\x08\x02\n\x02\x08\x01b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x01"
    b"B\x04\n\x00\x10\x12"
)
"""An ONNX graph of one MatMulInteger: a (1, 2) uint8, b (2, 1) int8 -> y (1, 1) int32."""

State = dict[str, Any]
"""Names of decoder inputs -> their OrtValue."""

Past = dict[str, np.ndarray]
"""Names of the decoder's own caches -> their memory."""


class Sessions:
    """Encoder and decoder of an artifact whose files were checked."""

    encoder: ort.InferenceSession
    decoder: ort.InferenceSession

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        self.folder = folder
        check_runtime(folder, manifest)
        return_large_blocks()
        with OPENING:
            others = mapped(folder)
            for name in opening_order(manifest):
                options = session_options(threads, arena=name == "encoder")
                setattr(self, name, open_session(folder / f"{name}.onnx", options))
                give_back_memory(new_mappings(folder, others))
            self.mapped = new_mappings(folder, others)
        for name, session in (("encoder", self.encoder), ("decoder", self.decoder)):
            check_session(folder / f"{name}.onnx", session, manifest["contract"][name])
        sizes = {output.name: output.shape[-1] for output in self.decoder.get_outputs()}
        self.vocabulary: int = sizes["logits"]
        self.alignment: dict[str, Any] = manifest["decoding"].get("alignment") or {}
        self.own = threading.local()
        self.caches(1)

    def decoder_over(self, window: Pcm, times: Transcript) -> "Decoder":
        """Encode one window (1, samples) and return the decoder over it."""
        return Decoder(self, window, times)

    def caches(self, count: int) -> list[State]:
        """Return `count` key and value caches of this thread. They are allocated once and kept as
        long as the thread lives."""
        held: list[State] = self.own.__dict__.setdefault("caches", [])
        while len(held) < count:
            held.append(empty_cache(self.decoder))
        return held[:count]


class Decoder:
    """The decoder over one encoded window, with its key and value caches. The graph updates the
    caches in place. It reads ids and length from arrays that are bound once, and writes logits to
    one: binding them in every step took 3 % of a token's CPU time on whisper-tiny."""

    ids: np.ndarray
    """The tokens of a step, (1, s)."""

    def __init__(self, sessions: Sessions, window: Pcm, times: Transcript) -> None:
        self.sessions, self.session, self.fed = sessions, sessions.decoder, 0
        self.path = sessions.folder / "decoder.onnx"
        self.clock, self.next_clock = times.prompt_s, times.per_token_s
        started = time.perf_counter()
        unmap_pages(sessions.mapped)  # rows of the token table that were looked up
        with running(sessions.folder / "encoder.onnx"):
            cross = encode(sessions.encoder, window)
        times.graph_s.append(time.perf_counter() - started)
        self.cross = cross
        self.write_to(sessions.caches(1)[0])

    def __call__(self, ids: Sequence[int]) -> Logits:
        """Feed tokens after those already fed; return the logits (vocab,) after the last. The array
        belongs to the decoder; the next call overwrites it."""
        for start in range(0, len(ids), MOST_IDS):
            logits = self.step(ids[start : start + MOST_IDS])
        self.clock = self.next_clock
        return logits

    def step(self, ids: Sequence[int]) -> Logits:
        """Feed at most MOST_IDS tokens."""
        started = time.perf_counter()
        if self.ids.size != len(ids):
            self.ids = np.empty((1, len(ids)), np.int64)
            self.binding.bind_ortvalue_input("input_ids", value(self.ids))
        self.ids[:], self.length[:] = ids, self.fed
        with running(self.path):
            self.session.run_with_iobinding(self.binding)
        self.fed += len(ids)
        self.clock.append(time.perf_counter() - started)
        logits: Logits = self.logits[0, 0]
        return logits

    def branches(self, count: int) -> list["Decoder"]:
        """Return `count` decoders over the same window, each with its own caches."""
        others = [copy(self) for _ in range(count)]
        for other, memory in zip(others, self.sessions.caches(count + 1)[1:], strict=True):
            other.write_to(memory)
        return others

    def write_to(self, cache: State) -> None:
        """Use this memory for the decoder's own keys and values."""
        self.past, self.binding = views(cache), bind(self.session, self.cross | cache)
        self.ids = np.empty((1, 0), np.int64)
        self.length: np.ndarray = np.empty(1, np.int32)
        self.logits: np.ndarray = np.empty((1, 1, self.sessions.vocabulary), np.float32)
        self.binding.bind_ortvalue_input("past_length", value(self.length))
        self.binding.bind_ortvalue_output("logits", value(self.logits))

    def follow(self, other: "Decoder") -> None:
        """Copy the state of another decoder over the same window."""
        self.fed = other.fed
        for name, array in other.past.items():
            self.past[name][:, :, : self.fed] = array[:, :, : self.fed]

    def attention(self, ids: Sequence[int], positions: int) -> np.ndarray:
        """Return the attention (heads, ids, positions) of the alignment heads over the first
        positions of the window, for tokens from the start of the decoder. They are fed again."""
        heads, scale = self.sessions.alignment["heads"], self.sessions.alignment["scale"]
        layers, parts = sorted({layer for layer, _ in heads}), []
        self.fed, self.clock = 0, []  # not a stage of decoding
        for start in range(0, len(ids), MOST_IDS):
            for layer in layers:  # again for every step, because their shape may change
                self.binding.bind_output(f"query.{layer}")
            self.step(ids[start : start + MOST_IDS])
            outputs = self.binding.get_outputs()[-len(layers) :]
            parts.append([output.numpy()[0].copy() for output in outputs])
        queries = dict(zip(layers, map(np.concatenate, zip(*parts, strict=True)), strict=True))
        return softmax(
            np.stack(
                [self.products(queries[layer], layer, head, positions) for layer, head in heads]
            )
            * np.float32(scale)
        )

    def products(self, queries: np.ndarray, layer: int, head: int, positions: int) -> np.ndarray:
        """Return the products (ids, positions) of a head's queries with its keys. `queries` are
        (ids, heads * width)."""
        keys = self.cross[f"cross.{layer}.key"].numpy()[0]  # (heads, room, cache width)
        width = queries.shape[1] // len(keys)
        own = keys[head, :positions, :width].astype(np.float32)
        if scales := self.cross.get(f"cross.{layer}.key_scale"):
            own *= scales.numpy().reshape(len(keys), -1)[head, :width]
        product: np.ndarray = queries[:, head * width : (head + 1) * width] @ own.T
        return product

    def parts(self) -> dict[str, np.ndarray]:
        """Return no intermediate arrays: onnxruntime does not expose them."""
        return {}


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def views(state: State) -> Past:
    """Return the caches as NumPy arrays that share onnxruntime's memory."""
    return {name: held.numpy() for name, held in state.items()}


def bind(decoder: ort.InferenceSession, state: State) -> Any:
    """Return a binding that reads and writes every cache in place."""
    binding = decoder.io_binding()
    for name, array in state.items():
        binding.bind_ortvalue_input(name, array)
    for output in decoder.get_outputs():
        name = output.name.replace("present.", "past.").replace("heard.", "cross.")
        if name.startswith("query."):  # bound for word timestamps only
            continue
        if name in state:
            binding.bind_ortvalue_output(output.name, state[name])
        else:
            binding.bind_output(output.name)
    return binding


def encode(session: ort.InferenceSession, window: Pcm) -> State:
    """Run the encoder graph; its outputs have the names of the decoder's inputs."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, {"pcm": value(window)}), strict=True))


def empty_cache(decoder: ort.InferenceSession) -> State:
    """Return zeroed caches with the decoder's full capacity."""
    shapes = {output.name: output.shape for output in decoder.get_outputs()}
    return {
        name.replace("present.", "past."): value(np.zeros(shape, np.float32))
        for name, shape in shapes.items()
        if name.startswith("present.")
    }


def value(array: np.ndarray) -> Any:
    """Return the array as an OrtValue that shares its memory."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def opening_order(manifest: dict[str, Any]) -> tuple[str, str]:
    """Return the graphs in the order in which they are opened: first the one that takes more memory
    meanwhile. In int4 that is the encoder, whose weights onnxruntime converts to 8 bits. The peak
    of loading tiny.en is 128 instead of 155 MB then; in int8 it is 126 instead of 114 MB."""
    encoder_first = manifest.get("precision") == "int4"  # optional in the manifest
    return ("encoder", "decoder") if encoder_first else ("decoder", "encoder")


def session_options(
    threads: int | None, arena: bool = True, exact: bool = True
) -> ort.SessionOptions:
    """Return session options for low memory use and short busy-waiting.

    A thread that waits for the next operator spins for 0.1 ms, then sleeps. On whisper-tiny with
    two threads, tokens are 20 % faster than without spinning, for 6 % more CPU time. onnxruntime's
    default spins a thousand times as long, took 2.8 times the CPU time on two busy cores, and heats
    a small board.

    With `exact`, onnxruntime rewrites int8 weights as uint8 at loading on processors where int8
    products saturate. Elsewhere that is not needed and slow: with VNNI the encoder took 1.6 times
    as long. It works for graphs of the native layout only, see export/onnx/constants.py.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = arena
    options.enable_mem_reuse = not arena
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    if exact and saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # errors are raised, not logged
    return options


def check_runtime(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise RunnerProblem for an onnxruntime that is too old for the graphs."""
    runtime = manifest.get("runtime")  # missing in artifacts of earlier versions
    needed = str(runtime.get("onnxruntime")) if isinstance(runtime, dict) else ""
    if numbers(ort.__version__) < numbers(needed):
        raise RunnerProblem(
            f"{folder}: its graphs need onnxruntime {needed} or newer, and {ort.__version__} is "
            "installed",
            "update onnxruntime, or export the checkpoint again with "
            f"`--runtime {ort.__version__}`",
        )


def numbers(version: str) -> tuple[int, ...]:
    """Return major and minor version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def new_mappings(folder: Path, others: Sequence[Mapping]) -> list[Mapping]:
    """Return the mappings of files in `folder` that are not among `others`."""
    return [place for place in mapped(folder) if place not in others]


@cache
def saturates() -> bool:
    """Return whether int8 products saturate here: onnxruntime adds pairs of them in 16 bits."""
    session = ort.InferenceSession(PRODUCT, providers=["CPUExecutionProvider"])
    pair = {"a": np.full((1, 2), 255, np.uint8), "b": np.full((2, 1), 127, np.int8)}
    return bool(session.run(None, pair)[0] != 2 * 255 * 127)


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Return a session on the CPU; raise RunnerProblem if the graph does not load."""
    if not path.is_file():
        raise RunnerProblem(f"{path}: there is no such file", "copy the artifact again")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has one class per status code
        reason = str(error).strip().splitlines()[0]
        raise RunnerProblem(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({reason})",
            "export or copy the artifact again, or update onnxruntime",
        ) from None
