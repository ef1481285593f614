"""Compare the latency table's predictions with measured times on this machine.

    python -m benchmarks.study.latency_check [--threads 1] [--precision int8] [--rounds 3]

The exported models are the embedded one, three compressed variants of it (fewer and narrower heads
and units, low ranks, a factorised token table) and one with whisper-tiny's dimensions. All but the
embedded one have random weights, which take the same time. Every round measures the table and then
benches all models, so that a busy machine affects both.

The table shows the median measured time and two errors of the prediction, each as median and range
over the rounds: of the sum over the operators, and of that sum corrected by the round's result of
the embedded model.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import latency
from benchmarks.bench import BenchOptions, Candidate, bench_all
from benchmarks.calibrate_latency import calibrate
from benchmarks.latency import STAGES, Table
from benchmarks.markdown import table as markdown
from benchmarks.program import exit_code, parser_of
from benchmarks.speech.clips import read_manifest
from devices.device import Place
from devices.local import LocalDevice

CLIPS, TOKENS = 4, 64
RANKS = {"self_attn.q_proj": 24, "self_attn.k_proj": 24, "fc1": 40, "fc2": 32}


def layer(heads: int, qk: int, v: int, units: int, ranks: dict[str, int]) -> dict[str, Any]:
    """Return an encoder layer's shapes as in config.edgewhisper."""
    attention = {"heads": heads, "qk_dim": qk, "v_dim": v}
    return {"self_attn": attention, "ffn": units, "ranks": ranks}


def decoder_layer(shapes: dict[str, Any]) -> dict[str, Any]:
    """Return a decoder layer's shapes, with cross-attention like self-attention."""
    return shapes | {"encoder_attn": shapes["self_attn"]}


SLIM: dict[str, dict[str, Any]] = {
    "fewer heads and units": {
        "encoder": [layer(h, 32, 32, f, {}) for h, f in ((3, 401), (2, 256), (3, 190), (4, 333))],
        "decoder": [decoder_layer(layer(h, 32, 32, f, {})) for h, f in ((2, 120), (3, 215))],
    },
    "low rank": {
        "encoder": [layer(4, 32, 32, 512, RANKS)] * 4,
        "decoder": [decoder_layer(layer(4, 32, 32, 512, {"fc1": 48, "fc2": 48}))] * 2,
    },
    "narrow heads, table of rank 32": {
        "encoder": [layer(4, 20, 27, 147, {"fc1": 32})] * 4,
        "decoder": [decoder_layer(layer(3, 20, 29, 260, {}))] * 2,
        "token_rank": 32,
    },
}


def models(folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, model and processor of each benched model."""
    import torch

    from benchmarks.rivals.models import make
    from edgewhisper import whisper
    from edgewhisper.shipped import DEFAULT_MODEL

    dense, processor = whisper.load(DEFAULT_MODEL), whisper.load_processor(DEFAULT_MODEL)
    yield "embedded", dense, processor
    for name, shapes in SLIM.items():
        config = copy.deepcopy(dense.config)
        config.edgewhisper = {"format": 1, **shapes}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            slim = whisper.WhisperForConditionalGeneration(config).eval()
        slim.generation_config = dense.generation_config
        yield name, slim, processor
    make("tiny", folder / "checkpoint")
    tiny = whisper.load(folder / "checkpoint")
    tiny.config.max_target_positions = TOKENS  # random weights always decode up to the limit
    yield "tiny's dimensions", tiny, whisper.load_processor(folder / "checkpoint")


def candidates(folder: Path, precision: str) -> list[Candidate]:
    """Export all models into a folder."""
    from export.onnx.to_onnx import export_onnx

    exported = []
    for number, (name, model, processor) in enumerate(models(folder)):
        place = folder / "artifacts" / str(number)
        export_onnx(model, processor, place, precision)
        exported.append(Candidate(place, name=name))
    return exported


def errors_of(table: Table, results: Sequence[dict[str, Any]], shapes: dict) -> list[dict]:
    """Return each result's measured times and the relative errors of both predictions."""
    corrected = latency.correct(table, results[:1], shapes)
    errors = []
    for result in results:
        here = shapes[result["artifact_hash"]]
        times = latency.measured(result)
        predictions = {
            "sum": latency.uncorrected(table, here),
            "corrected": latency.stages(corrected, here),
        }
        errors.append(
            {("measured", stage): times[stage] for stage in STAGES}
            | {
                (name, stage): prediction[stage] / times[stage] - 1
                for name, prediction in predictions.items()
                for stage in STAGES
            }
        )
    return errors


def rows_of(names: Sequence[str], rounds: Sequence[Sequence[dict]]) -> list[dict[str, str]]:
    """Return a row per model and stage; `rounds` has the errors_of() of each round."""
    rows = []
    for stage in STAGES:
        for number, name in enumerate(names):
            every = {
                what: [errors[number][what, stage] for errors in rounds]
                for what in ("measured", "sum", "corrected")
            }
            rows.append(
                {
                    "model": name,
                    "": stage,
                    "measured ms": f"{1e3 * median(every['measured']):.3g}",
                    "error of the sum %": spread(every["sum"]),
                    "error after correction %": spread(every["corrected"]),
                }
            )
    return rows


def spread(errors: Sequence[float]) -> str:
    """Return the median and range in per cent, such as `+3 (-2 to +9)`."""
    low, middle, high = (100 * pick(errors) for pick in (min, median, max))
    return f"{middle:+.0f} ({low:+.0f} to {high:+.0f})"


def compare(given: argparse.Namespace) -> None:
    """Measure the rounds and print the tables."""
    from edgewhisper.shipped import SPEECH

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    clips = [clip for clip in read_manifest(SPEECH / "test.jsonl") if clip.text][:CLIPS]
    with tempfile.TemporaryDirectory() as folder, LocalDevice() as device:
        ours = candidates(Path(folder), given.precision)
        shapes = latency.artifacts_in([Path(folder) / "artifacts"])
        rounds = []
        for _ in range(given.rounds):
            place = Place("local")
            table = calibrate(place, given.precision, given.threads, say, rounds=1)
            results = bench_all(ours, device, clips, BenchOptions(1, given.threads), say)
            rounds.append(errors_of(table, results, shapes))
    print(markdown(rows_of([each.name for each in ours], rounds)))
    print(f"{table}, {table.machine['cpu']}; {table.measured_at}; table of the last round:\n")
    print(markdown(latency.rows_of(table)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("python -m benchmarks.study.latency_check", __doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    return exit_code(compare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
