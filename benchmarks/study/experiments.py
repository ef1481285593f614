"""The experiments of the study as data: their arms, and which pairs of arms are compared.

An arm is a list of recipe steps. In an experiment with training, all arms make the same number of
optimiser steps with the same batch size on the same clips, so that methods and not budgets are
compared. The budget is small: an arm takes about a minute on one core. Differences that hours of
training would remove are therefore visible, on purpose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Step = dict[str, Any]
"""A [[step]] table of a recipe."""

STEPS, BATCH = 60, 8
TRAINED = f"{STEPS} optimiser steps of {BATCH} clips in total, noise of 10 dB or less"
ZERO = 0.354
"""Share of the parameters that TSPAR prunes from whisper-small."""
MATRICES = 1_310_720 / 1_448_448
"""Share of the embedded model's parameters outside the token table that is in linear layers."""


@dataclass(frozen=True)
class CostOf:
    """Placeholder for a number: the share of the layers' weights that another arm kept with the
    same seed."""

    arm: str


@dataclass(frozen=True)
class Experiment:
    """A question, the arms that answer it, and the pairs of arms to compare."""

    question: str
    budget: str
    arms: Mapping[str, Sequence[Step]]
    pairs: Sequence[tuple[str, str]]
    """(A, B): is A better than B?"""
    published: Mapping[str, str] = field(default_factory=dict)
    """Arm -> the result in its paper, on the paper's models and speech."""
    chosen_on_dev: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Additional arm -> arms; for each seed it takes their run with the lowest dev WER."""


def training(steps: int, learning_rate: float = 5e-4) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": learning_rate,
        "warmup": 0.1,
        "noise_snr_db": 10.0,
    }


HALF = {"training": training(STEPS // 2), "recovery": training(STEPS - STEPS // 2)}
SHRINK: Step = {"method": "shrink"}

# ---------------------------------------------------------------- pruning: TSPAR, IMP, WSAP


def lambdas(element: float, column: float) -> Step:
    return {
        f"{side}_{kind}": value
        for side in ("encoder", "decoder")
        for kind, value in (("element", element), ("column", column))
    }


def tspar(zero: float, **options: Any) -> list[Step]:
    """Return steps that prune all linear layers up to the share `zero`, without recovery."""
    step = {"method": "tspar", "search": False, "min_zero": zero, "training": training(STEPS)}
    return [step | options, SHRINK]


def tspar_fc2(zero: float, **options: Any) -> list[Step]:
    """Return our variant: only columns of fc2, with half of the steps after pruning."""
    columns = {"reg_mode": "proximal", "c1": 0.1, "c2": -1.0, "rho": 0.1, **lambdas(0.0, 30.0)}
    return tspar(zero, **({"layers": "*.fc2"} | columns | HALF | options))


def imp(zero: float, rounds: int) -> list[Step]:
    """Return steps that prune in `rounds` rounds, with half of the steps after the last."""
    target = zero / MATRICES
    share = 1 - (1 - target) ** (1 / rounds) + 1e-6
    half = STEPS // 2
    step = {"method": "imp", "share": round(share, 6), "target": round(target, 6)}
    each = {"training": training(half // rounds), "recovery": training(STEPS - half)}
    return [step | each, SHRINK]


def wsap(zero: float, scale: float) -> list[Step]:
    """Return steps with the ratios 0.3, 0.5 and 0.7 times `scale`, which reaches `zero`."""
    ratios = {n: round(scale * r, 6) for n, r in (("low", 0.3), ("middle", 0.5), ("high", 0.7))}
    return [{"method": "wsap", **ratios, "recovery": training(STEPS)}, SHRINK]


PROXIMAL = {"reg_mode": "proximal", **lambdas(3.0, 3.0)}
ELEMENTS = {"reg_mode": "proximal", **lambdas(3.0, 0.0), "c2": 5.0, "rho": 0.0}

PRUNING = Experiment(
    question=f"TSPAR, IMP and WSAP with {ZERO:.1%} of the parameters outside the token table zero "
    "or removed",
    budget=TRAINED,
    arms={
        "IMP": imp(ZERO, rounds=2),
        "WSAP": wsap(ZERO, scale=0.84583),
        "TSPAR as published": tspar(ZERO, reg_mode="subgradient"),
        "TSPAR, l2 squared": tspar(ZERO, reg_mode="subgradient", group_norm="l2_squared"),
        "TSPAR, proximal (ours)": tspar(ZERO, **PROXIMAL),
        "TSPAR, no penalty": tspar(ZERO, **lambdas(0.0, 0.0)),
        "TSPAR, half the steps after pruning (ours)": tspar(ZERO, **HALF),
        "TSPAR on fc2 (ours)": tspar_fc2(ZERO),
        "TSPAR, elements alone, half after (ours)": tspar(ZERO, **ELEMENTS, **HALF),
        "fc2, no penalty": tspar_fc2(ZERO, **lambdas(0.0, 0.0)),
    },
    pairs=(
        ("TSPAR as published", "IMP"),
        ("TSPAR as published", "WSAP"),
        ("TSPAR as published", "TSPAR, l2 squared"),
        ("TSPAR as published", "TSPAR, no penalty"),
        ("TSPAR, proximal (ours)", "TSPAR as published"),
        ("TSPAR, half the steps after pruning (ours)", "TSPAR as published"),
        ("TSPAR, half the steps after pruning (ours)", "IMP"),
        ("TSPAR on fc2 (ours)", "TSPAR as published"),
        ("TSPAR on fc2 (ours)", "IMP"),
        ("TSPAR, elements alone, half after (ours)", "IMP"),
        ("TSPAR on fc2 (ours)", "fc2, no penalty"),
    ),
    published={
        "TSPAR as published": "whisper-small, Hindi: 35.4 % of the parameters, WER not degraded; "
        "12.31 lower than IMP's",
    },
)

# -------------------------------------------------------------------------------- BaldWhisper


def merge(**options: Any) -> list[Step]:
    """Return a merge step with a high learning rate; at 5e-4, so few steps recover none of the
    models."""
    return [{"method": "merge", **options, "training": training(STEPS, 2e-3)}]


ALPHAS = (0.1, 1.0, 10.0)
MERGED = {f"merged, alpha {a:g}": merge(alpha=a, beta=1.0) for a in ALPHAS}

MERGING = Experiment(
    question="Two decoder layers merged into one, or one of them dropped, with equal distillation",
    budget=TRAINED,
    arms={"upper kept": merge(start="upper"), "lower kept": merge(start="lower"), **MERGED},
    pairs=(
        ("merged, alpha chosen on dev", "upper kept"),
        ("merged, alpha chosen on dev", "lower kept"),
        ("merged, alpha 0.1", "upper kept"),
        ("lower kept", "upper kept"),
    ),
    published={
        "merged, alpha chosen on dev": "whisper-base, Bambara, 6 layers to 3: WER 33.11 to 34.77 %",
    },
    chosen_on_dev={"merged, alpha chosen on dev": tuple(MERGED)},
)


def shear(rank: int, start: str, **options: Any) -> list[Step]:
    step = {"method": "shear", "rank": rank, "start": start, **options}
    return [step | {"training": training(STEPS)}]


STARTS = ("svd", "frequency", "activation")


def shearing(rank: int, published: Mapping[str, str]) -> Experiment:
    return Experiment(
        question=f"Initialisation of a token table (783 x 128) of rank {rank}, with equal recovery",
        budget=TRAINED,
        arms={f"rank {rank}, {start}": shear(rank, start) for start in STARTS},
        pairs=tuple((f"rank {rank}, {start}", f"rank {rank}, svd") for start in STARTS[1:]),
        published=published,
    )


SHEARED = {"rank 32, svd": "whisper-base, Bambara, rank 96 of 512: WER 34.77 to 36.49 %"}

# ------------------------------------------------------------------------------------ LiteASR


def lite(theta_attn: float, theta_mlp: float, **options: Any) -> list[Step]:
    step = {"method": "lite", "theta_attn": theta_attn, "theta_mlp": theta_mlp}
    return [step | options, SHRINK]


LITE_BALANCED = Experiment(
    question="LiteASR at its thresholds (b), 0.99 for attention and 0.999 for feed-forward layers",
    budget="no training; 100 calibration clips, different ones for each seed",
    arms={
        "as published": lite(0.99, 0.999),
        "plain SVD, same ranks": lite(0.99, 0.999, basis="weights"),
        "budget, same cost (ours)": lite(0.99, 0.999, budget=CostOf("as published")),
        "padding masked (ours)": lite(0.99, 0.999, mask_padding=True),
        "budget, padding masked (ours)": lite(
            0.99, 0.999, mask_padding=True, budget=CostOf("as published")
        ),
        "shared keys and values": lite(0.99, 0.999, share=True),
    },
    pairs=(
        ("as published", "plain SVD, same ranks"),
        ("budget, same cost (ours)", "as published"),
        ("padding masked (ours)", "as published"),
        ("budget, padding masked (ours)", "as published"),
        ("shared keys and values", "as published"),
    ),
    published={
        "as published": "large-v3, English: 635 M to 377 M in the encoder, WER 10.1 to 10.2 %"
    },
)

LITE_TIGHT = Experiment(
    question="LiteASR below its thresholds, 0.95 for all layers",
    budget="no training; 100 calibration clips, different ones for each seed",
    arms={
        "as published": lite(0.95, 0.95),
        "plain SVD, same ranks": lite(0.95, 0.95, basis="weights"),
        "budget, same cost (ours)": lite(0.95, 0.95, budget=CostOf("as published")),
        "padding masked (ours)": lite(0.95, 0.95, mask_padding=True),
        "budget, padding masked (ours)": lite(
            0.95, 0.95, mask_padding=True, budget=CostOf("as published")
        ),
    },
    pairs=(
        ("as published", "plain SVD, same ranks"),
        ("budget, same cost (ours)", "as published"),
        ("budget, padding masked (ours)", "as published"),
        ("padding masked (ours)", "as published"),
    ),
)

LITE_SEQUENTIAL = Experiment(
    question="LiteASR below its thresholds, each layer fitted to the compressed layers before it",
    budget="no training; 25 calibration clips, different ones for each seed",
    arms={
        "as published": lite(0.95, 0.95, clips=25),
        "sequential (ours)": lite(0.95, 0.95, clips=25, sequential=True),
    },
    pairs=(("sequential (ours)", "as published"),),
)

# -------------------------------------------------------- Whisper-KDQ, and shorter audio contexts


def kdq(**options: Any) -> list[Step]:
    """Return steps that distil the model into itself while all layers are rounded to 4 bits."""
    quantise = {"encoder": 4, "decoder": 4, "token_table": 8}
    step = {"method": "kdq", "encoder": True, **options, "quantise": quantise}
    return [{"training": training(STEPS)} | step]


GUIDED = Experiment(
    question="Distillation during 4-bit quantisation: which layers, and with which loss",
    budget=TRAINED,
    arms={
        "rounded, not trained": kdq(training={"steps": 0}),
        "logits alone": kdq(distill_mode="logits"),
        "unguided": kdq(),
        "static match": kdq(matching="static"),
        "guided, half of the layers": kdq(distil_share=0.5),
        "weights matched": kdq(guided_mode="KDQ"),
        "normalised, best match (ours)": kdq(features="normalised", matching="dp"),
    },
    pairs=(
        ("guided, half of the layers", "unguided"),
        ("unguided", "static match"),
        ("unguided", "logits alone"),
        ("weights matched", "unguided"),
        ("normalised, best match (ours)", "unguided"),
        ("unguided", "rounded, not trained"),
    ),
)


def short(steps: int, **options: Any) -> list[Step]:
    return [{"method": "short", **options, "training": training(steps)}]


SHORT = Experiment(
    question="Windows of one and two thirds of the length, with and without training",
    budget=TRAINED,
    arms={
        "naive": short(0),
        "trained, lengths as published": short(STEPS),
        "trained on the windows (ours)": short(STEPS, lengths="windows", full_share=0.2, kl=1.0),
    },
    pairs=(
        ("trained, lengths as published", "naive"),
        ("trained on the windows (ours)", "naive"),
        ("trained on the windows (ours)", "trained, lengths as published"),
    ),
    published={
        "naive": "tiny.en, LibriSpeech: 4.73 to 225.99 %",
        "trained, lengths as published": "tiny.en, LibriSpeech: 4.73 to 5.50 %",
    },
)

# --------------------------------------------------------------------- the order of recipe `edge`

PRUNED = tspar_fc2(ZERO)
PRUNED_AFTER = tspar_fc2(0.2, layers="*.fc2*")  # both factors; a share of the remaining weights
LOW_RANK = lite(0.99, 0.99, layers="*", mask_padding=True, sequential=True, share=True, clips=50)
TABLE = [{"method": "shear", "theta": 0.9999, "start": "activation", "training": training(0)}]
INT8 = [{"method": "qat", "stem": 8, "keep": 1.0, "training": training(STEPS // 2, 1e-4)}]
RECORDED = short(0)

EDGE = Experiment(
    question="The order of the steps of `edge`",
    budget=f"{STEPS} optimiser steps for pruning, {STEPS // 2} for int8",
    arms={
        "windows, prune, low rank, table, int8": RECORDED + PRUNED + LOW_RANK + TABLE + INT8,
        "windows, low rank, prune, table, int8": RECORDED + LOW_RANK + PRUNED_AFTER + TABLE + INT8,
        "prune, low rank, table, int8, windows": PRUNED + LOW_RANK + TABLE + INT8 + RECORDED,
        "windows, low rank, table, int8": RECORDED + LOW_RANK + TABLE + INT8,
    },
    pairs=(
        ("windows, prune, low rank, table, int8", "windows, low rank, prune, table, int8"),
        ("windows, prune, low rank, table, int8", "prune, low rank, table, int8, windows"),
        ("windows, prune, low rank, table, int8", "windows, low rank, table, int8"),
    ),
)

DENSE = Experiment(
    question="The uncompressed embedded model",
    budget="none",
    arms={"dense": [SHRINK]},
    pairs=(),
)

EXPERIMENTS: dict[str, Experiment] = {
    "dense": DENSE,
    "pruning": PRUNING,
    "merging": MERGING,
    "shearing": shearing(32, SHEARED),
    "shearing-far": shearing(16, {}),
    "lite": LITE_BALANCED,
    "lite-tight": LITE_TIGHT,
    "lite-sequential": LITE_SEQUENTIAL,
    "guided": GUIDED,
    "short": SHORT,
    "edge": EDGE,
}


def methods(name: str) -> set[str]:
    """Return the names of the methods that an experiment uses."""
    return {step["method"] for steps in EXPERIMENTS[name].arms.values() for step in steps}


def recipe_text(steps: Sequence[Step], title: str) -> str:
    """Return the steps as the text of a recipe file."""
    lines = [f"# {title}"]
    for step in steps:
        tables = {name: value for name, value in step.items() if isinstance(value, dict)}
        lines += ["", "[[step]]"]
        lines += [f"{n} = {literal(v)}" for n, v in step.items() if n not in tables]
        for name, table in tables.items():
            lines += ["", f"[step.{name}]", *(f"{n} = {literal(v)}" for n, v in table.items())]
    return "\n".join(lines) + "\n"


def literal(value: Any) -> str:
    """Return a string without quotes, a boolean or a number as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
