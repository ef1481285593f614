"""Whisper's log-mel front end as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from export.onnx.graph import Graph, in_pieces, pieces_of
from export.weights import Floats


def log_mel(g: Graph, pcm: str, extractor: Any, lengths: Sequence[int]) -> str:
    """Compute log-mel features: pcm (1, samples) -> (1, n_mels, samples / hop), named `log_mel`.

    A Hann-windowed DFT, mel filters (n_fft / 2 + 1, n_mels), log10, and a floor 8 below the
    maximum. `extractor` is a WhisperFeatureExtractor. `samples` must be one of `lengths` times the
    hop length, and n_fft a multiple of 4 (Whisper: 3000, 160 and 400).
    """
    n_fft, hop = extractor.n_fft, extractor.hop_length
    filters = _split_filters(extractor.mel_filters.T.astype(np.float32))
    pieces = pieces_of(n_fft, lengths)
    with g.scope("log_mel"):
        frames = _frames(g, pcm, n_fft, hop)
        mel = in_pieces(g, frames, pieces, lambda piece: _mel(g, piece, n_fft, filters))
        log = g.op("Log", g.op("Max", mel, g.constant(1e-10)))
        log10 = g.op("Mul", log, g.constant(1 / np.log(10)))
        largest = g.op("ReduceMax", log10, keepdims=1)
        log10 = g.op("Max", log10, g.op("Sub", largest, g.constant(8.0)))
        scaled = g.op("Mul", g.op("Add", log10, g.constant(4.0)), g.constant(0.25))
        return g.name(g.op("Unsqueeze", scaled, g.constant([0])), "log_mel")


def _mel(g: Graph, frames: str, n_fft: int, filters: Sequence[Floats]) -> str:
    """Return the power in mel bands, (n_mels, n), of frames (n_fft, n)."""
    halves = zip(filters, _power(g, frames, n_fft), strict=True)  # (n_fft / 4 + 1, n) each
    return g.op("Add", *(g.op("MatMul", g.constant(bands), power) for bands, power in halves))


def _frames(g: Graph, pcm: str, n_fft: int, hop: int) -> str:
    """Return overlapping frames as columns, (1, samples) -> (n_fft, samples / hop), mirrored at
    both ends.

    With the samples in columns of `hop`, frame f is column f on top of column f + 1, and so on. The
    DFT then takes whole rows, in steps of two or reversed, and nothing is copied sample by sample.
    The last frame of a centred transform is dropped, as in transformers.
    """
    pieces = -(-n_fft // hop)
    pads = g.constant([0, n_fft // 2, 0, (pieces - 1) * hop - n_fft // 2])
    rows = g.op("Reshape", g.op("Pad", pcm, pads, mode="reflect"), g.constant([-1, hop]))
    columns = g.op("Transpose", rows, perm=[1, 0])
    shifted = []
    for piece in range(pieces):
        end = [min(hop, n_fft - piece * hop), piece - pieces + 1 or 2**31 - 1]
        shifted.append(
            g.op("Slice", columns, g.constant([0, piece]), g.constant(end), g.constant([0, 1]))
        )
    return g.op("Concat", *shifted, axis=0)


def _power(g: Graph, frames: str, n_fft: int) -> tuple[str, str]:
    """Return the power spectrum at bins k and at bins n_fft / 2 - k, for k = 0 ... n_fft / 4.

    Two symmetries save three quarters of the products of a plain DFT. Cosine, sine and Hann window
    are even or odd about n_fft / 2, so samples n and n_fft - n are first added or subtracted. Bin
    n_fft / 2 - k has the cosines and sines of bin k with every second sign changed, so even and odd
    n are summed separately: their sum gives one bin, their difference the other.
    """
    half = n_fft // 2
    bins = n_fft // 4 + 1
    cosines, sines = [], []
    for first in (2, 1):  # even and odd n
        left = _rows(g, frames, first, half, 2)  # n
        right = _rows(g, frames, n_fft - first, half, -2)  # n_fft - n
        taps = np.arange(first, half, 2)
        odd = g.op("MatMul", _kernel(g, np.sin, taps, n_fft, bins), g.op("Sub", left, right))
        even = g.op("Add", left, right)
        if first == 2:  # the middle sample has no mirror image; the window removes sample 0
            even = g.op("Concat", even, _rows(g, frames, half, half + 1, 1), axis=0)
            taps = np.append(taps, half)
        cosines.append(g.op("MatMul", _kernel(g, np.cos, taps, n_fft, bins), even))
        sines.append(odd)
    low, high = ([g.op(kind, *part) for part in (cosines, sines)] for kind in ("Add", "Sub"))
    return _squared_length(g, *low), _squared_length(g, *high)


def _rows(g: Graph, x: str, start: int, end: int, step: int) -> str:
    return g.op("Slice", x, *(g.constant([value]) for value in (start, end, 0, step)))


def _squared_length(g: Graph, x: str, y: str) -> str:
    return g.op("Add", g.op("Mul", x, x), g.op("Mul", y, y))


def _kernel(g: Graph, wave: Callable, taps: NDArray, n_fft: int, bins: int) -> str:
    """Return wave(2 pi n k / n_fft) * hann(n) for n in `taps` and k < bins: (bins, taps) float32.
    The product is computed in float64 and rounded once. Only one period of the wave is stored; the
    runtime computes the matrix when it loads the graph (constant folding)."""
    angle = 2 * np.pi * np.arange(n_fft) / n_fft
    k = g.op("Range", g.constant(0), g.constant(bins), g.constant(1))
    turn = g.op("Mul", g.op("Unsqueeze", k, g.constant([1])), g.constant(taps))
    window = g.constant(0.5 - 0.5 * np.cos(angle[taps]))
    period = g.op("Gather", g.constant(wave(angle)), g.op("Mod", turn, g.constant(n_fft)))
    return g.op("Cast", g.op("Mul", period, window), to=TensorProto.FLOAT)


def _split_filters(filters: Floats) -> tuple[Floats, Floats]:
    """Split (n_mels, n_fft / 2 + 1) into columns of bins k and of bins n_fft / 2 - k, k <= n_fft /
    4. The middle bin is in both; its weight in the second is zero."""
    bins = filters.shape[1] // 2 + 1
    rising, falling = filters[:, :bins].copy(), filters[:, ::-1][:, :bins].copy()
    falling[:, -1] = 0
    return rising, falling
