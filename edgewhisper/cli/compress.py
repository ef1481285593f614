"""`edgewhisper compress`: make a checkpoint smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.options import MODEL, SPEECH, Out
from edgewhisper.cli.output import print_table, say

Model = Annotated[str | None, Argument(help=f"{MODEL}; default: the embedded digits model")]
Recipe = Annotated[
    str | None,
    Option(
        help="name of a recipe (see `edgewhisper recipes`) or .toml file; default: lite, or "
        "quick for the embedded model"
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
TargetParams = Annotated[
    str | None,
    Option(
        metavar="N|SHARE",
        help="search for a model with at most this many parameters: 900000, 0.9M or 60%",
    ),
]
TargetMacs = Annotated[
    str | None,
    Option(
        metavar="N|SHARE",
        help="search for a model with at most this many multiply-accumulates for one window "
        "and 32 tokens",
    ),
]
TargetLatency = Annotated[
    str | None,
    Option(
        metavar="TIME",
        help="search for a model with at most this latency on --device: 400ms or 0.4s",
    ),
]
Device = Annotated[
    str | None,
    Option(help="device for --target-latency; run `edgewhisper devices calibrate` on it first"),
]
MaxWerLoss = Annotated[
    float | None,
    Option(
        metavar="POINTS",
        help="search for the smallest model whose word error rate (WER) on the dev clips rises "
        "by at most this many percentage points",
    ),
]
AllowLoss = Annotated[
    bool,
    Option(
        "--allow-loss",
        help="write the checkpoint even if its WER rises by more than max_wer_loss in the recipe",
    ),
]
Trials = Annotated[int | None, Option(min=1, help="number of trials in a search; default: 12")]


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
    max_wer_loss: MaxWerLoss = None,
    allow_loss: AllowLoss = False,
    trials: Trials = None,
) -> None:
    """Make a checkpoint smaller with a recipe.

    Run an interrupted command again to resume it.

    --target-params, --target-macs, --target-latency and --max-wer-loss start a search: the recipe
    runs several times with different values (see `edgewhisper recipes`). The output directory gets
    the checkpoint that meets the targets best, all trials in pareto.json, and the other trials on
    the Pareto front in front/.
    """
    from edgewhisper import job, pipeline

    request = job.Request(
        model, recipe, speech, dev, out, seed, revision, language, allow_loss=allow_loss
    )
    asked = (target_params, target_macs, max_wer_loss, target_latency)
    if asked == (None,) * 4 and device is None:
        refuse_trials(trials)
        say(f"wrote {pipeline.compress(request, say)}")
        return
    from edgewhisper import target_search, targets

    place, rows = target_search.compress_to(
        targets.parse(*asked),
        request,
        trials or target_search.TRIALS,
        say,
        targets.table_of(target_latency, device),
    )
    print_table(rows)
    say(f"wrote {place}")


def refuse_trials(trials: int | None) -> None:
    """Raise Problem if --trials is given without a target."""
    if trials is not None:
        from export.problem import Problem

        raise Problem(
            f"--trials {trials}: there is nothing to search without a target",
            hint="add --target-params, --target-macs, --target-latency or --max-wer-loss, or leave "
            "--trials out",
        )
