"""The layout of Hugging Face's runtimes: optimum's ORTModelForSpeechSeq2Seq and transformers.js.

    onnx/encoder_model{S}.onnx            input_features (b, n_mels, frames)
                                          -> last_hidden_state (b, T, d_model)
    onnx/decoder_model_merged{S}.onnx     input_ids (b, s), encoder_hidden_states,
                                          past_key_values.{i}.{decoder|encoder}.{key|value},
                                          use_cache_branch (1,) bool -> logits (b, s, vocab),
                                          present.{i}.{decoder|encoder}.{key|value}
    onnx/decoder_model{S}.onnx            the same without a past
    onnx/decoder_with_past_model{S}.onnx  the same with a past, without encoder_hidden_states
    onnx/decoder_model_merged{S}.onnx_data   the weights of all three decoders, stored once

S is empty in fp32, `_quantized` in int8, `_fp16` in fp16 and `_q4` in int4, as in transformers.js.
Inputs and outputs are float32 in every precision. The files of tokenizer, feature extractor and
configuration are saved alongside, also in the form that transformers 4 reads.

Both runtimes start with a past of no positions. They derive its shape from config.json, the same
for all layers. So the head axes of the past are symbolic, as are widths other than d_model / heads,
and an empty past is reshaped to the layer's own shape before use.

The merged decoder has one common graph. Only the encoder's keys and values come from one of two
sources, so each cross-attention is an If: without a past they are projected, with a past they are
read. In the second case present.{i}.encoder.* have no elements, and callers keep the first ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from export.hub_files import save_hub_files, write_compactly
from export.layouts import suffix_for
from export.manifest import Contract, Spec
from export.onnx import blocks
from export.onnx.attention import KINDS
from export.onnx.constants import SMALL, Weights
from export.onnx.graph import Graph
from export.onnx.layouts import parts
from export.onnx.save import GraphParts, write_graph
from export.weights import Heads

DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
"""Precision -> its name in transformers.js."""
ENCODER, MERGED = "encoder_model", "decoder_model_merged"
FIRST, LATER = "decoder_model", "decoder_with_past_model"


def write(model: nn.Module, processor: Any, precision: str, out: Path) -> Contract:
    """Write the graphs and Hugging Face's files into `out`; return the inputs and outputs of each
    graph."""
    suffix, folder = suffix_for("transformers", precision), out / "onnx"
    folder.mkdir()
    contract = {ENCODER: write_graph(encoder_graph(model, precision), folder, ENCODER, suffix)}
    with Weights(folder / f"{MERGED}{suffix}.onnx_data", SMALL) as weights:
        for kind in (MERGED, FIRST, LATER):
            made = decoder_graph(model, precision, kind)
            contract[kind] = write_graph(made, folder, kind, suffix, weights.take)
    save_hub_files(model, processor, out)
    _write_for_transformers_js(out, precision)
    _write_for_transformers_4(out)
    return contract


# ---------------------------------------------------------------------------------------- graphs


def encoder_graph(model: nn.Module, precision: str) -> GraphParts:
    """Build the graph from log-mel features to the encoder's last states."""
    g = parts.new_graph(model, precision)
    g.name(parts.encode(g, model, "input_features"), "last_hidden_state")
    config, positions = model.config, blocks.positions_of(model)
    frames = 2 * positions if isinstance(positions, int) else "frames"
    features = Spec("input_features", ("batch_size", config.num_mel_bins, frames))
    return g, [features], [Spec("last_hidden_state", ("batch_size", positions, config.d_model))]


def decoder_graph(model: nn.Module, precision: str, kind: str) -> GraphParts:
    """Build the graph from new tokens and, unless `kind` is FIRST, a cache to logits and longer
    cache."""
    g = parts.new_graph(model, precision)
    if kind == FIRST:
        start = g.constant([0])
    else:
        start = g.op("Shape", "past_key_values.0.decoder.key", start=2, end=3)

    def attend_self(number: int, qkv: list[str], heads: Heads) -> str:
        past = None if kind == FIRST else _reshaped(g, _names("past_key_values", number), heads)
        return parts.grown_attention(g, qkv, past, _names("present", number), heads, start)

    def attend_cross(number: int, q: str, heads: Heads) -> str:
        cached = _names("past_key_values", number, "encoder")
        if kind == LATER:
            return parts.attention(g, q, cached, heads)
        if kind == MERGED:
            return _read_or_made(g, model, number, q, heads)
        made = parts.cross_caches(g, model, number, "encoder_hidden_states")
        named = zip(made, _names("present", number, "encoder"), strict=True)
        return parts.attention(g, q, [g.name(cache, name) for cache, name in named], heads)

    g.name(parts.decode(g, model, "input_ids", start, attend_self, attend_cross), "logits")
    return g, *_contract(model, kind)


