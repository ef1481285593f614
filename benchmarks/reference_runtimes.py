"""Reference runtimes: run artifacts of every layout as their own tools run them.

ONNX graphs run in plain onnxruntime; Core ML packages run in Core ML on a Mac and in the
interpreter of export/coreml elsewhere.

Each class has what the gate needs: `window_samples`, `window(pcm)` for the greedy tokens,
`text(tokens)` for their text and, if the layout returns intermediate results unchanged,
`parts(pcm, tokens)`.

As a program (`python -m benchmarks.reference_runtimes ARTIFACT CLIPS`) it does for these layouts
what the runner's `check` does for the native one. The last line of stdout is JSON with tokens and
texts, or with an error and a hint. The process has a memory limit.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.metadata import folder_bytes
from devices.runner.__main__ import SPARE_BYTES
from devices.runner.artifact.tensors import ONE_EXPORT, check_session
from devices.runner.audio import read_wav
from devices.runner.decode.greedy import Filter, greedy
from devices.runner.decode.rules import Rules
from devices.runner.decode.text import read_tokens, to_text
from devices.runner.engines.coreml import Opener, checked, installed, typed
from devices.runner.engines.sessions import open_session, session_options
from devices.runner.interfaces import Logits
from devices.runner.machine.host import limit_memory, usable_cores, versions
from devices.runner.measure.bench import read_clips
from devices.runner.measure.check import WindowDecoder, said
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from export import layouts
from export.artifact import AGAIN, checked_manifest, read_manifest
from export.layouts import graph_files
from export.problem import Problem


def open_artifact(
    folder: Path, threads: int | None = None, manifest: dict[str, Any] | None = None
) -> WindowDecoder:
    """Open an artifact of any layout in its reference runtime. A `manifest` is used instead of the
    folder's manifest.json, which an export writes last."""
    manifest = read_manifest(folder) if manifest is None else checked_manifest(folder, manifest)
    layout = manifest.get("layout", "native")
    if layouts.LAYOUTS[layout].runtime == layouts.RUNNER:
        return recognizer(folder, threads, guards=False, manifest=manifest)
    return LAYOUTS[layout](folder, manifest, threads)


def recognizer(
    folder: Path,
    threads: int | None,
    guards: bool = True,
    compute_units: str | None = None,
    manifest: dict[str, Any] | None = None,
) -> Recognizer:
    """Return the runner's recognizer; without Core ML, packages run in the interpreter."""
    return Recognizer(
        folder,
        threads,
        guards,
        compute_units=compute_units,
        open_package=None if has_core_ml() else opener(threads),
        manifest=manifest,
    )


def has_core_ml() -> bool:
    return platform.system() == "Darwin"


def opener(threads: int | None) -> Opener:
    """Return the function that opens Core ML packages on this system."""
    return installed("all") if has_core_ml() else partial(InterpretedPackage, threads=threads)


class Encoder:
    """whisper.cpp's Core ML encoder, which maps log-mel features to encoder states."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None = None) -> None:
        from transformers import WhisperFeatureExtractor

        (name,) = graph_files(manifest["layout"], manifest["precision"])
        self.path, contract = Path(folder) / f"{name}.mlpackage", manifest["contract"][name]
        audio = manifest["audio"]
        self.window_samples: int = audio["window_samples"]
        with blamed(self.path):
            self.package = checked(opener(threads), self.path, contract)
            self.extractor = WhisperFeatureExtractor(
                feature_size=contract["inputs"][0]["shape"][1],
                chunk_length=self.window_samples // audio["sampling_rate"],
            )

    def states(self, pcm: np.ndarray) -> np.ndarray:
        """Return the encoder states (d_model, positions) of a window."""
        with blamed(self.path):
            mel = log_mel(self.extractor, pcm)
            (states,) = self.package.predict(typed(self.package, mel)).values()
            transposed: np.ndarray = states[0].T.astype(np.float32)
            return transposed

    def some_states(self, pcm: np.ndarray) -> list[float]:
        """Return SAMPLED_STATES evenly spread states of the first window."""
        states = self.states(pcm[: self.window_samples]).ravel()
        places = np.linspace(0, len(states) - 1, SAMPLED_STATES).round().astype(int)
        return [float(x) for x in states[places]]


SAMPLED_STATES = 16


class InterpretedPackage:
    """A Core ML package in the interpreter of export/coreml."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import torch

        from export.coreml.interpreter import open_package

        torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
        program = open_package(path)
        self.inputs, self.outputs, self.states = program.inputs, program.outputs, program.states
        self.predict, self.new_state = program.predict, program.new_state

    def copy_state(self, source: dict[str, Any], target: dict[str, Any]) -> None:
        target.update({name: value.clone() for name, value in source.items()})


