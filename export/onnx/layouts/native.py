"""The native layout: Whisper as two ONNX graphs for EdgeWhisper's own runner.

    encoder.onnx   pcm (1, samples) float32, 16 kHz
                   -> cross.{i}.key/value (1, heads, T + 32, width)
    decoder.onnx   input_ids (1, s) int64, s <= 32, past_length (1,) int32,
                   past.{i}.key/value (1, heads, room, width), cross.{i}.*
                   -> logits (1, 1, vocab) of the last position,
                      present.{i}.key/value, heard.{i}.key/value,
                      query.{i} (1, s, heads * qk_dim) of layers with alignment heads

`i` counts decoder layers. `samples` is one of the manifest's `windows_samples`, and T is the number
of encoder positions of that window; one graph serves all windows. If the model has one window, both
are fixed numbers. Head axes of the inputs are symbolic, those of the outputs fixed.

Short clips. With a silence stride, the windows are all whole seconds, and the encoder adds the
silence up to the model's window itself, in fewer positions (see silence.py). Its output cross.bias
(1, 1, 1, T) and the decoder's input of that name are their weights in cross-attention.

Caches. Keys and values are buffers with room for all positions, of which `past_length` are filled.
A caller binds one buffer as past.{i} and present.{i}, and one as cross.{i} and heard.{i}. Then
nothing is copied between steps; with separate buffers the results are the same. Head widths are
rounded up to a multiple of 8. In int8 the encoder's keys and values are int8 too, because reading
them is a large part of a step, and cross.{i}.key_scale and value_scale (heads * width,) are their
scales.

Word timestamps. query.{i} are the queries of the cross-attention, for every position. With the keys
cross.{i}.key they give the attention of the alignment heads. The graph computes these queries in
any case; outputs that a caller does not bind cost nothing. The manifest has the heads and the
scale.

Other files. tokens.json and the manifest's prompt and decoding rules are all that inference needs,
without a tokenizer library. The Hugging Face files are for tools that read them. Weights from
128 KiB on are in encoder.weights and decoder.weights, which the runtime maps into memory.

Precisions. fp32 keeps every weight. fp16 stores matrices and tables as float16, which the runtime
widens when it loads them. int8 quantises every matrix of the blocks per output channel and the tied
token table per token (its factors per row), with activations quantised at run time. The convolution
stem and the decoder's positions are stored as float16 and computed in float32; biases and norms
stay float32. int4 differs from int8 in the matrices of the blocks: 4 bits, with a scale per 32
inputs. The runtime widens those of the encoder to 8 bits when it loads them. The encoder's
positions are computed if they are Whisper's sinusoids. If the checkpoint names bits for a layer,
the table or the stem (see quantise.py), int8 and int4 use them: 4 bits in blocks, 8, 16 (computed
in float32) or 32. Nothing is stored twice, except by logits in two stages (see two_stage.py), which
add a smaller table. On x86 without VNNI, the int8 products of onnxruntime saturate unless the
session asks for exact ones; see constants.py.

Profiling. The front end is part of the encoder: its output is the tensor `log_mel` (1, n_mels,
frames), and the names of its nodes begin with `log_mel/`. Those of other parts begin with `stem/`,
`layers.{i}/`, `cross.{i}/`, `look_up/` and `logits/`; within a layer, `feed_forward/` or
`encoder_attn/` follows, and everything else is self-attention. To measure a part, run a graph with
SessionOptions.enable_profiling and add up the `dur` of the events of its nodes. onnxruntime
computes the whole graph whichever outputs are requested.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto
from torch import nn

from export.hub_files import save_configuration
from export.manifest import Contract, Spec
from export.onnx import blocks
from export.onnx.attention import (
    KINDS,
    SPARE,
    cached_attention,
    cross_attention,
    encoder_cache,
    ends,
    spare_mask,
)
from export.onnx.graph import Graph
from export.onnx.layers import float_table, joint_linear, linear, separate_linear
from export.onnx.log_mel import log_mel
from export.onnx.save import GraphParts, write_graph
from export.onnx.silence import Silence, placed, with_margin
from export.onnx.tables import TokenTable
from export.onnx.two_stage import two_stage_logits
from export.quantise import schemes
from export.shrink import windows_of
from export.tokens import write_tokens
from export.weights import Floats, alignment_heads, array, chain, chains, heads_of

BIAS = Spec("cross.bias", (1, 1, 1, "positions"))
"""Added to the scores of cross-attention, if silence takes fewer positions."""


def write(
    model: nn.Module,
    processor: Any,
    precision: str,
    out: Path,
    int8_cache: bool = True,
    moment: Floats | None = None,
    silence: Silence | None = None,
) -> Contract:
    """Write the layout's files and return the inputs and outputs of each graph. With `moment`,
    logits are computed in two stages; see two_stage.py. With `silence`, that after a clip takes
    fewer positions; see silence.py."""
    encoder = encoder_graph(model, processor.feature_extractor, precision, int8_cache, silence)
    decoder = decoder_graph(model, precision, int8_cache, moment, silence)
    contract = {
        "encoder": write_graph(encoder, out, "encoder"),
        "decoder": write_graph(decoder, out, "decoder"),
    }
    write_tokens(processor.tokenizer, model.config.vocab_size, out)
    save_configuration(model, processor, out)
    return contract


def encoder_graph(
    model: nn.Module,
    extractor: Any,
    precision: str,
    int8_cache: bool = True,
    silence: Silence | None = None,
) -> GraphParts:
    """Build the graph from PCM to the cross-attention's keys and values of every decoder layer."""
    g = Graph(precision, schemes(model), int8_cache, mapped=True)
    encoder = model.model.encoder
    windows, positions = windows_of(model.config), positions_of(model, silence)
    x, lengths, weights = "pcm", windows, None
    if silence is not None:
        x = with_margin(g, x, extractor.n_samples, silence)
        windows = [silence.mel_positions(window) for window in silence.windows]
        lengths = [silence.positions(window) for window in silence.windows]
    mel = log_mel(g, x, extractor, [2 * n for n in windows])
    with g.scope("stem"):
        if silence is None:
            x = blocks.stem(g, mel, encoder, positions)
        else:
            x = blocks.convolutions(g, mel, encoder)
            x, weights = placed(g, x, array(encoder.embed_positions.weight), silence)
    for i, layer in enumerate(encoder.layers):
        with g.scope(f"layers.{i}"):
            x = blocks.encoder_layer(g, x, layer, lengths, weights)
    with g.scope("layer_norm"):
        x = blocks.norm(g, x, encoder.layer_norm)
    outputs = []
    for i, layer in enumerate(model.model.decoder.layers):
        attention, heads = layer.encoder_attn, heads_of(layer.encoder_attn)
        dims = heads.qk_dim, heads.v_dim
        specs = _cross(model, i, g.int8_cache, heads.count, positions)
        with g.scope(f"cross.{i}"):
            both = separate_linear(g, x, chains(g.schemes, attention, "kv"))
            made = [encoder_cache(g, y, heads, dim) for y, dim in zip(both, dims, strict=True)]
        for value, spec in zip(sum(zip(*made, strict=True), ()), specs, strict=True):
            g.name(value, spec.name)
        outputs += specs
    if weights is not None:
        g.name(g.op("Reshape", weights, g.constant([1, 1, 1, -1])), BIAS.name)
        outputs.append(BIAS)
    one_window = isinstance(positions, int)
    return g, [Spec("pcm", (1, extractor.n_samples if one_window else "samples"))], outputs


