"""The layout of sherpa-onnx: whisper-encoder{S}.onnx, whisper-decoder{S}.onnx, whisper-tokens.txt.

    encoder   mel (b, n_mels, frames)
              -> n_layer_cross_k, n_layer_cross_v (layers, b, T, width)
    decoder   tokens (b, s), in_n_layer_self_k_cache, in_n_layer_self_v_cache
              (layers, b, n_text_ctx, n_text_state), n_layer_cross_k, n_layer_cross_v, offset (1,)
              -> logits (b, s, vocab), out_n_layer_self_k_cache, out_n_layer_self_v_cache

S is empty in fp32, else `.fp16`, `.int8` or `.int4`. The caches of all layers are stacked: each
layer uses as many columns as its heads have, the rest is zero. `n_text_state` in the metadata is
the width of that stack, from which sherpa-onnx allocates its cache. The stack of the encoder's keys
and values has its own width, which sherpa-onnx passes on. All metadata are in the encoder, where
sherpa-onnx reads them.

How sherpa-onnx differs from Whisper, and what the graphs do about it:

- It feeds as many frames as the clip has, followed by zeros (1000 frames, or `tail_paddings`),
  3000 at most. Zeros are not silence, and Whisper was trained on whole windows. So the encoder
  accepts any number of frames, replaces frames of zeros by silence (the floor of this clip's
  log-mel), fills the window with silence, and drops what exceeds the window. A model with a
  window of 6 s processes the first 6 s; the amount of tail padding makes no difference.
- It suppresses no tokens, so the decoder does: those that generation_config.json suppresses,
  always or at the beginning, and timestamps, which the prompt forbids. Segment timestamps are
  therefore not available in this layout, nor the attention weights for token timestamps.
- It decodes at most 6 tokens per second of frames, including padding, and n_text_ctx / 2.
- Its log-mel frames are 5 ms later than Whisper's (kaldi's are centred at 10 t + 5 ms). No graph
  can undo that; an uncertain word may be transcribed differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from torch import nn

from export.layouts import suffix_for
from export.manifest import Contract, Spec, decoding_rules
from export.onnx.attention import KINDS, split_heads
from export.onnx.graph import Graph
from export.onnx.layouts import parts
from export.onnx.save import GraphParts, write_graph
from export.problem import Problem
from export.prompt import timestamp_ids
from export.tokens import token_bytes
from export.weights import Heads

NAME = "whisper"
SELF = ("in_n_layer_self_k_cache", "in_n_layer_self_v_cache")
CROSS = ("n_layer_cross_k", "n_layer_cross_v")
QUIET = -100.0
"""Below every value of a log-mel."""
FLOOR = -1.5
"""Log-mel of digital silence, (log10(1e-10) + 4) / 4."""
RANGE = 2.0
"""Largest difference between two log-mel values of a window: 8 / 4."""


def write(model: nn.Module, processor: Any, precision: str, out: Path) -> Contract:
    """Write both graphs and the tokens into `out`; return the inputs and outputs of each graph."""
    suffix = suffix_for("sherpa", precision)
    metadata_fields = metadata(model, processor.tokenizer)

    def add_metadata(made: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(made, metadata_fields)

    encoder, decoder = encoder_graph(model, precision), decoder_graph(model, precision)
    contract = {
        "encoder": write_graph(encoder, out, f"{NAME}-encoder", suffix, add_metadata),
        "decoder": write_graph(decoder, out, f"{NAME}-decoder", suffix),
    }
    rows = enumerate(token_bytes(processor.tokenizer, model.config.vocab_size))
    lines = [f"{token} {number}\n" for number, token in rows if token]
    (out / f"{NAME}-tokens.txt").write_text("".join(lines), encoding="ascii")
    return contract


# --------------------------------------------------------------------------------------- encoder


def encoder_graph(model: nn.Module, precision: str) -> GraphParts:
    """Build the graph from log-mel of any length to keys and values of all decoder layers."""
    g = parts.new_graph(model, precision)
    config, frames = model.config, 2 * model.config.max_source_positions
    x = parts.encode(g, model, _whole_window(g, "mel", config.num_mel_bins, frames))
    width = _width(model, parts.cross_heads)
    made = [parts.cross_projections(g, model, number, x) for number in parts.layers_of(model)]
    sizes = [_sizes(parts.cross_heads(model, number)) for number in parts.layers_of(model)]
    for side, name in enumerate(CROSS):
        _stack(g, [both[side] for both in made], [size[side] for size in sizes], width, name)
    shape = (len(made), "n_audio", config.max_source_positions, width)
    inputs = [Spec("mel", ("n_audio", config.num_mel_bins, "n_frames"))]
    return g, inputs, [Spec(name, shape) for name in CROSS]


def _whole_window(g: Graph, mel: str, n_mels: int, frames: int) -> str:
    """Replace frames of zeros by silence and pad or cut to `frames`: (b, n_mels, frames)."""
    mel = g.op("Slice", mel, g.constant([0]), g.constant([frames]), g.constant([2]))
    present = g.op("ReduceMax", g.op("Abs", mel), g.constant([1]), keepdims=1)  # (b, 1, n)
    present = g.op("Greater", present, g.constant(0.0))
    loudest = g.op("ReduceMax", g.op("Where", present, mel, g.constant(QUIET)), g.constant([1, 2]))
    silence = g.op("Max", g.op("Sub", loudest, g.constant(RANGE)), g.constant(FLOOR))  # (b, 1, 1)
    mel = g.op("Where", present, mel, silence)
    missing = g.op("Sub", g.constant([frames]), g.op("Shape", mel, start=2, end=3))
    batch = g.op("Shape", mel, start=0, end=1)
    shape = g.op("Concat", batch, g.constant([n_mels]), missing, axis=0)
    filled = g.op("Concat", mel, g.op("Expand", silence, shape), axis=2)
    return g.op("Reshape", filled, g.constant([0, n_mels, frames]))


# --------------------------------------------------------------------------------------- decoder


def decoder_graph(model: nn.Module, precision: str) -> GraphParts:
    """Build the graph from tokens and stacked caches to logits and caches with new keys and
    values."""
    g = parts.new_graph(model, precision)
    width = _width(model, parts.own_heads)
    new: tuple[list[str], list[str]] = ([], [])
    sizes = [_sizes(parts.own_heads(model, i)) for i in parts.layers_of(model)]

    def attend_self(number: int, qkv: list[str], heads: Heads) -> str:
        for made, part in zip(new, qkv[1:], strict=True):
            made.append(part)
        past = [
            split_heads(
                g, _layer(g, name, number, size, "offset"), heads.count, size // heads.count
            )
            for name, size in zip(SELF, sizes[number], strict=True)
        ]
        present = [f"present.{number}.{kind}" for kind in KINDS]
        return parts.grown_attention(g, qkv, past, present, heads, "offset")

    def attend_cross(number: int, q: str, heads: Heads) -> str:
        both = zip(CROSS, _sizes(heads), strict=True)
        caches = [
            split_heads(g, _layer(g, name, number, size), heads.count, size // heads.count)
            for name, size in both
        ]
        return parts.attention(g, q, caches, heads)

    logits = parts.decode(g, model, "tokens", "offset", attend_self, attend_cross)
    g.name(_without_suppressed(g, model, logits), "logits")
    for side, name in enumerate(SELF):
        fresh = _stack(g, new[side], [size[side] for size in sizes], width)
        _replaced(g, name, fresh, name.replace("in_", "out_", 1))
    return g, *_decoder_contract(model)


def _layer(g: Graph, cache: str, number: int, size: int, end: str = "") -> str:
    """Return one layer's columns of a stack up to a position: (layers, b, n, width) -> (b, end,
    size)."""
    end = end or g.constant([2**31 - 1])
    stop = g.op("Concat", g.constant([number + 1]), end, g.constant([size]), axis=0)
    part = g.op("Slice", cache, g.constant([number, 0, 0]), stop, g.constant([0, 2, 3]))
    return g.op("Squeeze", part, g.constant([0]))


def _stack(g: Graph, layers: Any, sizes: list[int], width: int, name: str = "") -> str:
    """Stack layers (b, n, size) of different sizes as (layers, b, n, width), padded with zeros."""
    wide = []
    for layer, size in zip(layers, sizes, strict=True):
        if size < width:
            layer = g.op("Pad", layer, g.constant([0, 0, 0, 0, 0, width - size]))
        wide.append(g.op("Unsqueeze", layer, g.constant([0])))
    stacked = g.op("Concat", *wide, axis=0)
    return g.name(stacked, name) if name else stacked


def _replaced(g: Graph, cache: str, fresh: str, name: str) -> str:
    """Return the cache with `fresh` written from position `offset` on, for all layers at once."""
    axis, end = g.constant([2]), g.constant([2**31 - 1])
    stop = g.op("Add", "offset", g.op("Shape", fresh, start=2, end=3))
    before = g.op("Slice", cache, g.constant([0]), "offset", axis)
    after = g.op("Slice", cache, stop, end, axis)
    return g.name(g.op("Concat", before, fresh, after, axis=2), name)


def _without_suppressed(g: Graph, model: nn.Module, logits: str) -> str:
    """Return logits with -inf for suppressed tokens: always, and for more of them at the
    beginning."""
    rules, vocab = decoding_rules(model), model.config.vocab_size
    always = [*rules["suppress_tokens"], *timestamp_ids(model.generation_config, vocab)]
    first = [*always, *rules["begin_suppress_tokens"]]
    bias = parts.forbidden(g, sorted(set(always)), vocab)
    if set(first) != set(always):
        begins = g.op("Equal", "offset", g.constant([0]))
        bias = g.op("Where", begins, parts.forbidden(g, sorted(set(first)), vocab), bias)
    return g.op("Add", logits, bias)


def _decoder_contract(model: nn.Module) -> tuple[list[Spec], list[Spec]]:
    config, layers = model.config, len(model.model.decoder.layers)
    own = (layers, "n_audio", config.max_target_positions, _width(model, parts.own_heads))
    cross = (layers, "n_audio", config.max_source_positions, _width(model, parts.cross_heads))
    inputs = [
        Spec("tokens", ("n_audio", "n_tokens"), "int64"),
        *(Spec(name, own) for name in SELF),
        *(Spec(name, cross) for name in CROSS),
        Spec("offset", (1,), "int64"),
    ]
    outputs = [Spec("logits", ("n_audio", "n_tokens", config.vocab_size))]
    return inputs, [*outputs, *(Spec(name.replace("in_", "out_", 1), own) for name in SELF)]


def _sizes(heads: Heads) -> tuple[int, int]:
    """Columns of one layer's keys and of its values."""
    keys, values = parts.widths(heads)
    return heads.count * keys, heads.count * values


