"""A Core ML artifact's three packages: the decode loop, as WhisperKit has it.

    MelSpectrogram   audio (samples,)        -> melspectrogram_features (1, n_mels, 1, frames)
    AudioEncoder     melspectrogram_features -> encoder_output_embeds (1, d_model, 1, positions)
    TextDecoder      input_ids (1,) int32              the token
                     cache_length (1,) int32           how many were fed before
                     key_cache, value_cache (1, width, 1, room)
                     kv_cache_update_mask (1, room)    1 where this token stands, else 0
                     encoder_output_embeds
                     decoder_key_padding_mask (1, room)   0 up to this token, MASKED behind it
                     -> logits (1, 1, vocab)
                        key_cache_updates, value_cache_updates (1, width, 1, 1)

One token a call, also of the prompt. The caches are taken once; what the decoder says of a token is
written into them in place, and what stands behind the last one, of a text before, is masked out. A
decoder with a state keeps its caches there itself, and they are neither given nor returned.

Who runs a package is a Package: on a Mac Core ML (Installed), elsewhere whoever is given. numpy
only; coremltools is imported on a Mac, where a package is opened.
"""

import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..audio import Pcm
from ..decode.rules import Logits
from ..problem import RunnerProblem
from .contract import Tensor, check_tensors, running
from .whisperkit import PACKAGES

if TYPE_CHECKING:
    from ..recognizer import Transcript

MASKED = -1e4
"""Added to the attention's scores; the exponential of it is zero, and it is a float16."""

CACHES = ("key_cache", "value_cache")

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-ane": "CPU_AND_NE", "cpu-gpu": "CPU_AND_GPU"}
"""What may compute, and coremltools' name for it."""

Arrays = dict[str, np.ndarray]


class Package(Protocol):
    """A package, ready to run."""

    inputs: list[Any]
    outputs: list[Any]
    states: list[Any]
    """Each with name, shape and dtype."""

    def predict(self, feed: Mapping[str, np.ndarray], state: Any = None) -> Arrays:
        """Return the outputs by name; `state` is changed, by packages that keep one."""

    def new_state(self) -> Any:
        """Return what a decoder keeps between steps, all zeros."""

    def copy_state(self, source: Any, target: Any) -> None:
        """Make one state what the other is."""


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

    def decoder_over(self, window: Pcm, times: "Transcript") -> "Decoder":
        """Return the decoder over one window (1, samples), which is encoded here."""
        return Decoder(self, window, times)

    def encode(self, window: Pcm, times: "Transcript") -> tuple[np.ndarray, np.ndarray]:
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
        """Return memory and states for so many decoders. Every thread has its own; they are made
        once, and kept as long as the thread lives."""
        held: list[tuple[Arrays, Any]] = self.own.__dict__.setdefault("rooms", [])
        while len(held) < count:
            state = self.decoder.new_state() if self.decoder.states else None
            held.append((room_for(self.decoder), state))
        return held[:count]


class Decoder:
    """The decoder over one encoded window: feeds tokens, keeps their keys and values."""

    def __init__(self, packages: Packages, window: Pcm, times: "Transcript") -> None:
        self.packages, self.fed = packages, 0
        self.clock, self.next_clock = times.prompt_s, times.per_token_s
        self.mel, states = packages.encode(window, times)
        memory, self.state = packages.rooms(1)[0]
        self.feed = memory | {"encoder_output_embeds": states}

    def __call__(self, ids: Sequence[int]) -> Logits:
        """Feed tokens behind those already fed; return the logits (vocab,) after the last."""
        started = time.perf_counter()
        with running(self.packages.paths[2]):
            for token in ids:
                found = self.step(token)
        self.clock.append(time.perf_counter() - started)
        self.clock = self.next_clock
        return found.reshape(-1).astype(np.float32)

    def step(self, token: int) -> np.ndarray:
        """Feed one token."""
        feed, here = self.feed, self.fed
        update, padding = feed["kv_cache_update_mask"], feed["decoder_key_padding_mask"]
        feed["input_ids"][0], feed["cache_length"][0] = token, here
        update[:], padding[:] = 0, MASKED
        update[0, here], padding[0, : here + 1] = 1, 0
        found = self.packages.decoder.predict(feed, self.state)
        for name in CACHES:
            if name in feed:
                feed[name][..., here] = found[f"{name}_updates"][..., 0]
        self.fed += 1
        return found["logits"]

    def branches(self, count: int) -> list["Decoder"]:
        """Return decoders over the same window with keys and values in memory of their own."""
        found = []
        for memory, state in self.packages.rooms(count + 1)[1:]:
            other = copy(self)
            other.feed, other.state = self.feed | memory, state
            found.append(other)
        return found

    def follow(self, other: "Decoder") -> None:
        """Go on from where another decoder over the same window is."""
        self.fed = other.fed
        for name in CACHES:
            if name in self.feed:
                self.feed[name][..., : self.fed] = other.feed[name][..., : self.fed]
        if self.state is not None:
            self.packages.decoder.copy_state(other.state, self.state)

    def parts(self) -> Arrays:
        """Return features (n_mels, frames), states (d_model, positions), and where they can be
        seen the caches (width, tokens)."""
        states = self.feed["encoder_output_embeds"]
        found = {"mel": self.mel[0, :, 0], "states": states[0, :, 0]}
        own = {name: self.feed[name][0, :, 0, : self.fed] for name in CACHES if name in self.feed}
        return {name: array.astype(np.float32) for name, array in (found | own).items()}


