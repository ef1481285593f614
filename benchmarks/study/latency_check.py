"""How far the latency table's predictions are from what is measured, on this machine.

    python -m benchmarks.study.latency_check [--threads 1] [--precision int8] [--rounds 3]

Models are exported: the embedded one, three of its size with fewer and narrower heads and units,
low ranks, a factorised token table (random weights, which take as long), and Whisper-tiny's
dimensions (random too). In every round the table is measured and then all models are benched, so
that a machine which grows busy is seen by both. Beside the median of the rounds stand two errors,
the median too and all that were found: of the sum over the operators, and of that sum corrected by
the embedded model's result of the round, which the others have no part in.
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
from benchmarks.bench import Candidate, Measuring, bench_all
from benchmarks.latency import STAGES, Table
from benchmarks.markdown import table as markdown
from benchmarks.program import exit_code, parser_of
from benchmarks.speech.clips import read_manifest
from devices.device import Place
from devices.local import LocalDevice

CLIPS, TOKENS = 4, 64
RANKS = {"self_attn.q_proj": 24, "self_attn.k_proj": 24, "fc1": 40, "fc2": 32}


def layer(heads: int, qk: int, v: int, units: int, ranks: dict[str, int]) -> dict[str, Any]:
    """An encoder layer's shapes, as config.edgewhisper has them."""
    attention = {"heads": heads, "qk_dim": qk, "v_dim": v}
    return {"self_attn": attention, "ffn": units, "ranks": ranks}


def crossing(shapes: dict[str, Any]) -> dict[str, Any]:
    """A decoder layer's, whose cross-attention is as its own."""
    return shapes | {"encoder_attn": shapes["self_attn"]}


SLIM: dict[str, dict[str, Any]] = {
    "fewer heads and units": {
        "encoder": [layer(h, 32, 32, f, {}) for h, f in ((3, 401), (2, 256), (3, 190), (4, 333))],
        "decoder": [crossing(layer(h, 32, 32, f, {})) for h, f in ((2, 120), (3, 215))],
    },
    "low rank": {
        "encoder": [layer(4, 32, 32, 512, RANKS)] * 4,
        "decoder": [crossing(layer(4, 32, 32, 512, {"fc1": 48, "fc2": 48}))] * 2,
    },
    "narrow heads, table of rank 32": {
        "encoder": [layer(4, 20, 27, 147, {"fc1": 32})] * 4,
        "decoder": [crossing(layer(3, 20, 29, 260, {}))] * 2,
        "token_rank": 32,
    },
}


def models(work: Path) -> Iterator[tuple[str, Any, Any]]:
    """Name, model and processor of each that is benched."""
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
    make("tiny", work / "checkpoint")
    tiny = whisper.load(work / "checkpoint")
    tiny.config.max_target_positions = TOKENS  # it would say all 448, whatever it hears
    yield "tiny's dimensions", tiny, whisper.load_processor(work / "checkpoint")


def candidates(work: Path, precision: str) -> list[Candidate]:
    from export.onnx.to_onnx import export_onnx

    found = []
    for number, (name, model, processor) in enumerate(models(work)):
        place = work / "artifacts" / str(number)
        export_onnx(model, processor, place, precision)
        found.append(Candidate(place, name=name))
    return found


def errors_of(table: Table, results: Sequence[dict[str, Any]], shapes: dict) -> list[dict]:
    """Of each result in turn: what was measured, and by how much both predictions miss it."""
    corrected = latency.correct(table, results[:1], shapes)
    found = []
    for result in results:
        here = shapes[result["artifact_hash"]]
        times = latency.measured(result)
        guesses = {
            "sum": latency.uncorrected(table, here),
            "corrected": latency.stages(corrected, here),
        }
        found.append(
            {("measured", stage): times[stage] for stage in STAGES}
            | {
                (name, stage): guess[stage] / times[stage] - 1
                for name, guess in guesses.items()
                for stage in STAGES
            }
        )
    return found


def rows_of(names: Sequence[str], rounds: Sequence[Sequence[dict]]) -> list[dict[str, str]]:
    """A row a model and stage; `rounds` has errors_of() each."""
    rows = []
    for stage in STAGES:
        for number, name in enumerate(names):
            every = {
                what: [found[number][what, stage] for found in rounds]
                for what in ("measured", "sum", "corrected")
            }
            rows.append(
                {
                    "model": name,
                    "": stage,
                    "measured ms": f"{1e3 * median(every['measured']):.3g}",
                    "sum off by %": spread(every["sum"]),
                    "corrected off by %": spread(every["corrected"]),
                }
            )
    return rows


def spread(errors: Sequence[float]) -> str:
    low, middle, high = (100 * pick(errors) for pick in (min, median, max))
    return f"{middle:+.0f} ({low:+.0f} to {high:+.0f})"


def work(given: argparse.Namespace) -> None:
    from edgewhisper.shipped import SPEECH

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    clips = [clip for clip in read_manifest(SPEECH / "test.jsonl") if clip.text][:CLIPS]
    with tempfile.TemporaryDirectory() as folder, LocalDevice() as device:
        ours = candidates(Path(folder), given.precision)
        shapes = latency.artifacts_in([Path(folder) / "artifacts"])
        found = []
        for _ in range(given.rounds):
            place = Place("local")
            table = latency.calibrate(place, given.precision, given.threads, say, rounds=1)
            results = bench_all(ours, device, clips, Measuring(1, given.threads), say)
            found.append(errors_of(table, results, shapes))
    print(markdown(rows_of([each.name for each in ours], found)))
    print(f"{table}, {table.machine['cpu']}; {table.measured_at}; the last round's table:\n")
    print(markdown(latency.rows_of(table)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("python -m benchmarks.study.latency_check", __doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    return exit_code(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
