"""Counts of instructions: read from the marks, kept as JSON lines, compared with those kept.

A line has, for one artifact on one emulated core, the instructions of the encoder per second of its
window, of the prompt's step and of a token's (the mean over the forced ones), how many of each are
dot products, and how far the outputs are from x86-64's. No times: emulated ones mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aarch64.guest import ENCODER, END, PROMPT, TOKEN
from benchmarks.aarch64.machine import Answer, Work
from devices.runner.audio import SAMPLING_RATE
from export.files import new_file
from export.problem import Problem

FORMAT = 1
STAGES = {"encoder_per_s": ENCODER, "prompt": PROMPT, "token": TOKEN}
TITLES = {"encoder_per_s": "encoder a second", "prompt": "prompt", "token": "token"}
ALLOWED_RISE = 0.01
ALLOWED_ERROR = 1e-5

Row = dict[str, Any]


# ------------------------------------------------------------------------------------- counting


def spans(text: str) -> dict[int, np.ndarray]:
    """Number of a mark -> (instructions, dot products) from every such mark to the next, (n, 2)."""
    try:
        marks = np.array([[int(word) for word in line.split()] for line in text.splitlines()])
        numbers, totals = marks[:, 0], marks[:, 1:3]
        if totals.shape[1] != 2 or (np.diff(totals, axis=0) < 0).any():
            raise ValueError("not two totals that grow")
    except (ValueError, IndexError) as error:
        raise Problem(
            f"the plugin's marks cannot be read ({error})",
            "delete build/aarch64 to build the emulated machine anew",
        ) from None
    between = np.diff(totals, axis=0)
    return {number: between[numbers[:-1] == number] for number in set(numbers.tolist()) - {END}}


def counted(text: str, work: Work, window_s: float) -> dict[str, dict[str, float]]:
    """`instructions` and `dot_products` of the last round, by stage."""
    found = spans(text)
    wanted = {ENCODER: work.rounds, PROMPT: work.rounds, TOKEN: work.rounds * work.tokens}
    there = {number: len(span) for number, span in found.items()}
    if there != wanted:
        raise Problem(
            f"the plugin saw {there} marks of {wanted}",
            "the guest ended early or ran more than once; run it again",
        )
    last = {
        "encoder_per_s": found[ENCODER][-1] / window_s,
        "prompt": found[PROMPT][-1],
        "token": found[TOKEN][-work.tokens :].mean(axis=0),
    }
    names = ("instructions", "dot_products")
    return {
        name: {stage: round(float(both[column])) for stage, both in last.items()}
        for column, name in enumerate(names)
    }


# ------------------------------------------------------------------------------ against x86-64


def against(ours: Answer, theirs: Answer) -> Row:
    """How far what one machine made is from what the other did."""
    same = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    logits = ours.arrays["logits"], theirs.arrays["logits"]
    return {
        "encoder": max(farthest(floats(ours.arrays), floats(theirs.arrays)), default=0.0),
        "logits": float(np.abs(logits[0] - logits[1]).max()),
        "logits_span": float(np.ptp(logits[1])),
        "clips": len(ours.tokens),
        "clips_alike": same,
    }


def farthest(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[float]:
    return [float(np.abs(ours[name] - array).max()) for name, array in theirs.items()]


def floats(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keys and values as they are read: codes times the scale of each head's channels."""
    found = {}
    for name, array in arrays.items():
        if name.endswith((".key", ".value")):
            wide = array[0].astype(np.float32)  # (heads, room, width)
            scale = arrays.get(f"{name}_scale")
            found[name] = wide if scale is None else wide * scale.reshape(len(wide), 1, -1)
    return found


# ------------------------------------------------------------------------------------- the gate


