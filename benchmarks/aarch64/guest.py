"""The program that runs under the emulator, and on this machine for comparison.

    python -m benchmarks.aarch64.guest ARTIFACT OUT WAV... --seconds 2 --tokens 8 --rounds 3

Each round encodes a window of noise and decodes the prompt and then forced tokens, with a mark
before each step. The plugin (count.c) counts instructions between marks; without it they do
nothing. OUT.npz gets the outputs of the first round, OUT.json the tokens of each clip. The program
needs numpy, onnxruntime and the runner.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from devices.runner.audio import SAMPLING_RATE, Pcm
from devices.runner.engines.sessions import Decoder, views
from devices.runner.machine.host import versions
from devices.runner.measure.profile import noise
from devices.runner.recognizer import Recognizer, Transcript

END, ENCODER, PROMPT, TOKEN = range(4)
"""Numbers of the marks: the stage that begins at the mark."""
FIRST_MARK = -7_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("artifact", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("clips", type=Path, nargs="*")
    parser.add_argument("--seconds", type=float)
    for name in ("--tokens", "--rounds"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    # the host has already checked the hashes; emulated, that would take longer than everything else
    recognizer = Recognizer(given.artifact, threads=1, guards=False, hashed=False)
    pcm = noise(round(given.seconds * SAMPLING_RATE))
    outputs = [window(recognizer, pcm, given.tokens) for _ in range(given.rounds)]
    np.savez(given.out.with_suffix(".npz"), **outputs[0])
    tokens = [recognizer.transcribe(path).tokens for path in given.clips]
    answer = {"tokens": tokens, "versions": versions()}
    given.out.with_suffix(".json").write_text(json.dumps(answer), encoding="utf-8")


def window(recognizer: Recognizer, pcm: Pcm, tokens: int) -> dict[str, Any]:
    """Encode and decode once; return the cross keys and values and the logits of all steps."""
    mark(ENCODER)
    decoder = recognizer.decoder_over(pcm, Transcript())
    mark(END)
    assert isinstance(decoder, Decoder)
    cross = {name: array.copy() for name, array in views(decoder.cross).items()}
    prompt = recognizer.rules.prompt
    logits: list[np.ndarray] = []
    for ids in [prompt, *[prompt[:1]] * tokens]:
        mark(TOKEN if logits else PROMPT)
        output = decoder(ids)
        mark(END)
        logits.append(output.copy())
    return {**cross, "logits": np.stack(logits)}


def mark(number: int) -> None:
    """Make the system call that the plugin recognises as a mark."""
    with suppress(OSError):  # there is no such process group
        os.getpgid(FIRST_MARK - number)


if __name__ == "__main__":
    main()
