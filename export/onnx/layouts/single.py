"""The layout without a decode loop in the caller: whisper.onnx.

    pcm (1, samples) float32, 16 kHz, up to a window
    prompt (1, p) int64, max_new_tokens () int64
    -> tokens (n,) int64, greedy, without prompt and end of text

Shorter audio is padded with silence to the shortest window of the model that holds it; longer audio
is cut at the longest. The prompt for the artifact's language is in manifest.json under `decoding`,
as is the largest `max_new_tokens` that the model has room for; more are not decoded. The decoding
rules are part of the graph: tokens that generation_config.json suppresses, always and at the
beginning, timestamps, and the end of text. tokens.json has the bytes of every token.

The loop is an ONNX Loop whose body is one decoder step. Its first iteration takes the whole prompt.
The encoder's keys and values are computed before the loop and read inside it. Those of the decoder
are carried from step to step and grow (the fixed caches of the native layout would be copied in
every iteration).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from export.manifest import Contract, Spec, decoding_rules
from export.onnx.attention import KINDS
from export.onnx.graph import Graph
from export.onnx.layouts import parts
from export.onnx.log_mel import log_mel
from export.onnx.save import GraphParts, write_graph
from export.prompt import timestamp_ids
from export.shrink import windows_of
from export.tokens import write_tokens
from export.weights import Heads

NAME = "whisper"


def write(model: nn.Module, processor: Any, precision: str, out: Path) -> Contract:
    """Write the graph and tokens.json into `out`; return the inputs and outputs of the graph."""
    made = whole_graph(model, processor.feature_extractor, precision)
    write_tokens(processor.tokenizer, model.config.vocab_size, out)
    return {NAME: write_graph(made, out, NAME)}


def whole_graph(model: nn.Module, extractor: Any, precision: str) -> GraphParts:
    """Build the graph from PCM and prompt to tokens."""
    g = parts.new_graph(model, precision)
    rules, vocab = decoding_rules(model), model.config.vocab_size
    lengths = [2 * n for n in windows_of(model.config)]  # in frames
    pcm = _window(g, "pcm", [n * extractor.hop_length for n in lengths])
    mel = log_mel(g, pcm, extractor, lengths)
    x = parts.encode(g, model, mel)
    cross = [parts.cross_caches(g, model, number, x) for number in parts.layers_of(model)]
    always = {*rules["suppress_tokens"], *timestamp_ids(model.generation_config, vocab)}
    biases = [
        parts.forbidden(g, sorted(ids), vocab)
        for ids in (always, always | {*rules["begin_suppress_tokens"]})
    ]
    turns = _turns(g, model.config.max_target_positions)
    carried = ["prompt", *_no_past(g, model)]
    body = _body(g, model, cross, biases, rules["eos"])
    names = [f"{name}.after" for name in ["ids", *_past_names(model)]]
    tokens = g.ops(
        "Loop", turns, g.constant(np.array(True)), *carried, outputs=[*names, "said"], body=body
    )[-1]
    _without_end(g, tokens, rules["eos"])
    inputs = [
        Spec("pcm", (1, "samples")),
        Spec("prompt", (1, "prompt_length"), "int64"),
        Spec("max_new_tokens", (), "int64"),
    ]
    return g, inputs, [Spec("tokens", ("new_tokens",), "int64")]


def _window(g: Graph, pcm: str, windows: list[int]) -> str:
    """Pad (1, samples) to the shortest window that holds them, or cut to the longest window."""
    pcm = g.op("Slice", pcm, g.constant([0]), g.constant([windows[-1]]), g.constant([1]))
    length = g.op("Shape", pcm, start=1, end=2)
    known = g.constant(windows)
    holds = g.op("GreaterOrEqual", known, length)
    chosen = g.op("ReduceMin", g.op("Where", holds, known, g.constant([windows[-1]])))
    chosen = g.op("Reshape", chosen, g.constant([1]))
    silence = g.op("Concat", g.constant([1]), g.op("Sub", chosen, length), axis=0)
    filled = g.op("Concat", pcm, g.op("ConstantOfShape", silence), axis=1)
    return g.op("Reshape", filled, g.constant([1, windows[0] if len(windows) == 1 else -1]))


def _turns(g: Graph, room: int) -> str:
    """Return the largest number of new tokens: as requested, and as there is room after the
    prompt."""
    length = g.op("Squeeze", g.op("Shape", "prompt", start=1, end=2), g.constant([0]))
    return g.op("Min", "max_new_tokens", g.op("Sub", g.constant(room), length))


def _past_names(model: nn.Module) -> list[str]:
    return [f"past.{i}.{kind}" for i in parts.layers_of(model) for kind in KINDS]


def _past_specs(model: nn.Module, time: str) -> list[Spec]:
    specs = []
    for number in parts.layers_of(model):
        heads = parts.own_heads(model, number)
        for kind, width in zip(KINDS, parts.widths(heads), strict=True):
            shape = (1, heads.count, f"{time}_length_{number}_{kind}", width)
            specs.append(Spec(f"{time}.{number}.{kind}", shape))
    return specs


def _no_past(g: Graph, model: nn.Module) -> list[str]:
    """Return keys and values of no positions for every layer."""
    caches = []
    for number in parts.layers_of(model):
        heads = parts.own_heads(model, number)
        shapes = ([1, heads.count, 0, width] for width in parts.widths(heads))
        caches += [g.op("ConstantOfShape", g.constant(shape)) for shape in shapes]
    return caches


def _body(g: Graph, model: nn.Module, cross: list[list[str]], biases: list[str], end: int) -> Any:
    """Build one iteration: ids and the cache to the likeliest token, which is the next iteration's
    ids."""
    b = parts.Branch(g, "step")
    start = b.op("Shape", "past.0.key", start=2, end=3)

    def attend_self(number: int, qkv: list[str], heads: Heads) -> str:
        past, present = (
            [f"{time}.{number}.{kind}" for kind in KINDS] for time in ("past", "present")
        )
        return parts.grown_attention(b, qkv, past, present, heads, start)

    def attend_cross(number: int, q: str, heads: Heads) -> str:
        return parts.attention(b, q, cross[number], heads)

    logits = parts.decode(
        b, model, "ids", start, attend_self, attend_cross, last=True
    )  # (1, 1, vocab)
    first = b.op("Equal", "turn", b.constant(0))
    bias = b.op("Where", first, biases[1], biases[0])
    b.ops("ArgMax", b.op("Add", logits, bias), outputs=["next_ids"], axis=-1, keepdims=0)
    token = b.ops("Reshape", "next_ids", b.constant([1]), outputs=["token"])[0]
    ended = b.op("Equal", token, b.constant([end]))
    b.ops("Not", b.op("Squeeze", ended, b.constant([0])), outputs=["goes_on"])
    inputs = [
        Spec("turn", (), "int64"),
        Spec("went_on", (), "bool"),
        Spec("ids", (1, "s"), "int64"),
        *_past_specs(model, "past"),
    ]
    outputs = [
        Spec("goes_on", (), "bool"),
        Spec("next_ids", (1, 1), "int64"),
        *_past_specs(model, "present"),
        Spec("token", (1,), "int64"),
    ]
    return b.subgraph(inputs, outputs)


def _without_end(g: Graph, tokens: str, end: int) -> None:
    """Reshape (n, 1) to (n,) and drop the end of text, which can only be the last token."""
    tokens = g.op("Reshape", tokens, g.constant([-1]))
    kept = g.op("Not", g.op("Equal", tokens, g.constant([end])))
    g.ops("Compress", tokens, kept, outputs=["tokens"], axis=0)
