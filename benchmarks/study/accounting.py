"""Count the sizes and costs published in the papers, on Whisper's exact dimensions.

    python -m benchmarks.study.accounting [--out FILE]

The models have no weights (PyTorch's meta device). They are built with the shapes that a method
produces, and counted by the code that counts every checkpoint (export/cost.py). A line has the
paper's figure in `published` (null if it has none) and our count in `ours`. A megabyte is 10^6
bytes. Work is the number of multiply-accumulates of a 30 s window with 32 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sizes import HEAD, SIZES
from export.cost import count_parameters, macs

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

STORED = Path(__file__).parent.parent / "results" / "accounting.jsonl"
TOKENS = 32
COUNTED = ("tiny", "base", "small", "medium")


@dataclass(frozen=True)
class Line:
    """A figure of a paper and our count of it."""

    system: str
    model: str
    what: str
    unit: str
    published: float | None
    ours: float
    how: str = ""


def build(name: str, **shape: Any) -> WhisperForConditionalGeneration:
    """Return a Whisper without weights; build_config has the arguments."""
    import torch

    from edgewhisper.whisper import WhisperForConditionalGeneration

    with torch.device("meta"):
        return WhisperForConditionalGeneration(build_config(name, **shape))


def build_config(
    name: str,
    decoder_layers: int | None = None,
    positions: int = 1500,
    ffn: int | None = None,
    token_rank: int | None = None,
) -> WhisperConfig:
    """Return the config of a Whisper size with the given compressed dimensions."""
    from transformers import WhisperConfig

    from export.shrink import FORMAT

    size = SIZES[name]
    layers = {"encoder": size.layers, "decoder": decoder_layers or size.layers}
    heads = size.width // HEAD
    config = WhisperConfig(
        d_model=size.width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width,
        num_mel_bins=size.mels,
        vocab_size=size.vocabulary,
        max_source_positions=positions,
        max_target_positions=448,
    )
    shapes: dict[str, Any] = {"format": FORMAT}
    if token_rank is not None:
        shapes["token_rank"] = token_rank
    if ffn is not None:
        attention = {"heads": heads, "qk_dim": HEAD, "v_dim": HEAD}
        layer = {"self_attn": attention, "encoder_attn": attention, "ffn": ffn}
        shapes |= {side: [layer] * count for side, count in layers.items()}
    if len(shapes) > 1:
        config.edgewhisper = shapes
    return config


def parameters(model: Any) -> int:
    return count_parameters(model)["total"]


def work(model: Any) -> int:
    """Return the multiply-accumulates of a full window with 32 tokens."""
    cost = macs(model, TOKENS)
    return cost["encoder"] + cost["cross"] + TOKENS * cost["decoder_per_token"]


def percent_less(after: float, before: float) -> float:
    return -100 * (1 - after / before)


# --------------------------------------------------------------------------- uncompressed Whisper

PRINTED_SIZES = {"tiny": 39e6, "base": 74e6, "small": 244e6, "medium": 769e6}
"""Sizes in Whisper's paper; our counts are 37.8, 72.6, 241.7 and 763.9 M, as Hugging Face's."""


def dense() -> Iterator[Line]:
    for name in COUNTED:
        model = build(name)
        count, cost = parameters(model), macs(model, TOKENS)
        yield Line("Whisper", name, "parameters", "M", PRINTED_SIZES[name] / 1e6, count / 1e6)
        for precision, size in (("fp32", 4), ("fp16", 2), ("int8", 1)):
            how = f"{size} bytes a parameter"
            yield Line("Whisper", name, f"all in {precision}", "MB", None, size * count / 1e6, how)
        yield Line("Whisper", name, "encoder, 30 s", "GMAC", None, cost["encoder"] / 1e9)
        yield Line("Whisper", name, "cross keys and values", "GMAC", None, cost["cross"] / 1e9)
        token = cost["decoder_per_token"] / 1e6
        yield Line("Whisper", name, "decoder, one token", "MMAC", None, token)


# ------------------------------------------------------------------------------------- TSPAR

TSPAR = {
    "small": {"parameters": -35.4, "memory": -14.25, "work": -18.5},
    "medium": {"parameters": -31.0, "memory": -15.29, "work": -16.95},
}


def tspar() -> Iterator[Line]:
    """Yield the effect of removing as many feed-forward units as each published figure requires.

    If the three figures came from one structural removal, the same units would give all three.
    Removing structure reduces stored weights and memory equally, so the published -35 % counts
    zeros that still take memory.
    """
    for name, printed in TSPAR.items():
        whole = build(name)
        for figure, target in printed.items():
            measured = work if figure == "work" else parameters
            left = widest(name, measured, (1 + target / 100) * measured(whole))
            model, units = build(name, ffn=left), 4 * SIZES[name].width
            how = f"{units - left} of {units} units of every feed-forward layer removed, so that "
            how += f"{figure} falls by {-target} %"
            for what in [what for what in printed if what != figure]:
                of = work if what == "work" else parameters
                change = percent_less(of(model), of(whole))
                yield Line("TSPAR", name, what, "%", printed[what], change, how)


def widest(name: str, measured: Callable[[Any], int], limit: float) -> int:
    """Return the largest feed-forward width at which the model measures at most `limit`.

    Every unit counts the same, so two models determine the cost of a unit.
    """
    full = 4 * SIZES[name].width
    most = measured(build(name))
    unit = (most - measured(build(name, ffn=1))) / (full - 1)
    return int(full - (most - limit) / unit)


# ------------------------------------------------------------------------------- BaldWhisper


def bald() -> Iterator[Line]:
    whole = build("base")
    merged = build("base", decoder_layers=3)
    final = build("base", decoder_layers=3, token_rank=96)
    stages = (("as it is", whole, 73), ("6 layers to 3", merged, 60), ("and rank 96", final, 38))
    for stage, model, printed in stages:
        yield Line("BaldWhisper", "base", stage, "M", printed, parameters(model) / 1e6)
    for stage, model, less in (("6 layers to 3", merged, -18.0), ("and rank 96", final, -48.0)):
        change = percent_less(parameters(model), parameters(whole))
        yield Line("BaldWhisper", "base", f"{stage}: parameters", "%", less, change)
        change = percent_less(work(model), work(whole))
        yield Line("BaldWhisper", "base", f"{stage}: work", "%", None, change)
    for stage, model in (("as it is", whole), ("and rank 96", final)):
        token = macs(model, TOKENS)["decoder_per_token"] / 1e6
        yield Line("BaldWhisper", "base", f"{stage}: one token", "MMAC", None, token)


# ------------------------------------------------------------------------------- Whisper-KDQ


def kdq() -> Iterator[Line]:
    small = kdq_bytes(build("small"), 16)
    how = "fp16 throughout"
    yield Line("Whisper-KDQ", "small", "teacher, fp16", "MB", None, small / 1e6, how)
    for name, printed in (("base", 5.18), ("tiny", 10.48)):
        student = kdq_bytes(build(name), 8)
        how = "weights outside the encoder in int8, all else fp16"
        yield Line("Whisper-KDQ", name, "student", "MB", None, student / 1e6, how)
        how += "; the teacher is whisper-small in fp16"
        yield Line(
            "Whisper-KDQ", name, "smaller than small", "times", printed, small / student, how
        )
        alone = kdq_bytes(build(name), 16)
        how = "without any quantisation"
        yield Line("Whisper-KDQ", name, "in fp16 alone", "times", None, small / alone, how)


def kdq_bytes(model: Any, bits: int) -> float:
    """Return the size as the authors count it.

    Tensors outside the encoder whose names end in "weight" have `bits` bits, all others 16. The
    decoder's positions, in OpenAI's release a plain tensor, are among the others.
    """
    total = 0
    for name, parameter in model.named_parameters():
        weight = name.endswith(".weight") and "embed_positions" not in name
        quantised = weight and not name.startswith("model.encoder.")
        total += parameter.numel() * (bits if quantised else 16)
    return total / 8


# ----------------------------------------------------------------------------------- LiteASR

LITE = {"(a)": (429, 67.6), "(b)": (377, 59.4), "(c)": (308, 48.5)}
LITE_RATIOS = {
    "q_proj": (0.03, 0.21),
    "k_proj": (0.03, 0.15),
    "v_proj": (0.04, 0.49),
    "out_proj": (0.03, 0.39),
    "fc1": (0.03, 0.19),
    "fc2": (0.07, 0.86),
}
"""Smallest and largest rank of any layer in configuration (c), as a share of d_model."""


def lite() -> Iterator[Line]:
    """Yield checks of the published sizes and ranks against each other.

    The paper gives sizes, and for (c) the range of the ranks. The ranks depend on the weights and
    the calibration speech, so 377 M cannot be counted exactly.
    """
    whole = encoder_parameters(build("large-v3"))
    yield Line("LiteASR", "large-v3", "encoder", "M", 635, whole / 1e6)
    for name, (millions, share) in LITE.items():
        how = "the published share of our count of the encoder"
        ours = share / 100 * whole / 1e6
        yield Line("LiteASR", "large-v3", f"encoder {name}", "M", millions, ours, how)
        how = "share of the linear layers' weights if nothing else changes: the published size "
        how += "without all other parameters"
        left = (millions * 1e6 - (whole - linear_weights())) / linear_weights()
        yield Line("LiteASR", "large-v3", f"weights left {name}", "%", None, 100 * left, how)
    for end, what in enumerate(("smallest", "largest")):
        how = f"every layer with the {what} published rank of its kind; dense if that is not "
        how += "larger"
        count = (whole - linear_weights() + ranked_weights(end)) / 1e6
        yield Line("LiteASR", "large-v3", f"encoder (c), {what} ranks", "M", 308, count, how)
    for d_out, d_in, what in ((1280, 1280, "attention"), (5120, 1280, "feed-forward")):
        how = "rank at which two factors have as many weights as the layer"
        even = d_out * d_in / (d_out + d_in)
        printed = 640 if what == "attention" else 1024
        yield Line("LiteASR", "large-v3", f"break-even, {what}", "rank", printed, even, how)


def encoder_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.model.encoder.parameters())


def linear_shapes() -> dict[str, tuple[int, int]]:
    """Return the shapes (d_out, d_in) of one layer's linear weights."""
    width = SIZES["large-v3"].width
    square = {name: (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    return {**square, "fc1": (4 * width, width), "fc2": (width, 4 * width)}


def linear_weights() -> int:
    layer = sum(d_out * d_in for d_out, d_in in linear_shapes().values())
    return SIZES["large-v3"].layers * layer


def ranked_weights(end: int) -> float:
    """Return the weights with the smallest (0) or largest (1) ranks of (c) in all layers."""
    size = SIZES["large-v3"]
    layer = 0.0
    for name, (d_out, d_in) in linear_shapes().items():
        rank = LITE_RATIOS[name][end] * size.width
        layer += min(rank * (d_out + d_in), d_out * d_in)
    return size.layers * layer


# --------------------------------------------------------------------------- shorter contexts

PRINTED_WINDOWS = {("small", 10): 0.28, ("small", 5): 0.13}
"""Published shares of the 30 s encoder's work, the argument for short windows."""


def short() -> Iterator[Line]:
    for name in COUNTED:
        whole = macs(build(name), TOKENS)["encoder"]
        for seconds in (15, 10, 5, 2):
            share = macs(build(name, positions=50 * seconds), TOKENS)["encoder"] / whole
            printed = PRINTED_WINDOWS.get((name, seconds))
            yield Line("short windows", name, f"encoder, {seconds} s", "of 30 s", printed, share)


# -------------------------------------------------------------------------------------- table

SYSTEMS = (dense, tspar, bald, kdq, lite, short)


def lines() -> Iterator[Line]:
    for system in SYSTEMS:
        yield from system()


def write(out: Path) -> None:
    text = "".join(json.dumps(vars(line)) + "\n" for line in lines())
    out.write_text(text, encoding="utf-8")


def rows(stored: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the table of the lines that have a published figure."""
    return [
        {
            "system": line["system"],
            "model": line["model"],
            "figure": f"{line['what']}, {line['unit']}",
            "published": f"{line['published']:g}",
            "ours": f"{line['ours']:.4g}",
            "counted": line["how"],
        }
        for line in stored
        if line["published"] is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=STORED)
    given = parser.parse_args()
    write(given.out)
    for line in lines():
        printed = "-" if line.published is None else f"{line.published:g}"
        text = f"{line.system:14} {line.model:9} {line.what:32} {printed:>8} {line.ours:10.4g}"
        print(f"{text} {line.unit}  {line.how}")


if __name__ == "__main__":
    main()
