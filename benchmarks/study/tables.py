"""The study's tables, verdicts and plot, from the stored lines. Nothing here is written by hand.

Of an arm's runs (one a seed) the table has the mean of the word error rate and a 95 % t-interval
over the seeds. A verdict compares two arms seed by seed: D = errors of B - errors of A, in points
of the words of all judge sets, and again the t-interval of its mean. A is better where that
interval lies above zero. With three seeds an interval is wide (t = 4.3), and it speaks of the
seeds, not of the clips: other speakers would shift all arms.
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
    """The runs of one experiment, with the arms that are chosen on dev clips."""
    experiment, runs = EXPERIMENTS[name], Runs()
    for line in lines:
        if line["experiment"] == name:
            runs.setdefault(line["arm"], {})[line["seed"]] = line
    for arm, among in experiment.chosen_on_dev.items():
        runs[arm] = chosen(runs, among)
    order = [*experiment.arms, *experiment.chosen_on_dev]
    return {arm: runs[arm] for arm in order if runs.get(arm)}


def chosen(runs: Runs, among: Sequence[str]) -> dict[int, Line]:
    """Of every seed that all these arms have: the line with the lowest dev error rates."""
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
    """Mean, and a t-interval of it; the whole line where there is one value only."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = t.ppf((1 + COVERAGE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return mean, float(mean - half), float(mean + half)


def errors(score: Mapping[str, Any]) -> int:
    return score["substitutions"] + score["deletions"] + score["insertions"]


def points(line: Line, judge: str | None = None) -> float:
    """Word errors in percent of the words of one judge set, or of all."""
    scores = [line["scores"][judge]] if judge else list(line["scores"].values())
    return 100 * sum(map(errors, scores)) / sum(score["words"] for score in scores)


def refuse_mixture(lines: Sequence[Line]) -> None:
    """Raises Problem where lines of other speech or normalizers stand among them."""
    for what, of in {
        "speech": lambda line: line["speech"],
        "normalizers": lambda line: {n: s["normalizer"] for n, s in line["scores"].items()},
        "base models": lambda line: line["base"],
    }.items():
        if any(of(line) != of(lines[0]) for line in lines):
            raise Problem(
                f"study: the {len(lines)} stored runs have different {what}",
                hint="keep the runs of each in a file of its own",
            )


# ------------------------------------------------------------------------------------- tables


def rows(name: str, lines: Sequence[Line]) -> list[dict[str, str]]:
    """One row an arm; sizes are means over the seeds."""
    runs = {"as it is": runs_of("dense", lines).get("dense", {}), **runs_of(name, lines)}
    published = EXPERIMENTS[name].published
    found_rows = []
    for arm, of_seed in runs.items():
        if not of_seed:
            continue
        found = list(of_seed.values())
        row = {"arm": arm, "seeds": str(len(found))}
        row["stored"] = millions(found, lambda line: line["parameters"]["total"])
        row["nonzero"] = millions(found, total_nonzero)
        row["encoder MMAC"] = f"{mean(found, lambda line: line['macs']['encoder']) / 1e6:.0f}"
        for judge in found[0]["scores"]:
            row[f"WER % {judge}"] = rate([points(line, judge) for line in found])
        row["published"] = published.get(arm, "")
        found_rows.append(row)
    if not published:
        for row in found_rows:
            del row["published"]
    return found_rows


def total_nonzero(line: Line) -> int:
    return line["parameters"]["nonzero"] + line["parameters"]["token_table"]


def mean(lines: Sequence[Line], of: Any) -> float:
    return float(np.mean([of(line) for line in lines]))


def millions(lines: Sequence[Line], of: Any) -> str:
    return f"{mean(lines, of) / 1e6:.3f} M"


def rate(values: Sequence[float]) -> str:
    """`4.1 (3.2 to 5.0)`; no rate is below zero, whatever the interval says."""
    middle, low, high = interval(values)
    return f"{middle:.1f}" + (f" ({max(low, 0):.1f} to {high:.1f})" if math.isfinite(low) else "")


# ----------------------------------------------------------------------------------- verdicts


