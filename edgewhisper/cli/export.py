"""`edgewhisper export`: turn a checkpoint into an artifact."""

from __future__ import annotations

from typing import Any

from edgewhisper.cli import export_options as given
from edgewhisper.cli.choices import check_choices, precision_for
from edgewhisper.cli.options import Out
from edgewhisper.cli.output import say


def export_cli(
    checkpoint: given.Checkpoint = None,
    target: given.Target = "onnx",
    precision: given.Precision = None,
    device: given.Device = None,
    layout: given.Layout = None,
    speech: given.Speech = None,
    gate: given.Gate = "fail",
    gate_clips: given.GateClips = None,
    language: given.Language = None,
    runtime: given.Runtime = None,
    two_stage: given.TwoStage = False,
    silence_stride: given.SilenceStride = None,
    out: Out = None,
    deployment_target: given.DeploymentTarget = None,
    stateful: given.Stateful = False,
    word_timestamps: given.WordTimestamps = None,
    neural_engine: given.NeuralEngine = False,
    window: given.Window = None,
) -> None:
    """Turn a checkpoint into files that a device can run.

    The last step is an accuracy check, called the gate. It compares the text of the files with that
    of the checkpoint. fp32 must give the same tokens. In other precisions, the gate fails if the
    word error rate rises by more than 0.5 percentage points with 95 % confidence, or by more than
    10.5 points. In Core ML packages, fp16 must also give the same tokens on 98 % of the clips, and
    int4 and palettes never fail the gate. If the gate fails, nothing is written (see --gate).
    """
    options: dict[str, Any] = dict(
        deployment_target=deployment_target,
        stateful=stateful or None,
        word_timestamps=word_timestamps,
        neural_engine=neural_engine or None,
        window=window,
        runtime=runtime,
        two_stage=two_stage or None,
        silence_stride=silence_stride,
    )
    options = {name: value for name, value in options.items() if value is not None}
    check_choices(target, gate, layout, options)
    precision = precision_for(precision, device, target)
    from edgewhisper import pipeline

    options["gating"] = pipeline.Gating(gate, gate_clips)
    rest = (checkpoint, precision, speech, out, say, layout, target, language)
    say(f"wrote {pipeline.export(*rest, **options)}")