def _width(model: nn.Module, heads_of: Any) -> int:
    """Return the number of columns of the widest layer."""
    return max(max(_sizes(heads_of(model, number))) for number in parts.layers_of(model))


# -------------------------------------------------------------------------------------- metadata


def metadata(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """Return the metadata that sherpa-onnx reads from an encoder, ids and sizes, as text."""
    config, generation = model.config, model.generation_config
    languages = getattr(generation, "lang_to_id", None) or {}
    ids = {name: _id(tokenizer, token) for name, token in SPECIAL.items()}
    multilingual = bool(getattr(generation, "is_multilingual", False))
    rules = decoding_rules(model)
    prompt = [number for number in rules["prompt"] if number != ids["no_timestamps"]]
    metadata_fields: dict[str, Any] = {
        "model_type": f"whisper-{NAME}",
        "version": 1,
        "maintainer": "edgewhisper",
        "n_mels": config.num_mel_bins,
        "n_audio_ctx": config.max_source_positions,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": len(model.model.encoder.layers),
        "n_vocab": config.vocab_size,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": _width(model, parts.own_heads),
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": len(model.model.decoder.layers),
        "sot_sequence": _joined(prompt),
        "all_language_tokens": _joined(languages.values()),
        "all_language_codes": ",".join(token.strip("<|>") for token in languages),
        **ids,
        "sot_index": 0,
        "eot": rules["eos"],
        "blank_id": _blank(tokenizer),
        "is_multilingual": int(multilingual),
        "non_speech_tokens": _joined(generation.suppress_tokens or []),
    }
    return {name: str(value) for name, value in metadata_fields.items()}


SPECIAL = {
    "sot": ("<|startoftranscript|>",),
    "translate": ("<|translate|>",),
    "transcribe": ("<|transcribe|>",),
    "sot_lm": ("<|startoflm|>",),
    "sot_prev": ("<|startofprev|>",),
    "no_speech": ("<|nospeech|>", "<|nocaptions|>"),
    "no_timestamps": ("<|notimestamps|>",),
}
"""Name in the metadata -> names of the token; later tokenizers renamed one."""


def _id(tokenizer: Any, names: tuple[str, ...]) -> int:
    known = tokenizer.get_vocab()
    for name in names:
        if name in known:
            return int(known[name])
    raise Problem(
        f"the tokenizer has no {names[0]}, which sherpa-onnx needs",
        hint="export with --layout native, transformers or single",
    )


def _blank(tokenizer: Any) -> int:
    """Return the token of a space, which GPT-2's byte alphabet writes as Ġ."""
    return int(tokenizer.get_vocab()["Ġ"])


def _joined(ids: Any) -> str:
    return ",".join(str(number) for number in ids)
