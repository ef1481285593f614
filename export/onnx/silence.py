"""Short clips: the silence after a clip in few encoder positions.

Whisper's encoder reads 30 s of sound, and most of a short clip's window is silence. Without it, the
text is unusable: tiny.en's WER rises from 9.5 to about 30 % with windows of 10 s. Here `stride`
positions of the silence at a time are computed as one, in the encoder and in the decoder's
cross-attention: log(stride) is added to its attention scores, and its encoding of the position is
the mean of theirs. This is the proportional attention of token merging (Bolya et al. 2022,
arXiv:2210.09461), which merges similar positions; here the positions are known in advance. Nothing
is trained.

    here      shape           meaning
    n                         positions of the clip, rounded up to a second, and of MARGIN after it
    firsts    (groups,)       first position of each group of silence: n, n + stride, ...
    weights   (T,)            0 for the first n positions, then the logarithm of each group's size

Log-mel features and convolutions are computed for n positions only. Silence has constant features,
so all its positions have the same output of the convolutions, and differ in their encoding of the
position. A window that is full is computed as before.

The mean matters. With the encoding of each group's middle position, the squared error of the
encoder states of speech is 2.7 % of their variance (tiny.en, 30 dev clips, stride 8); with the mean
it is 0.36 %.

With a stride of 8, an average clip of Common Voice (4.5 s) has 450 positions instead of 1500.
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

    def window_of(self, positions: int) -> int:
        """Return the shortest window that holds a clip of so many positions."""
        return min(-(-positions // UNIT) * UNIT, self.full)

    def mel_positions(self, window: int) -> int:
        """Return the positions whose log-mel features are computed."""
        return min(window + MARGIN, self.full)

    def positions(self, window: int) -> int:
        """Return the encoder positions of a window, T."""
        return len(self.sizes(self.mel_positions(window)))

    def spoken(self, mel_positions: int) -> int:
        """Return the positions that are computed one by one, n."""
        return mel_positions - min(EDGE, self.full - mel_positions)

    def sizes(self, mel_positions: int) -> list[int]:
        """Return the number of positions that each computed one stands for, (T,)."""
        n = self.spoken(mel_positions)
        groups = range(n, self.full, self.stride)
        return [1] * n + [min(self.stride, self.full - first) for first in groups]


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
    full = g.constant([silence.full])
    n = g.op("Shape", x, start=2, end=3)
    n = g.op("Sub", n, g.op("Min", g.op("Sub", full, n), g.constant([EDGE])))
    firsts = numbers(g, n, full, silence.stride)
    sizes = g.op("Min", g.op("Sub", full, firsts), g.constant(silence.stride))
    sizes = g.op("Cast", sizes, to=TensorProto.FLOAT)

    angles = encoder_positions(g, table, full)
    spoken = g.op("Slice", angles, g.constant([0]), n)
    means = group_means(g, angles, firsts, sizes, silence)
    # all positions of silence have the output of the last one before it
    silent = g.op("Expand", g.op("Sub", n, g.constant([1])), g.op("Shape", firsts))
    rows = g.op("Concat", numbers(g, g.constant([0]), n, 1), silent, axis=0)
    x = g.op("Gather", g.op("Transpose", x, perm=[0, 2, 1]), rows, axis=1)
    x = g.op("Add", x, g.op("Concat", spoken, means, axis=0))
    weights = g.op("Concat", g.op("Expand", g.constant(0.0), n), g.op("Log", sizes), axis=0)
    return x, weights


def numbers(g: Graph, first: str, end: str, step: int) -> str:
    """Return the numbers from `first` (1,) up to `end` (1,), in steps of `step`."""
    first, end = (g.op("Squeeze", x, g.constant([0])) for x in (first, end))
    return g.op("Range", first, end, g.constant(step))


def group_means(g: Graph, table: str, firsts: str, sizes: str, silence: Silence) -> str:
    """Return the mean row of the table (full, d_model) in each group of positions, (groups,
    d_model), given their first positions and sizes (groups,)."""
    members = g.op("Unsqueeze", firsts, g.constant([1]))
    members = g.op("Add", members, g.constant(list(range(silence.stride))))
    end = g.constant(silence.full)
    inside = g.op("Cast", g.op("Less", members, end), to=TensorProto.FLOAT)
    rows = g.op("Gather", table, g.op("Min", members, g.constant(silence.full - 1)), axis=0)
    rows = g.op("Mul", rows, g.op("Unsqueeze", inside, g.constant([2])))
    sums = g.op("ReduceSum", rows, g.constant([1]), keepdims=0)
    return g.op("Div", sums, g.op("Unsqueeze", sizes, g.constant([1])))
