"""Short clips: the silence after a clip in few encoder positions.

Whisper's encoder reads 30 s of sound, and most of a short clip's window is silence. Without it, the
text is unusable: tiny.en's WER rises from 9.5 to about 30 % with windows of 10 s. Here only every
`stride`-th position of the silence is computed, and stands for those that are left out: log(stride)
is added to its attention scores, in the encoder and in the decoder's cross-attention. This is the
proportional attention of token merging (Bolya et al. 2022, arXiv:2210.09461), which merges similar
positions; here the positions are known in advance. Nothing is trained.

    here      shape    meaning
    n                  positions of the clip, rounded up to a second, and of MARGIN after it
    places    (T,)     positions that are computed: 0 ... n - 1, then every stride-th one
    weights   (T,)     0 for the first n positions, then the logarithm of the number that each
                       stands for

Log-mel features and convolutions are computed for n positions only. Silence has constant features,
so all its positions have the same output of the convolutions, and differ in their encoding of the
position. A window that is full is computed as before.

With a stride of 8, an average clip of Common Voice (4.5 s) has 450 positions instead of 1500. The
number of wrong words does not rise: on 596 clips, tiny.en in int8 has 505 of 6552 without a stride,
499 with a stride of 4, and 497 with 8.
"""

from __future__ import annotations

from typing import NamedTuple

from onnx import TensorProto
from torch import nn

from export.layouts import NATIVE
from export.onnx.graph import Graph
from export.onnx.tables import encoder_positions
from export.problem import Problem
from export.shrink import windows_of
from export.weights import Floats

DEFAULT = 8
"""The stride of an export in int8 or int4, for windows of LONG positions."""
LONG = 1500
UNIT = 50
"""Windows are multiples of so many encoder positions (1 s)."""
MARGIN = 50
"""Positions of silence after the window that are computed like speech, because the encoder marks
the end of speech there."""
EDGE = 2
"""Last positions that are left out: their convolutions reach beyond the samples."""


class Silence(NamedTuple):
    """Where the silence begins, and how much of it is computed. `full` are the positions of the
    whole window."""

    full: int
    stride: int

    @property
    def windows(self) -> list[int]:
        """Window lengths in encoder positions, ascending."""
        return [*range(UNIT, self.full, UNIT), self.full]

    def mel_positions(self, window: int) -> int:
        """Return the positions whose log-mel features are computed."""
        return min(window + MARGIN, self.full)

    def positions(self, window: int) -> int:
        """Return the encoder positions of a window, T."""
        n = self.mel_positions(window)
        n -= min(EDGE, self.full - n)
        return n + len(range(n + self.offset, self.full, self.stride))

    @property
    def offset(self) -> int:
        """Positions from the first of a group to the one that is computed."""
        return (self.stride - 1) // 2


def default_stride(model: nn.Module, precision: str, layout: str) -> int:
    """Return the silence stride that suits a model: DEFAULT for OpenAI's window in int8 and int4,
    whose texts differ from those of the checkpoint in any case."""
    rounded = layout == NATIVE and precision in ("int8", "int4")
    return DEFAULT if rounded and windows_of(model.config) == [LONG] else 1


def silence_of(model: nn.Module, layout: str, stride: int) -> Silence | None:
    """Return how the silence after a clip is computed; None for a stride of 1, all positions."""
    if stride == 1:
        return None
    windows = windows_of(model.config)
    if stride < 1 or layout != NATIVE or len(windows) > 1 or windows[0] <= UNIT:
        raise Problem(
            f"silence stride {stride}: layout {layout}, windows of {windows} encoder positions; it "
            f"needs a stride of at least 1, the native layout and one window of more than {UNIT}",
            hint="leave --silence-stride out; a model with short windows does not need it",
        )
    return Silence(windows[0], stride)


def with_margin(g: Graph, pcm: str, samples: int, silence: Silence) -> str:
    """Pad a window, (1, window), with silence of MARGIN, up to the full window of `samples`."""
    margin = MARGIN * samples // silence.full
    missing = g.op("Sub", g.constant([samples]), g.op("Shape", pcm, start=1, end=2))
    pads = g.op("Concat", g.constant([0, 0, 0]), g.op("Min", missing, g.constant([margin])), axis=0)
    return g.op("Pad", pcm, pads)


def placed(g: Graph, x: str, table: Floats, silence: Silence) -> tuple[str, str]:
    """Add the positions to the output of the convolutions, (1, d_model, n).

    Returns states (1, T, d_model) and the weights (T,).
    """
    full, stride = g.constant([silence.full]), g.constant(silence.stride)
    n = g.op("Shape", x, start=2, end=3)
    n = g.op("Sub", n, g.op("Min", g.op("Sub", full, n), g.constant([EDGE])))
    spoken = count(g, g.constant(0), n, g.constant(1))
    first = g.op("Add", n, g.constant([silence.offset]))
    silent = count(g, g.op("Squeeze", first, g.constant([0])), full, stride)
    places = g.op("Concat", spoken, silent, axis=0)
    # all positions of silence have the output of the last one
    rows = g.op("Min", places, g.op("Sub", n, g.constant([1])))
    x = g.op("Gather", g.op("Transpose", x, perm=[0, 2, 1]), rows, axis=1)
    angles = g.op("Gather", encoder_positions(g, table, full), places, axis=0)
    return g.op("Add", x, angles), weights(g, n, silent, full)


def count(g: Graph, first: str, end: str, step: str) -> str:
    """Return the numbers from `first` () up to `end` (1,), in steps of `step` ()."""
    return g.op("Range", first, g.op("Squeeze", end, g.constant([0])), step)


def weights(g: Graph, n: str, silent: str, full: str) -> str:
    """Return the weights (T,): `n` (1,) zeros, then those of the positions `silent`."""
    number = g.op("Shape", silent)
    left, some = g.op("Sub", full, n), g.op("Max", number, g.constant([1]))
    left, some = (g.op("Cast", x, to=TensorProto.FLOAT) for x in (left, some))
    each = g.op("Log", g.op("Max", g.op("Div", left, some), g.constant(1.0)))  # 0 without silence
    parts = g.op("Expand", g.constant(0.0), n), g.op("Expand", each, number)
    return g.op("Concat", *parts, axis=0)
