"""Whisper as three Core ML packages in WhisperKit's layout, built from the weights.

    MelSpectrogram  audio (samples,), 16 kHz -> melspectrogram_features (1, n_mels, 1, frames)
    AudioEncoder    melspectrogram_features -> encoder_output_embeds (1, d_model, 1, positions)
    TextDecoder     input_ids (1,) and cache_length (1,) int32, key_cache and value_cache
                    (1, width, 1, room), kv_cache_update_mask (1, room), encoder_output_embeds,
                    decoder_key_padding_mask (1, room)
                    -> logits (1, 1, vocab), key_cache_updates, value_cache_updates (1, width, 1, 1)

One token a call. `cache_length` positions stand in the caches, a layer's channels behind those of
the layer before; `kv_cache_update_mask` is 1 at position cache_length and 0 elsewhere, and
`decoder_key_padding_mask` 0 up to it and -10000 behind. The caller writes the updates into the
caches. `width` is the sum of the layers' heads * width of a head, the larger one of keys and
values; what is left over in the other is zero.

Floats are float16 going in and out, float32 in precision fp32. The mel front end computes in
float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from export import mil_graph as ops
from export.artifact import write_manifest
from export.cost import count_parameters, macs, macs_by_window
from export.mil_graph import PRECISIONS, TARGETS, Graph, Var
from export.onnx_graph import Linear, Spec
from export.problem import Problem
from export.quantise import schemes
from export.shrink import layer_shapes, windows_of
from export.to_onnx import (
    Contract,
    _array,
    _chain,
    _chains,
    _described,
    _heads,
    _outputs,
    check_model,
    check_window,
    decoding_rules,
    save_beside,
    token_bytes,
    write_tokens,
)
from export.versions import version, versions

LAYOUTS = ("whisperkit", "encoder")


@dataclass(frozen=True)
class Plan:
    """What is asked for, with everything that was left open decided."""

    precision: str
    target: str
    positions: int
    """Of the encoder: two mel frames each."""
    room: int
    """Positions in the decoder's caches."""

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == "fp32" else "float16"


