"""Transcripts of several recordings by one checkpoint or artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgewhisper.transcription import recogniser


def transcripts(
    source: str, pcms: Iterable[np.ndarray], **options: Any
) -> Iterator[dict[str, Any]]:
    """Yield the transcript of each 16 kHz recording. Options are those of `recogniser`."""
    recognise = recogniser(source, **options)
    for pcm in pcms:
        yield recognise(pcm, lambda segment: None)
