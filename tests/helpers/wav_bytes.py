"""WAV files as bytes."""

from __future__ import annotations

import struct


def wav(rate=16_000, channels=1, bits=16, coding=1, data=b"\0\0" * 1600, size=None) -> bytes:
    """Return the bytes of a WAV file; arguments can make one part of it wrong."""
    block = channels * bits // 8
    header = struct.pack("<HHIIHH", coding, channels, rate, rate * block, block, bits)
    chunks = b"fmt " + struct.pack("<I", len(header)) + header
    chunks += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
