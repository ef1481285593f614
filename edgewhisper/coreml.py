"""Core ML artifacts: their summary after export, their contents, and decoding for the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.program import OURS
from benchmarks.reference_runtimes import Encoder
from devices.device import run_runner
from devices.local import LocalDevice
from devices.runner.decode.greedy import greedy
from devices.runner.decode.rules import Rules
from devices.runner.engines.coreml import CACHES
from devices.runner.interfaces import Logits

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

READING_S = 600.0
"""Time limit for reading the packages of an artifact, in seconds."""


def chosen(manifest: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the export's summary: the deployment target with its reason, and sizes."""
    record = manifest["coreml"]
    why = "as requested" if options.get("deployment_target") else reason(manifest)
    yield (
        f"deployment target {record['deployment_target']}, specification "
        f"{record['specification_version']}: {why}"
    )
    for name in manifest["contract"]:
        weights = record["weights"].get(name) or {"float32": None}
        size = package_bytes(manifest, name) / 1e6
        yield f"{name:16} {size:8.2f} MB   weights in {listed(weights)}"
    if manifest["layout"] == "encoder":
        yield (
            "on a Mac, `xcrun coremlcompiler compile coreml-encoder.mlpackage .` compiles it; "
            "whisper.cpp loads it as ggml-NAME-encoder.mlmodelc from the folder of ggml-NAME.bin"
        )
    elif record["word_timestamps"]:
        yield "TextDecoder: outputs the alignment heads' weights, for word timestamps in WhisperKit"
    yield from record["said"]


def reason(manifest: dict[str, Any]) -> str:
    """Return why an older deployment target is not possible."""
    if manifest["coreml"]["deployment_target"] != "iOS18":
        return "the oldest that is supported, equal to macOS 13"
    stateful = manifest["coreml"]["stateful"]
    needs = [*(["a cache in the package"] if stateful else []), *uses_blocks(manifest)]
    return f"the oldest that has {' and '.join(needs)}, equal to macOS 15"


def uses_blocks(manifest: dict[str, Any]) -> list[str]:
    stored = manifest["coreml"]["weights"].values()
    return ["4-bit weights in blocks"] if any("int4" in forms for forms in stored) else []


def listed(weights: dict[str, int | None]) -> str:
    """Format the number of weights of each type: "int8 812,544 and float16 45,193"."""
    both = (form if count is None else f"{form} {count:,}" for form, count in weights.items())
    return " and ".join(both)


def package_bytes(manifest: dict[str, Any], name: str) -> int:
    files = manifest["files"].items()
    return sum(entry["bytes"] for file, entry in files if file.startswith(f"{name}.mlpackage/"))


def read_packages(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the contents of each package of an artifact (see export/coreml/contents.py). They are
    read in a separate process with a memory limit, because coremltools parses the files."""
    with LocalDevice() as device:
        words = [str(folder.resolve())]
        answer = run_runner(device, words, "benchmarks.reference_runtimes", OURS, READING_S)
    packages: dict[str, dict[str, Any]] = answer["packages"]
    return packages


def cache_packer(
    model: WhisperForConditionalGeneration, manifest: dict[str, Any]
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return a function that arranges a checkpoint's caches as in a package. The caches of a
    package may have unused channels, which are zero."""
    from export.coreml.decoder import cache_channels

    channels = cache_channels(model, bool((manifest.get("coreml") or {}).get("neural_engine")))

    def packed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        caches = {}
        for name, places in zip(CACHES, channels, strict=True):
            caches[name] = np.zeros((max(places) + 1, tensors[name].shape[1]), np.float32)
            caches[name][places] = tensors[name]
        return caches

    return packed


class CheckpointDecoder:
    """The encoder of a package with the checkpoint's decoder, as whisper.cpp combines them. The
    gate compares its tokens as those of any other artifact."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
    ) -> None:
        self.encoder, self.model = Encoder(folder, manifest), model
        self.tokenizer = processor.tokenizer
        self.rules = Rules.from_manifest(manifest["decoding"])
        self.window_samples: int = manifest["audio"]["window_samples"]

    def window(self, pcm: np.ndarray) -> list[int]:
        states = torch.from_numpy(self.encoder.states(pcm).T.copy())[None]
        fed: list[int] = []

        @torch.no_grad()
        def step(ids: Sequence[int]) -> Logits:
            fed.extend(ids)
            output = self.model(encoder_outputs=(states,), decoder_input_ids=torch.tensor([fed]))
            logits: Logits = output.logits[0, -1].float().numpy()
            return logits

        return greedy(step, self.rules, stop_loops=False)

    def text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def parts(self, pcm: np.ndarray, tokens: list[int]) -> dict[str, np.ndarray]:
        return {"states": self.encoder.states(pcm)}
