"""Core ML packages of three checkpoints against torch, over all clips that come with EdgeWhisper:

    python -m tests.interop.coreml WORK

The checkpoints are those of check.py. Packages run in our interpreter under the bounds of export's
gate, which some precisions only report on. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gate import Bounds, GateFailure, bounds_for, checkpoint_tokens, judge
from benchmarks.metadata import folder_bytes
from benchmarks.reference_runtimes import recognizer
from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import decoding, gating, pipeline, shipped
from export.coreml.to_coreml import export_coreml
from export.layouts import PACKAGES

from .check import made_sources

SETS = ("test", "dev", "train", "other")
PRECISIONS = ("fp32", "fp16", "int8", "int4", "pal4")


def rows(source: Path, work: Path, precisions: Sequence[str], clips: list[Clip]) -> int:
    """Print a line for each precision; how many do not pass their gate."""
    model, processor, _ = pipeline.load_for("whisperkit", str(source))
    tokens, failed = partial(decoding.greedy, model, processor), 0
    reference = checkpoint_tokens(tokens, clips, processor.feature_extractor.n_samples)
    for precision in precisions:
        place = work / f"{source.name}-coreml-{precision}"
        manifest = export_coreml(model, processor, place, precision)
        parts = gating.torch_parts(model, processor, manifest)
        hearing, letter = recognizer(place, None, guards=False), ""
        try:
            figures = judge(hearing, reference, clips, bounds_for("coreml", precision), parts)
        except GateFailure as failure:
            letter, failed = f"  FAILED: {failure}", failed + 1
            figures = judge(hearing, reference, clips, Bounds(strict=False), parts)
        print(row(source.name, precision, figures, place) + letter, flush=True)
    return failed


def row(name: str, precision: str, figures: dict[str, Any], place: Path) -> str:
    same = round(figures["identical_tokens"] * figures["clips"])
    size = sum(folder_bytes(place / f"{package}.mlpackage") for package in PACKAGES[1:]) / 1e6
    errors = "  ".join(f"{part} {error:.1e}" for part, error in figures["max_errors"].items())
    return (
        f"{name:15}{precision:6}{same} of {figures['clips']} clips the same   "
        f"WER {100 * figures['artifact_wer']:.2f} % "
        f"(checkpoint {100 * figures['checkpoint_wer']:.2f} %)   "
        f"encoder and decoder {size:.2f} MB   off by: {errors}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for checkpoints and artifacts; must be new")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    parser.add_argument("--source", nargs="*", type=Path, help="checkpoints instead of the three")
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    clips = [clip for name in SETS for clip in read_manifest(shipped.SPEECH / f"{name}.jsonl")]
    warnings.simplefilter("ignore")  # a loss that is only told stands in its row
    sources = given.source or made_sources(given.work)
    failed = sum(rows(source, given.work, given.precision, clips) for source in sources)
    sys.exit(f"{failed} packages do not pass" if failed else 0)


if __name__ == "__main__":
    main()