def positions_of(model: nn.Module, silence: Silence | None) -> int | str:
    """Return the encoder's positions; a symbol if they differ between windows."""
    return blocks.positions_of(model) if silence is None else "positions"


def decoder_graph(
    model: nn.Module,
    precision: str,
    int8_cache: bool = True,
    moment: Floats | None = None,
    silence: Silence | None = None,
) -> GraphParts:
    """Build the graph from new tokens and the cache to the last token's logits and the longer
    cache."""
    g = Graph(precision, schemes(model), int8_cache, mapped=True)
    decoder = model.model.decoder
    with g.scope("look_up"):
        table = blocks.token_table(g, decoder.embed_tokens)
    length = g.op("Cast", "past_length", to=TensorProto.INT64)
    end = g.op("Add", length, g.op("Shape", "input_ids", start=1, end=2))
    with g.scope("look_up"):
        positions = float_table(g, array(decoder.embed_positions.weight))
        x = g.op("Add", table.look_up("input_ids"), g.op("Slice", positions, length, end))
    filled = g.op("Sub", g.op("Shape", "cross.0.key", start=2, end=3), g.constant([SPARE]))
    places = Places(
        own=ends(g, "input_ids", "past_length"),
        cross=ends(g, "input_ids", g.op("Cast", filled, to=TensorProto.INT32)),
        mask=spare_mask(g, "input_ids", filled, None if silence is None else BIAS.name),
    )
    aligned = {layer for layer, _ in alignment(model)["heads"]}
    for i, layer in enumerate(decoder.layers):
        with g.scope(f"layers.{i}"):
            x = _decoder_layer(g, x, layer, i, places, i in aligned)
    with g.scope("logits"):
        last = g.op("Slice", x, g.constant([-1]), g.constant([2**31 - 1]), g.constant([1]))
        x = blocks.norm(g, last, decoder.layer_norm)
        if moment is None:
            logits = table.logits(x)
        else:
            assert isinstance(table, TokenTable)  # see two_stage.suits
            logits = two_stage_logits(g, table, x, model, moment)
        g.name(logits, "logits")
    inputs, outputs = _decoder_contract(model, g.int8_cache, positions_of(model, silence))
    return g, inputs if silence is None else [*inputs, BIAS], outputs


