"""The study's tables, verdicts and plot, generated from the stored lines.

The table has the mean word error rate of an arm's runs (one per seed) and its 95 % t-interval over
the seeds. A verdict compares two arms seed by seed: D = WER(B) - WER(A) in points over the words of
all test sets. A is better if the 95 % t-interval of the mean of D is above zero. With three seeds,
an interval is wide (t = 4.3). It covers the variation of the seeds, not of the clips: other
speakers would shift all arms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.markdown import table
from benchmarks.study.experiments import EXPERIMENTS, Experiment
from export.problem import Problem

Line = dict[str, Any]
Runs = dict[str, dict[int, Line]]
"""Arm -> seed -> its line."""

RESULTS = Path(__file__).parent.parent / "results"
PLOT = RESULTS / "study.png"
COVERAGE = 0.95


def runs_of(name: str, lines: Sequence[Line]) -> Runs:
    """Return the runs of one experiment, with the arms that are chosen on dev clips."""
    experiment, runs = EXPERIMENTS[name], Runs()
    for line in lines:
        if line["experiment"] == name:
            runs.setdefault(line["arm"], {})[line["seed"]] = line
    for arm, among in experiment.chosen_on_dev.items():
        runs[arm] = chosen(runs, among)
    order = [*experiment.arms, *experiment.chosen_on_dev]
    return {arm: runs[arm] for arm in order if runs.get(arm)}


def chosen(runs: Runs, among: Sequence[str]) -> dict[int, Line]:
    """Return, for every common seed of the arms, the line with the lowest dev error rates."""
    seeds = set.intersection(*(set(runs.get(arm, {})) for arm in among))
    return {
        seed: min(
            (runs[arm][seed] for arm in among),
            key=lambda line: (line["dev"]["wer"], line["dev"]["cer"]),
        )
        for seed in sorted(seeds)
    }


# ------------------------------------------------------------------------------------ numbers


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its t-interval, which is infinite for a single value."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = t.ppf((1 + COVERAGE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return mean, float(mean - half), float(mean + half)


def errors(score: Mapping[str, Any]) -> int:
    return score["substitutions"] + score["deletions"] + score["insertions"]


def points(line: Line, judge: str | None = None) -> float:
    """Return the word error rate in per cent on one test set, or on all."""
    scores = [line["scores"][judge]] if judge else list(line["scores"].values())
    return 100 * sum(map(errors, scores)) / sum(score["words"] for score in scores)


def refuse_mixture(lines: Sequence[Line]) -> None:
    """Raise Problem for lines with different speech, normalizers or base models."""
    for what, of in {
        "speech": lambda line: line["speech"],
        "normalizers": lambda line: {n: s["normalizer"] for n, s in line["scores"].items()},
        "base models": lambda line: line["base"],
    }.items():
        if any(of(line) != of(lines[0]) for line in lines):
            raise Problem(
                f"study: the {len(lines)} stored runs have different {what}",
                hint="store the runs of each in a separate file",
            )


# ------------------------------------------------------------------------------------- tables


def rows(name: str, lines: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row per arm; sizes are means over the seeds."""
    runs = {"uncompressed": runs_of("dense", lines).get("dense", {}), **runs_of(name, lines)}
    published = EXPERIMENTS[name].published
    table_rows = []
    for arm, of_seed in runs.items():
        if not of_seed:
            continue
        own = list(of_seed.values())
        row = {"arm": arm, "seeds": str(len(own))}
        row["stored"] = millions(own, lambda line: line["parameters"]["total"])
        row["nonzero"] = millions(own, total_nonzero)
        row["encoder MMAC"] = f"{mean(own, lambda line: line['macs']['encoder']) / 1e6:.0f}"
        for judge in own[0]["scores"]:
            row[f"WER % {judge}"] = rate([points(line, judge) for line in own])
        row["published"] = published.get(arm, "")
        table_rows.append(row)
    if not published:
        for row in table_rows:
            del row["published"]
    return table_rows


def total_nonzero(line: Line) -> int:
    return line["parameters"]["nonzero"] + line["parameters"]["token_table"]


def mean(lines: Sequence[Line], of: Any) -> float:
    return float(np.mean([of(line) for line in lines]))


def millions(lines: Sequence[Line], of: Any) -> str:
    return f"{mean(lines, of) / 1e6:.3f} M"


def rate(values: Sequence[float]) -> str:
    """Return a mean and interval such as `4.1 (3.2 to 5.0)`, cut at zero."""
    middle, low, high = interval(values)
    return f"{middle:.1f}" + (f" ({max(low, 0):.1f} to {high:.1f})" if math.isfinite(low) else "")


# ----------------------------------------------------------------------------------- verdicts


BETTER, WORSE, NOISE, SAME, UNKNOWN = (
    "yes",
    "no, worse",
    "not significant",
    "the same",
    "unknown",
)
LARGER, SMALLER = ", but larger", ", but smaller"
EQUAL_SIZE = 0.005
"""Sizes that differ by less than this share count as equal."""