def read(path: Path) -> list[Row]:
    """The lines of a file of counts. Raises Problem where it is none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if row["format"] != FORMAT or not set(STAGES) <= set(row["instructions"]):
                raise ValueError(f"format {row['format']}")
            key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"{path}: no counts of this version ({error})", "keep them anew with --keep"
        ) from None
    return rows


def keep(rows: Sequence[Row], path: Path) -> None:
    """Put rows into a file, in the place of those of the same artifacts and cores."""
    kept = {key(row): row for row in (read(path) if path.is_file() else [])}
    kept |= {key(row): row for row in rows}
    with new_file(path) as temporary:
        lines = [json.dumps(row) + "\n" for _, row in sorted(kept.items())]
        temporary.write_text("".join(lines), encoding="utf-8")


def key(row: Row) -> tuple[Any, ...]:
    """Rows of one key have done the same work."""
    return tuple(row[name] for name in ("name", "cpu", "window_s", "tokens"))


def change(row: Row, kept: Sequence[Row]) -> str:
    """How much more the worst stage takes than was kept, for a table."""
    before = next((one for one in kept if key(one) == key(row)), None)
    if before is None:
        return "none kept"
    counts = (row["instructions"], before["instructions"])
    return f"{max(counts[0][stage] / counts[1][stage] for stage in STAGES) - 1:+.2%}"


def risen(row: Row, kept: Row) -> list[str]:
    """What takes more instructions than was kept for the same artifact and core."""
    pairs = [(TITLES[s], kept["instructions"][s], row["instructions"][s]) for s in STAGES]
    where = f"{row['name']} on {row['cpu']}"
    return [
        f"{where}: {title} {now:,} instructions, {now / before - 1:.1%} more than {before:,}"
        for title, before, now in pairs
        if now > before * (1 + ALLOWED_RISE)
    ]


def judge(rows: Sequence[Row], kept: Sequence[Row]) -> None:
    """Raises Problem where outputs are not x86-64's or counts have risen."""
    before = {key(row): row for row in kept}
    wrong = [sentence for row in rows for sentence in apart(row)]
    if wrong:
        raise Problem("; ".join(wrong), "compare the graphs operator by operator on both machines")
    for row in rows:
        more = risen(row, before.get(key(row), row))
        if more:
            runtimes = (one["versions"]["onnxruntime"] for one in (before[key(row)], row))
            raise Problem(
                f"{'; '.join(more)} (onnxruntime {' and '.join(runtimes)})",
                "see which operators the export has gained; if it is right, keep it with --keep",
            )


def apart(row: Row) -> list[str]:
    """Outputs that differ from x86-64's: fp32 by more than rounding, the rest in tokens."""
    off, where = row["against_x86"], f"{row['name']} on {row['cpu']}"
    found = []
    if off["clips_alike"] < off["clips"]:
        other = off["clips"] - off["clips_alike"]
        found.append(f"{where}: {other} of {off['clips']} clips get other tokens than on x86-64")
    if row["precision"] == "fp32":
        found += [
            f"{where}: {part} up to {off[part]:.1e} off x86-64's, {ALLOWED_ERROR:g} is allowed"
            for part in ("encoder", "logits")
            if off[part] > ALLOWED_ERROR
        ]
    return found


# ------------------------------------------------------------------------------------ for people


def table_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows for a table: millions of instructions."""
    return [
        {
            "artifact": row["name"],
            "core (emulated)": row["cpu"],
            **{f"{TITLES[s]}, M": f"{row['instructions'][s] / 1e6:.3g}" for s in STAGES},
            "encoder's dot products": share(row),
            "logits off x86-64": "{logits:.1e} of {logits_span:.0f}".format(**row["against_x86"]),
            "clips alike": alike(row),
        }
        for row in rows
    ]


def alike(row: Row) -> str:
    """How many clips get the same tokens as on x86-64; random weights hear none."""
    off = row["against_x86"]
    return f"{off['clips_alike']} of {off['clips']}" if off["clips"] else "-"


def share(row: Row) -> str:
    """What part of the encoder's instructions are dot products."""
    return f"{row['dot_products']['encoder_per_s'] / row['instructions']['encoder_per_s']:.0%}"


def window_s(samples: Sequence[int], seconds: float) -> float:
    """The length of the shortest window that holds so many seconds."""
    return min(n for n in samples if n >= round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
