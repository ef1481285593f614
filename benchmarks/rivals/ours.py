"""Run an artifact in this project's runner, by the same protocol as the rivals.

    python -m benchmarks.rivals.ours ARTIFACT CLIPS.json --threads 2 --tokens 64

It is the runner's own measurement (devices/runner/measure/bench.py) with a forced number of tokens.
A profiled run afterwards measures log-mel's share of the encoder graph. The cross keys and values
are computed in the encoder graph. The runner's guards against silence and loops are off, as in all
rivals.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rivals.protocol import Engine, forced, main
from devices.runner.audio import read_wav

if TYPE_CHECKING:
    from devices.runner.recognizer import Transcript

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Ours(Engine):
    """The runner's recognizer, whose transcripts contain the times."""

    imports = ("devices.runner.recognizer", "devices.runner.engines.sessions")
    packages = ("numpy", "onnxruntime")

    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        from devices.runner.recognizer import Recognizer

        super().__init__(model, threads, tokens)
        self.artifact, self.threads = model, threads
        self.recognizer = Recognizer(model, threads, guards=False)
        self.recognizer.rules = forced(self.recognizer.rules, tokens)
        self.done: list[Transcript] = []
        self.first: Path | None = None

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        self.first = self.first or path
        transcript = self.recognizer.transcribe(path, language=self.recognizer.known(language))
        self.done.append(transcript)
        return transcript.tokens, transcript.text

    def finish(self) -> None:
        """Split the graph's times into log-mel and encoder."""
        from devices.runner.measure.bench import mel_share, stages
        from devices.runner.recognizer import pad

        assert self.first is not None
        pcm = read_wav(self.first)[: self.recognizer.window_samples]
        window = pad(pcm, self.recognizer.windows)
        self.mel_share = mel_share(self.artifact, window, self.threads)
        timed = self.done[-len(self.watch.end_to_end_s) :]  # without the warm-up
        for stage, seconds in stages(timed, self.mel_share).items():
            setattr(self.watch, stage, seconds)


if __name__ == "__main__":
    sys.exit(main(Ours))
