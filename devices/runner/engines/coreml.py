"""Runs a Core ML artifact's three packages, with WhisperKit's interface.

    MelSpectrogram   audio (samples,)        -> melspectrogram_features (1, n_mels, 1, frames)
    AudioEncoder     melspectrogram_features -> encoder_output_embeds (1, d_model, 1, positions)
    TextDecoder      input_ids (1,) int32              the token
                     cache_length (1,) int32           the number of tokens fed before
                     key_cache, value_cache (1, width, 1, room)
                     kv_cache_update_mask (1, room)    1 at this token's position, else 0
                     encoder_output_embeds
                     decoder_key_padding_mask (1, room)   0 up to this token, MASKED after it
                     -> logits (1, 1, vocab)
                        key_cache_updates, value_cache_updates (1, width, 1, 1)

Each call takes one token, also for the prompt. The caches are allocated once. A token's updates are
written into them in place, and entries after the last token, left from an earlier text, are masked.
A decoder with states holds its caches there, and has no cache inputs and outputs.

A Package executes a package: Core ML on a Mac (Installed), elsewhere the given runtime. Only numpy
is imported; coremltools is imported on a Mac when a package is opened.
"""

import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..artifact.tensors import Tensor, check_tensors
from ..artifact.whisperkit import PACKAGES
from ..interfaces import Logits, Pcm, Transcript
from ..problem import RunnerProblem, running

MASKED = -1e4
"""Added to masked attention scores: its exponential is zero, and it fits into float16."""

CACHES = ("key_cache", "value_cache")

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-ane": "CPU_AND_NE", "cpu-gpu": "CPU_AND_GPU"}
"""Compute units -> coremltools' name."""

Arrays = dict[str, np.ndarray]


class Package(Protocol):
    """An opened package."""

    inputs: list[Any]
    outputs: list[Any]
    states: list[Any]
    """Each with name, shape and dtype."""

    def predict(self, feed: Mapping[str, np.ndarray], state: Any = None) -> Arrays:
        """Return the outputs by name; packages with states update `state`."""

    def new_state(self) -> Any:
        """Return a new state of zeros."""

    def copy_state(self, source: Any, target: Any) -> None:
        """Copy one state to another."""


Opener = Callable[[Path], Package]


class Packages:
    """The three packages of an artifact whose files were checked."""

    def __init__(self, folder: Path, manifest: dict[str, Any], open_package: Opener) -> None:
        self.paths = [folder / f"{name}.mlpackage" for name in PACKAGES]
        self.mel, self.encoder, self.decoder = (
            checked(open_package, path, manifest["contract"][path.stem]) for path in self.paths
        )
        self.own = threading.local()
        self.rooms(1)

    def decoder_over(self, window: Pcm, times: Transcript) -> "Decoder":
        """Encode one window (1, samples) and return the decoder over it."""
        return Decoder(self, window, times)

    def encode(self, window: Pcm, times: Transcript) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-mel features of a window and the encoder's states."""
        started = time.perf_counter()
        with running(self.paths[0]):
            (mel,) = self.mel.predict(typed(self.mel, window[0])).values()
        times.mel_s.append(time.perf_counter() - started)
        with running(self.paths[1]):
            (states,) = self.encoder.predict(typed(self.encoder, mel)).values()
        times.graph_s.append(time.perf_counter() - started)
        return mel, states

    def rooms(self, count: int) -> list[tuple[Arrays, Any]]:
        """Return input arrays and states for `count` decoders of this thread. They are allocated
        once and kept as long as the thread lives."""
        held: list[tuple[Arrays, Any]] = self.own.__dict__.setdefault("rooms", [])
        while len(held) < count:
            state = self.decoder.new_state() if self.decoder.states else None
            held.append((room_for(self.decoder), state))
        return held[:count]


class Decoder:
    """The decoder over one encoded window, with its key and value caches."""

    def __init__(self, packages: Packages, window: Pcm, times: Transcript) -> None:
        self.packages, self.fed = packages, 0
        self.clock, self.next_clock = times.prompt_s, times.per_token_s
        self.mel, states = packages.encode(window, times)
        memory, self.state = packages.rooms(1)[0]
        self.feed = memory | {"encoder_output_embeds": states}

    def __call__(self, ids: Sequence[int]) -> Logits:
        """Feed tokens after those already fed; return the logits (vocab,) after the last."""
        started = time.perf_counter()
        with running(self.packages.paths[2]):
            for token in ids:
                logits = self.step(token)
        self.clock.append(time.perf_counter() - started)
        self.clock = self.next_clock
        return logits.reshape(-1).astype(np.float32)

    def step(self, token: int) -> np.ndarray:
        """Feed one token; return the logits (1, 1, vocab)."""
        feed, here = self.feed, self.fed
        update, padding = feed["kv_cache_update_mask"], feed["decoder_key_padding_mask"]
        feed["input_ids"][0], feed["cache_length"][0] = token, here
        update[:], padding[:] = 0, MASKED
        update[0, here], padding[0, : here + 1] = 1, 0
        outputs = self.packages.decoder.predict(feed, self.state)
        for name in CACHES:
            if name in feed:
                feed[name][..., here] = outputs[f"{name}_updates"][..., 0]
        self.fed += 1
        return outputs["logits"]

    def attention(self, ids: Sequence[int], positions: int) -> np.ndarray:
        """Raise RunnerProblem: the packages average the heads, which is for WhisperKit."""
        raise RunnerProblem(
            "word timestamps need an ONNX artifact", "export the checkpoint with `--target onnx`"
        )

    def branches(self, count: int) -> list["Decoder"]:
        """Return `count` decoders over the same window, each with its own caches."""
        others = []
        for memory, state in self.packages.rooms(count + 1)[1:]:
            other = copy(self)
            other.feed, other.state = self.feed | memory, state
            others.append(other)
        return others

    def follow(self, other: "Decoder") -> None:
        """Copy the state of another decoder over the same window."""
        self.fed = other.fed
        for name in CACHES:
            if name in self.feed:
                self.feed[name][..., : self.fed] = other.feed[name][..., : self.fed]
        if self.state is not None:
            self.packages.decoder.copy_state(other.state, self.state)

    def parts(self) -> Arrays:
        """Return features (n_mels, frames), encoder states (d_model, positions), and caches
        (width, tokens) that are not Core ML states."""
        states = self.feed["encoder_output_embeds"]
        arrays = {"mel": self.mel[0, :, 0], "states": states[0, :, 0]}
        own = {name: self.feed[name][0, :, 0, : self.fed] for name in CACHES if name in self.feed}
        return {name: array.astype(np.float32) for name, array in (arrays | own).items()}


