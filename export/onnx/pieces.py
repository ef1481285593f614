"""Computation in pieces: wide intermediate values are computed for some positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from export.onnx.graph import Graph

PIECE_BYTES = 2**21
"""Target size of a wide intermediate value (audio frames, hidden units). Measured for hidden units
on whisper-tiny: the peak memory is 16 MB lower and the time 2 to 4 % shorter."""


def in_pieces(g: Graph, x: str, pieces: int, compute: Callable[[str], str], axis: int = 1) -> str:
    """Apply `compute` to `pieces` parts of x along `axis` one after the other and join the
    results.
    """
    if pieces == 1:
        return compute(x)
    parts = g.ops("Split", x, outputs=pieces, axis=axis, num_outputs=pieces)
    return g.op("Concat", *(compute(part) for part in parts), axis=axis)


def pieces_of(width: int, lengths: Sequence[int]) -> int:
    """Return the number of pieces for `width` floats per position and windows of these lengths.

    Split rounds the length of a piece up; the number is chosen so that no piece is empty in any
    window.
    """
    most = -(-4 * width * max(lengths) // PIECE_BYTES)
    return next(n for n in range(most, 0, -1) if all(-(-m // -(-m // n)) == n for m in lengths))