def _reshaped(g: Graph, past: list[str], heads: Heads) -> list[str]:
    """Return the past; a past of no positions is brought from any shape to that of this layer."""
    batch, count = g.op("Shape", "input_ids", start=0, end=1), g.constant([heads.count])
    reshaped = []
    for name, width in zip(past, parts.widths(heads), strict=True):
        length = g.op("Shape", name, start=2, end=3)
        shape = g.op("Concat", batch, count, length, g.constant([width]), axis=0)
        reshaped.append(g.op("Reshape", name, shape, allowzero=1))
    return reshaped


def _read_or_made(g: Graph, model: nn.Module, number: int, q: str, heads: Heads) -> str:
    """Attend to the cached encoder keys and values, or to those projected in this step."""
    cached = parts.Branch(g, f"cached_{number}")
    mixed = parts.attention(cached, q, _names("past_key_values", number, "encoder"), heads)
    shapes = ((0, heads.count, 0, width) for width in parts.widths(heads))
    nothing = [g.constant(np.zeros(shape, np.float32)) for shape in shapes]
    read = [mixed, *(cached.op("Identity", value) for value in nothing)]

    here = parts.Branch(g, f"made_{number}")
    caches = parts.cross_caches(here, model, number, "encoder_hidden_states")
    made = [parts.attention(here, q, caches, heads), *caches]

    outputs = [f"cross_attention.{number}", *_names("present", number, "encoder")]
    return g.ops(
        "If",
        "use_cache_branch",
        outputs=outputs,
        then_branch=cached.subgraph([], _any_shape(read)),
        else_branch=here.subgraph([], _any_shape(made)),
    )[0]


def _any_shape(names: list[str]) -> list[Spec]:
    ranks = [3, *[4] * (len(names) - 1)]
    return [
        Spec(name, tuple(f"{name}_{axis}" for axis in range(rank)))
        for name, rank in zip(names, ranks, strict=True)
    ]


def _names(time: str, number: int, side: str = "decoder") -> list[str]:
    return [f"{time}.{number}.{side}.{kind}" for kind in KINDS]


def _contract(model: nn.Module, kind: str) -> tuple[list[Spec], list[Spec]]:
    config = model.config
    inputs = [Spec("input_ids", ("batch_size", "decoder_sequence_length"), "int64")]
    if kind != LATER:
        shape = ("batch_size", "encoder_sequence_length", config.d_model)
        inputs.append(Spec("encoder_hidden_states", shape))
    logits = ("batch_size", "decoder_sequence_length", config.vocab_size)
    outputs = [Spec("logits", logits)]
    usual = config.d_model // config.encoder_attention_heads
    for number in parts.layers_of(model):
        for side, heads in (
            ("decoder", parts.own_heads(model, number)),
            ("encoder", parts.cross_heads(model, number)),
        ):
            if kind != FIRST:
                inputs += _past(number, side, heads, usual)
            if side == "decoder" or kind != LATER:
                outputs += _present(number, side, heads)
    if kind == MERGED:
        inputs.append(Spec("use_cache_branch", (1,), "bool"))
    return inputs, outputs


def _past(number: int, side: str, heads: Heads, usual: int) -> list[Spec]:
    """Return the specs of the past. Heads and unusual widths are symbolic: an empty past has the
    dense model's."""
    count, length = f"heads_{side[:3]}_{number}", f"past_{side}_sequence_length"
    named = zip(_names("past_key_values", number, side), parts.widths(heads), strict=True)
    return [
        Spec(name, ("batch_size", count, length, width if width == usual else f"{name}.width"))
        for name, width in named
    ]


def _present(number: int, side: str, heads: Heads) -> list[Spec]:
    """Return the specs of the new cache. The encoder's is empty if it was read, so its batch has
    another symbol."""
    axes = ("batch_size", "total_sequence_length")
    batch, length = axes if side == "decoder" else ("made_batch_size", "made_sequence_length")
    named = zip(_names("present", number, side), parts.widths(heads), strict=True)
    return [Spec(name, (batch, heads.count, length, width)) for name, width in named]


# -------------------------------------------------------------------------- files of the runtimes


def _write_for_transformers_js(out: Path, precision: str) -> None:
    """Add what transformers.js needs: the precision, the file of the weights, the processor
    class."""
    fields = {"dtype": DTYPES[precision], "use_external_data_format": {MERGED: 1}}
    _change(out / "config.json", {"transformers.js_config": fields})
    _change(out / "preprocessor_config.json", {"processor_class": "WhisperProcessor"})


def _write_for_transformers_4(out: Path) -> None:
    """Write the files that the Whisper tokenizer of transformers 4 reads: vocabulary, merges,
    tokens."""
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    added = sorted(tokenizer["added_tokens"], key=lambda token: token["id"])
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    for name, value in {
        "vocab.json": tokenizer["model"]["vocab"],
        "added_tokens.json": {token["content"]: token["id"] for token in added},
    }.items():
        (out / name).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    fields = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    special = [token["content"] for token in added if token["special"]]
    tokens = {"added_tokens_decoder": fields, "additional_special_tokens": special}
    _change(out / "tokenizer_config.json", tokens)
    write_compactly(out / "tokenizer_config.json")


def _change(path: Path, fields: dict[str, Any]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
