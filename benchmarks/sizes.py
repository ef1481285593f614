"""Published dimensions of the Whisper models (Radford et al. 2022, arXiv:2212.04356).

edgewhisper/checkpoints/openai.py has the same dimensions, which must not be imported here; a test
holds both equal.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 64
"""Width of an attention head in all Whisper models."""


@dataclass(frozen=True)
class Size:
    """The dimensions of a model with as many decoder layers as encoder layers."""

    width: int
    layers: int
    mels: int = 80
    vocabulary: int = 51_865


SIZES = {
    "tiny": Size(384, 4),
    "base": Size(512, 6),
    "small": Size(768, 12),
    "medium": Size(1024, 24),
    "large-v3": Size(1280, 32, mels=128, vocabulary=51_866),
}
