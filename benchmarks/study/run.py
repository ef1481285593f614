"""Run the study: every arm of every experiment, once per seed.

    python -m benchmarks.study.run [EXPERIMENT ...] --speech train.jsonl --dev dev.jsonl
        --judge clean.jsonl --judge noisy.jsonl [--seeds 0 1 2] [--arm ARM ...] [--out FILE]
    python -m benchmarks.study.run --recipes DIRECTORY

Every run appends one line to FILE with the recipe, sizes, costs, and error rates with their counts.
Runs in the file are not repeated, so the same command continues an interrupted study. The second
form writes each arm's recipe for `edgewhisper compress --recipe`.

The runs share one process, because starting one takes longer than some runs. A run depends on its
recipe and seed only. No threshold is chosen during a run; the dev clips only choose between
finished arms in experiments that ask for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study.experiments import EXPERIMENTS, CostOf, Step, methods, recipe_text
from benchmarks.study.stored import read
from export.problem import Problem

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip

STORED = Path(__file__).parent.parent / "results" / "study.jsonl"
Line = dict[str, Any]
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Speech:
    """The clips of a study."""

    train: list[Clip]
    dev: list[Clip]
    judges: dict[str, list[Clip]]
    """Name of a manifest -> its clips."""


def keys(names: Sequence[str], seeds: Sequence[int]) -> Iterator[Key]:
    """Yield (experiment, arm, seed) of all runs, ordered by seed.

    Experiments without pairs to compare run once. Raises Problem for an unknown experiment.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise Problem(
                f"study: unknown experiment {name!r}",
                hint=f"choose from {', '.join(EXPERIMENTS)}",
            )
    for seed in seeds:
        for name in names:
            if EXPERIMENTS[name].pairs or seed == seeds[0]:
                yield from ((name, arm, seed) for arm in EXPERIMENTS[name].arms)


def available() -> list[str]:
    """Return the experiments whose methods all exist."""
    from edgewhisper.compress import METHODS

    return [name for name in EXPERIMENTS if methods(name) <= METHODS.keys()]


def key_of(line: Line) -> Key:
    return line["experiment"], line["arm"], line["seed"]


def run_all(
    names: Sequence[str],
    seeds: Sequence[int],
    speech: Speech,
    out: Path,
    base: str,
    arms: Sequence[str] = (),
) -> None:
    """Make the runs that are missing in `out` and append each when it is finished.

    `arms` restricts the runs to these arms.
    """
    for key in keys(names, seeds):
        if arms and key[1] not in arms:
            continue
        lines = read(out)
        text = recipe_of(key, lines)
        stored = next((line for line in lines if key_of(line) == key), None)
        if stored is not None and stored["recipe"] != text:
            raise Problem(
                f"study: {out} has a run of {key[0]}, {key[1]}, seed {key[2]} with another recipe",
                hint="remove that line, or choose another --out",
            )
        if stored is None:
            line = run_one(key, text, speech, base)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(describe(line), flush=True)


def recipe_of(key: Key, lines: Sequence[Line]) -> str:
    """Return the recipe of a run; `lines` are the stored runs."""
    experiment, arm, seed = key
    steps = [resolved(step, experiment, seed, lines) for step in EXPERIMENTS[experiment].arms[arm]]
    return recipe_text(steps, f"{experiment}: {arm}")


def resolved(step: Step, experiment: str, seed: int, lines: Sequence[Line]) -> Step:
    """Return the step with every CostOf replaced by its number."""

    def value_of(value: Any) -> Any:
        if not isinstance(value, CostOf):
            return value
        for line in lines:
            if key_of(line) == (experiment, value.arm, seed):
                return line["lite_cost"]
        raise Problem(
            f"study: the cost of {value.arm!r} with seed {seed} is not measured yet",
            hint=f"run all arms of the experiment {experiment}",
        )

    return {name: value_of(value) for name, value in step.items()}


