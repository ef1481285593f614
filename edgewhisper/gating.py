"""The gate of `export`: compare the text of a finished artifact with its checkpoint's.

The comparison and its limits are in benchmarks/gate.py. This module runs the checkpoint in torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speech.clips import Clip
from edgewhisper import decoding
from edgewhisper.job import Say
from edgewhisper.progress import progress_bar
from export.layouts import LAYOUTS
from export.prompt import language_code, prompt_ids

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.gate import Parts

BY_CLIP = tuple(name for name, layout in LAYOUTS.items() if layout.prompts_by_clip)
"""Layouts that prompt each clip for its own language. The others have one fixed prompt."""
SATURATES = (
    "onnxruntime's int8 products saturate on this processor (x86 without VNNI). This lowers the "
    "accuracy here, but not on ARM and newer x86 processors: export there, or use --layout "
    "native, whose products are exact everywhere"
)


@dataclass(frozen=True)
class Gating:
    """How an export is compared with its checkpoint."""

    mode: str = "fail"
    """fail: a failed gate ends the export; warn: the manifest records the failure; off: nothing is
    compared."""
    most_clips: int | None = None
    """Maximum number of clips, chosen evenly. None: benchmarks.gate.MOST_CLIPS."""

    def chosen(self, clips: Sequence[Clip]) -> list[Clip]:
        """Return the clips that are compared."""
        from benchmarks.gate import MOST_CLIPS, evenly

        return evenly(clips, self.most_clips or MOST_CLIPS)


def gated(
    folder: Path,
    manifest: dict[str, Any],
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    gating: Gating,
    say: Say,
) -> dict[str, Any]:
    """Run the gate as `gating` asks and return its record for the manifest.

    Raises GateFailure if the gate fails and `gating.mode` is "fail".
    """
    from benchmarks.gate import FAILED, NOT_RUN, PASSED, GateFailure, compared
    from devices.runner.engines.sessions import saturates

    if gating.mode == "off":
        say("the gate was not run (--gate off)")
        return {"result": NOT_RUN}
    chosen = gating.chosen(clips)
    counts = {"clips": len(chosen), "clips_available": len(clips)}
    started = time.monotonic()
    try:
        figures = gate(folder, manifest, model, processor, chosen)
    except GateFailure as failure:
        # only the native layout asks for exact products: devices/runner/engines/sessions.py
        inexact = manifest.get("target", "onnx") == "onnx" and manifest.get("layout") != "native"
        if manifest["precision"] == "int8" and inexact and saturates():
            failure.hint = f"{SATURATES}; {failure.hint}"
        if gating.mode != "warn":
            raise
        say(f"gate FAILED, and the artifact is kept (--gate warn): {failure}\n{failure.hint}")
        return counts | (failure.figures or {}) | {"result": FAILED, "error": str(failure)}
    say(
        f"gate passed on {len(chosen)} of {len(clips)} clips: {figures['identical_tokens']:.0%} of "
        f"them with identical tokens; {compared(figures)}; normalizer {figures['normalizer']}; "
        f"{time.monotonic() - started:.0f} s"
    )
    return counts | figures | {"result": PASSED}


def gate(
    folder: Path,
    manifest: dict[str, Any],
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
) -> dict[str, Any]:
    """Return the gate's figures of an artifact, see benchmarks/gate.py. Raises GateFailure."""
    from benchmarks.gate import bounds_for, checkpoint_tokens, judge, refuse_foreign, with_states
    from benchmarks.reference_runtimes import open_artifact
    from devices.runner.decode.text import join
    from edgewhisper.coreml import CheckpointDecoder

    layout = manifest.get("layout", "native")
    languages = [language_code(clip.lang) if layout in BY_CLIP else None for clip in clips]
    window_samples = manifest["audio"]["window_samples"]
    tokens = partial(decoding.greedy, model, processor)
    with progress_bar(len(clips), "gate: checkpoint") as progress:
        reference = checkpoint_tokens(tokens, clips, window_samples, languages, progress)
    decode = partial(processor.tokenizer.batch_decode, skip_special_tokens=True)
    refuse_foreign(clips, [join([text.strip() for text in decode(clip)]) for clip in reference])
    artifact = (
        CheckpointDecoder(folder, manifest, model, processor)
        if layout == "encoder"
        else open_artifact(folder, manifest=manifest)
    )
    bounds = bounds_for(manifest.get("target", "onnx"), manifest["precision"])
    parts = torch_parts(model, processor, manifest)
    with progress_bar(len(clips), "gate: artifact") as progress:
        figures = judge(artifact, reference, clips, bounds, parts, languages, progress)
    if isinstance(artifact, CheckpointDecoder):
        return with_states(figures, artifact.encoder, clips)
    return figures


def torch_parts(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, manifest: dict[str, Any]
) -> Parts:
    """Return a function from (pcm, tokens, language) to the checkpoint's intermediate tensors.

    The tensors are those of decoding.parts, with caches in the layout of the artifact. "logits" are
    (tokens + 1, vocab): before each token and after the last.
    """
    from edgewhisper.coreml import cache_packer

    packed = cache_packer(model, manifest)

    def parts(
        pcm: np.ndarray, tokens: list[int], language: str | None = None
    ) -> dict[str, np.ndarray]:
        prompt = prompt_ids(model.generation_config, language)
        tensors = decoding.parts(model, processor, pcm, [*prompt, *tokens])
        return tensors | {"logits": tensors["logits"][len(prompt) - 1 :]} | packed(tensors)

    return parts
