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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import nn

from export.artifact import write_manifest
from export.artifact_files import (
    Contract,
    Spec,
    check,
    described,
    manifest_of,
    save_beside,
    write_tokens,
)
from export.cost import macs_by_window
from export.onnx import graph as ops
from export.onnx.constants import LARGE, Weights, own_constants
from export.onnx.graph import PRECISIONS, Graph
from export.onnx.layouts import LAYOUTS
from export.onnx.runtimes import NATIVE, has_int8_cache, needed
from export.problem import Problem
from export.quantise import schemes
from export.shrink import windows_of
from export.weights import Floats, array, chain, chains, heads_of, outputs_of

KINDS = ("key", "value")
GraphParts = tuple[Graph, list[Spec], list[Spec]]
"""A graph, what goes in and what comes out."""
PROTOBUF_LIMIT = 2**31 - 2**20
"""A graph is one protobuf message of less than 2 GiB; a MiB is left for the nodes."""
SINUSOID_ERROR = {False: 1e-5, True: 2**-12}
"""Positions this close to Whisper's sinusoids are computed, not stored. A graph that would store
them as float16 would be off by as much."""


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
    if precision not in PRECISIONS:
        raise Problem(
            f"there is no precision {precision!r} for ONNX",
            hint=f"choose one of: {', '.join(PRECISIONS)}",
        )
    if layout not in LAYOUTS:
        raise Problem(
            f"there is no layout {layout!r} for ONNX", hint=f"choose one of: {', '.join(LAYOUTS)}"
        )
    check(model, processor)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    oldest = needed(layout, precision, runtime)
    write_layout = import_module(LAYOUTS[layout]).write
    if layout == NATIVE:
        write_layout = partial(write_layout, int8_cache=has_int8_cache(precision, runtime))
    contract = write_layout(model, processor, precision, out)
    told: dict[str, Any] = {"target": "onnx", "layout": layout, "precision": precision}
    told["runtime"] = {"onnxruntime": oldest}
    costs = macs_by_window(model)
    manifest = manifest_of(told, model, processor, costs, contract, provenance)
    write_manifest(out, manifest)
    return manifest


def write(
    model: nn.Module, processor: Any, precision: str, out: Path, int8_cache: bool = True
) -> Contract:
    """The native layout's files; returns what goes in and comes out of each graph."""
    encoder = encoder_graph(model, processor.feature_extractor, precision, int8_cache)
    decoder = decoder_graph(model, precision, int8_cache)
    contract = {
        "encoder": write_graph(encoder, out, "encoder", mapped=True),
        "decoder": write_graph(decoder, out, "decoder", mapped=True),
    }
    write_tokens(processor.tokenizer, model.config.vocab_size, out)
    save_beside(model, processor, out)
    return contract