class _OnnxRuntime:
    """Sessions for an artifact's graphs, and the decoding rules of its manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.rules = Rules.from_manifest(manifest["decoding"])
        self.window_samples: int = manifest["audio"]["window_samples"]
        files = graph_files(manifest["layout"], manifest["precision"])
        self.paths = [self.folder / name for name in files.values()]
        # the tools of these layouts do not request exact int8 products
        options = session_options(threads, exact=False)
        self.sessions = [open_session(path, options) for path in self.paths]
        for name, path, session in zip(files, self.paths, self.sessions, strict=True):
            check_session(path, session, manifest["contract"][name])


class TransformersRuntime(_OnnxRuntime):
    """The layout of optimum and transformers.js.

    `window` uses the merged decoder, `logits` the two separate ones; both must agree. The empty
    past of the first step has the shape that optimum derives from config.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

        super().__init__(folder, manifest, threads)
        self.encoder, self.merged, self.first, self.later = self.sessions
        with blamed(self.folder / "config.json"):
            config = WhisperConfig.from_pretrained(folder)
            heads, layers = config.num_attention_heads, config.decoder_layers
            self.no_past = np.zeros((1, heads, 0, config.d_model // heads), np.float32)
            if (count := len(self.later.get_outputs()) // 2) != layers:
                raise ValueError(f"it has {layers} decoder layers, the graphs have {count}")
        with blamed(self.folder / "preprocessor_config.json"):
            self.extractor = WhisperFeatureExtractor.from_pretrained(folder)
        with blamed(self.folder / "tokenizer.json"):
            self.tokenizer = WhisperTokenizer.from_pretrained(folder)

    def window(self, pcm: np.ndarray) -> list[int]:
        step = self.steps(pcm, merged=True)
        with blamed(self.paths[1]):
            tokens = greedy(step, self.rules, stop_loops=False)
        self._check_unmerged(pcm, tokens)
        return tokens

    def _check_unmerged(self, pcm: np.ndarray, tokens: list[int]) -> None:
        """Raise RunnerProblem if the separate decoders choose other tokens in more than half of the
        steps; rounding may decide between equally likely tokens."""
        likeliest, expected = Filter(self.rules).likeliest, [*tokens, self.rules.eos]
        rows = enumerate(self.logits(pcm, tokens))
        actual = [likeliest(row, tokens[:place]) for place, row in rows]
        wrong = sum(a != b for a, b in zip(actual, expected, strict=True))
        if 2 * wrong > len(expected):
            raise RunnerProblem(
                f"{self.paths[2]}: it and {self.paths[3].name} choose other tokens than "
                f"{self.paths[1].name}, {wrong} of {len(expected)}",
                ONE_EXPORT,
            )

    def logits(self, pcm: np.ndarray, tokens: Sequence[int]) -> Logits:
        step = self.steps(pcm, merged=False)
        fed = [self.rules.prompt, *((token,) for token in tokens)]
        with blamed(self.paths[3]):
            return np.stack([step(ids) for ids in fed])

    def parts(self, pcm: np.ndarray, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        return {"logits": self.logits(pcm, tokens)}

    def text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def steps(self, pcm: np.ndarray, merged: bool) -> Callable[[Sequence[int]], Logits]:
        with blamed(self.folder / "preprocessor_config.json"):
            features = log_mel(self.extractor, pcm)
        with blamed(self.paths[0]):
            states = self.encoder.run(None, {"input_features": features})[0]
        cache: dict[str, np.ndarray] = {}

        def step(ids: Sequence[int]) -> Logits:
            session = self.merged if merged else self.later if cache else self.first
            known = {
                "input_ids": np.array([ids], np.int64),
                "encoder_hidden_states": states,
                "use_cache_branch": np.array([bool(cache)]),
            }
            names = [spec.name for spec in session.get_inputs()]
            feed = {n: known[n] if n in known else cache.get(n, self.no_past) for n in names}
            names = [spec.name for spec in session.get_outputs()]
            outputs = dict(zip(names, session.run(None, feed), strict=True))
            for name, array in outputs.items():
                past = name.replace("present", "past_key_values")
                if name != "logits" and not (past in cache and ".encoder." in past):
                    cache[past] = array
            return outputs["logits"][0, -1]

        return step


class Sherpa(_OnnxRuntime):
    """The layout of sherpa-onnx.

    The encoder gets the clip's frames followed by zeros, the caches of all layers are one array,
    and decoding is greedy. The decoding rules are part of the graph, so the logits differ from the
    model's and there is no `parts`.
    """

    TAIL = 1000
    """Frames of zeros that sherpa-onnx appends to every clip."""
    REQUIRED = (
        *("n_mels", "n_text_layer", "n_text_ctx", "n_text_state", "n_vocab", "sot", "eot"),
        *("blank_id", "translate", "transcribe", "is_multilingual", "no_timestamps", "no_speech"),
        *("sot_sequence", "all_language_tokens", "all_language_codes"),
    )
    """Metadata without which sherpa-onnx exits."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        from transformers import WhisperFeatureExtractor

        super().__init__(folder, manifest, threads)
        self.encoder, self.decoder = self.sessions
        with blamed(self.paths[0]):
            metadata = self.encoder.get_modelmeta().custom_metadata_map
            self._check(metadata)
            self.prompt = [int(i) for i in metadata["sot_sequence"].split(",")]
            self.prompt.append(int(metadata["no_timestamps"]))
            seconds = self.window_samples // manifest["audio"]["sampling_rate"]
            mels = int(metadata["n_mels"])
            self.extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)
        with blamed(self.folder / "whisper-tokens.txt"):
            lines = (self.folder / "whisper-tokens.txt").read_text(encoding="ascii").splitlines()
            rows = (line.split() for line in lines)
            self.table = {int(number): base64.b64decode(token) for token, number in rows}

    def _check(self, metadata: dict[str, str]) -> None:
        """Raise ValueError for missing metadata or a cache size that the decoder does not accept.

        sherpa-onnx exits the process in these cases.
        """
        if missing := [name for name in self.REQUIRED if name not in metadata]:
            raise ValueError(f"its metadata has no {', '.join(missing)}")
        sizes = [int(metadata[f"n_text_{size}"]) for size in ("layer", "ctx", "state")]
        layers, _, room, width = taken = self.decoder.get_inputs()[1].shape
        if sizes != [layers, room, width]:
            raise ValueError(f"its metadata gives a cache of {sizes}, the decoder takes {taken}")
        self.no_past = np.zeros((layers, 1, room, width), np.float32)

    def window(self, pcm: np.ndarray) -> list[int]:
        return self.decode(self.mel(pcm))

    def decode(self, mel: np.ndarray) -> list[int]:
        """Return the greedy tokens of log-mel frames (1, n_mels, n)."""
        step = self.steps(mel)
        rules = replace(self.rules, prompt=tuple(self.prompt))
        rules = replace(rules, suppress_tokens=(), begin_suppress_tokens=(), timestamp_begin=None)
        with blamed(self.paths[1]):
            return greedy(step, rules, stop_loops=False)

    def text(self, tokens: list[int]) -> str:
        joined = b"".join(self.table.get(token, b"") for token in tokens)
        return joined.decode("utf-8", errors="replace").strip()

    def mel(self, pcm: np.ndarray) -> np.ndarray:
        """Return the log-mel frames that overlap the clip, followed by TAIL frames of zeros."""
        whole = log_mel(self.extractor, pcm)
        frames = min(-(-(len(pcm) + self.extractor.n_fft // 2) // self.extractor.hop_length), 3000)
        tail = np.zeros((1, whole.shape[1], self.TAIL), np.float32)
        return np.concatenate([whole[..., :frames], tail], axis=2)

    def steps(self, mel: np.ndarray) -> Callable[[Sequence[int]], Logits]:
        with blamed(self.paths[0]):
            cross = self.encoder.run(None, {"mel": mel})
        own, fed = [self.no_past, self.no_past], 0
        names = [spec.name for spec in self.decoder.get_inputs()]

        def step(ids: Sequence[int]) -> Logits:
            nonlocal own, fed
            values = [np.array([ids], np.int64), *own, *cross, np.array([fed], np.int64)]
            logits, *own = self.decoder.run(None, dict(zip(names, values, strict=True)))
            fed += len(ids)
            return logits[0, -1]

        return step


class SingleGraphRuntime(_OnnxRuntime):
    """The layout of one graph that transcribes a window in one call."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        super().__init__(folder, manifest, threads)
        (self.session,) = self.sessions
        self.table = read_tokens(self.folder / "tokens.json")

    def window(self, pcm: np.ndarray) -> list[int]:
        feed = {
            "pcm": pcm[None].astype(np.float32),
            "prompt": np.array([self.rules.prompt], np.int64),
            "max_new_tokens": np.array(self.rules.max_new_tokens, np.int64),
        }
        with blamed(self.paths[0]):
            tokens: list[int] = self.session.run(None, feed)[0].tolist()
            return tokens

    def text(self, tokens: list[int]) -> str:
        return to_text(tokens, self.table)


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Raise RunnerProblem that names the file for any exception inside the block.

    Libraries raise exceptions of all kinds for files of unknown origin.
    """
    try:
        yield
    except (RunnerProblem, Problem):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise RunnerProblem(
            f"{path}: cannot be used ({type(error).__name__}: {reason})", AGAIN
        ) from error


def log_mel(extractor: Any, pcm: np.ndarray) -> np.ndarray:
    """Return the log-mel features (1, n_mels, frames) of a window."""
    features = extractor(pcm, sampling_rate=extractor.sampling_rate, return_tensors="np")
    return features.input_features.astype(np.float32)


LAYOUTS: dict[str, Callable[..., WindowDecoder]] = {
    "transformers": TransformersRuntime,
    "sherpa": Sherpa,
    "single": SingleGraphRuntime,
}


WHISPER = "transformers.models.whisper.processing_whisper"
LIBRARIES: dict[str, tuple[str, ...]] = {
    "native": (),
    "transformers": (WHISPER,),
    "sherpa": (WHISPER,),
    "single": (),
    "whisperkit": ("export.coreml.interpreter",),
    "encoder": (
        "export.coreml.interpreter",
        "transformers.models.whisper.feature_extraction_whisper",
    ),
}
"""Modules that each layout's runtime imports."""


def main(argv: list[str] | None = None) -> int:
    """Run an artifact on a JSON list of WAV files and print its answer.

    Libraries are imported before the memory limit is set, which applies to the artifact alone.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks.reference_runtimes", description="Run artifacts of other layouts."
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "clips",
        type=Path,
        nargs="?",
        help="without it, only list the operators of a Core ML artifact",
    )
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(argv)
    try:
        layout = read_manifest(given.artifact).get("layout", "native")
        for name in LIBRARIES[layout] if given.clips else ():
            import_module(name)
        limit_memory(SPARE_BYTES + 8 * folder_bytes(given.artifact))
        answer = answer_of(given.artifact, given.clips, given.threads)
    except (RunnerProblem, Problem) as error:
        answer = {"error": str(error), "hint": error.hint}
    print(json.dumps(answer, ensure_ascii=False))
    return int("error" in answer)


def answer_of(folder: Path, clips: Path | None, threads: int | None) -> dict[str, Any]:
    """Return an artifact's output for the clips; without clips, a Core ML artifact's operators."""
    manifest = read_manifest(folder)
    if clips is None:
        from export.coreml.contents import contents

        places = graph_files(manifest["layout"], manifest["precision"])
        return {"packages": {name: contents(folder / place) for name, place in places.items()}}
    if manifest.get("layout") == "encoder":
        encoder = Encoder(folder, manifest, threads)
        states = [encoder.some_states(read_wav(path)) for path in read_clips(clips)]
        return {"states": states, "versions": versions()}
    return said(open_artifact(folder, threads), clips)


if __name__ == "__main__":
    sys.exit(main())
