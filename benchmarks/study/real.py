"""Run every shipped recipe on one of OpenAI's models, with the shipped clips.

    python -m benchmarks.study.real build/models/tiny.en --out real.jsonl [RECIPE ...]

A line has parameters, dev WER (60 clips) and test WER (80 clips) before and after, the normalizer
of the test WER, optimiser steps and minutes, or the error if a step lost too many words. Recipes
that are in the file are not run again; an interrupted recipe is resumed. The table is printed at
the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.markdown import table
from benchmarks.normalizers import name_for
from benchmarks.speech.clips import Clip, Samples, read_manifest
from benchmarks.study.stored import read

if TYPE_CHECKING:
    from benchmarks.wer import Score

Line = dict[str, Any]
LEFT_OUT = ("digits-", "quick", "bald-paper")
"""Prefixes of recipes for the embedded model, and of one that takes days."""
FIRST_NORMALIZER = "whisper-basic"
"""The normalizer of the test WER in older lines, which do not name it."""


def run_one(model: str, recipe: str, before: float) -> Line:
    """Compress with a recipe and measure the result; `before` is the dense test WER."""
    import torch

    from edgewhisper import pipeline
    from edgewhisper.guard import AccuracyLoss
    from export.versions import versions

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, failed = Path(folder) / "slim", None
        try:
            place = pipeline.compress(pipeline.Request(model, recipe, out=out), say)
        except AccuracyLoss as error:
            failed, place = str(error), out.with_name(out.name + error.suffix)
        minutes = (time.monotonic() - started) / 60
        record = json.loads((place / "compression.json").read_text("utf-8"))
        after = test_score(str(place))
    return {
        "model": Path(model).name,
        "recipe": recipe,
        "failed": failed,
        "parameters": [record[when]["parameters"] for when in ("before", "after")],
        "dev_wer": [record[when]["dev"]["wer"] for when in ("before", "after")],
        "losses": record["dev_wer"],
        "test_wer": [before, after.wer],
        "test_normalizer": after.normalizer,
        "steps": sum(steps_in(record["steps"])),
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def steps_in(record: Any) -> Iterator[int]:
    """Yield the optimiser steps of all trainings in a record."""
    if isinstance(record, list):
        for entry in record:
            yield from steps_in(entry)
    elif isinstance(record, dict):
        if {"steps", "first_loss"} <= record.keys():
            yield record["steps"]
        for entry in record.values():
            yield from steps_in(entry)


def test_score(source: str) -> Score:
    """Return a checkpoint's error rates on the 80 test clips, with their language's normalizer."""
    from benchmarks.wer import score
    from edgewhisper import decoding, whisper

    clips = test_clips()
    languages = [clip.lang for clip in clips]
    texts = decoding.transcribe(
        whisper.load(source), whisper.load_processor(source), Samples(clips), languages
    )
    return score([clip.text for clip in clips], texts, name_for(clips), languages)


def test_clips() -> list[Clip]:
    """Return the 80 included test clips, which are English."""
    from edgewhisper import shipped

    return read_manifest(shipped.COMMON_VOICE / "test.jsonl")


def dense_wer(model: str, lines: Sequence[Line]) -> float:
    """Return the dense test WER, from a stored line of the model if its normalizer is today's."""
    for line in lines:
        if line["model"] == Path(model).name and normalizer_of(line) == name_for(test_clips()):
            return float(line["test_wer"][0])
    return test_score(model).wer


def normalizer_of(line: Line) -> str:
    """Return the normalizer of a line's test WER."""
    return str(line.get("test_normalizer", FIRST_NORMALIZER))


def row(line: Line) -> dict[str, str]:
    """Return a row of the table."""
    dense, slim = (counted["total"] / 1e6 for counted in line["parameters"])
    dev, test = (
        f"{100 * before:.1f} -> {100 * after:.1f}"
        for before, after in (line["dev_wer"], line["test_wer"])
    )
    return {
        "recipe": line["recipe"],
        "model": line["model"],
        "parameters, M": f"{dense:.2f} -> {slim:.2f}",
        "dev WER %": dev,
        "test WER %": test,
        "test normalizer": normalizer_of(line),
        "steps": str(line["steps"]),
        "minutes": f"{line['minutes']:.1f}",
        "limit": "exceeded" if line["failed"] else "kept",
    }


def say(text: str) -> None:
    print(text, flush=True)


def shipped() -> list[str]:
    from edgewhisper.recipe import available

    return [name for name in available() if not name.startswith(LEFT_OUT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint directory of OpenAI's Whisper")
    parser.add_argument("recipes", nargs="*", help="default: all that suit such a model")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines; appended to if it exists"
    )
    given = parser.parse_intermixed_args()
    lines = read(given.out)
    done = {line["recipe"] for line in lines if line["model"] == Path(given.model).name}
    todo = [name for name in given.recipes or shipped() if name not in done]
    before = dense_wer(given.model, lines) if todo else 0.0
    for recipe in todo:
        say(f"{given.model}: {recipe}")
        lines.append(run_one(given.model, recipe, before))
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    say(table([row(line) for line in lines]))


if __name__ == "__main__":
    main()
