"""Write a Whisper as an ONNX artifact, in any layout of export/layouts.py."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from export.artifact import Gate, write_manifest
from export.checks import check, check_choice
from export.cost import macs, macs_by_window
from export.layouts import NATIVE, TARGETS, layouts_of
from export.manifest import manifest_of
from export.onnx.layouts.native import alignment
from export.onnx.runtimes import has_int8_cache, needed
from export.onnx.silence import silence_of
from export.onnx.two_stage import facts
from export.weights import Floats


def export_onnx(
    model: nn.Module,
    processor: Any,
    out: Path,
    precision: str = "int8",
    provenance: dict[str, Any] | None = None,
    layout: str = "native",
    runtime: str | None = None,
    moment: Floats | None = None,
    silence_stride: int = 1,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Write an artifact into the empty folder `out` and return its manifest.

    `model` is a Whisper, dense or slim, `processor` its WhisperProcessor, and `provenance` the
    checkpoint's compression.json. `runtime` is the oldest onnxruntime that has to run the artifact;
    see runtimes.py. `moment` is the second moment (d_model, d_model) of the decoder's last hidden
    states. With it, logits are computed in two stages; the model must pass two_stage.suits(). With
    a `silence_stride` above 1, only every so many encoder positions of the silence after a clip are
    computed; see silence.py. The manifest is written last, after `gate`.

    Raises Problem for an unknown precision, layout or runtime, for a model or feature extractor
    that the graphs cannot represent, for a prompt that the generation config cannot give, for a
    graph beyond protobuf's 2 GiB, and for a silence stride with another layout or with windows of
    several lengths.
    """
    check_choice("precision", precision, TARGETS["onnx"].precisions, "ONNX")
    check_choice("layout", layout, layouts_of("onnx"), "ONNX")
    check(model, processor)
    silence = silence_of(model, layout, silence_stride)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    oldest = needed(layout, precision, runtime)
    write_layout = import_module(f".layouts.{layout}", __package__).write
    if layout == NATIVE:
        int8_cache = has_int8_cache(precision, runtime)
        write_layout = partial(write_layout, int8_cache=int8_cache, moment=moment, silence=silence)
    contract = write_layout(model, processor, precision, out)
    header: dict[str, Any] = {"target": "onnx", "layout": layout, "precision": precision}
    header["runtime"] = {"onnxruntime": oldest}
    if moment is not None:
        header["logits"] = facts(model)
    costs = macs_by_window(model)
    if silence is not None:
        header["silence"] = silence._asdict()
        costs = {str(n): macs(model, positions=silence.positions(n)) for n in silence.windows}
    manifest = manifest_of(header, model, processor, costs, contract, provenance)
    if layout == NATIVE:
        manifest["decoding"]["alignment"] = alignment(model)
    write_manifest(out, manifest, gate)
    return manifest
