"""Core ML artifacts: what export says of one, what it is made of, and how the gate hears an encoder
without a decoder."""

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
from devices.runner.decode.rules import Logits, Rules, greedy
from devices.runner.engines.coreml import CACHES

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

READING_S = 600.0


def chosen(manifest: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """What was decided where nothing was asked for, and what it comes to; line by line."""
    told = manifest["coreml"]
    why = "as asked" if options.get("deployment_target") else reason(manifest)
    yield (
        f"deployment target {told['deployment_target']}, specification "
        f"{told['specification_version']}: {why}"
    )
    for name in manifest["contract"]:
        weights = told["weights"].get(name) or {"float32": None}
        size = package_bytes(manifest, name) / 1e6
        yield f"{name:16} {size:8.2f} MB   weights in {listed(weights)}"
    if manifest["layout"] == "encoder":
        yield (
            "on a Mac, `xcrun coremlcompiler compile coreml-encoder.mlpackage .` compiles it; "
            "whisper.cpp looks for it as ggml-NAME-encoder.mlmodelc beside ggml-NAME.bin"
        )
    elif told["word_timestamps"]:
        yield "TextDecoder: gives the alignment heads' weights, so WhisperKit can time words"
    yield from told["said"]


def reason(manifest: dict[str, Any]) -> str:
    """Why no older deployment target will do."""
    if manifest["coreml"]["deployment_target"] != "iOS18":
        return "the oldest that will do, macOS 13 likewise"
    stateful = manifest["coreml"]["stateful"]
    needs = [*(["a cache in the package"] if stateful else []), *uses_blocks(manifest)]
    return f"the oldest that has {' and '.join(needs)}, macOS 15 likewise"


def uses_blocks(manifest: dict[str, Any]) -> list[str]:
    stored = manifest["coreml"]["weights"].values()
    return ["4-bit weights in blocks"] if any("int4" in forms for forms in stored) else []


def listed(weights: dict[str, int | None]) -> str:
    """int8 812,544 and float16 45,193: numbers in each form."""
    both = (form if count is None else f"{form} {count:,}" for form, count in weights.items())
    return " and ".join(both)


def package_bytes(manifest: dict[str, Any], name: str) -> int:
    files = manifest["files"].items()
    return sum(entry["bytes"] for file, entry in files if file.startswith(f"{name}.mlpackage/"))


def read_packages(folder: Path) -> dict[str, dict[str, Any]]:
    """What each package of an artifact is made of (export/coreml/contents.py), read in a process
    under a limit of memory: the reader of the format is not ours."""
    with LocalDevice() as device:
        words = [str(folder.resolve())]
        answer = run_runner(device, words, "benchmarks.reference_runtimes", OURS, READING_S)
    found: dict[str, dict[str, Any]] = answer["packages"]
    return found


def packed_caches(
    model: WhisperForConditionalGeneration, manifest: dict[str, Any]
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What lays a checkpoint's caches out as those of a package, which may have zeros between."""
    from export.coreml.to_coreml import cache_channels

    channels = cache_channels(model, bool((manifest.get("coreml") or {}).get("neural_engine")))

    def packed(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        laid = {}
        for name, places in zip(CACHES, channels, strict=True):
            laid[name] = np.zeros((max(places) + 1, found[name].shape[1]), np.float32)
            laid[name][places] = found[name]
        return laid

    return packed


class OwnDecoder:
    """As whisper.cpp has it: the package encodes, the checkpoint's own decoder writes. What it
    writes of the package's states is judged as any artifact's text."""

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
            found: Logits = output.logits[0, -1].float().numpy()
            return found

        return greedy(step, self.rules, stop_loops=False)

    def text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def parts(self, pcm: np.ndarray, tokens: list[int]) -> dict[str, np.ndarray]:
        return {"states": self.encoder.states(pcm)}
