"""`edgewhisper export`: turn a checkpoint into an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgewhisper.cli.choices import check_choices, precision_for
from edgewhisper.cli.options import MODEL, SPEECH, Out
from edgewhisper.cli.output import say


def export_cli(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help=f"{MODEL}; default: the newest checkpoint in ./edgewhisper-runs, otherwise the "
            "embedded digits model"
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="onnx or coreml")] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, int8 or int4; for coreml also pal4, pal6 or pal8; default: int8 for "
            "onnx, fp16 for coreml, or the best one for --device"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="choose the default precision for this device; see `edgewhisper devices`"
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="runtime to write files for; onnx: native (EdgeWhisper's runner), transformers, "
            "sherpa or single; coreml: whisperkit or encoder (for whisper.cpp); default: native or "
            "whisperkit"
        ),
    ] = None,
    speech: Annotated[
        Path | None,
        typer.Option(
            help=f"clips for the gate: {SPEECH}; default: clips included with EdgeWhisper"
        ),
    ] = None,
    gate: Annotated[
        str,
        typer.Option(
            help="fail: write nothing if the gate fails; warn: write the artifact and record the "
            "failure; off: do not run the gate"
        ),
    ] = "fail",
    gate_clips: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="maximum number of clips for the gate; default: 100"),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="default language of the artifact, or auto to detect it; default: the language "
            "that the checkpoint names, otherwise auto, or English for layouts with one prompt",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="onnx: oldest onnxruntime version that must run the artifact, such as 1.23; "
            "default: the version that the fastest graphs need",
        ),
    ] = None,
    out: Out = None,
    deployment_target: Annotated[
        str | None,
        typer.Option(help="coreml: iOS16, iOS17 or iOS18; default: the oldest one possible"),
    ] = None,
    stateful: Annotated[
        bool,
        typer.Option(
            "--stateful", help="coreml: keep the decoder's caches inside the model (needs iOS18)"
        ),
    ] = False,
    word_timestamps: Annotated[
        bool | None,
        typer.Option(
            "--word-timestamps/--no-word-timestamps",
            help="coreml: output the weights of the alignment heads, for word timestamps; default: "
            "on if the model has alignment heads",
        ),
    ] = None,
    neural_engine: Annotated[
        bool,
        typer.Option(
            "--neural-engine", help="coreml: use the tensor layout that the Neural Engine prefers"
        ),
    ] = False,
    window: Annotated[
        float | None,
        typer.Option(
            help="coreml: window length in seconds, one that the model has; default: the longest"
        ),
    ] = None,
) -> None:
    """Turn a checkpoint into files that a device can run.

    The last step is a check, called the gate: the files must give the same text as the checkpoint.
    fp32 must give the same tokens. Other precisions fail if the word error rate rises by more than
    0.5 percentage points with 95 % confidence, or by more than 10.5 points in any case. If the gate
    fails, nothing is written.
    """
    options: dict[str, Any] = dict(
        deployment_target=deployment_target,
        stateful=stateful or None,
        word_timestamps=word_timestamps,
        neural_engine=neural_engine or None,
        window=window,
        runtime=runtime,
    )
    options = {name: value for name, value in options.items() if value is not None}
    check_choices(target, gate, layout, options)
    precision = precision_for(precision, device, target)
    from edgewhisper import pipeline

    gating = pipeline.Gating(gate, gate_clips)
    rest = (checkpoint, precision, speech, out, say, layout, target, language, gating)
    say(f"wrote {pipeline.export(*rest, **options)}")
