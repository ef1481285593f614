"""Mutated inputs for all readers of external data: they read them or raise one of our errors."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from made_results import make_result
from other_forms import ctranslate2_arrays, model_bin

from benchmarks import result
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.sound import read_audio
from devices.device import DeviceProblem, Finished, run_runner
from devices.runner.audio import read_wav
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper import decoding, whisper
from export.manifest import decoding_rules
from export.problem import Problem

pytestmark = pytest.mark.slow

OURS = (Problem, RunnerProblem, DeviceProblem)
MUTATIONS = 200
ODD = (None, -1, 0, 2**31, 2**63, 1e308, "", "x" * 300, [], {}, True, [None], {"a": 1}, "\ud800")


def mutated(content: bytes, rng: np.random.Generator, within: int | None = None) -> bytes:
    """Return bytes with one to three faults in the first `within` bytes.

    A fault overwrites, deletes, duplicates, sets or clears bytes, or truncates the data.
    """
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        size = max(1, min(len(data), within or len(data)))
        place = int(rng.integers(size))
        length = int(rng.integers(1, 9))
        match int(rng.integers(6)):
            case 0:
                data[place : place + 1] = bytes([int(rng.integers(256))])
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[place : place + length]
            case 3:
                data[place : place + length] = b"\xff" * length
            case 4:
                data[place : place + length] = bytes(length)
            case 5 if rng.random() < 0.3:
                del data[place:]
    return bytes(data)


def mutated_json(value: Any, rng: np.random.Generator) -> Any:
    """Return the JSON value with one random entry replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return value
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.75:
            at = at[key]
            continue
        match int(rng.integers(4)):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[f"{key}x"] = at.pop(key)
            case 2 if isinstance(at[key], int):
                at[key] += int(rng.choice([-1, 1, 1000, -1000]))
            case _:
                at[key] = ODD[int(rng.integers(len(ODD)))]
        return value


def result_or_none(read: Callable[[], Any]) -> Any:
    """Return the result of a reader, or None if it raises one of our errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except OURS as error:
            assert str(error).strip()
            return None


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF", "W64", "RF64", "AU"])
def test_mutated_audio_headers(kind, clips, rng, tmp_path):
    soundfile.write(tmp_path / "a", read_manifest(clips)[0].pcm(), 16_000, format=kind)
    content = (tmp_path / "a").read_bytes()
    for number in range(MUTATIONS):
        (tmp_path / "b").write_bytes(mutated(content, rng, 100 if number % 2 else None))
        for strict in (True, False):
            pcm = result_or_none(lambda strict=strict: read_audio(tmp_path / "b", strict))
            if pcm is not None:
                assert np.isfinite(pcm).all()
                assert pcm.size
        result_or_none(lambda: read_wav(tmp_path / "b"))


@pytest.fixture
def checkpoint(digits, tmp_path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "name", ["generation_config.json", "config.json", "preprocessor_config.json"]
)
def test_mutated_checkpoint_configs(name, checkpoint, clips, rng):
    """An accepted config must also work in decoding and export, or be refused there."""
    pcm = read_manifest(clips)[0].pcm()
    stored = json.loads((checkpoint / name).read_text())
    for number in range(MUTATIONS):
        (checkpoint / name).write_text(json.dumps(mutated_json(stored, rng)))

        def read(thorough: bool = number % 10 == 0) -> None:
            model, processor = whisper.load(checkpoint), whisper.load_processor(checkpoint)
            decoding_rules(model)
            if thorough:
                decoding.transcribe(model, processor, [pcm], max_tokens=5)

        result_or_none(read)


def test_mutated_tokenizers(checkpoint, rng):
    path = checkpoint / "tokenizer.json"
    stored, content = json.loads(path.read_text()), path.read_bytes()
    for number in range(MUTATIONS):
        if number % 2:
            path.write_bytes(mutated(content, rng))
        else:
            path.write_text(json.dumps(mutated_json(stored, rng)))
        result_or_none(lambda: whisper.load_processor(checkpoint))


def test_mutated_safetensors_headers(checkpoint, rng):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(content, rng, header))
        result_or_none(lambda: whisper.load(checkpoint))


def test_mutated_ctranslate2_models(digits, checkpoint, rng, tmp_path):
    arrays = ctranslate2_arrays(whisper.load(digits))
    content = model_bin(arrays)
    folder = tmp_path / "ct2"
    folder.mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, folder)
    (folder / "config.json").write_text("{}")
    for _ in range(MUTATIONS):
        (folder / "model.bin").write_bytes(mutated(content, rng, 4000))
        result_or_none(lambda: whisper.load(folder))


def test_mutated_manifests(exported, clips, rng, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "artifact"))
    stored = json.loads((folder / "manifest.json").read_text())
    pcm = read_manifest(clips)[0].pcm()
    expected = Recognizer(exported, threads=1).transcribe(pcm).text
    unaffected = 0
    for _ in range(MUTATIONS):
        (folder / "manifest.json").write_text(json.dumps(mutated_json(stored, rng)))
        text = result_or_none(lambda: Recognizer(folder, threads=1).transcribe(pcm).text)
        unaffected += text == expected
    assert unaffected > 0


def test_mutated_results(rng, tmp_path):
    stored = make_result()
    for number in range(MUTATIONS):
        line = json.dumps(mutated_json(stored, rng)).encode()
        (tmp_path / "a.jsonl").write_bytes(mutated(line, rng) if number % 2 else line)
        result_or_none(lambda: result.read(tmp_path / "a.jsonl"))


def test_mutated_device_output(rng):
    answer = {"transcripts": [{"audio": "a.wav", "text": "one"}], "versions": {"numpy": "2"}}
    content = json.dumps(answer).encode() + b"\n"

    class Machine:
        name = python = "pi"

        def __init__(self, done: Finished) -> None:
            self.done = done

        def run(self, *command: Any, **options: Any) -> Finished:
            return self.done

    for _ in range(MUTATIONS):
        stdout = mutated(content, rng).decode("utf-8", errors="replace")
        done = Finished(
            int(rng.integers(-9, 3)), stdout, mutated(b"note: x\n", rng).decode(errors="replace")
        )
        result_or_none(lambda done=done: run_runner(Machine(done), ["check"]))