@dataclass(frozen=True)
class Places:
    """Cache lengths of self-attention and of cross-attention, and the mask of the spare
    positions."""

    own: tuple[str, str]
    cross: tuple[str, str]
    mask: str


def _decoder_contract(
    model: nn.Module, int8: bool, positions: int | str
) -> tuple[list[Spec], list[Spec]]:
    inputs = [Spec("input_ids", (1, "s"), "int64"), Spec("past_length", (1,), "int32")]
    outputs = [Spec("logits", (1, 1, model.config.vocab_size))]
    for i, layer in enumerate(model.model.decoder.layers):
        inputs += _cache(model, f"past.{i}", f"heads_dec_{i}", layer.self_attn)
        inputs += _cross(model, i, int8, f"heads_enc_{i}", positions)
        outputs += _cache(model, f"present.{i}", heads_of(layer.self_attn).count, layer.self_attn)
        count = heads_of(layer.encoder_attn).count
        outputs += _cross(model, i, int8, count, positions, "heard")[:2]
    for i in sorted({layer for layer, _ in alignment(model)["heads"]}):
        heads = heads_of(model.model.decoder.layers[i].encoder_attn)
        outputs.append(Spec(f"query.{i}", (1, "s", heads.count * heads.qk_dim)))
    return inputs, outputs


def alignment(model: nn.Module) -> dict[str, Any]:
    """Return the alignment heads as [layer, head], the scale of their attention, and how late their
    word timestamps are in seconds, if known. If the generation config names no heads that exist,
    they are all heads of the upper half of the layers, as in OpenAI's Whisper."""
    layers = model.model.decoder.layers
    named = alignment_heads(model)
    delay_s = getattr(model.generation_config, "word_delay_s", None) if any(named) else None
    if not any(named):
        upper = range(len(layers) // 2, len(layers))
        named = [
            [*range(heads_of(layer.encoder_attn).count)] if i in upper else []
            for i, layer in enumerate(layers)
        ]
    heads = [[i, head] for i, chosen in enumerate(named) for head in chosen]
    return {
        "heads": heads,
        "scale": heads_of(layers[heads[0][0]].encoder_attn).scale,
        **({} if delay_s is None else {"delay_s": delay_s}),
    }


def _cache(model: nn.Module, name: str, heads: int | str, attention: nn.Module) -> list[Spec]:
    shape = (1, heads, model.config.max_target_positions, heads_of(attention).cache_dim)
    return [Spec(f"{name}.{kind}", shape) for kind in KINDS]


def _cross(
    model: nn.Module,
    layer: int,
    int8: bool,
    heads: int | str,
    positions: int | str,
    name: str = "cross",
) -> list[Spec]:
    """Return the specs of the encoder's keys and values for one decoder layer, and of int8
    scales."""
    attention = heads_of(model.model.decoder.layers[layer].encoder_attn)
    width = attention.cache_dim
    room = positions + SPARE if isinstance(positions, int) else "room"
    shape = (1, heads, room, width)
    specs = [Spec(f"{name}.{layer}.{kind}", shape, "int8" if int8 else "float32") for kind in KINDS]
    scales = [Spec(f"{name}.{layer}.{kind}_scale", (attention.count * width,)) for kind in KINDS]
    return specs + scales if int8 else specs


def _decoder_layer(
    g: Graph, x: str, layer: nn.Module, number: int, places: Places, aligned: bool
) -> str:
    attention = layer.self_attn
    y = blocks.norm(g, x, layer.self_attn_layer_norm)
    past, present = ([f"{time}.{number}.{kind}" for kind in KINDS] for time in ("past", "present"))
    qkv = joint_linear(g, y, chains(g.schemes, attention, "qkv"))
    y = cached_attention(g, qkv, past, present, places.own, heads_of(attention))
    x = g.op("Add", x, blocks.attention_output(g, y, attention, few_rows=True))

    with g.scope("encoder_attn"):
        x = _cross_attention(g, x, layer, number, places, aligned)
    return blocks.feed_forward(g, x, layer, few_rows=True)


def _cross_attention(
    g: Graph, x: str, layer: nn.Module, number: int, places: Places, aligned: bool
) -> str:
    attention = layer.encoder_attn
    y = blocks.norm(g, x, layer.encoder_attn_layer_norm)
    q = linear(g, y, chain(g.schemes, attention.q_proj, layer.embed_dim), few_rows=True)
    if aligned:
        q = g.name(q, f"query.{number}")
    kinds = (*KINDS, *(f"{kind}_scale" for kind in KINDS)) if g.int8_cache else KINDS
    cross = [f"cross.{number}.{kind}" for kind in kinds]
    heard = [f"heard.{number}.{kind}" for kind in KINDS]
    y = cross_attention(g, q, cross, heard, places.cross, heads_of(attention), places.mask)
    return g.op("Add", x, blocks.attention_output(g, y, attention, few_rows=True))