def checked(open_package: Opener, path: Path, contract: dict[str, Any]) -> Package:
    """Open a package whose inputs and outputs are the manifest's, in any order."""
    with running(path):
        package = open_package(path)
    sides = {"inputs": package.inputs, "outputs": package.outputs, "states": package.states}
    for side, specs in sides.items():
        tensors = [Tensor(spec.name, list(spec.shape), spec.dtype) for spec in specs]
        expected = contract.get(side) or []
        check_tensors(path, side, sorted(tensors), sorted(expected, key=lambda spec: spec["name"]))
    return package


def room_for(decoder: Package) -> Arrays:
    """Return zeroed arrays for a decoder's inputs, except the encoder's output."""
    others = [spec for spec in decoder.inputs if spec.name != "encoder_output_embeds"]
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in others}


def typed(package: Package, value: np.ndarray) -> Arrays:
    """Return the single input of a package, in its declared type."""
    (spec,) = package.inputs
    return {spec.name: value.astype(spec.dtype)}


# --------------------------------------------------------------------------------- on a Mac


def installed(compute_units: str) -> Opener:
    """Return a function that opens packages in the system's Core ML."""
    if compute_units not in UNITS:
        raise RunnerProblem(
            f"unknown compute units {compute_units!r}", f"choose one of {', '.join(UNITS)}"
        )
    if platform.system() != "Darwin":
        raise RunnerProblem(
            f"this machine runs {platform.system()}, and Core ML needs an Apple system",
            "copy the artifact to a Mac; here `edgewhisper transcribe` and `eval` run it in an "
            "interpreter, and `edgewhisper export --target onnx` writes one for this machine",
        )
    return lambda path: Installed(path, compute_units)


def library(path: Path) -> Any:
    """Return coremltools; raise RunnerProblem if it is not installed."""
    try:
        import coremltools
    except ImportError as error:
        raise RunnerProblem(
            f"{path}: needs coremltools, which is not installed ({error})",
            "pip install coremltools",
        ) from None
    return coremltools


def compile_packages(folder: Path) -> bool:
    """Compile packages for this machine, each to a folder next to it. Returns whether any of them
    had not been compiled before."""
    paths = [folder / f"{name}.mlpackage" for name in PACKAGES]
    missing = [path for path in paths if not path.with_suffix(".mlmodelc").is_dir()]
    for path in missing:
        with running(path):
            compiled = str(path.with_suffix(".mlmodelc"))
            library(path).models.utils.compile_model(str(path), compiled)
    return bool(missing)


class Installed:
    """A package in Core ML; a compiled .mlmodelc folder next to it is used if there is one."""

    def __init__(self, path: Path, compute_units: str) -> None:
        coremltools = library(path)
        units = coremltools.ComputeUnit[UNITS[compute_units]]
        compiled = path.with_suffix(".mlmodelc")
        models = coremltools.models
        self.model = (
            models.CompiledMLModel(str(compiled), units)
            if compiled.is_dir()
            else models.MLModel(str(path), compute_units=units)
        )
        description = coremltools.utils.load_spec(str(path)).description
        self.inputs, self.outputs, self.states = (
            [declared(feature) for feature in side]
            for side in (description.input, description.output, description.state)
        )

    def predict(self, feed: Mapping[str, np.ndarray], state: Any = None) -> Arrays:
        """Return the outputs by name."""
        inputs = dict(feed)  # coremltools replaces float16 arrays in the dictionary it gets
        outputs: Arrays = self.model.predict(inputs, **({} if state is None else {"state": state}))
        return outputs

    def new_state(self) -> Any:
        """Return a new state of zeros."""
        return self.model.make_state()

    def copy_state(self, source: Any, target: Any) -> None:
        """Copy one state to another."""
        for spec in self.states:
            target.write_state(spec.name, source.read_state(spec.name))


CODES = {65552: "float16", 65568: "float32", 131104: "int32"}
"""Core ML's code of a data type -> its name."""


def declared(feature: Any) -> Tensor:
    """Return an input, output or state as a package's description declares it."""
    kind = feature.type.WhichOneof("Type")
    array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
    return Tensor(feature.name, list(array.shape), CODES.get(array.dataType, str(array.dataType)))
