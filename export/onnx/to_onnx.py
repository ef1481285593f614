"""Whisper as two ONNX graphs in our native layout, built from the weights.

    encoder.onnx   pcm (1, samples) float32, 16 kHz
                   -> cross.{i}.key/value (1, heads, T + 32, width)
    decoder.onnx   input_ids (1, s) int64, s <= 32, past_length (1,) int32,
                   past.{i}.key/value (1, heads, room, width), cross.{i}.*
                   -> logits (1, 1, vocab) of the last position,
                      present.{i}.key/value, heard.{i}.key/value

`i` counts decoder layers. `samples` is one of the manifest's `windows_samples`, and T the encoder
positions of that window: one graph serves them all. Where the model has one window only, both are
numbers. Keys and values stand in buffers with room for all positions, `past_length` says how many
of them are filled. A caller binds one buffer as past.{i} and as present.{i}, and another one as
cross.{i} and as heard.{i}: then nothing is copied between steps (bound apart, they are copied, and
the results are the same). Widths of heads are rounded up to a multiple of 8. In int8 the encoder's
keys and values are int8 as well, and cross.{i}.key_scale and value_scale (heads * width,) belong to
them: reading them is a large part of a step's work. Head axes of the inputs are symbolic, those of
the outputs static. Beside the graphs stands all that inference needs
without a tokenizer library: tokens.json, and the prompt and the rules of decoding in manifest.json;
the Hugging Face files are there for tools that want them. Weights of a mebibyte and more stand in
files of their own, encoder.weights and decoder.weights, which the runtime maps.

fp32 keeps every weight as it is; fp16 stores matrices and tables as float16, which the runtime
widens as it loads them. int8 quantises every matrix of the blocks per output channel and the tied
token table per token (its factors per row), with dynamic activations; the convolution stem and the
decoder's positions are float16 on disk and float32 at work; biases and norms stay float32. int4 is
int8 but for the matrices of the blocks: 4 bits, a scale for 32 inputs. The encoder's positions are
computed where they are the sinusoids that Whisper fixes. Where the checkpoint names bits for a
layer, the table or the stem (see quantise.py), int8 and int4 follow it: 4 bits in blocks, 8, 16
(float32 at work) or 32. Nothing is stored twice. On x86 without VNNI, onnxruntime's int8 products
saturate unless the session asks for exact ones, see constants.py.

The front end is part of the encoder: its output is the tensor `log_mel` (1, n_mels, frames), and
the names of its nodes begin with `log_mel/`. Those of the other parts begin with `stem/`,
`layers.{i}/`, `cross.{i}/`, `look_up/` and `logits/`, and in a layer go on with `feed_forward/` or
`encoder_attn/`; all else there is self-attention. To tell their times, run a graph with profiling
on (SessionOptions.enable_profiling) and add up the `dur` of the events whose name
begins with `log_mel/`: onnxruntime computes a whole graph whatever outputs are asked for.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from export.artifact import write_manifest
from export.checks import check, check_choice
from export.cost import macs_by_window
from export.layouts import NATIVE, TARGETS, layouts_of
from export.manifest import manifest_of
from export.onnx.runtimes import has_int8_cache, needed


def export_onnx(
    model: nn.Module,
    processor: Any,
    out: Path,
    precision: str = "int8",
    provenance: dict[str, Any] | None = None,
    layout: str = "native",
    runtime: str | None = None,
) -> dict[str, Any]:
    """Write an artifact into the empty directory `out`; returns its manifest, gate still null.

    `model` is a Whisper, dense or slim, `processor` its WhisperProcessor, `provenance` the
    checkpoint's compression.json. The caller gates the artifact and writes the manifest again.
    `runtime` is the oldest onnxruntime that is to run it, see runtimes.py. Raises Problem: unknown
    precision or runtime, a model or a feature extractor that the graphs would not
    follow, a prompt that the generation config cannot give, a graph beyond protobuf's 2 GiB.
    """
    check_choice("precision", precision, TARGETS["onnx"].precisions, "ONNX")
    check_choice("layout", layout, layouts_of("onnx"), "ONNX")
    check(model, processor)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    oldest = needed(layout, precision, runtime)
    write_layout = import_module(f"export.onnx.layouts.{layout}").write
    if layout == NATIVE:
        write_layout = partial(write_layout, int8_cache=has_int8_cache(precision, runtime))
    contract = write_layout(model, processor, precision, out)
    told: dict[str, Any] = {"target": "onnx", "layout": layout, "precision": precision}
    told["runtime"] = {"onnxruntime": oldest}
    costs = macs_by_window(model)
    manifest = manifest_of(told, model, processor, costs, contract, provenance)
    write_manifest(out, manifest)
    return manifest
