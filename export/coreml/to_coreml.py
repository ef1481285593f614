"""Whisper as Core ML packages, built from the weights.

Layout `whisperkit`, three packages as WhisperKit loads them from a folder:

    MelSpectrogram  audio (samples,), 16 kHz -> melspectrogram_features (1, n_mels, 1, frames)
    AudioEncoder    melspectrogram_features -> encoder_output_embeds (1, d_model, 1, positions)
    TextDecoder     input_ids (1,) and cache_length (1,) int32, key_cache and value_cache
                    (1, width, 1, room), kv_cache_update_mask (1, room), encoder_output_embeds,
                    decoder_key_padding_mask (1, room)
                    -> logits (1, 1, vocab), key_cache_updates and value_cache_updates
                    (1, width, 1, 1), and where word timestamps are wanted
                    alignment_heads_weights (1, positions)

One token a call. `cache_length` positions stand in the caches, a layer's channels behind those of
the layer before; kv_cache_update_mask is 1 at position cache_length and 0 elsewhere, and
decoder_key_padding_mask 0 up to it and -10000 behind. The caller writes the updates into the
caches. `width` is the sum of the layers' heads * width of a head, for keys or for values, whichever
is larger; what the other leaves over is zero. alignment_heads_weights are the new token's
cross-attention, the mean over the generation config's alignment heads.

`stateful` (iOS18) keeps the caches in the package: key_cache and value_cache are states, there are
no updates, and the caller only says where it is. WhisperKit does not run this form.

Layout `encoder`, one package as whisper.cpp loads it beside its own decoder:

    coreml-encoder  logmel_data (1, n_mels, frames) -> output (1, positions, d_model), float32

The encoder may be pruned; the decoder that whisper.cpp reads from its own file is the dense one, of
the same d_model.

Floats are float16 going in and out, in precision fp32 float32. The mel front end computes in
float32 throughout. Programs have fixed shapes: one window, the model's longest unless another one
of its windows is asked for.

`neural_engine` writes encoder and decoder in the form that Apple's notes on transformers for the
Neural Engine, whisperkit and whisper.cpp describe: values are (1, channels, 1, positions), linear
layers 1x1 convolutions, attention goes head by head, inner dimensions are filled up with zeros to
multiples of 64, and the token table stands in chunks of less than 16384 rows. It computes the same
function. Known is that the engine wants channels first, and that it takes no tensor with a larger
dimension than 16384; that the whole form is faster, on which chip and by how much, we have not
measured: there was no Mac. Where layers are irregular, the zeros make it larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from export.artifact import write_manifest
from export.artifact_files import Spec, check, described, manifest_of, save_beside, write_tokens
from export.coreml import graph as ops
from export.coreml.graph import TARGETS, Graph, Var
from export.coreml.weights import PRECISIONS, needs_blocks
from export.cost import macs
from export.problem import Problem
from export.quantise import Scheme, schemes
from export.shrink import windows_of
from export.versions import version
from export.weights import (
    Heads,
    Linear,
    array,
    chain,
    chains,
    heads_of,
    outputs_of,
    scaled,
)

SAMPLE_LENGTH = 224
"""Tokens that WhisperKit's DecodingOptions ask for unless told otherwise; caches must hold them."""
KINDS = ("key", "value")
Table = ops.TokenTable | ops.FactorisedTable


@dataclass(frozen=True)
class Plan:
    """What is asked for, with everything that was left open decided."""

    precision: str
    target: str
    positions: int
    """Of the encoder: two mel frames each."""
    room: int
    """Positions in the decoder's caches."""
    stateful: bool
    neural_engine: bool
    alignment: list[list[int]]
    """Of every decoder layer the alignment heads; empty where no word timestamps are wanted."""

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == "fp32" else "float16"

    def graph(self, model: nn.Module) -> Graph:
        return Graph(self.precision, self.target, _schemes(model), self.neural_engine)


