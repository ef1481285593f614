"""Write clips as the WAV files and JSON lists that device programs read."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.speech.clips import Clip
from devices.device import Device
from devices.runner.audio import SAMPLING_RATE
from export.prompt import language_code


def push_clips(clips: Sequence[Clip], device: Device) -> float:
    """Push clips into the device's folder `clips`; return their total duration in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        audio_s = write_clips(clips, Path(folder))
        device.push(Path(folder), "clips")
    return audio_s


def write_clips(clips: Sequence[Clip], folder: Path) -> float:
    """Write clips into a folder and return their total duration in seconds.

    The folder gets one 16 kHz float WAV file per clip, their names in clips.json and the language
    code of each clip, which sets the model's prompt, in languages.json.
    """
    names = [f"{index:05}.wav" for index in range(len(clips))]
    samples = 0
    for clip, name in zip(clips, names, strict=True):
        pcm = clip.pcm()
        samples += len(pcm)
        (folder / name).write_bytes(float_wav(pcm))
    (folder / "clips.json").write_text(json.dumps(names), encoding="utf-8")
    languages = [language_code(clip.lang) for clip in clips]
    (folder / "languages.json").write_text(json.dumps(languages), encoding="utf-8")
    return samples / SAMPLING_RATE


def float_wav(pcm: np.ndarray) -> bytes:
    """Return samples (n,) as a WAV file of 32-bit floats; equal samples give equal bytes.

    libsndfile stores the time of writing in the file, so devices would copy it for every bench.
    """
    data = pcm.astype("<f4").tobytes()
    wave = struct.pack("<HHIIHHH", 3, 1, SAMPLING_RATE, 4 * SAMPLING_RATE, 4, 32, 0)
    chunks = {b"fmt ": wave, b"fact": struct.pack("<I", len(pcm)), b"data": data}
    body = b"".join(name + struct.pack("<I", len(chunk)) + chunk for name, chunk in chunks.items())
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body
