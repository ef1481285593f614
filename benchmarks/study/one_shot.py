"""Compare one-shot methods at equal parameters on one of OpenAI's models.

    python -m benchmarks.study.one_shot build/models/tiny.en --out one_shot.jsonl

Nothing is trained. The arms of a share remove this share of the parameters outside the token table;
those of 4 bits store all linear layers in 4 bits, and remove nothing. Methods calibrate on the
included calibration clips, and the WER is that of the dev and test clips (140). Its loss against
the unchanged model has a 95 % interval, a paired bootstrap over clips. Arms that are in the file
are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gate_loss import Counts, errors_of, loss, rate
from benchmarks.markdown import table
from benchmarks.program import exit_code, parser_of
from benchmarks.speech.clips import Samples, read_manifest
from benchmarks.study.stored import read

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration as Whisper

    from edgewhisper.compress.context import Context

Line = dict[str, Any]
Arm = Callable[["Whisper", "Context"], "Whisper"]
SHARES = (0.15, 0.25)
LAYERS = "model.*coder.layers.*"
FOUR_BITS: dict[str, Any] = {"encoder": 4, "decoder": 4, "token_table": 8, "stem": 8}
"""The bits that `export --precision int4` uses by default."""


# ------------------------------------------------------------------------------------------ arms


def arms() -> dict[str, Arm]:
    """Return name -> arm."""
    return {
        f"{100 * share:.0f} %: {name}": make(share)
        for share in SHARES
        for name, make in {
            "obs": obs,
            "magnitude": magnitude,
            "LiteASR": lite,
            "SVD of the weights": lambda share: lite(share, basis="weights"),
        }.items()
    } | {"4 bits: round to nearest": four_bits("qat"), "4 bits: gptq": four_bits("gptq")}


def obs(share: float) -> Arm:
    """Feed-forward units, heads and dimensions, with the update of what remains."""
    from edgewhisper.compress import obs as method

    return lambda model, context: method.apply(model, method.Options(remove=share), context)


def magnitude(share: float) -> Arm:
    """Feed-forward units with the smallest product of their norms in fc1 and fc2, the same share of
    each layer. Nothing else changes."""
    from edgewhisper.compress.masks import rest

    def apply(model: Whisper, context: Context) -> Whisper:
        layers = [*model.model.encoder.layers, *model.model.decoder.layers]
        all_units = sum(layer.fc1.weight.numel() + layer.fc2.weight.numel() for layer in layers)
        for layer in layers:
            sizes = layer.fc1.weight.norm(dim=1) * layer.fc2.weight.norm(dim=0)
            units = sizes.argsort()[: round(share * rest(model) / all_units * len(sizes))]
            for parameter in (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight.T):
                parameter.data[units] = 0
        return model

    return apply


def lite(share: float, **options: Any) -> Arm:
    """Low rank of encoder and decoder layers, ranks allocated to a budget of parameters."""
    from edgewhisper.compress import lite as method
    from edgewhisper.compress.masks import rest
    from edgewhisper.whisper import linears

    def apply(model: Whisper, context: Context) -> Whisper:
        weights = sum(linear.weight.numel() for _, linear in linears(model))
        budget = 1 - share * rest(model) / weights
        return method.apply(
            model,
            method.Options(layers=LAYERS, budget=budget, mask_padding=True, **options),
            context,
        )

    return apply


def four_bits(name: str) -> Arm:
    """4 bits: each weight rounded to the nearest value (`qat` without training), or with errors
    propagated to later weights (`gptq`)."""
    method = import_module(f"edgewhisper.compress.{name}")
    return lambda model, context: method.apply(model, method.Options(**FOUR_BITS), context)


# --------------------------------------------------------------------------------------- running


def counts_of(source: str, model: Whisper) -> Counts:
    """Return the word errors and words of each dev and test clip."""
    from edgewhisper import decoding, whisper

    clips = included("dev") + included("test")
    processor = whisper.load_processor(source)
    texts = decoding.transcribe(model, processor, Samples(clips), [clip.lang for clip in clips])
    return errors_of(clips, texts, "whisper-english")


def context_of(source: str) -> Context:
    """Return what a compression step receives. Measurements of the model are stored."""
    from edgewhisper import runs, whisper
    from edgewhisper.compress.context import Context

    processor = whisper.load_processor(source)
    clips = included("calibration"), included("dev")
    return Context(processor, *clips, runs.RUNS, measured_dir=runs.RUNS / "measured")


def included(name: str) -> list[Any]:
    """Return the included clips of a set."""
    from edgewhisper import shipped

    return read_manifest(shipped.COMMON_VOICE / f"{name}.jsonl")


def run(source: str, name: str, arm: Arm, before: Counts) -> Line:
    """Apply an arm and return its line."""
    from edgewhisper import whisper
    from edgewhisper.compress.masks import removed_share, rest
    from export.versions import versions

    dense = whisper.load(source)
    size, started = rest(dense), time.process_time()
    with torch.no_grad():
        model = arm(dense, context_of(source))
    seconds = time.process_time() - started
    after = counts_of(source, model)
    return {
        "model": Path(source).name,
        "arm": name,
        "removed": 1 - (1 - removed_share(model)) * rest(model) / size,
        "wer": [rate(before), rate(after)],
        **loss(before, after),
        "cpu_s": seconds,
        "threads": torch.get_num_threads(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def row(line: Line) -> dict[str, str]:
    """Return a row of the table."""
    low, high = line["wer_loss_interval"]
    return {
        "model": line["model"],
        "arm": line["arm"],
        "removed %": f"{100 * line['removed']:.1f}",
        "WER %": f"{100 * line['wer'][0]:.1f} -> {100 * line['wer'][1]:.1f}",
        "points lost": f"{line['wer_loss_points']:.1f} ({low:.1f} to {high:.1f})",
        "CPU s": f"{line['cpu_s']:.0f}",
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 after an error."""
    parser = parser_of("benchmarks.study.one_shot", __doc__)
    parser.add_argument("model", help="a checkpoint directory of OpenAI's Whisper")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines; appended to if it exists"
    )
    parser.add_argument(
        "--arm",
        action="append",
        choices=list(arms()),
        metavar="ARM",
        help="run this arm only; repeatable",
    )
    return exit_code(measure, parser, argv)


def measure(given: argparse.Namespace) -> None:
    """Run the arms that are not in the file, and print the table."""
    from edgewhisper import whisper

    lines = read(given.out)
    done = {line["arm"] for line in lines if line["model"] == Path(given.model).name}
    todo = [name for name in given.arm or arms() if name not in done]
    before = counts_of(given.model, whisper.load(given.model)) if todo else []
    for name in todo:
        print(f"{given.model}: {name}", flush=True)
        lines.append(run(given.model, name, arms()[name], before))
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table([row(line) for line in lines]))


if __name__ == "__main__":
    sys.exit(main())
