"""The native layout: encoder.onnx, decoder.onnx and tokens.json, for EdgeWhisper's own runner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto
from torch import nn

from export.hub_files import save_hub_files
from export.manifest import Contract, Spec
from export.onnx.attention import (
    KINDS,
    SPARE,
    cached_attention,
    cross_attention,
    encoder_cache,
    ends,
    unseen,
)
from export.onnx.blocks import (
    attention_output,
    encoder_layer,
    feed_forward,
    norm,
    positions_of,
    stem,
    token_table,
)
from export.onnx.graph import Graph
from export.onnx.layers import apart, float_table, linear, parallel
from export.onnx.log_mel import log_mel
from export.onnx.save import GraphParts, write_graph
from export.quantise import schemes
from export.shrink import windows_of
from export.tokens import write_tokens
from export.weights import array, chain, chains, heads_of


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
    save_hub_files(model, processor, out)
    return contract


def encoder_graph(
    model: nn.Module, extractor: Any, precision: str, int8_cache: bool = True
) -> GraphParts:
    """PCM to the cross-attention's keys and values of every decoder layer."""
    g = Graph(precision, schemes(model), int8_cache)
    encoder = model.model.encoder
    windows = windows_of(model.config)
    mel = log_mel(g, "pcm", extractor, [2 * n for n in windows])
    with g.scope("stem"):
        x = stem(g, mel, encoder, positions_of(model))
    for i, layer in enumerate(encoder.layers):
        with g.scope(f"layers.{i}"):
            x = encoder_layer(g, x, layer, windows)
    with g.scope("layer_norm"):
        x = norm(g, x, encoder.layer_norm)
    outputs = []
    for i, layer in enumerate(model.model.decoder.layers):
        attention, heads = layer.encoder_attn, heads_of(layer.encoder_attn)
        dims = heads.qk_dim, heads.v_dim
        specs = _cross(model, i, g.int8_cache, heads.count)
        with g.scope(f"cross.{i}"):
            both = apart(g, x, chains(g.schemes, attention, "kv"))
            made = [encoder_cache(g, y, heads, dim) for y, dim in zip(both, dims, strict=True)]
        for value, spec in zip(sum(zip(*made, strict=True), ()), specs, strict=True):
            g.name(value, spec.name)
        outputs += specs
    one_window = isinstance(positions_of(model), int)
    return g, [Spec("pcm", (1, extractor.n_samples if one_window else "samples"))], outputs


def decoder_graph(model: nn.Module, precision: str, int8_cache: bool = True) -> GraphParts:
    """New tokens and the cache to the last token's logits and the longer cache."""
    g = Graph(precision, schemes(model), int8_cache)
    decoder = model.model.decoder
    with g.scope("look_up"):
        table = token_table(g, decoder.embed_tokens)
    length = g.op("Cast", "past_length", to=TensorProto.INT64)
    end = g.op("Add", length, g.op("Shape", "input_ids", start=1, end=2))
    with g.scope("look_up"):
        positions = float_table(g, array(decoder.embed_positions.weight))
        x = g.op("Add", table.look_up("input_ids"), g.op("Slice", positions, length, end))
    filled = g.op("Sub", g.op("Shape", "cross.0.key", start=2, end=3), g.constant([SPARE]))
    places = Places(
        own=ends(g, "input_ids", "past_length"),
        cross=ends(g, "input_ids", g.op("Cast", filled, to=TensorProto.INT32)),
        unseen=unseen(g, "input_ids", filled),
    )
    for i, layer in enumerate(decoder.layers):
        with g.scope(f"layers.{i}"):
            x = _decoder_layer(g, x, layer, i, places)
    with g.scope("logits"):
        last = g.op("Slice", x, g.constant([-1]), g.constant([2**31 - 1]), g.constant([1]))
        g.name(table.logits(norm(g, last, decoder.layer_norm)), "logits")
    return g, *_decoder_contract(model, g.int8_cache)


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
    positions, width = positions_of(model), attention.cache_dim
    room = positions + SPARE if isinstance(positions, int) else "room"
    shape = (1, heads, room, width)
    specs = [Spec(f"{name}.{layer}.{kind}", shape, "int8" if int8 else "float32") for kind in KINDS]
    scales = [Spec(f"{name}.{layer}.{kind}_scale", (attention.count * width,)) for kind in KINDS]
    return specs + scales if int8 else specs


def _decoder_layer(g: Graph, x: str, layer: nn.Module, number: int, places: Places) -> str:
    attention = layer.self_attn
    y = norm(g, x, layer.self_attn_layer_norm)
    past, present = ([f"{time}.{number}.{kind}" for kind in KINDS] for time in ("past", "present"))
    qkv = parallel(g, y, chains(g.schemes, attention, "qkv"))
    y = cached_attention(g, qkv, past, present, places.own, heads_of(attention))
    x = g.op("Add", x, attention_output(g, y, attention))

    with g.scope("encoder_attn"):
        x = _cross_attention(g, x, layer, number, places)
    return feed_forward(g, x, layer, gather=True)


def _cross_attention(g: Graph, x: str, layer: nn.Module, number: int, places: Places) -> str:
    attention = layer.encoder_attn
    y = norm(g, x, layer.encoder_attn_layer_norm)
    q = linear(g, y, chain(g.schemes, attention.q_proj, layer.embed_dim), gather=True)
    kinds = (*KINDS, *(f"{kind}_scale" for kind in KINDS)) if g.int8_cache else KINDS
    cross = [f"cross.{number}.{kind}" for kind in kinds]
    heard = [f"heard.{number}.{kind}" for kind in KINDS]
    y = cross_attention(g, q, cross, heard, places.cross, heads_of(attention), places.unseen)
    return g.op("Add", x, attention_output(g, y, attention))
