"""Microbenchmark graphs of one operator each, which a device times.

The operators are those of the native graphs. A small operator is repeated in its graph, on inputs
and weights of its own, to make its time measurable. Operators of a token are repeated only twice:
in the decoder, too, each finds code and weights that have left the fastest caches (see
devices/runner/measure/probe.py). Sixteen repetitions took half the time per operator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from export.manifest import Spec
from export.onnx.attention import (
    SPARE,
    cached_attention,
    cross_attention,
    encoder_cache,
    ends,
    padded,
    self_attention,
    spare_mask,
)
from export.onnx.blocks import stem
from export.onnx.constants import own_constants
from export.onnx.graph import DTYPES, Graph
from export.onnx.layers import gelu, layer_norm, linear
from export.onnx.log_mel import log_mel
from export.onnx.operators import EMPTY, Operator, of_a_token, work
from export.onnx.tables import TokenTable
from export.weights import Heads, Linear

MOST_COPIES = 16
LARGE = 8e6
"""Multiply-accumulates and bytes that are enough for one graph."""
ROOM = 64
"""Smallest number of tokens that a decoder cache has room for."""

GRIDS: dict[str, list[tuple[int, ...]]] = {
    EMPTY: [(100,), (1,)],  # of a window, of a token
    "log_mel": [(200, 80), (600, 80), (1500, 80), (3000, 80), (3000, 128)],
    "stem": [(200, 80, 128), (600, 80, 128), (600, 80, 384), (3000, 80, 384), (1500, 128, 256)],
    "linear": [
        *[(100, 64, 64), (100, 128, 512), (300, 16, 128), (300, 128, 16), (300, 128, 128)],
        *[(300, 128, 512), (300, 512, 128), (300, 384, 384), (500, 384, 768), (500, 1536, 384)],
        *[(1500, 64, 384), (1500, 384, 64), (1500, 384, 384), (1500, 200, 600), (750, 768, 768)],
    ],
    "attention": [
        *[(100, 4, 32, 32), (300, 1, 32, 32), (300, 4, 32, 32), (300, 4, 16, 24), (300, 6, 64, 64)],
        *[(750, 3, 64, 64), (1500, 2, 64, 64), (1500, 6, 64, 64)],
    ],
    "norm": [(1, 64), (1, 384), (1, 1024), (100, 128), (300, 128), (1500, 384)],
    "gelu": [(1, 64), (1, 512), (1, 4096), (100, 512), (300, 512), (500, 1536)],
    "keys": [(100, 4, 32), (300, 2, 32), (300, 4, 32), (750, 6, 64), (1500, 6, 64)],
    "pad": [(1, 2, 16), (1, 4, 32), (1, 8, 64), (300, 4, 32), (1500, 6, 64)],
    "begin": [(100, 64), (300, 128), (1500, 384), (1500, 1024)],
    "product": [
        *[(16, 128), (64, 64), (128, 128), (128, 512), (512, 128), (384, 64), (384, 384)],
        *[(384, 1152), (384, 1536), (1536, 384), (768, 768), (768, 3072)],
    ],
    "past": [(32, 1, 32), (32, 4, 32), (32, 6, 64), (32, 12, 64), (128, 6, 64)],
    "cross": [(100, 4, 32), (300, 1, 32), (300, 4, 32), (750, 6, 64), (1500, 2, 64), (1500, 6, 64)],
    "logits": [(800, 32), (800, 128), (5000, 64), (5000, 384), (20000, 64), (20000, 384)],
}
"""Kind -> the sizes to measure."""


def grid() -> list[Operator]:
    """Return all operators to measure."""
    return [Operator(kind, sizes) for kind, all_ in GRIDS.items() for sizes in all_]


def copies(operator: Operator, precision: str) -> int:
    """Return how often an operator is repeated in its graph."""
    if operator.kind in (EMPTY, "log_mel", "stem", "begin"):
        return 1
    if of_a_token(operator):
        return 2
    return max(1, min(MOST_COPIES, int(LARGE / sum(work(operator, precision)))))


def write(folder: Path, name: str, operator: Operator, precision: str) -> None:
    """Write one microbenchmark to the file `name`.onnx."""
    g = Graph(precision)
    inputs: list[Spec] = []
    outputs: list[Spec] = []
    rng = np.random.default_rng(0)
    for number in range(copies(operator, precision)):
        probe = Probe(g, rng, number, inputs, outputs)
        BUILD[operator.kind](probe, *operator.sizes)
    model = g.model(name, inputs, outputs)
    own_constants(model)
    onnx.save(model, folder / f"{name}.onnx")


class Probe:
    """One operator in a graph, with its inputs and outputs."""

    def __init__(
        self,
        g: Graph,
        rng: np.random.Generator,
        number: int,
        inputs: list[Spec],
        outputs: list[Spec],
    ) -> None:
        self.g, self.rng, self.number = g, rng, number
        self.inputs, self.outputs = inputs, outputs

    def given(self, name: str, *shape: int, dtype: str = "float32") -> str:
        """Add an input and return its name."""
        self.inputs.append(Spec(name.format(self.number), shape, dtype))
        return self.inputs[-1].name

    def made(self, value: str, *shape: int | str, dtype: str = "float32") -> None:
        """Add an output, under the name the operator gave it or a new one."""
        own = value.startswith(("present.", "heard."))
        name = value if own else self.g.name(value, f"out.{len(self.outputs)}")
        self.outputs.append(Spec(name, shape, dtype))

    def weights(self, *shape: int) -> NDArray[np.float32]:
        return self.rng.standard_normal(shape, np.float32)


# ------------------------------------------------------------------------------ one of each kind


def _empty(p: Probe, rows: int) -> None:
    p.made(p.g.op("Add", p.given("x.{}", rows), p.g.constant(1.0)), rows)


def _log_mel(p: Probe, frames: int, bands: int) -> None:
    filters = np.abs(p.weights(201, bands))
    extractor = SimpleNamespace(n_fft=400, hop_length=160, mel_filters=filters)
    mel = log_mel(p.g, p.given("pcm.{}", 1, 160 * frames), extractor, [frames])
    p.made(mel, 1, bands, frames)


def _stem(p: Probe, frames: int, bands: int, width: int) -> None:
    encoder = SimpleNamespace(
        conv1=nn.Conv1d(bands, width, 3),
        conv2=nn.Conv1d(width, width, 3),
        embed_positions=nn.Embedding(frames // 2, width),
    )
    x = stem(p.g, p.given("mel.{}", 1, bands, frames), encoder, frames // 2)
    p.made(x, 1, frames // 2, width)


def _linear(p: Probe, rows: int, inputs: int, outputs: int) -> None:
    layer = Linear(p.weights(outputs, inputs), p.weights(outputs))
    y = linear(p.g, p.given("x.{}", 1, rows, inputs), [layer], few_rows=rows == 1)
    p.made(y, 1, rows, outputs)


def _product(p: Probe, inputs: int, outputs: int) -> None:
    _linear(p, 1, inputs, outputs)


def _attention(p: Probe, rows: int, heads: int, qk: int, v: int) -> None:
    sizes = {"q": qk, "k": qk, "v": v}
    q, k, v_ = [p.given(f"{name}.{{}}", 1, rows, heads * dim) for name, dim in sizes.items()]
    shape = Heads(heads, qk, v, qk**-0.5)
    p.made(self_attention(p.g, q, k, v_, shape), 1, rows, heads * v)


def _norm(p: Probe, rows: int, width: int) -> None:
    x = p.g.op("Add", *(p.given(f"{name}.{{}}", 1, rows, width) for name in "xy"))
    y = layer_norm(p.g, x, p.weights(width), p.weights(width), 1e-5)
    for value in (x, y):
        p.made(value, 1, rows, width)


def _gelu(p: Probe, rows: int, width: int) -> None:
    p.made(gelu(p.g, p.given("x.{}", 1, rows, width)), 1, rows, width)


def _keys(p: Probe, positions: int, heads: int, width: int) -> None:
    shape = Heads(heads, width, width, width**-0.5)
    x = p.given("x.{}", 1, positions, heads * width)
    codes, *scales = encoder_cache(p.g, x, shape, width)
    p.made(codes, 1, heads, positions + SPARE, width, dtype=_code(p.g))
    for scale in scales:
        p.made(scale, heads * width)


def _pad(p: Probe, rows: int, heads: int, width: int) -> None:
    x = p.given("x.{}", 1, rows, heads * (width - 1))
    p.made(padded(p.g, x, heads, width, width - 1), 1, rows, heads * width)


def _begin(p: Probe, positions: int, width: int) -> None:
    ids = p.given("input_ids", 1, 1, dtype="int64")
    length = p.given("past_length", 1, dtype="int32")
    table = TokenTable(p.g, p.weights(512, width))
    p.made(p.g.op("Add", table.look_up(ids), p.given("position", 1, 1, width)), 1, 1, width)
    filled = p.g.op("Cast", length, to=DTYPES["int64"])
    many = p.g.op("Add", filled, p.g.constant([positions]))
    p.made(spare_mask(p.g, ids, many), 1, 1, 1, "all")
    last, total = ends(p.g, ids, length)
    p.made(last, 1, dtype="int32")
    p.made(total, dtype="int32")


def _past(p: Probe, tokens: int, heads: int, width: int) -> None:
    _cached(p, "past", "present", tokens - 1, max(ROOM, tokens), heads, width)


def _cross(p: Probe, positions: int, heads: int, width: int) -> None:
    _cached(p, "cross", "heard", positions, positions + SPARE, heads, width)


def _cached(
    p: Probe, cache: str, after: str, filled: int, room: int, heads: int, width: int
) -> None:
    """Attend from one token to the `filled` positions of a cache, which is written in place."""
    g, shape = p.g, (1, heads, room, width)
    crosses = cache == "cross"
    dtype = _code(g) if crosses else "float32"
    past = [p.given(f"{cache}.{{}}.{kind}", *shape, dtype=dtype) for kind in ("key", "value")]
    if crosses and g.int8_cache:
        kinds = ("key_scale", "value_scale")
        past += [p.given(f"{cache}.{{}}.{kind}", heads * width) for kind in kinds]
    present = [f"{after}.{p.number}.{kind}" for kind in ("key", "value")]
    ends = (g.constant(np.array([filled], np.int32)), g.constant(np.array(filled + 1, np.int32)))
    q = p.given("q.{}", 1, 1, heads * width)
    how = Heads(heads, width, width, width**-0.5)
    if crosses:
        hidden = np.zeros((1, 1, 1, filled + 1), np.float32)
        hidden[..., -1] = -1e30
        y = cross_attention(g, q, past, present, ends, how, g.constant(hidden))
    else:
        k, v = (p.given(f"{name}.{{}}", 1, 1, heads * width) for name in "kv")
        y = cached_attention(g, [q, k, v], past, present, ends, how)
    p.made(y, 1, 1, heads * width)
    for name in present:
        p.made(name, *shape, dtype=dtype)


def _logits(p: Probe, tokens: int, width: int) -> None:
    table = TokenTable(p.g, p.weights(tokens, width))
    p.made(table.logits(p.given("x.{}", 1, 1, width)), 1, 1, tokens)


def _code(g: Graph) -> str:
    """Return the dtype of the encoder's keys and values."""
    return "int8" if g.int8_cache else "float32"


BUILD: dict[str, Callable[..., None]] = {
    EMPTY: _empty,
    "log_mel": _log_mel,
    "stem": _stem,
    "linear": _linear,
    "attention": _attention,
    "norm": _norm,
    "gelu": _gelu,
    "keys": _keys,
    "pad": _pad,
    "begin": _begin,
    "product": _product,
    "past": _past,
    "cross": _cross,
    "logits": _logits,
}
"""Kind -> the function that adds an operator of given sizes to a probe."""
