"""Whisper's log-mel front end as MIL operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.coreml.graph import Graph, Var
from export.coreml.layers import stored
from export.weights import Floats


def log_mel(g: Graph, pcm: Var, extractor: Any) -> Var:
    """Compute log-mel features in float32: pcm (samples,) -> (1, n_mels, samples / hop). A
    Hann-windowed DFT as a convolution, mel filters, log10, and a floor 8 below the maximum."""
    n_fft, hop, (samples,) = extractor.n_fft, extractor.hop_length, pcm.shape
    bins = n_fft // 2 + 1
    # mirrored at both ends; the last frame of a centred transform is dropped, as in transformers
    pad = [0, 0, 0, 0, n_fft // 2, n_fft // 2 - hop]
    x = g.op("pad", x=g.reshape(pcm, 1, 1, samples), pad=pad, mode="reflect")
    x = g.op("conv", x=x, weight=stored(g, _waves(n_fft)), strides=[hop], pad_type="valid")
    cosines, sines = g.split(g.mul(x, x), [bins, bins], 1)  # (1, bins, frames)
    filters = g.constant(extractor.mel_filters.T[None])  # (1, n_mels, bins)
    mel = g.op("maximum", x=g.matmul(filters, g.add(cosines, sines)), y=np.float32(1e-10))
    log10 = g.mul(g.op("log", x=mel), 1 / float(np.log(10)))
    largest = g.op("reduce_max", x=log10, axes=[1, 2], keep_dims=True)
    log10 = g.op("maximum", x=log10, y=g.add(largest, -8.0))
    return g.mul(g.add(log10, 4.0), 0.25)


def _waves(n_fft: int) -> Floats:
    """Return hann(n) cos(2 pi k n / n_fft) for k = 0 ... n_fft / 2, then sines: (n_fft + 2, 1,
    n_fft). The products are computed in float64 and rounded once."""
    n, k = np.arange(n_fft), np.arange(n_fft // 2 + 1)[:, None]
    angle = 2 * np.pi * (k * n % n_fft) / n_fft
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft)
    return (np.concatenate([np.cos(angle), np.sin(angle)]) * hann)[:, None].astype(np.float32)