def write_graph(
    made: GraphParts,
    folder: Path,
    name: str,
    suffix: str = "",
    last: Callable[[onnx.ModelProto], None] = lambda model: None,
    mapped: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Write one graph, changed by `last`; returns what goes in and comes out of it.

    Where it is to be `mapped`, large weights get a file of their own beside it, NAME.weights: the
    runtime maps that into memory, where it would copy what stands in the graph. Its int8 products
    share no constants, see constants.py.
    """
    graph, inputs, outputs = made
    model, path = graph.model(name, inputs, outputs), folder / f"{name}{suffix}.onnx"
    _check(model, path)
    last(model)
    if mapped:
        own_constants(model)
        with Weights(path.with_suffix(".weights"), LARGE) as weights:
            weights.take(model)
    onnx.save(model, path)
    return described(inputs, outputs)


# ---------------------------------------------------------------------------------------- graphs


def encoder_graph(
    model: nn.Module, extractor: Any, precision: str, int8_cache: bool = True
) -> GraphParts:
    """PCM to the cross-attention's keys and values of every decoder layer."""
    g = Graph(precision, schemes(model), int8_cache)
    encoder = model.model.encoder
    windows = windows_of(model.config)
    mel = ops.log_mel(g, "pcm", extractor, [2 * n for n in windows])
    with g.scope("stem"):
        x = _stem(g, mel, encoder, _positions(model))
    for i, layer in enumerate(encoder.layers):
        with g.scope(f"layers.{i}"):
            x = _encoder_layer(g, x, layer, windows)
    with g.scope("layer_norm"):
        x = _norm(g, x, encoder.layer_norm)
    outputs = []
    for i, layer in enumerate(model.model.decoder.layers):
        attention, heads = layer.encoder_attn, heads_of(layer.encoder_attn)
        dims = heads.qk_dim, heads.v_dim
        specs = _cross(model, i, g.int8_cache, heads.count)
        with g.scope(f"cross.{i}"):
            both = ops.apart(g, x, chains(g.schemes, attention, "kv"))
            made = [ops.encoder_cache(g, y, heads, dim) for y, dim in zip(both, dims, strict=True)]
        for value, spec in zip(sum(zip(*made, strict=True), ()), specs, strict=True):
            g.name(value, spec.name)
        outputs += specs
    one_window = isinstance(_positions(model), int)
    return g, [Spec("pcm", (1, extractor.n_samples if one_window else "samples"))], outputs


def _positions(model: nn.Module) -> int | str:
    """The encoder's positions; symbolic where the model has windows of several lengths."""
    windows = windows_of(model.config)
    return windows[0] if len(windows) == 1 else "positions"


def decoder_graph(model: nn.Module, precision: str, int8_cache: bool = True) -> GraphParts:
    """New tokens and the cache to the last token's logits and the longer cache."""
    g = Graph(precision, schemes(model), int8_cache)
    decoder = model.model.decoder
    with g.scope("look_up"):
        table = _token_table(g, decoder.embed_tokens)
    length = g.op("Cast", "past_length", to=TensorProto.INT64)
    end = g.op("Add", length, g.op("Shape", "input_ids", start=1, end=2))
    with g.scope("look_up"):
        positions = ops.float_table(g, array(decoder.embed_positions.weight))
        x = g.op("Add", table.look_up("input_ids"), g.op("Slice", positions, length, end))
    filled = g.op("Sub", g.op("Shape", "cross.0.key", start=2, end=3), g.constant([ops.SPARE]))
    places = Places(
        own=ops.ends(g, "input_ids", "past_length"),
        cross=ops.ends(g, "input_ids", g.op("Cast", filled, to=TensorProto.INT32)),
        unseen=ops.unseen(g, "input_ids", filled),
    )
    for i, layer in enumerate(decoder.layers):
        with g.scope(f"layers.{i}"):
            x = _decoder_layer(g, x, layer, i, places)
    with g.scope("logits"):
        last = g.op("Slice", x, g.constant([-1]), g.constant([2**31 - 1]), g.constant([1]))
        g.name(table.logits(_norm(g, last, decoder.layer_norm)), "logits")
    return g, *_decoder_contract(model, g.int8_cache)


def _token_table(g: Graph, table: nn.Module) -> ops.TokenTable | ops.FactorisedTable:
    if hasattr(table, "rows"):
        rows, basis = array(table.rows.weight), array(table.up.weight.T)
        return ops.FactorisedTable(g, rows, basis, g.schemes.get(table.rows))
    return ops.TokenTable(g, array(table.weight), g.schemes.get(table))


@dataclass(frozen=True)
class Places:
    """Where the new tokens stand among the cached ones, and behind the encoder's positions."""

    own: tuple[str, str]
    cross: tuple[str, str]
    unseen: str


def _decoder_contract(model: nn.Module, int8: bool) -> tuple[list[Spec], list[Spec]]:
    inputs = [Spec("input_ids", (1, "s"), "int64"), Spec("past_length", (1,), "int32")]
    outputs = [Spec("logits", (1, 1, model.config.vocab_size))]
    for i, layer in enumerate(model.model.decoder.layers):
        inputs += _cache(model, f"past.{i}", f"heads_dec_{i}", layer.self_attn)
        inputs += _cross(model, i, int8, f"heads_enc_{i}")
        outputs += _cache(model, f"present.{i}", heads_of(layer.self_attn).count, layer.self_attn)
        outputs += _cross(model, i, int8, heads_of(layer.encoder_attn).count, "heard")[:2]
    return inputs, outputs


def _cache(model: nn.Module, name: str, heads: int | str, attention: nn.Module) -> list[Spec]:
    shape = (1, heads, model.config.max_target_positions, heads_of(attention).cache_dim)
    return [Spec(f"{name}.{kind}", shape) for kind in KINDS]


def _cross(
    model: nn.Module, layer: int, int8: bool, heads: int | str, name: str = "cross"
) -> list[Spec]:
    """Keys and values of the encoder for one decoder layer, and their scales in an int8 graph."""
    attention = heads_of(model.model.decoder.layers[layer].encoder_attn)
    positions, width = _positions(model), attention.cache_dim
    room = positions + ops.SPARE if isinstance(positions, int) else "room"
    shape = (1, heads, room, width)
    specs = [Spec(f"{name}.{layer}.{kind}", shape, "int8" if int8 else "float32") for kind in KINDS]
    scales = [Spec(f"{name}.{layer}.{kind}_scale", (attention.count * width,)) for kind in KINDS]
    return specs + scales if int8 else specs


def _stem(g: Graph, mel: str, encoder: nn.Module, positions: int | str) -> str:
    """Two convolutions and the positions: (1, n_mels, frames) -> (1, frames / 2, d_model)."""
    x = mel
    for conv, stride in ((encoder.conv1, 1), (encoder.conv2, 2)):
        kernel = ops.widened(g, array(conv.weight), g.schemes.get(conv))
        bias = g.constant(array(conv.bias))
        x = ops.gelu(g, g.op("Conv", x, kernel, bias, pads=[1, 1], strides=[stride]))
    if isinstance(positions, str):
        length = g.op("Shape", x, start=2, end=3)
    else:  # a constant: the runtime computes the positions once, as it loads the graph
        length = g.constant([positions])
    here = _encoder_positions(g, array(encoder.embed_positions.weight), length)
    return g.op("Add", g.op("Transpose", x, perm=[0, 2, 1]), here)


def _encoder_positions(g: Graph, table: Floats, length: str) -> str:
    """The first `length` rows of the table, computed where they are Whisper's sinusoids."""
    rates = sinusoid_rates(table.shape[1])
    angles = np.arange(len(table), dtype=np.float32)[:, None] * rates
    wanted = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    error = SINUSOID_ERROR[g.halves]
    if wanted.shape == table.shape and np.abs(wanted - table).max() <= error:
        return ops.sinusoids(g, length, rates)
    return g.op("Slice", ops.float_table(g, table), g.constant([0]), length)


def sinusoid_rates(width: int) -> Floats:
    """Angle per position of every sine, (width / 2,): from 1 down to 1/10000, as Whisper rounds it.

    Bits matter: an angle is up to 1500 times as far off as its rate.
    """
    half = width // 2
    step = np.log(10000) / max(1, half - 1)
    return torch.exp(-step * torch.arange(half)).numpy()


def _encoder_layer(g: Graph, x: str, layer: nn.Module, windows: Sequence[int]) -> str:
    """One layer over one of the windows; hidden units are computed for a part of it at a time."""
    attention = layer.self_attn
    y = _norm(g, x, layer.self_attn_layer_norm)
    q, k, v = ops.apart(g, y, chains(g.schemes, attention, "qkv"))
    attend = ops.shared_attention if getattr(attention, "shared", False) else ops.self_attention
    y = attend(g, q, k, v, heads_of(attention))
    x = g.op("Add", x, _attention_output(g, y, attention))
    pieces = ops.pieces_of(outputs_of(layer.fc1), windows)
    return ops.in_pieces(g, x, pieces, lambda piece: _feed_forward(g, piece, layer))


def _decoder_layer(g: Graph, x: str, layer: nn.Module, number: int, places: Places) -> str:
    attention = layer.self_attn
    y = _norm(g, x, layer.self_attn_layer_norm)
    past, present = ([f"{time}.{number}.{kind}" for kind in KINDS] for time in ("past", "present"))
    qkv = ops.parallel(g, y, chains(g.schemes, attention, "qkv"))
    y = ops.cached_attention(g, qkv, past, present, places.own, heads_of(attention))
    x = g.op("Add", x, _attention_output(g, y, attention))

    with g.scope("encoder_attn"):
        x = _cross_attention(g, x, layer, number, places)
    return _feed_forward(g, x, layer, gather=True)


def _cross_attention(g: Graph, x: str, layer: nn.Module, number: int, places: Places) -> str:
    attention = layer.encoder_attn
    y = _norm(g, x, layer.encoder_attn_layer_norm)
    q = ops.linear(g, y, chain(g.schemes, attention.q_proj, layer.embed_dim), gather=True)
    kinds = (*KINDS, *(f"{kind}_scale" for kind in KINDS)) if g.int8_cache else KINDS
    cross = [f"cross.{number}.{kind}" for kind in kinds]
    heard = [f"heard.{number}.{kind}" for kind in KINDS]
    y = ops.cross_attention(g, q, cross, heard, places.cross, heads_of(attention), places.unseen)
    return g.op("Add", x, _attention_output(g, y, attention))


def _feed_forward(g: Graph, x: str, layer: nn.Module, gather: bool = False) -> str:
    with g.scope("feed_forward"):
        y = _norm(g, x, layer.final_layer_norm)
        y = ops.gelu(g, ops.linear(g, y, chain(g.schemes, layer.fc1, layer.embed_dim), gather))
        second = chain(g.schemes, layer.fc2, outputs_of(layer.fc1))
        y = ops.linear(g, y, second, gather) if gather else ops.by_rows(g, y, second)
        return g.op("Add", x, y)


def _norm(g: Graph, x: str, norm: nn.Module) -> str:
    return ops.layer_norm(g, x, array(norm.weight), array(norm.bias), norm.eps)


def _attention_output(g: Graph, x: str, attention: nn.Module) -> str:
    heads = heads_of(attention)
    return ops.linear(g, x, chain(g.schemes, attention.out_proj, heads.count * heads.v_dim))


def _check(graph: onnx.ModelProto, path: Path) -> None:
    size = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if size > PROTOBUF_LIMIT:
        raise Problem(
            f"{path.name} would take {size / 1e9:.1f} GB; one ONNX file holds less than 2.1 GB",
            hint="export with --precision int8",
        )
    onnx.checker.check_model(graph)
