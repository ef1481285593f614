"""How far the latency table's predictions are from what is measured, on this machine.

    python -m benchmarks.study.latency_check [--threads 1] [--precision int8] [--rounds 3]

The table is measured first, or read with --table. Then models are exported and benched: the
embedded one, three of its size with fewer and narrower heads and units, low ranks, a factorised
token table (random weights, which take as long), and Whisper-tiny's dimensions (random too). Two
predictions are printed beside what was measured, with their errors: the sum over the operators,
and that sum corrected by the result of the embedded model alone, which the others have no part in.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import latency
from benchmarks.bench import Candidate, Measuring, bench_all
from benchmarks.latency import STAGES, Table
from benchmarks.markdown import table as markdown
from benchmarks.program import exit_code, parser_of
from benchmarks.speech import read_manifest
from devices.device import Place
from devices.local import LocalDevice

CLIPS, TOKENS = 4, 64
RANKS = {"self_attn.q_proj": 24, "self_attn.k_proj": 24, "fc1": 40, "fc2": 32}


def narrow(heads: int, qk: int, v: int, units: int, ranks: dict[str, int]) -> dict[str, Any]:
    """One layer's shapes, as config.edgewhisper has them; `encoder_attn` is for decoders."""
    attention = {"heads": heads, "qk_dim": qk, "v_dim": v}
    return {"self_attn": attention, "encoder_attn": attention, "ffn": units, "ranks": ranks}


SLIM: dict[str, dict[str, Any]] = {
    "fewer heads and units": {
        "encoder": [narrow(h, 32, 32, f, {}) for h, f in ((3, 401), (2, 256), (3, 190), (4, 333))],
        "decoder": [narrow(2, 32, 32, 120, {}), narrow(3, 32, 32, 215, {})],
    },
    "low rank": {
        "encoder": [narrow(4, 32, 32, 512, RANKS)] * 4,
        "decoder": [narrow(4, 32, 32, 512, {"fc1": 48, "fc2": 48})] * 2,
    },
    "narrow heads, table of rank 32": {
        "encoder": [narrow(4, 20, 27, 147, {"fc1": 32})] * 4,
        "decoder": [narrow(3, 20, 29, 260, {})] * 2,
        "token_rank": 32,
    },
}


def models(work: Path) -> Iterator[tuple[str, Any, Any]]:
    """Name, model and processor of each that is benched."""
    import torch

    from benchmarks.rivals.models import make
    from edgewhisper import whisper
    from edgewhisper.pipeline import DEFAULT_MODEL

    dense, processor = whisper.load(DEFAULT_MODEL), whisper.load_processor(DEFAULT_MODEL)
    yield "embedded", dense, processor
    for name, shapes in SLIM.items():
        config = copy.deepcopy(dense.config)
        config.edgewhisper = {"format": 1, **shapes}
        for layer in shapes["encoder"]:
            layer.pop("encoder_attn", None)
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
    from export.to_onnx import export_onnx

    found = []
    for number, (name, model, processor) in enumerate(models(work)):
        place = work / "artifacts" / str(number)
        export_onnx(model, processor, place, precision)
        found.append(Candidate(place, name=name))
    return found


def rows_of(
    table: Table, results: Sequence[dict[str, Any]], shapes: dict[str, latency.Shapes]
) -> list[dict[str, str]]:
    corrected = latency.correct(table, results[:1], shapes)
    rows = []
    for result in results:
        here = shapes[result["artifact_hash"]]
        times, plain = latency.measured(result), latency.uncorrected(table, here)
        better = latency.stages(corrected, here)
        row = {"model": result["name"]}
        for stage in STAGES:
            row |= {
                f"{stage}, measured ms": f"{1e3 * times[stage]:.3g}",
                "sum" + " " * STAGES.index(stage): error(plain[stage], times[stage]),
                "corrected" + " " * STAGES.index(stage): error(better[stage], times[stage]),
            }
        rows.append(row)
    return rows


def error(predicted: float, seconds: float) -> str:
    return f"{1e3 * predicted:.3g} ({100 * (predicted / seconds - 1):+.0f} %)"


def work(given: argparse.Namespace) -> None:
    from edgewhisper.pipeline import SPEECH

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if given.table is None:
        table = latency.calibrate(Place("local"), given.precision, given.threads, say)
    else:
        table = latency.read(given.table)
    clips = [clip for clip in read_manifest(SPEECH / "test.jsonl") if clip.text][:CLIPS]
    with tempfile.TemporaryDirectory() as folder, LocalDevice() as device:
        ours = candidates(Path(folder), table.precision)
        how = Measuring(given.rounds, table.threads)
        results = bench_all(ours, device, clips, how, say)
        shapes = latency.artifacts_in([Path(folder) / "artifacts"])
    print(markdown(latency.rows_of(table)))
    print(f"\n{table}, {table.machine['cpu']}; {table.measured_at}\n")
    print(markdown(rows_of(table, results, shapes)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("python -m benchmarks.study.latency_check", __doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", type=Path, help="one that is measured already")
    return exit_code(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