def export_coreml(
    model: nn.Module,
    processor: Any,
    out: Path,
    precision: str = "fp16",
    provenance: dict[str, Any] | None = None,
    layout: str = "whisperkit",
    *,
    deployment_target: str | None = None,
    stateful: bool = False,
    word_timestamps: bool | None = None,
    neural_engine: bool = False,
    window: float | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Write an artifact into the empty directory `out`; returns its manifest, gate still null."""
    if precision not in PRECISIONS:
        raise Problem(
            f"there is no precision {precision!r} for Core ML",
            hint=f"choose one of: {', '.join(PRECISIONS)}",
        )
    extractor = processor.feature_extractor
    check_model(model)
    check_window(model, extractor)
    decoding = decoding_rules(model)
    token_bytes(processor.tokenizer, model.config.vocab_size)  # refused before a file is written
    room = max_tokens or model.config.max_target_positions
    plan = Plan(precision, deployment_target or "iOS16", windows_of(model.config)[-1], room)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    contract = write_packages(model, extractor, plan, out)
    write_tokens(processor.tokenizer, model.config.vocab_size, out)
    save_beside(model, processor, out)
    manifest = {
        "target": "coreml",
        "layout": layout,
        "precision": precision,
        "parameters": count_parameters(model)["total"],
        "macs": macs(model),
        "macs_by_window": macs_by_window(model),
        "contract": contract,
        "layers": layer_shapes(model),
        "audio": {
            "sampling_rate": extractor.sampling_rate,
            "window_samples": 2 * plan.positions * extractor.hop_length,
            "windows_samples": [2 * plan.positions * extractor.hop_length],
            "hop_samples": extractor.hop_length,
        },
        "decoding": decoding,
        "coreml": {
            "deployment_target": plan.target,
            "specification_version": TARGETS[plan.target],
            "stateful": stateful,
            "word_timestamps": False,
            "neural_engine": neural_engine,
            "weights": {},
        },
        "provenance": provenance or {},
        "gate": None,
        "versions": versions() | {"coremltools": version("coremltools")},
    }
    write_manifest(out, manifest)
    return manifest


def write_packages(model: nn.Module, extractor: Any, plan: Plan, out: Path) -> Contract:
    contract = {}
    for name, parts in (
        ("MelSpectrogram", mel_program(model, extractor, plan)),
        ("AudioEncoder", encoder_program(model, plan)),
        ("TextDecoder", decoder_program(model, plan)),
    ):
        made, inputs, outputs = parts
        ops.save(made, plan.target, out / f"{name}.mlpackage", f"Whisper: {name}")
        contract[name] = {"inputs": _described(inputs), "outputs": _described(outputs)}
    return contract


Parts = tuple[Any, list[Spec], list[Spec]]
"""A program, what goes in and what comes out."""


def mel_program(model: nn.Module, extractor: Any, plan: Plan) -> Parts:
    """Samples to features."""
    frames = 2 * plan.positions
    audio = Spec("audio", (frames * extractor.hop_length,), plan.dtype)
    features = _features(model, plan)

    def work(g: Graph, given: dict[str, Var]) -> list[Var]:
        pcm = given["audio"]
        if plan.dtype != "float32":
            pcm = g.op("cast", x=pcm, dtype="fp32")
        mel = g.reshape(ops.log_mel(g, pcm, extractor), *features.shape)
        return [mel if plan.dtype == "float32" else g.op("cast", x=mel, dtype="fp16")]

    g = Graph("fp32", plan.target)
    return ops.program(g, [audio], [features], work), [audio], [features]


def _features(model: nn.Module, plan: Plan) -> Spec:
    shape = (1, model.config.num_mel_bins, 1, 2 * plan.positions)
    return Spec("melspectrogram_features", shape, plan.dtype)


def _states(model: nn.Module, plan: Plan) -> Spec:
    return Spec("encoder_output_embeds", (1, model.config.d_model, 1, plan.positions), plan.dtype)


def encoder_program(model: nn.Module, plan: Plan) -> Parts:
    """Features to the encoder's states."""
    features, states = _features(model, plan), _states(model, plan)
    encoder = model.model.encoder

    def work(g: Graph, given: dict[str, Var]) -> list[Var]:
        with g.scope("stem"):
            x = _stem(g, given[features.name], encoder, plan.positions)
        for i, layer in enumerate(encoder.layers):
            with g.scope(f"layers_{i}"):
                x = _encoder_layer(g, x, layer)
        with g.scope("layer_norm"):
            x = _norm(g, x, encoder.layer_norm)
            return [g.reshape(g.transpose(x, 0, 2, 1), *states.shape)]

    g = Graph(plan.precision, plan.target, schemes(model))
    return ops.program(g, [features], [states], work), [features], [states]


def _stem(g: Graph, mel: Var, encoder: nn.Module, positions: int) -> Var:
    """Two convolutions and the positions: (1, n_mels, 1, frames) -> (1, positions, d_model)."""
    x = g.op("squeeze", x=mel, axes=[2])
    for module, stride in ((encoder.conv1, 1), (encoder.conv2, 2)):
        x = ops.gelu(g, ops.conv(g, x, _array(module.weight), _array(module.bias), stride))
    return g.add(g.transpose(x, 0, 2, 1), _array(encoder.embed_positions.weight)[None, :positions])


def _encoder_layer(g: Graph, x: Var, layer: nn.Module) -> Var:
    attention = layer.self_attn
    y = _norm(g, x, layer.self_attn_layer_norm)
    q, k, v = (ops.linear(g, y, chain) for chain in _chains(g, attention, "qkv"))
    y = ops.self_attention(g, q, k, v, _heads(attention))
    x = g.add(x, _attention_output(g, y, attention))
    return _feed_forward(g, x, layer)


def decoder_program(model: nn.Module, plan: Plan) -> Parts:
    """A token and the caches to its logits and what is to be written into the caches."""
    decoder, config = model.model.decoder, model.config
    inputs, outputs = _decoder_contract(model, plan)
    widths = [_cache_widths(layer) for layer in decoder.layers]  # of keys, of values

    def work(g: Graph, given: dict[str, Var]) -> list[Var]:
        with g.scope("look_up"):
            table = _token_table(g, decoder.embed_tokens)
            positions = g.constant(_array(decoder.embed_positions.weight))
            here = g.op("gather", x=positions, indices=given["cache_length"], axis=0)
            x = g.reshape(g.add(table.look_up(given["input_ids"]), here), 1, 1, config.d_model)
        caches = [
            _layers_of(g, given[f"{kind}_cache"], [pair[i] for pair in widths])
            for i, kind in enumerate(("key", "value"))
        ]
        update, mask = (
            g.reshape(given[name], 1, 1, 1, plan.room)
            for name in ("kv_cache_update_mask", "decoder_key_padding_mask")
        )
        states = g.op("squeeze", x=given["encoder_output_embeds"], axes=[2])
        updates = []
        for i, layer in enumerate(decoder.layers):
            with g.scope(f"layers_{i}"):
                own = [caches[0][i], caches[1][i]]
                x, new = _decoder_layer(g, x, layer, own, update, mask, states)
                updates.append(new)
        with g.scope("logits"):
            logits = table.logits(_norm(g, x, decoder.layer_norm))
        width = outputs[1].shape[1]
        return [logits, *(_all_layers(g, [new[i] for new in updates], width) for i in range(2))]

    g = Graph(plan.precision, plan.target, schemes(model))
    return ops.program(g, inputs, outputs, work), inputs, outputs


def _decoder_contract(model: nn.Module, plan: Plan) -> tuple[list[Spec], list[Spec]]:
    widths = [_cache_widths(layer) for layer in model.model.decoder.layers]
    width = max(map(sum, zip(*widths, strict=True)))
    cache, update = (1, width, 1, plan.room), (1, width, 1, 1)
    inputs = [
        Spec("input_ids", (1,), "int32"),
        Spec("cache_length", (1,), "int32"),
        Spec("key_cache", cache, plan.dtype),
        Spec("value_cache", cache, plan.dtype),
        Spec("kv_cache_update_mask", (1, plan.room), plan.dtype),
        _states(model, plan),
        Spec("decoder_key_padding_mask", (1, plan.room), plan.dtype),
    ]
    outputs = [
        Spec("logits", (1, 1, model.config.vocab_size), plan.dtype),
        Spec("key_cache_updates", update, plan.dtype),
        Spec("value_cache_updates", update, plan.dtype),
    ]
    return inputs, outputs


def _cache_widths(layer: nn.Module) -> tuple[int, int]:
    """Channels of a decoder layer's keys and values, of all heads."""
    heads = _heads(layer.self_attn)
    return heads.count * heads.qk_dim, heads.count * heads.v_dim


def _layers_of(g: Graph, cache: Var, widths: Sequence[int]) -> list[Var]:
    """A cache (1, width, 1, room) -> one of each layer; what is left over goes."""
    left = cache.shape[1] - sum(widths)
    return g.split(cache, [*widths, left] if left else widths, axis=1)


def _all_layers(g: Graph, updates: Sequence[Var], width: int) -> Var:
    """Updates of all layers as one (1, width, 1, 1), filled up with zeros."""
    left = width - sum(update.shape[1] for update in updates)
    zeros = [g.constant(np.zeros((1, left, 1, 1)))] if left else []
    return g.concat([*updates, *zeros], axis=1)


def _token_table(g: Graph, table: nn.Module) -> ops.TokenTable | ops.FactorisedTable:
    if hasattr(table, "rows"):
        rows, basis = _array(table.rows.weight), _array(table.up.weight.T)
        return ops.FactorisedTable(g, rows, basis, g.schemes.get(table.rows))
    return ops.TokenTable(g, _array(table.weight), g.schemes.get(table))


def _decoder_layer(
    g: Graph,
    x: Var,
    layer: nn.Module,
    caches: Sequence[Var],
    update: Var,
    mask: Var,
    states: Var,
) -> tuple[Var, list[Var]]:
    """x (1, 1, d_model) -> the same behind the layer, and its new key and value."""
    attention = layer.self_attn
    y = _norm(g, x, layer.self_attn_layer_norm)
    q, *new = (ops.linear(g, y, chain) for chain in _chains(g, attention, "qkv"))
    new = [g.reshape(value, 1, value.shape[2], 1, 1) for value in new]
    keys, values = (ops.written(g, *pair, update) for pair in zip(caches, new, strict=True))
    y = ops.cached_attention(g, q, keys, values, mask, _heads(attention))
    x = g.add(x, _attention_output(g, y, attention))
    with g.scope("encoder_attn"):
        y = _norm(g, x, layer.encoder_attn_layer_norm)
        q, key, value = _chains(g, layer.encoder_attn, "qkv")
        heads = _heads(layer.encoder_attn)
        y, _ = ops.cross_attention(g, ops.linear(g, y, q), states, key, value, heads)
        x = g.add(x, _attention_output(g, y, layer.encoder_attn))
    return _feed_forward(g, x, layer), new


def _feed_forward(g: Graph, x: Var, layer: nn.Module) -> Var:
    with g.scope("feed_forward"):
        y = _norm(g, x, layer.final_layer_norm)
        y = ops.gelu(g, ops.linear(g, y, _chain(g, layer.fc1, layer.embed_dim)))
        return g.add(x, ops.linear(g, y, _chain(g, layer.fc2, _outputs(layer.fc1))))


def _norm(g: Graph, x: Var, norm: nn.Module) -> Var:
    return ops.layer_norm(g, x, _array(norm.weight), _array(norm.bias), norm.eps)


def _attention_output(g: Graph, x: Var, attention: nn.Module) -> Var:
    heads = _heads(attention)
    chain: list[Linear] = _chain(g, attention.out_proj, heads.count * heads.v_dim)
    return ops.linear(g, x, chain)