def run_one(key: Key, text: str, speech: Speech, base: str) -> Line:
    """Compress the base model with a recipe and return the line of the run."""
    import torch

    from benchmarks.metadata import clips_hash
    from edgewhisper import alignment, job, recipe, whisper
    from edgewhisper.compress.context import Context
    from export.cost import count_parameters, macs
    from export.versions import versions

    experiment, arm, seed = key
    started = time.monotonic()
    processor = whisper.load_processor(base)
    with tempfile.TemporaryDirectory() as place:
        context = Context(processor, speech.train, speech.dev, Path(place), seed)
        steps = recipe.parse(f"{experiment}: {arm}", text)
        model = job.run_steps(whisper.load(base), steps, context, say=lambda text: None)
    alignment.settle(model)
    minutes = (time.monotonic() - started) / 60
    return {
        "experiment": experiment,
        "arm": arm,
        "seed": seed,
        "base": Path(base).name,
        "recipe": text,
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "parameters": count_parameters(model) | {"nonzero": nonzero(model)},
        "macs": macs(model),
        "lite_cost": lite_cost(context.record),
        "scores": {name: scored(model, processor, c) for name, c in speech.judges.items()},
        "dev": scored(model, processor, speech.dev) if needs_dev(key) else None,
        "minutes": minutes,
        "speech": {
            name: clips_hash(clips)
            for name, clips in {"train": speech.train, "dev": speech.dev, **speech.judges}.items()
        },
        "threads": torch.get_num_threads(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def needs_dev(key: Key) -> bool:
    return any(key[1] in among for among in EXPERIMENTS[key[0]].chosen_on_dev.values())


def nonzero(model: Any) -> int:
    """Return the number of nonzero parameters outside the token table."""
    table = "model.decoder.embed_tokens."
    return sum(
        int((parameter != 0).sum())
        for name, parameter in model.named_parameters()
        if not name.startswith(table)
    )


def lite_cost(record: dict[str, Any]) -> float | None:
    """Return the share of weights that LiteASR kept in its layers; None for other methods."""
    if "lite" not in record:
        return None
    kept = dense = 0
    for layer in record["lite"]["layers"].values():
        d_out, d_in, rank = layer["outputs"], layer["inputs"], layer["rank"]
        dense += d_out * d_in
        kept += d_out * d_in if rank is None else rank * (d_out + d_in)
    return kept / dense


def scored(model: Any, processor: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    """Return the error rates of a model on clips."""
    from benchmarks.normalizers import name_for
    from benchmarks.speech.clips import Samples
    from benchmarks.wer import score
    from edgewhisper import decoding

    pcms = Samples(clips)
    texts = decoding.transcribe(model, processor, pcms, [clip.lang for clip in clips])
    languages = [clip.lang for clip in clips]
    return score([clip.text for clip in clips], texts, name_for(clips), languages).as_dict()


def describe(line: Line) -> str:
    """Return a run's results as a line of text."""
    rates = ", ".join(f"{name} {100 * s['wer']:.2f} %" for name, s in line["scores"].items())
    if line["dev"]:
        rates += f", dev {100 * line['dev']['wer']:.2f} %"
    return (
        f"{line['experiment']}: {line['arm']}, seed {line['seed']}: {rates}; "
        f"{line['parameters']['total']:,} parameters, "
        f"{line['parameters']['nonzero']:,} nonzero outside the token table; "
        f"{line['minutes']:.1f} min"
    )


def write_recipes(folder: Path) -> None:
    """Write the recipes of all arms that do not depend on another arm's result."""
    for name, experiment in EXPERIMENTS.items():
        for arm, steps in experiment.arms.items():
            if not any(isinstance(v, CostOf) for step in steps for v in step.values()):
                path = folder / name / f"{arm.replace(' ', '-').replace(',', '')}.toml"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(recipe_text(steps, f"{name}: {arm}"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all")
    parser.add_argument("--model", help="checkpoint; default: the embedded model")
    parser.add_argument("--speech", type=Path, help="manifest to train and calibrate on")
    parser.add_argument("--dev", type=Path, help="manifest to choose between arms on")
    parser.add_argument("--judge", type=Path, action="append", help="manifest of a test set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arm", action="append", help="run only this arm; may be repeated")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument(
        "--recipes", type=Path, help="write the recipes into this folder and run nothing"
    )
    given = parser.parse_args()
    if given.recipes:
        return write_recipes(given.recipes)
    if not (given.speech and given.dev and given.judge):
        parser.error("--speech, --dev and --judge are needed")
    from benchmarks.speech.clips import read_manifest
    from edgewhisper.shipped import DEFAULT_MODEL

    judges = {path.stem: read_manifest(path) for path in given.judge}
    speech = Speech(read_manifest(given.speech), read_manifest(given.dev), judges)
    names = given.experiments or available()
    try:
        model = given.model or str(DEFAULT_MODEL)
        run_all(names, given.seeds, speech, given.out, model, given.arm or ())
    except Problem as problem:
        sys.exit(f"error: {problem}\ntry:   {problem.hint}")


if __name__ == "__main__":
    main()