@dataclass(frozen=True)
class Verdict:
    """Whether arm A is better than arm B."""

    a: str
    b: str
    answer: str
    difference: str
    """The difference in points, and in size if it is not equal."""

    def __str__(self) -> str:
        return f"{self.a} better than {self.b}: **{self.answer}**, {self.difference}"


def verdict(a: str, b: str, runs: Runs) -> Verdict | None:
    """Return the verdict on two arms; None if they have no common seed."""
    seeds = sorted(set(runs.get(a, {})) & set(runs.get(b, {})))
    if not seeds:
        return None
    differences = [points(runs[b][seed]) - points(runs[a][seed]) for seed in seeds]
    middle, low, high = interval(differences)
    text = f"{middle:+.2f} points"
    text += f" ({low:+.2f} to {high:+.2f})" if math.isfinite(low) else ", one seed"
    if not any(differences):
        text = f"equal word errors with all {len(seeds)} seeds"
    verdict = answer(differences)
    sizes = [mean(list(runs[arm].values()), total_nonzero) / 1e6 for arm in (a, b)]
    if abs(sizes[0] - sizes[1]) > EQUAL_SIZE * sizes[1]:
        text += f"; nonzero {sizes[0]:.3f} M against {sizes[1]:.3f} M"
        smaller = sizes[0] < sizes[1]
        verdict += {(BETTER, False): LARGER, (WORSE, True): SMALLER}.get((verdict, smaller), "")
    return Verdict(a, b, verdict, text)


def answer(differences: Sequence[float]) -> str:
    """Return the answer for the differences WER(B) - WER(A) of all seeds."""
    _, low, high = interval(differences)
    if len(differences) < 2:
        return UNKNOWN
    if not any(differences):
        return SAME
    return BETTER if low > 0 else WORSE if high < 0 else NOISE


def verdicts(name: str, lines: Sequence[Line]) -> list[Verdict]:
    runs = runs_of(name, lines)
    answers = [verdict(a, b, runs) for a, b in EXPERIMENTS[name].pairs]
    return [one for one in answers if one]


def verdict_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    return [
        {
            "experiment": name,
            "A": v.a,
            "B": v.b,
            "A better?": v.answer,
            "WER(B) - WER(A)": v.difference,
        }
        for name in EXPERIMENTS
        for v in verdicts(name, lines)
    ]


def summary(lines: Sequence[Line]) -> str:
    """Return a sentence that counts the verdicts on our variants and lists the worse ones."""
    ours = [v for name in EXPERIMENTS for v in verdicts(name, lines) if "(ours)" in v.a]
    ours = [v for v in ours if v.answer != UNKNOWN]
    counts = Counter(v.answer for v in ours)
    summary = ", ".join(f"{count} “{word}”" for word, count in counts.most_common())
    worse = "; ".join(f"{v.a} than {v.b}" for v in ours if v.answer.startswith(WORSE))
    text = f"{len(ours)} comparisons of our variants: {summary or 'none measured yet'}."
    return f"{text} Worse: {worse}.\n" if worse else f"{text}\n"


def markdown(lines: Sequence[Line]) -> str:
    """Return the question, budget, table and verdicts of all experiments with stored runs."""
    refuse_mixture(lines)
    parts = []
    for name, experiment in EXPERIMENTS.items():
        if experiment.pairs and any(line["experiment"] == name for line in lines):
            sentences = "".join(f"- {sentence}\n" for sentence in verdicts(name, lines))
            parts.append(f"{heading(experiment)}\n{table(rows(name, lines))}\n{sentences}")
    return "\n".join(parts)


def heading(experiment: Experiment) -> str:
    return f"**{experiment.question}** ({experiment.budget})\n"


# --------------------------------------------------------------------------------------- plot


def plot(lines: Sequence[Line], out: Path = PLOT) -> None:
    """Plot the error rate of every arm on all test sets: one dot per seed, and the interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_name = {n: runs_of(n, lines) for n, e in EXPERIMENTS.items() if e.pairs}
    by_name = {name: runs for name, runs in by_name.items() if runs}
    heights = [1 + len(runs) for runs in by_name.values()]
    figure = Figure(figsize=(7.5, 0.27 * sum(heights) + 0.5), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(by_name), 1, height_ratios=heights, squeeze=False)[:, 0]
    dense = runs_of("dense", lines).get("dense", {})
    for axes, (name, runs) in zip(panels, by_name.items(), strict=True):
        for row, of_seed in enumerate(runs.values()):
            values = [points(line) for line in of_seed.values()]
            middle, low, high = interval(values)
            if math.isfinite(low):
                axes.hlines(row, low, high, color="tab:blue", lw=2, alpha=0.4)
            axes.plot(values, [row] * len(values), ".", color="tab:blue")
            axes.plot(middle, row, "|", color="black", ms=10)
        for line in dense.values():
            axes.axvline(points(line), color="gray", ls=":", lw=1)
        axes.set_yticks(range(len(runs)), list(runs), fontsize=8)
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_title(name, loc="left", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("word error rate, %, all test sets; dotted: the uncompressed model")
    # without version and date in the file, equal lines give equal bytes
    figure.savefig(out, format="png", metadata={"Software": None})
