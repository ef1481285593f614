"""Silero's voice activity detector, an optional model that finds speech in noise and music.

The package `silero-vad` (MIT licence) contains it as an ONNX graph of 1.2 MB. The graph is read
without importing the package, which would import torch. One call takes a block of frames:

    input (frames, 576): 32 ms of samples each, after the last 4 ms of the frame before
    h, c (1, 1, 128): the state of its LSTM, zero at the beginning of a window
    speech_probs (frames,): the probability of speech in each frame
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..interfaces import Pcm
from ..problem import RunnerProblem, running
from .sessions import open_session, session_options

PACKAGE, GRAPH = "silero_vad", "data/silero_vad_16k_sequence.onnx"
FRAME, CONTEXT, STATE = 512, 64, (1, 1, 128)
SPEECH = 0.5
"""Frames above this probability are speech; the default of Silero's own functions."""
MARGIN_FRAMES = 16
"""0.5 s on both sides of speech are kept, because the first and last sounds of a word are weak."""


class Voice:
    """The opened detector. Raises RunnerProblem if the package is not installed."""

    def __init__(self) -> None:
        self.path = graph_path()
        self.session = open_session(self.path, session_options(threads=1))

    def only_speech(self, pcm: Pcm) -> Pcm:
        """Return the samples of a window (samples,), with zeros where there is no speech."""
        speech = self.probabilities(pcm) > SPEECH
        wide = np.convolve(speech, np.ones(2 * MARGIN_FRAMES + 1), "full")
        kept = wide[MARGIN_FRAMES:-MARGIN_FRAMES] > 0
        return np.where(np.repeat(kept, FRAME)[: len(pcm)], pcm, np.float32(0))

    def probabilities(self, pcm: Pcm) -> npt.NDArray[np.float32]:
        """Return the probability of speech in each 32 ms of a window, (frames,)."""
        frames = np.zeros((-(-len(pcm) // FRAME), FRAME), np.float32)
        frames.reshape(-1)[: len(pcm)] = pcm
        before = np.zeros((len(frames), CONTEXT), np.float32)
        before[1:] = frames[:-1, -CONTEXT:]
        state = np.zeros(STATE, np.float32)
        inputs = {"input": np.concatenate([before, frames], axis=1), "h": state, "c": state}
        with running(self.path):
            speech: npt.NDArray[np.float32] = self.session.run(["speech_probs"], inputs)[0]
        return speech.reshape(-1)


def graph_path() -> Path:
    """Return the path of the installed graph."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(*(folders or [""])[:1]) / GRAPH
    if not path.is_file():
        raise RunnerProblem(
            "vad: the package silero-vad, version 6.2.3 or newer, is not installed",
            "run `pip install --no-deps silero-vad`, or leave it out",
        )
    return path
