"""Run artifacts in the runtimes that their layouts are for, and compare texts: `make interop`.

Exports three checkpoints in every layout and precision: the embedded one; one pruned so that no two
layers have the same shape; and that one with its decoder merged into one layer, low rank in the
encoder and a factorised token table. Then each runtime, in an environment of its own, transcribes
the same clips.
In fp32 every text must be what the checkpoint itself says. In int8 it must be what the artifact
says in plain onnxruntime under EdgeWhisper's own loop; that this is close to the checkpoint is the
business of export's gate, which these exports do not pass through. sherpa-onnx is compared on its
own frames (kaldi_mel.py): they differ from Whisper's, so a word in doubt may too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import torch

from benchmarks.reference_runtimes import Sherpa, open_artifact
from benchmarks.speech.clips import read_manifest
from devices.runner.audio import read_wav
from edgewhisper import decoding, pipeline, shipped, whisper
from export.onnx.to_onnx import export_onnx

HERE = Path(__file__).parent
ONE_WINDOW, DEFAULT = "600", "-1"
"""Frames of sherpa-onnx's tail padding: one window of the embedded model's, and its own choice."""


def commands(where: Path, layout: str, artifact: Path) -> dict[str, list[str | Path]]:
    """Name -> command of every runtime that takes a layout; clips are to be appended."""
    optimum, sherpa = where / "optimum/bin/python", where / "sherpa/bin/python"
    modules, script = where / "js/node_modules", HERE / "run_transformers_js.mjs"
    return {
        "transformers": {
            "optimum, merged": [optimum, HERE / "run_optimum.py", artifact, "merged"],
            "optimum, unmerged": [optimum, HERE / "run_optimum.py", artifact, "unmerged"],
            "transformers.js": ["node", script, modules / "@huggingface/transformers", artifact],
            "transformers.js 3": ["node", script, modules / "transformers-3", artifact],
        },
        "sherpa": {
            "sherpa-onnx": [sherpa, HERE / "run_sherpa.py", artifact, ONE_WINDOW],
            "sherpa-onnx, its own tail": [sherpa, HERE / "run_sherpa.py", artifact, DEFAULT],
        },
        "single": {"onnxruntime": [optimum, HERE / "run_single.py", artifact]},
    }[layout]


SPARE_HEADS = {
    "encoder.layers.0.self_attn": 1,
    "encoder.layers.1.self_attn": 0,
    "decoder.layers.0.encoder_attn": 2,
    "decoder.layers.1.self_attn": 0,
}
"""Heads that the embedded model can do without, tried on the shipped clips."""


@torch.no_grad()
def irregular(source: Path, out: Path) -> Path:
    """The embedded checkpoint without its spare heads and its weakest units: the layers of a stack
    have different shapes, and what it says is still worth comparing."""
    model = whisper.load(str(source))
    for name, head in SPARE_HEADS.items():
        attention = model.model.get_submodule(name)
        width = attention.out_proj.in_features // attention.num_heads
        attention.out_proj.weight[:, head * width : (head + 1) * width] = 0
    for number, layer in enumerate([*model.model.encoder.layers, *model.model.decoder.layers]):
        units = layer.fc1.weight.norm(dim=1) * layer.fc2.weight.norm(dim=0)
        layer.fc2.weight[:, units.argsort()[: 8 + 8 * number]] = 0
    whisper.save(model, whisper.load_processor(str(source)), out, {})
    return out


def merged(source: Path, out: Path) -> Path:
    """An irregular checkpoint after the recipe merged.toml: some minutes of training."""
    speech = shipped.SPEECH
    clips = speech / "train.jsonl", speech / "dev.jsonl"
    request = pipeline.Request(str(source), str(HERE / "merged.toml"), *clips, out)
    return pipeline.compress(request, lambda text: None)


def write_clips(folder: Path, count: int) -> list[Path]:
    """The first of the shipped test clips as WAV files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for clip in read_manifest(shipped.SPEECH / "test.jsonl")[:count]:
        path = folder / f"{clip.audio.stem}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((clip.pcm() * 32767).round().astype("<i2").tobytes())
        paths.append(path)
    return paths


def export(source: Path, out: Path, precision: str, layout: str) -> None:
    """As `edgewhisper export`, but for the gate: a model that int8 costs a word or two will do."""
    model, processor, _ = pipeline.load_for(layout, str(source))
    export_onnx(model, processor, out, precision, layout=layout)