def checked(open_package: Opener, path: Path, told: dict[str, Any]) -> Package:
    """Return a package that takes and gives what the manifest says, in any order."""
    with running(path):
        package = open_package(path)
    sides = {"inputs": package.inputs, "outputs": package.outputs, "states": package.states}
    for side, specs in sides.items():
        found = [Tensor(spec.name, list(spec.shape), spec.dtype) for spec in specs]
        wanted = told.get(side) or []
        check_tensors(path, side, sorted(found), sorted(wanted, key=lambda spec: spec["name"]))
    return package


def room_for(decoder: Package) -> Arrays:
    """Return arrays for a decoder's inputs; the encoder's states are the encoder's own."""
    others = [spec for spec in decoder.inputs if spec.name != "encoder_output_embeds"]
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in others}


def typed(package: Package, value: np.ndarray) -> Arrays:
    """Return the one input of a package, in the type that it declares."""
    (spec,) = package.inputs
    return {spec.name: value.astype(spec.dtype)}


# --------------------------------------------------------------------------------- on a Mac


def installed(compute_units: str) -> Opener:
    """Return what opens packages with the system's own Core ML."""
    if compute_units not in UNITS:
        raise RunnerProblem(
            f"compute units {compute_units!r} are not known", f"name one of {', '.join(UNITS)}"
        )
    if platform.system() != "Darwin":
        raise RunnerProblem(
            f"this machine runs {platform.system()}, and Core ML is on Apple's systems only",
            "take the artifact to a Mac; `edgewhisper transcribe` and `eval` run it here in an "
            "interpreter, and `edgewhisper export --target onnx` makes one for this machine",
        )
    return lambda path: Installed(path, compute_units)


def library(path: Path) -> Any:
    """Return coremltools, which is to run this."""
    try:
        import coremltools
    except ImportError as error:
        raise RunnerProblem(
            f"{path}: coremltools, which runs it, is not installed ({error})",
            "pip install coremltools",
        ) from None
    return coremltools


def compile_packages(folder: Path) -> bool:
    """Compile packages for this machine, each to a folder beside it; say whether any had not been
    compiled before."""
    paths = [folder / f"{name}.mlpackage" for name in PACKAGES]
    left = [path for path in paths if not path.with_suffix(".mlmodelc").is_dir()]
    for path in left:
        with running(path):
            compiled = str(path.with_suffix(".mlmodelc"))
            library(path).models.utils.compile_model(str(path), compiled)
    return bool(left)


class Installed:
    """A package in Core ML. What was compiled stands beside it as .mlmodelc, if it does, and then
    need not be compiled again."""

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
        told = coremltools.utils.load_spec(str(path)).description
        self.inputs, self.outputs, self.states = (
            [declared(feature) for feature in side]
            for side in (told.input, told.output, told.state)
        )

    def predict(self, feed: Mapping[str, np.ndarray], state: Any = None) -> Arrays:
        """Return the outputs by name."""
        given = dict(feed)  # coremltools widens float16 in the dictionary that it gets
        found: Arrays = self.model.predict(given, **({} if state is None else {"state": state}))
        return found

    def new_state(self) -> Any:
        """Return what Core ML keeps between steps."""
        return self.model.make_state()

    def copy_state(self, source: Any, target: Any) -> None:
        """Make one state what the other is."""
        for spec in self.states:
            target.write_state(spec.name, source.read_state(spec.name))


CODES = {65552: "float16", 65568: "float32", 131104: "int32"}
"""Core ML's number of a type -> its name."""


def declared(feature: Any) -> Tensor:
    """Return what a package's description says of an input, an output or a state."""
    kind = feature.type.WhichOneof("Type")
    array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
    return Tensor(feature.name, list(array.shape), CODES.get(array.dataType, str(array.dataType)))
