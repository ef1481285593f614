"""`edgewhisper compress`: make a checkpoint smaller."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.options import MODEL, SPEECH, Out
from edgewhisper.cli.output import print_table, say
from edgewhisper.cli.target_options import (
    Device,
    Front,
    MaxWerLoss,
    Precision,
    TargetBytes,
    TargetLatency,
    TargetMacs,
    TargetParams,
    Trials,
)
from export.problem import Problem

Model = Annotated[str | None, Argument(help=f"{MODEL}; default: the embedded digits model")]
Recipe = Annotated[
    str | None,
    Option(
        help="name of a recipe (see `edgewhisper recipes`) or .toml file; default: oneshot; for "
        "the embedded digits model: quick, or digits-tspar with --speech"
    ),
]
Speech = Annotated[
    Path | None,
    Option(
        help=f"clips for training or calibration: {SPEECH}; default: clips included with "
        "EdgeWhisper"
    ),
]
Dev = Annotated[
    Path | None,
    Option(
        help=f"dev clips, for measuring error rates and choosing thresholds: {SPEECH}; "
        "default: every tenth clip of --speech, or clips included with EdgeWhisper"
    ),
]
Seed = Annotated[int, Option(help="random seed")]
Revision = Annotated[str | None, Option(help="revision of a model on the Hugging Face Hub")]
Language = Annotated[
    str | None,
    Option(
        metavar="CODE",
        help="language of the prompt, if the model has no token for the language of the speech",
    ),
]
AllowLoss = Annotated[
    bool,
    Option(
        "--allow-loss",
        help="write the checkpoint even if its WER rises by more than the recipe's max_wer_loss",
    ),
]


def compress_cli(
    model: Model = None,
    recipe: Recipe = None,
    speech: Speech = None,
    dev: Dev = None,
    out: Out = None,
    seed: Seed = 0,
    revision: Revision = None,
    language: Language = None,
    target_params: TargetParams = None,
    target_macs: TargetMacs = None,
    target_latency: TargetLatency = None,
    device: Device = None,
    target_bytes: TargetBytes = None,
    precision: Precision = None,
    max_wer_loss: MaxWerLoss = None,
    front: Front = False,
    allow_loss: AllowLoss = False,
    trials: Trials = None,
) -> None:
    """Make a checkpoint smaller with a recipe.

    Run an interrupted command again to resume it.

    --target-params, --target-macs, --target-latency, --target-bytes, --max-wer-loss and --front
    start a search: the recipe runs once or several times, with different values (see `edgewhisper
    recipes`). The output directory gets the checkpoint that meets the targets best, all trials in
    pareto.json and front.png, and the other trials on the Pareto front in front/.
    """
    from edgewhisper import job, pipeline

    request = job.Request(
        model, recipe, speech, dev, out, seed, revision, language, allow_loss=allow_loss
    )
    asked = (target_params, target_macs, max_wer_loss, target_latency, target_bytes, precision)
    if not any(value is not None for value in (*asked, device)) and not front:
        refuse_trials(trials)
        say(f"wrote {pipeline.compress(request, say)}")
        return
    from edgewhisper import target_search, targets

    over = ("latency" if device else "parameters") if front else None
    place, rows = target_search.compress_to(
        replace(targets.parse(*asked), front=over),
        request,
        trials or target_search.TRIALS,
        say,
        targets.table_of(target_latency, device, front),
    )
    print_table(rows)
    say(f"wrote {place}")


def refuse_trials(trials: int | None) -> None:
    """Raise Problem if --trials is given without a target."""
    if trials is not None:
        raise Problem(
            f"--trials {trials}: there is nothing to search without a target",
            hint="add --target-params, --target-macs, --target-latency, --target-bytes, "
            "--max-wer-loss or --front, or leave --trials out",
        )