def run(command: Sequence[str | Path], clips: Sequence[Path]) -> dict[str, Any]:
    """The last line of what a runtime's script says."""
    words = [str(word) for word in (*command, *clips)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(words[:4])} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def wanted_texts(
    source: Path, artifact: Path, precision: str, layout: str, clips: list[Path]
) -> list[str]:
    """What the artifact must say under our loop: in fp32 the checkpoint's texts."""
    pcms = [read_wav(path) for path in clips]
    if precision != "fp32":
        hearing = open_artifact(artifact)
        return [hearing.text(hearing.window(pcm)) for pcm in pcms]
    model, processor = whisper.load(str(source)), whisper.load_processor(str(source))
    if layout in pipeline.ONE_WINDOW:
        whisper.remove_short_windows(model)
    tokens = decoding.greedy(model, processor, pcms)
    decoded: list[str] = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in decoded]


def wanted_by_sherpa(
    where: Path, artifact: Path, precision: str, clips: list[Path], wanted: list[str]
) -> list[str]:
    """What the artifact says under our loop of the frames that sherpa-onnx makes, which differ from
    Whisper's; of Whisper's own it must say what is wanted."""
    hearing = open_artifact(artifact)
    if not isinstance(hearing, Sherpa):
        raise TypeError(f"{artifact} is not of layout sherpa")
    found = [hearing.text(hearing.window(read_wav(path))) for path in clips]
    if precision == "fp32" and found != wanted:
        raise SystemExit(f"{artifact} says {found} instead of {wanted}")
    place = artifact.parent / "kaldi.npz"
    script = [where / "sherpa/bin/python", HERE / "kaldi_mel.py", place, *clips]
    subprocess.run([str(word) for word in script], check=True)
    with np.load(place) as mels:
        return [hearing.text(hearing.decode(mels[str(n)])) for n in range(len(clips))]


def check(
    source: Path, where: Path, work: Path, precision: str, layout: str, clips: list[Path]
) -> int:
    """How many runtimes said something else."""
    place = work / f"{source.name}-{layout}-{precision}"
    export(source, place, precision, layout)
    wanted, wrong = wanted_texts(source, place, precision, layout, clips), 0
    if layout == "sherpa" and (where / "sherpa").exists():
        wanted = wanted_by_sherpa(where, place, precision, clips, wanted)
    for name, command in commands(where, layout, place).items():
        head = f"{source.name:15}{layout:13}{precision:6}{name:26}"
        if not there(command):
            print(f"{head}not run: {command[0]} or its packages are missing", flush=True)
            continue
        found = run(command, clips)
        other = [row for row in zip(clips, found["texts"], wanted, strict=True) if row[1] != row[2]]
        same = f"{len(wanted) - len(other)} of {len(wanted)} texts the same"
        print(f"{head}{same}   {found['runtime']}", flush=True)
        for path, text, want in other:
            print(f"    {path.name}: {text!r} instead of {want!r}", flush=True)
        wrong += bool(other)
    return wrong


def there(command: Sequence[str | Path]) -> bool:
    """Whether the environment of a command was made."""
    needed = [command[0], *([command[2]] if command[0] == "node" else [])]
    return all(Path(word).exists() or which(str(word)) for word in needed)


def made_sources(work: Path) -> list[Path]:
    """The three checkpoints."""
    source = shipped.DEFAULT_MODEL
    pruned = irregular(source, work / "irregular")
    return [source, pruned, merged(pruned, work / "merged")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environments", type=Path, help="folder with optimum/, sherpa/ and js/")
    parser.add_argument("work", type=Path, help="folder for clips and artifacts; must not exist")
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--layout", nargs="*", default=["transformers", "sherpa", "single"])
    parser.add_argument("--precision", nargs="*", default=["fp32", "int8"])
    parser.add_argument("--source", nargs="*", type=Path, help="checkpoints instead of the three")
    given = parser.parse_args()
    where, work = given.environments.absolute(), given.work.absolute()
    clips = write_clips(work / "clips", given.clips)
    sources = given.source or made_sources(work)
    wrong = sum(
        check(source, where, work, precision, layout, clips)
        for source in sources
        for layout in given.layout
        for precision in given.precision
    )
    sys.exit(f"{wrong} runtimes say something else" if wrong else 0)


if __name__ == "__main__":
    main()
