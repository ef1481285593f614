"""One decoding step as a MIL program: from a token and the caches to logits and cache updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from export.coreml.attention import cached_attention, cross_attention, mean_weights, updated_cache
from export.coreml.blocks import Table, feed_forward, linears_of, norm, padded_heads, token_table
from export.coreml.graph import Graph, Var
from export.coreml.layers import linear
from export.coreml.plan import Plan
from export.manifest import Spec
from export.weights import Heads, array, heads_of

KINDS = ("key", "value")


def cache_channels(model: nn.Module, neural_engine: bool) -> list[list[int]]:
    """Return the channels of key_cache and of value_cache that hold the model's keys and values,
    layer by layer. The remaining channels are padding."""
    channels: list[list[int]] = [[], []]
    begins = [0, 0]
    for layer in model.model.decoder.layers:
        was = heads_of(layer.self_attn)
        now = padded_heads(layer.self_attn, neural_engine, cached=True)
        for kind, (dim, wide) in enumerate(((was.qk_dim, now.qk_dim), (was.v_dim, now.v_dim))):
            begin = begins[kind]
            channels[kind] += [begin + h * wide + n for h in range(was.count) for n in range(dim)]
            begins[kind] += was.count * wide
    return channels


def decoder_contract(model: nn.Module, plan: Plan) -> tuple[list[Spec], list[Spec], list[Spec]]:
    """Return the inputs, outputs and states of the program."""
    own = [layer.self_attn for layer in model.model.decoder.layers]
    widths = [
        _cache_widths(padded_heads(attention, plan.neural_engine, cached=True)) for attention in own
    ]
    width = max(map(sum, zip(*widths, strict=True)))
    caches = [Spec(f"{kind}_cache", (1, width, 1, plan.room), plan.dtype) for kind in KINDS]
    updates = [Spec(f"{kind}_cache_updates", (1, width, 1, 1), plan.dtype) for kind in KINDS]
    alignment = [Spec("alignment_heads_weights", (1, plan.positions), plan.dtype)]
    inputs = [
        Spec("input_ids", (1,), "int32"),
        Spec("cache_length", (1,), "int32"),
        *([] if plan.stateful else caches),
        Spec("kv_cache_update_mask", (1, plan.room), plan.dtype),
        states_spec(model, plan),
        Spec("decoder_key_padding_mask", (1, plan.room), plan.dtype),
    ]
    outputs = [
        Spec("logits", (1, 1, model.config.vocab_size), plan.dtype),
        *([] if plan.stateful else updates),
        *(alignment if plan.alignment else []),
    ]
    return inputs, outputs, caches if plan.stateful else []


def states_spec(model: nn.Module, plan: Plan) -> Spec:
    return Spec("encoder_output_embeds", (1, model.config.d_model, 1, plan.positions), plan.dtype)


def _cache_widths(heads: Heads) -> tuple[int, int]:
    """Return the channels of keys and of values, of all heads."""
    return heads.count * heads.qk_dim, heads.count * heads.v_dim


def decode(g: Graph, model: nn.Module, plan: Plan, given: dict[str, Var]) -> list[Var]:
    decoder, d_model = model.model.decoder, model.config.d_model
    table, x = _look_up(g, decoder, given)
    caches = [given[f"{kind}_cache"] for kind in KINDS]
    before = [g.op("read_state", input=x) for x in caches] if plan.stateful else caches
    past = _by_layers(g, before, decoder)
    updates, attended = [], []
    for i, layer in enumerate(decoder.layers):
        with g.scope(f"layers_{i}"):
            x, fresh, longer = _cached_attention(g, x, layer, past[i], given)
            updates.append(longer if plan.stateful else fresh)
            with g.scope("encoder_attn"):
                x, weights = _cross_attention(g, x, layer, given["encoder_output_embeds"])
            attended.append(weights)
            x = feed_forward(g, x, layer)
    with g.scope("logits"):
        results = [table.logits(g.reshape(norm(g, x, decoder.layer_norm), 1, 1, d_model))]
    with g.scope("caches"):
        both = [_joined(g, parts, caches[0].shape[1]) for parts in zip(*updates, strict=True)]
        if plan.stateful:
            for cache, value in zip(caches, both, strict=True):
                g.op("coreml_update_state", state=cache, value=value)
    with g.scope("alignment"):
        aligned = [mean_weights(g, attended, plan.alignment)] if plan.alignment else []
    return [*results, *([] if plan.stateful else both), *aligned]


def _look_up(g: Graph, decoder: nn.Module, given: dict[str, Var]) -> tuple[Table, Var]:
    """Return the token table, and the embedding of the token at its position."""
    with g.scope("look_up"):
        table = token_table(g, decoder.embed_tokens)
        positions = g.constant(array(decoder.embed_positions.weight))
        here = g.gather(positions, given["cache_length"], 0)
        x = g.add(table.look_up(given["input_ids"]), here)  # (1, d_model)
        one = (1, x.shape[1], 1, 1) if g.channels_first else (1, 1, x.shape[1])
        return table, g.reshape(x, *one)


def _by_layers(g: Graph, caches: Sequence[Var], decoder: nn.Module) -> list[tuple[Var, Var]]:
    """Split keys and values of all layers into those of each; padding at the end is dropped."""
    heads = [
        padded_heads(layer.self_attn, g.channels_first, cached=True) for layer in decoder.layers
    ]
    widths = zip(*map(_cache_widths, heads), strict=True)
    parts = []
    for cache, sizes in zip(caches, widths, strict=True):
        left = cache.shape[1] - sum(sizes)
        parts.append(g.split(cache, [*sizes, left] if left else sizes, 1)[: len(sizes)])
    return list(zip(*parts, strict=True))


def _joined(g: Graph, parts: Sequence[Var], width: int) -> Var:
    """Join keys or values of all layers, padded with zeros to `width` channels."""
    left = width - sum(part.shape[1] for part in parts)
    zeros = [g.constant(np.zeros((1, left, *parts[0].shape[2:])))] if left else []
    return g.concat([*parts, *zeros], 1)


def _cached_attention(
    g: Graph, x: Var, layer: nn.Module, past: Sequence[Var], given: dict[str, Var]
) -> tuple[Var, list[Var], list[Var]]:
    """Return x after self-attention, the new key and value, and all keys and values."""
    attention = linears_of(g, layer.self_attn, cached=True)
    y = norm(g, x, layer.self_attn_layer_norm)
    q, *fresh = (linear(g, y, part) for part in (attention.q, attention.k, attention.v))
    fresh = [g.reshape(new, 1, int(np.prod(new.shape)), 1, 1) for new in fresh]
    here, mask = given["kv_cache_update_mask"], given["decoder_key_padding_mask"]
    here = g.reshape(here, 1, 1, *here.shape)
    longer = [updated_cache(g, old, new, here) for old, new in zip(past, fresh, strict=True)]
    keys, values = longer
    y = cached_attention(g, q, keys, values, mask, attention.heads)
    return g.add(x, linear(g, y, attention.out)), fresh, longer


def _cross_attention(g: Graph, x: Var, layer: nn.Module, states: Var) -> tuple[Var, Var]:
    """Return x after cross-attention, and the attention weights of its heads."""
    attention = linears_of(g, layer.encoder_attn)
    q = linear(g, norm(g, x, layer.encoder_attn_layer_norm), attention.q)
    y, weights = cross_attention(g, q, states, attention.k, attention.v, attention.heads)
    return g.add(x, linear(g, y, attention.out)), weights
