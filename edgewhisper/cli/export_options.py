"""The options of `edgewhisper export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.choices import layouts_help
from edgewhisper.cli.options import MODEL, SPEECH
from export.layouts import TARGETS

Checkpoint = Annotated[
    str | None,
    Argument(
        help=f"{MODEL}; default: the newest checkpoint in ./edgewhisper-runs, otherwise the "
        "embedded digits model"
    ),
]
Target = Annotated[str, Option(help="onnx or coreml")]
Precision = Annotated[
    str | None,
    Option(
        help="fp32, fp16, int8 or int4; for coreml also pal4, pal6 or pal8; default: int8 for "
        "onnx, fp16 for coreml, or the best one for --device"
    ),
]
Device = Annotated[
    str | None,
    Option(help="choose the default precision for this device; see `edgewhisper devices`"),
]
Layout = Annotated[
    str | None,
    Option(
        help="layout of the files, which depends on the runtime that reads them; "
        f"{'; '.join(map(layouts_help, TARGETS))}"
    ),
]
Speech = Annotated[
    Path | None,
    Option(help=f"clips for the gate: {SPEECH}; default: clips included with EdgeWhisper"),
]
Gate = Annotated[
    str,
    Option(
        help="fail: write nothing if the gate fails; warn: write the artifact and record the "
        "failure; off: do not run the gate"
    ),
]
GateClips = Annotated[
    int | None,
    Option(min=1, metavar="N", help="maximum number of clips for the gate; default: 100"),
]
Language = Annotated[
    str | None,
    Option(
        metavar="CODE",
        help="default language of the artifact, or auto to detect it; default: the language "
        "that the checkpoint records, otherwise auto, or English for layouts with a fixed prompt",
    ),
]
Runtime = Annotated[
    str | None,
    Option(
        metavar="VERSION",
        help="onnx only: oldest onnxruntime version that must run the artifact, such as 1.23; "
        "default: the version that the fastest graphs need",
    ),
]
TwoStage = Annotated[
    bool,
    Option(
        "--two-stage",
        help="onnx only: compute logits in two stages, if no token of the gate's clips changes",
    ),
]
SilenceStride = Annotated[
    int | None,
    Option(
        min=1,
        metavar="N",
        help="native layout only: compute N encoder positions of the silence after a clip as one, "
        "which makes short clips faster; default: 8 for int8 and int4 with a window of 30 s, "
        "otherwise 1",
    ),
]
DeploymentTarget = Annotated[
    str | None,
    Option(
        help="coreml only: oldest system that must run the packages: iOS16, iOS17 or iOS18; "
        "default: the oldest one that supports the other options"
    ),
]
Stateful = Annotated[
    bool,
    Option("--stateful", help="coreml only: keep the decoder's caches in the model (iOS18)"),
]
WordTimestamps = Annotated[
    bool | None,
    Option(
        "--word-timestamps/--no-word-timestamps",
        help="coreml only: output the weights of the alignment heads, for word timestamps; "
        "default: on if the model has alignment heads",
    ),
]
NeuralEngine = Annotated[
    bool,
    Option("--neural-engine", help="coreml only: use the Neural Engine's tensor layout"),
]
Window = Annotated[
    float | None,
    Option(help="coreml only: window length in seconds, one of the model's; default: the longest"),
]