BETTER, WORSE, NOISE, SAME, UNKNOWN = (
    "yes",
    "no, worse",
    "within the noise",
    "the same",
    "not known yet",
)
LARGER, SMALLER = ", but larger", ", but smaller"
EQUAL_SIZE = 0.005
"""Sizes that differ by less than this share count as equal."""


@dataclass(frozen=True)
class Verdict:
    a: str
    b: str
    answer: str
    told: str

    def __str__(self) -> str:
        return f"{self.a} better than {self.b}: **{self.answer}**, {self.told}"


def verdict(a: str, b: str, runs: Runs) -> Verdict | None:
    """Whether A is better than B; None where no seed has both."""
    seeds = sorted(set(runs.get(a, {})) & set(runs.get(b, {})))
    if not seeds:
        return None
    differences = [points(runs[b][seed]) - points(runs[a][seed]) for seed in seeds]
    middle, low, high = interval(differences)
    told = f"{middle:+.2f} points"
    told += f" ({low:+.2f} to {high:+.2f})" if math.isfinite(low) else ", one seed"
    if not any(differences):
        told = f"as many words wrong with each of {len(seeds)} seeds"
    found = answer(differences)
    sizes = [mean(list(runs[arm].values()), total_nonzero) / 1e6 for arm in (a, b)]
    if abs(sizes[0] - sizes[1]) > EQUAL_SIZE * sizes[1]:
        told += f"; nonzero {sizes[0]:.3f} M against {sizes[1]:.3f} M"
        smaller = sizes[0] < sizes[1]
        found += {(BETTER, False): LARGER, (WORSE, True): SMALLER}.get((found, smaller), "")
    return Verdict(a, b, found, told)


def answer(differences: Sequence[float]) -> str:
    """In a word, from B's errors less A's of every seed."""
    _, low, high = interval(differences)
    if len(differences) < 2:
        return UNKNOWN
    if not any(differences):
        return SAME
    return BETTER if low > 0 else WORSE if high < 0 else NOISE


def verdicts(name: str, lines: Sequence[Line]) -> list[Verdict]:
    runs = runs_of(name, lines)
    found = [verdict(a, b, runs) for a, b in EXPERIMENTS[name].pairs]
    return [one for one in found if one]


def verdict_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    return [
        {"experiment": name, "A": v.a, "B": v.b, "A better?": v.answer, "points": v.told}
        for name in EXPERIMENTS
        for v in verdicts(name, lines)
    ]


def summary(lines: Sequence[Line]) -> str:
    """How often what is ours won, and where it did not."""
    ours = [v for name in EXPERIMENTS for v in verdicts(name, lines) if "(ours)" in v.a]
    ours = [v for v in ours if v.answer != UNKNOWN]
    counts = Counter(v.answer for v in ours)
    told = ", ".join(f"{count} “{word}”" for word, count in counts.most_common())
    lost = "; ".join(f"{v.a} with {v.b}" for v in ours if v.answer.startswith(WORSE))
    text = f"Of {len(ours)} comparisons of an option of ours: {told or 'none is measured yet'}."
    return f"{text} Worse: {lost}.\n" if lost else f"{text}\n"


def markdown(lines: Sequence[Line]) -> str:
    """All experiments of which something is stored: question, budget, table, verdicts."""
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
    """Errors of every arm, all judge sets together: a dot a seed, and the interval of the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {n: runs_of(n, lines) for n, e in EXPERIMENTS.items() if e.pairs}
    found = {name: runs for name, runs in found.items() if runs}
    heights = [1 + len(runs) for runs in found.values()]
    figure = Figure(figsize=(7.5, 0.27 * sum(heights) + 0.5), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found), 1, height_ratios=heights, squeeze=False)[:, 0]
    dense = runs_of("dense", lines).get("dense", {})
    for axes, (name, runs) in zip(panels, found.items(), strict=True):
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
    panels[-1].set_xlabel("word error rate, %, all judge sets; dotted: the model as it is")
    # no version or date in the file: the same lines make the same bytes
    figure.savefig(out, format="png", metadata={"Software": None})