@dataclass(frozen=True)
class Made:
    """A program, what goes in and what comes out, and what the graph noted of its weights."""

    graph: Graph
    program: Any
    inputs: list[Spec]
    outputs: list[Spec]
    states: list[Spec]


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
    """Write an artifact into the empty directory `out`; returns its manifest, gate still null.

    `model` is a Whisper, dense or slim, `processor` its WhisperProcessor, `provenance` the
    checkpoint's compression.json. `deployment_target` None: the oldest that can do what is asked;
    `word_timestamps` None: where the model names alignment heads; `window` is one of the model's,
    in seconds, None the longest; `max_tokens` are positions of the decoder, None all that it has.
    The caller gates the artifact and writes the manifest again.

    Raises Problem, before a file is written, where something is asked for that cannot be done; and
    where a weight is beyond float16.
    """
    check(model, processor)
    wanted = {"stateful": stateful, "word_timestamps": word_timestamps, "max_tokens": max_tokens}
    _check_request(precision, layout, wanted | {"window": window})
    plan = Plan(
        precision,
        _target(model, precision, deployment_target, stateful),
        _positions(model, processor.feature_extractor, window),
        _room(model, max_tokens),
        stateful,
        neural_engine,
        _alignment(model, word_timestamps),
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    contract, stored, said = {}, {}, list[str]()
    for name, make in LAYOUTS[layout].items():
        made = make(model, processor.feature_extractor, plan)
        ops.save(made.program, plan.target, out / f"{name}.mlpackage", f"Whisper: {name}")
        contract[name] = described(made.inputs, made.outputs, made.states)
        stored[name] = dict(sorted(made.graph.stored.items()))
        said += [f"{name}: {text}" for text in made.graph.said]
    if layout == "whisperkit":
        write_tokens(processor.tokenizer, model.config.vocab_size, out)
        save_beside(model, processor, out)
    told = {"target": "coreml", "layout": layout, "precision": precision}
    counted = macs(model, plan.room, plan.positions, cached=False)  # all of a cache is multiplied
    costs = {str(plan.positions): counted}
    manifest = manifest_of(told, model, processor, costs, contract, provenance)
    manifest["decoding"]["max_new_tokens"] -= model.config.max_target_positions - plan.room
    manifest["coreml"] = {
        "deployment_target": plan.target,
        "specification_version": TARGETS[plan.target],
        "stateful": stateful,
        "word_timestamps": bool(plan.alignment) and layout == "whisperkit",
        "neural_engine": neural_engine,
        "weights": stored,
        "said": said,
    }
    manifest["versions"]["coremltools"] = version("coremltools")
    write_manifest(out, manifest)
    return manifest


# ------------------------------------------------------------------------------------ what is asked


def _check_request(precision: str, layout: str, wanted: dict[str, Any]) -> None:
    for kind, found, known in (("precision", precision, PRECISIONS), ("layout", layout, LAYOUTS)):
        if found not in known:
            raise Problem(
                f"there is no {kind} {found!r} for Core ML",
                hint=f"choose one of: {', '.join(known)}",
            )
    asked = [name for name, value in wanted.items() if value]
    if layout == "encoder" and asked:
        raise Problem(
            f"the layout 'encoder' is whisper.cpp's, for its own decoder and its one window of "
            f"audio; {' and '.join(asked)} cannot be chosen for it",
            hint="leave that out, or export with --layout whisperkit",
        )
    if wanted["stateful"] and precision == "fp32":
        raise Problem(
            "Core ML keeps states in float16, and a stateful decoder in fp32 was asked for",
            hint="export with --precision fp16, or without --stateful",
        )


def _target(model: nn.Module, precision: str, asked: str | None, stateful: bool) -> str:
    """The deployment target, or the oldest one that can do what is asked."""
    if asked is not None and asked not in TARGETS:
        raise Problem(
            f"there is no deployment target {asked!r}", hint=f"choose one of: {', '.join(TARGETS)}"
        )
    reasons = []
    if stateful:
        reasons.append("a stateful cache")
    if needs_blocks(precision, schemes(model)):
        whose = "" if precision == "int4" else " (the checkpoint names 4 bits for some layers)"
        reasons.append(f"4-bit weights in blocks{whose}")
    if reasons and asked not in (None, "iOS18"):
        raise Problem(
            f"{' and '.join(reasons)} came with iOS18, and the deployment target {asked} was asked "
            "for",
            hint="export with --deployment-target iOS18, which macOS 15 has too, or for older "
            "systems with --precision pal4 and without --stateful",
        )
    return asked or ("iOS18" if reasons else "iOS16")


def _positions(model: nn.Module, extractor: Any, window: float | None) -> int:
    """Encoder positions of the window that is asked for, in seconds."""
    known = windows_of(model.config)
    if window is None:
        return known[-1]
    position_s = 2 * extractor.hop_length / extractor.sampling_rate
    positions = round(window / position_s)
    if positions not in known:
        raise Problem(
            f"the model has no window of {window:g} s; it was made for "
            f"{' and '.join(f'{n * position_s:g}' for n in known)} s",
            hint="choose one of these; the method `short` teaches a model others",
        )
    return positions


def _room(model: nn.Module, asked: int | None) -> int:
    limit = model.config.max_target_positions
    room = limit if asked is None else asked
    if not 1 <= room <= limit:
        raise Problem(
            f"a cache of {room} tokens was asked for; the model has {limit} positions",
            hint=f"choose from 1 to {limit}",
        )
    return room


def _alignment(model: nn.Module, asked: bool | None) -> list[list[int]]:
    """Of every decoder layer the alignment heads; empty where none are there, or wanted."""
    heads = _heads_there(model)
    if asked and not any(heads):
        raise Problem(
            f"word timestamps come from alignment heads; {_heads_told(model)}",
            hint="set alignment_heads there, or export without --word-timestamps",
        )
    return heads if any(heads) and asked is not False else []


def _heads_named(model: nn.Module) -> list[tuple[int, int]]:
    named = getattr(model.generation_config, "alignment_heads", None) or []
    return sorted({(layer, head) for layer, head in named})


def _heads_there(model: nn.Module) -> list[list[int]]:
    """Of every decoder layer the alignment heads that are named and that it has."""
    counts = [heads_of(layer.encoder_attn).count for layer in model.model.decoder.layers]
    named = _heads_named(model)
    return [[h for n, h in named if n == i and h < count] for i, count in enumerate(counts)]


def _heads_told(model: nn.Module) -> str:
    named, there = len(_heads_named(model)), sum(map(len, _heads_there(model)))
    return f"generation_config.json names {named or 'none'}" + (
        f", of which the model has {there or 'none'}" if named else ""
    )


def _decoder_limits(model: nn.Module, plan: Plan) -> list[str]:
    """What whoever runs the decoder must know."""
    said = []
    if plan.room < SAMPLE_LENGTH:
        said.append(
            f"its caches hold {plan.room} tokens, so WhisperKit's DecodingOptions.sampleLength, "
            f"{SAMPLE_LENGTH} by default, must be at most {plan.room}"
        )
    if sum(map(len, _heads_there(model))) < len(_heads_named(model)) or not _heads_named(model):
        kind = "fewer alignment heads" if plan.alignment else "no word timestamps"
        said.append(f"{kind}: {_heads_told(model)}")
    return said


# ---------------------------------------------------------------------------------------- programs


def mel_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """Samples to features."""
    features = _features(model, plan)
    audio = Spec("audio", (features.shape[3] * extractor.hop_length,), plan.dtype)
    g = Graph("fp32", plan.target)

    def work(given: dict[str, Var]) -> list[Var]:
        pcm = g.cast(given["audio"], "float32")
        mel = ops.log_mel(g, pcm, extractor)
        return [g.cast(g.reshape(mel, *features.shape), plan.dtype)]

    return _made(g, [audio], [features], work)


def encoder_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """Features to the encoder's states."""
    features, states = _features(model, plan), _states(model, plan)
    g = plan.graph(model)

    def work(given: dict[str, Var]) -> list[Var]:
        x = _encode(g, model, plan, given[features.name])
        if not plan.neural_engine:
            x = g.transpose(x, 0, 2, 1)
        return [g.reshape(x, *states.shape)]

    return _made(g, [features], [states], work)


def lone_encoder_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """The same as whisper.cpp hands it over: it copies float32 rows of states."""
    _, mels, _, frames = _features(model, plan).shape
    logmel = Spec("logmel_data", (1, mels, frames), "float32")
    output = Spec("output", (1, plan.positions, model.config.d_model), "float32")
    g = plan.graph(model)

    def work(given: dict[str, Var]) -> list[Var]:
        mel = g.reshape(g.cast(given[logmel.name], plan.dtype), 1, mels, 1, frames)
        x = _encode(g, model, plan, mel)
        if plan.neural_engine:
            x = g.transpose(g.op("squeeze", x=x, axes=[2]), 0, 2, 1)
        return [g.cast(x, "float32")]

    return _made(g, [logmel], [output], work)


def decoder_program(model: nn.Module, extractor: Any, plan: Plan) -> Made:
    """A token and the caches to its logits and what is to be written into the caches."""
    g = plan.graph(model)
    g.said += _decoder_limits(model, plan)
    inputs, outputs, states = _decoder_contract(model, plan)

    def work(given: dict[str, Var]) -> list[Var]:
        return _decode(g, model, plan, given)

    return _made(g, inputs, outputs, work, states)


LAYOUTS = {
    "whisperkit": {
        "MelSpectrogram": mel_program,
        "AudioEncoder": encoder_program,
        "TextDecoder": decoder_program,
    },
    "encoder": {"coreml-encoder": lone_encoder_program},
}


def _made(
    g: Graph,
    inputs: list[Spec],
    outputs: list[Spec],
    work: ops.Work,
    states: Sequence[Spec] = (),
) -> Made:
    return Made(g, ops.program(g, inputs, outputs, work, states), inputs, outputs, list(states))


def _schemes(model: nn.Module) -> dict[nn.Module, Scheme]:
    """What the checkpoint asks for; where it names any bits but none for the stem, the stem was
    trained in floats."""
    found, encoder = schemes(model), model.model.encoder
    stem = dict.fromkeys((encoder.conv1, encoder.conv2), Scheme(16)) if found else {}
    return stem | found


def _features(model: nn.Module, plan: Plan) -> Spec:
    shape = (1, model.config.num_mel_bins, 1, 2 * plan.positions)
    return Spec("melspectrogram_features", shape, plan.dtype)


def _states(model: nn.Module, plan: Plan) -> Spec:
    return Spec("encoder_output_embeds", (1, model.config.d_model, 1, plan.positions), plan.dtype)


# ----------------------------------------------------------------------------------------- encoder


def _encode(g: Graph, model: nn.Module, plan: Plan, mel: Var) -> Var:
    """Features (1, n_mels, 1, frames) -> states in the graph's arrangement."""
    encoder = model.model.encoder
    with g.scope("stem"):
        x = _stem(g, mel, encoder, plan.positions)
    for i, layer in enumerate(encoder.layers):
        with g.scope(f"layers_{i}"):
            x = _encoder_layer(g, x, layer)
    with g.scope("layer_norm"):
        return _norm(g, x, encoder.layer_norm)


def _stem(g: Graph, x: Var, encoder: nn.Module, positions: int) -> Var:
    """Two convolutions and the positions."""
    if not g.channels_first:
        x = g.op("squeeze", x=x, axes=[2])
    for module, stride in ((encoder.conv1, 1), (encoder.conv2, 2)):
        kernel, bias = array(module.weight), array(module.bias)
        x = ops.gelu(g, ops.conv(g, x, kernel, bias, stride, g.schemes.get(module)))
    table = array(encoder.embed_positions.weight)[:positions]
    if g.channels_first:
        return g.add(x, table.T[None, :, None])
    return g.add(g.transpose(x, 0, 2, 1), table[None])


def _encoder_layer(g: Graph, x: Var, layer: nn.Module) -> Var:
    attention = _attention(g, layer.self_attn)
    y = _norm(g, x, layer.self_attn_layer_norm)
    q, k, v = (ops.linear(g, y, part) for part in (attention.q, attention.k, attention.v))
    y = ops.self_attention(g, q, k, v, attention.heads)
    x = g.add(x, ops.linear(g, y, attention.out))
    return _feed_forward(g, x, layer)


# ----------------------------------------------------------------------------------------- decoder


def _decoder_contract(model: nn.Module, plan: Plan) -> tuple[list[Spec], list[Spec], list[Spec]]:
    """Inputs, outputs, states."""
    own = [layer.self_attn for layer in model.model.decoder.layers]
    widths = [
        _cache_widths(_heads(attention, plan.neural_engine, cached=True)) for attention in own
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
        _states(model, plan),
        Spec("decoder_key_padding_mask", (1, plan.room), plan.dtype),
    ]
    outputs = [
        Spec("logits", (1, 1, model.config.vocab_size), plan.dtype),
        *([] if plan.stateful else updates),
        *(alignment if plan.alignment else []),
    ]
    return inputs, outputs, caches if plan.stateful else []


def _cache_widths(heads: Heads) -> tuple[int, int]:
    """Channels of keys and of values, of all heads."""
    return heads.count * heads.qk_dim, heads.count * heads.v_dim


def cache_channels(model: nn.Module, neural_engine: bool) -> list[list[int]]:
    """Channels of key_cache and of value_cache that hold the model's own keys and values, layer by
    layer and head by head."""
    found: list[list[int]] = [[], []]
    begins = [0, 0]
    for layer in model.model.decoder.layers:
        was = heads_of(layer.self_attn)
        now = _heads(layer.self_attn, neural_engine, cached=True)
        for kind, (dim, wide) in enumerate(((was.qk_dim, now.qk_dim), (was.v_dim, now.v_dim))):
            begin = begins[kind]
            found[kind] += [begin + h * wide + n for h in range(was.count) for n in range(dim)]
            begins[kind] += was.count * wide
    return found


def _decode(g: Graph, model: nn.Module, plan: Plan, given: dict[str, Var]) -> list[Var]:
    decoder, d_model = model.model.decoder, model.config.d_model
    table, x = _look_up(g, decoder, given)
    caches = [given[f"{kind}_cache"] for kind in KINDS]
    before = [g.op("read_state", input=x) for x in caches] if plan.stateful else caches
    past = _by_layers(g, before, decoder)
    kept, heard = [], []
    for i, layer in enumerate(decoder.layers):
        with g.scope(f"layers_{i}"):
            x, fresh, longer = _cached_attention(g, x, layer, past[i], given)
            kept.append(longer if plan.stateful else fresh)
            with g.scope("encoder_attn"):
                x, weights = _cross_attention(g, x, layer, given["encoder_output_embeds"])
            heard.append(weights)
            x = _feed_forward(g, x, layer)
    with g.scope("logits"):
        results = [table.logits(g.reshape(_norm(g, x, decoder.layer_norm), 1, 1, d_model))]
    with g.scope("caches"):
        both = [_joined(g, parts, caches[0].shape[1]) for parts in zip(*kept, strict=True)]
        if plan.stateful:
            for cache, value in zip(caches, both, strict=True):
                g.op("coreml_update_state", state=cache, value=value)
    with g.scope("alignment"):
        aligned = [ops.mean_weights(g, heard, plan.alignment)] if plan.alignment else []
    return [*results, *([] if plan.stateful else both), *aligned]


def _look_up(g: Graph, decoder: nn.Module, given: dict[str, Var]) -> tuple[Table, Var]:
    """The token table, and the token where it stands, in the graph's arrangement."""
    with g.scope("look_up"):
        table = _token_table(g, decoder.embed_tokens)
        positions = g.constant(array(decoder.embed_positions.weight))
        here = g.gather(positions, given["cache_length"], 0)
        x = g.add(table.look_up(given["input_ids"]), here)  # (1, d_model)
        one = (1, x.shape[1], 1, 1) if g.channels_first else (1, 1, x.shape[1])
        return table, g.reshape(x, *one)


def _token_table(g: Graph, table: nn.Module) -> Table:
    if hasattr(table, "rows"):
        rows, basis = array(table.rows.weight), array(table.up.weight.T)
        return ops.FactorisedTable(g, rows, basis, g.schemes.get(table.rows))
    return ops.TokenTable(g, array(table.weight), g.schemes.get(table))


def _by_layers(g: Graph, caches: Sequence[Var], decoder: nn.Module) -> list[tuple[Var, Var]]:
    """Keys and values of all layers -> those of each; what a cache has left over goes."""
    heads = [_heads(layer.self_attn, g.channels_first, cached=True) for layer in decoder.layers]
    widths = zip(*map(_cache_widths, heads), strict=True)
    parts = []
    for cache, sizes in zip(caches, widths, strict=True):
        left = cache.shape[1] - sum(sizes)
        parts.append(g.split(cache, [*sizes, left] if left else sizes, 1)[: len(sizes)])
    return list(zip(*parts, strict=True))


def _joined(g: Graph, parts: Sequence[Var], width: int) -> Var:
    """Keys or values of each layer as one, filled up with zeros to `width` channels."""
    left = width - sum(part.shape[1] for part in parts)
    zeros = [g.constant(np.zeros((1, left, *parts[0].shape[2:])))] if left else []
    return g.concat([*parts, *zeros], 1)


def _cached_attention(
    g: Graph, x: Var, layer: nn.Module, past: Sequence[Var], given: dict[str, Var]
) -> tuple[Var, list[Var], list[Var]]:
    """x behind self-attention, its new key and value, and all keys and values."""
    attention = _attention(g, layer.self_attn, cached=True)
    y = _norm(g, x, layer.self_attn_layer_norm)
    q, *fresh = (ops.linear(g, y, part) for part in (attention.q, attention.k, attention.v))
    fresh = [g.reshape(new, 1, int(np.prod(new.shape)), 1, 1) for new in fresh]
    here, mask = given["kv_cache_update_mask"], given["decoder_key_padding_mask"]
    here = g.reshape(here, 1, 1, *here.shape)
    longer = [ops.written(g, old, new, here) for old, new in zip(past, fresh, strict=True)]
    keys, values = longer
    y = ops.cached_attention(g, q, keys, values, mask, attention.heads)
    return g.add(x, ops.linear(g, y, attention.out)), fresh, longer


def _cross_attention(g: Graph, x: Var, layer: nn.Module, states: Var) -> tuple[Var, Var]:
    """x behind cross-attention, and the weights of its heads."""
    attention = _attention(g, layer.encoder_attn)
    q = ops.linear(g, _norm(g, x, layer.encoder_attn_layer_norm), attention.q)
    y, weights = ops.cross_attention(g, q, states, attention.k, attention.v, attention.heads)
    return g.add(x, ops.linear(g, y, attention.out)), weights


# ------------------------------------------------------------------------------- parts of a layer


@dataclass(frozen=True)
class Attention:
    """The linear layers of an attention as the graph has them; those of q include the scale."""

    q: list[Linear]
    k: list[Linear]
    v: list[Linear]
    out: list[Linear]
    heads: Heads


def _heads(attention: nn.Module, aligned: bool, cached: bool = False) -> Heads:
    """Heads filled up where they are to be aligned: keys and values alike where they are cached."""
    heads = heads_of(attention)
    if not aligned:
        return heads
    dims = heads.qk_dim, heads.v_dim
    qk, v = (max(dims), max(dims)) if cached else dims
    wide = (ops.aligned_dim(heads.count, dim) for dim in (qk, v))
    return replace(heads, **dict(zip(("qk_dim", "v_dim"), wide, strict=True)))


def _attention(g: Graph, attention: nn.Module, cached: bool = False) -> Attention:
    was, now = heads_of(attention), _heads(attention, g.channels_first, cached)
    q, k, v = chains(g.schemes, attention, "qkv")
    out = chain(g.schemes, attention.out_proj, was.count * was.v_dim)
    q = scaled(q, was.scale)
    if g.channels_first:
        q, k, v, out = (ops.aligned(g, part) for part in (q, k, v, out))
        q, k = (ops.more_outputs(part, was.qk_dim, now.qk_dim) for part in (q, k))
        v = ops.more_outputs(v, was.v_dim, now.v_dim)
        out = ops.more_inputs(g, out, was.v_dim, now.v_dim)
    return Attention(q, k, v, out, now)


def _feed_forward(g: Graph, x: Var, layer: nn.Module) -> Var:
    width = outputs_of(layer.fc1)
    fc1, fc2 = chain(g.schemes, layer.fc1, layer.embed_dim), chain(g.schemes, layer.fc2, width)
    with g.scope("feed_forward"):
        if g.channels_first:
            room = ops.aligned_dim(1, width)
            fc1 = ops.more_outputs(ops.aligned(g, fc1), width, room)
            fc2 = ops.more_inputs(g, ops.aligned(g, fc2), width, room)
        y = ops.gelu(g, ops.linear(g, _norm(g, x, layer.final_layer_norm), fc1))
        return g.add(x, ops.linear(g, y, fc2))


def _norm(g: Graph, x: Var, norm: nn.Module) -> Var:
    return ops.layer_norm(g, x, array(norm.weight), array(norm.bias), norm.eps)
