"""The options of `edgewhisper compress` that set targets."""

from __future__ import annotations

from typing import Annotated

from typer import Option

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
    Option(
        help="device for --target-latency or --front; run `edgewhisper devices calibrate` on it "
        "first"
    ),
]
MaxWerLoss = Annotated[
    float | None,
    Option(
        metavar="POINTS",
        help="search for the smallest model whose word error rate (WER) on the dev clips rises "
        "by at most this many percentage points",
    ),
]
TargetBytes = Annotated[
    str | None,
    Option(
        metavar="N|SHARE",
        help="search for a model whose artifact has at most this many bytes in --precision, "
        "predicted from the shapes: 30M or 60%",
    ),
]
Precision = Annotated[
    str | None, Option(help="precision of the artifact for --target-bytes; default: int8")
]
Front = Annotated[
    bool,
    Option(
        "--front",
        help="try sizes over the whole range of the search, and plot their WER; with --device, try "
        "predicted latencies instead of sizes",
    ),
]
Trials = Annotated[int | None, Option(min=1, help="number of trials in a search; default: 12")]
