"""Instruction counts: computed from the plugin's marks, stored as JSON lines, and compared.

A line has, for one artifact on one emulated core, the instructions of the encoder per second of its
window, of the prompt's decoder step and of a token's step (mean over the forced tokens), the number
of dot products among them, and the difference of the outputs to x86-64. Times from emulators are
never reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aarch64.guest import ENCODER, END, PROMPT, TOKEN
from benchmarks.aarch64.machine import Answer, Task
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
    """Return, for each mark, (instructions, dot products) up to the next mark, (n, 2).

    Raises Problem if the text is not the plugin's output.
    """
    try:
        marks = np.array([[int(word) for word in line.split()] for line in text.splitlines()])
        numbers, totals = marks[:, 0], marks[:, 1:3]
        if totals.shape[1] != 2 or (np.diff(totals, axis=0) < 0).any():
            raise ValueError("the two totals do not increase")
    except (ValueError, IndexError) as error:
        raise Problem(
            f"the plugin's marks cannot be read ({error})",
            "delete build/aarch64 to rebuild the emulated machine",
        ) from None
    between = np.diff(totals, axis=0)
    return {number: between[numbers[:-1] == number] for number in set(numbers.tolist()) - {END}}


def counted(text: str, task: Task, window_s: float) -> dict[str, dict[str, float]]:
    """Return `instructions` and `dot_products` of the last round, by stage."""
    by_mark = spans(text)
    expected = {ENCODER: task.rounds, PROMPT: task.rounds, TOKEN: task.rounds * task.tokens}
    actual = {number: len(span) for number, span in by_mark.items()}
    if actual != expected:
        raise Problem(
            f"the plugin counted {actual} marks of {expected}",
            "the guest ended early or ran more than once; run it again",
        )
    last = {
        "encoder_per_s": by_mark[ENCODER][-1] / window_s,
        "prompt": by_mark[PROMPT][-1],
        "token": by_mark[TOKEN][-task.tokens :].mean(axis=0),
    }
    names = ("instructions", "dot_products")
    return {
        name: {stage: round(float(both[column])) for stage, both in last.items()}
        for column, name in enumerate(names)
    }


# ------------------------------------------------------------------------------ against x86-64


def against(ours: Answer, theirs: Answer) -> Row:
    """Return the differences between the outputs of two machines."""
    same = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    logits = ours.arrays["logits"], theirs.arrays["logits"]
    return {
        "encoder": max(errors(floats(ours.arrays), floats(theirs.arrays)), default=0.0),
        "logits": float(np.abs(logits[0] - logits[1]).max()),
        "logits_span": float(np.ptp(logits[1])),
        "clips": len(ours.tokens),
        "clips_alike": same,
    }


def errors(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[float]:
    """Return the largest difference of each array."""
    return [float(np.abs(ours[name] - array).max()) for name, array in theirs.items()]


def floats(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return keys and values (heads, room, width), with codes multiplied by their scales."""
    dequantised = {}
    for name, array in arrays.items():
        if name.endswith((".key", ".value")):
            wide = array[0].astype(np.float32)  # (heads, room, width)
            scale = arrays.get(f"{name}_scale")
            dequantised[name] = wide if scale is None else wide * scale.reshape(len(wide), 1, -1)
    return dequantised


# ------------------------------------------------------------------------------------- the gate


def read(path: Path) -> list[Row]:
    """Return the rows of a file of counts. Raises Problem for another file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if row["format"] != FORMAT or not set(STAGES) <= set(row["instructions"]):
                raise ValueError(f"format {row['format']}")
            key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"{path}: not a file of counts of this version ({error})", "store new ones with --keep"
        ) from None
    return rows


def store(rows: Sequence[Row], path: Path) -> None:
    """Store rows in a file; they replace rows of the same artifacts and cores."""
    kept = {key(row): row for row in (read(path) if path.is_file() else [])}
    kept |= {key(row): row for row in rows}
    with new_file(path) as temporary:
        lines = [json.dumps(row) + "\n" for _, row in sorted(kept.items())]
        temporary.write_text("".join(lines), encoding="utf-8")


def key(row: Row) -> tuple[Any, ...]:
    """Return what identifies a row; rows with equal keys did the same work."""
    return tuple(row[name] for name in ("name", "cpu", "window_s", "tokens"))


def change(row: Row, kept: Sequence[Row]) -> str:
    """Return the largest increase of any stage over the stored row, for a table."""
    before = next((one for one in kept if key(one) == key(row)), None)
    if before is None:
        return "not stored"
    counts = (row["instructions"], before["instructions"])
    return f"{max(counts[0][stage] / counts[1][stage] for stage in STAGES) - 1:+.2%}"


def risen(row: Row, kept: Row) -> list[str]:
    """Return a sentence for each stage with more instructions than in the stored row."""
    pairs = [(TITLES[s], kept["instructions"][s], row["instructions"][s]) for s in STAGES]
    where = f"{row['name']} on {row['cpu']}"
    return [
        f"{where}: {title} {now:,} instructions, {now / before - 1:.1%} more than {before:,}"
        for title, before, now in pairs
        if now > before * (1 + ALLOWED_RISE)
    ]


def judge(rows: Sequence[Row], kept: Sequence[Row]) -> None:
    """Raise Problem if outputs differ from x86-64 or counts have increased."""
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
                "see which operators the export has gained; if that is justified, use --keep",
            )


def apart(row: Row) -> list[str]:
    """Return a sentence per difference to x86-64: tokens, and fp32 beyond rounding."""
    off, where = row["against_x86"], f"{row['name']} on {row['cpu']}"
    sentences = []
    if off["clips_alike"] < off["clips"]:
        other = off["clips"] - off["clips_alike"]
        sentences.append(
            f"{where}: {other} of {off['clips']} clips get other tokens than on x86-64"
        )
    if row["precision"] == "fp32":
        sentences += [
            f"{where}: {part} differs from x86-64 by {off[part]:.1e}; {ALLOWED_ERROR:g} is allowed"
            for part in ("encoder", "logits")
            if off[part] > ALLOWED_ERROR
        ]
    return sentences


# ------------------------------------------------------------------------------------- tables


def table_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the rows of a table, in millions of instructions."""
    return [
        {
            "artifact": row["name"],
            "core (emulated)": row["cpu"],
            **{f"{TITLES[s]}, M": f"{row['instructions'][s] / 1e6:.3g}" for s in STAGES},
            "encoder's dot products": share(row),
            "logits error vs x86-64": "{logits:.1e} of {logits_span:.0f}".format(
                **row["against_x86"]
            ),
            "same tokens": alike(row),
        }
        for row in rows
    ]


def alike(row: Row) -> str:
    """Return how many clips get the same tokens as on x86-64; "-" for random weights."""
    off = row["against_x86"]
    return f"{off['clips_alike']} of {off['clips']}" if off["clips"] else "-"


def share(row: Row) -> str:
    """Return the share of dot products among the encoder's instructions."""
    return f"{row['dot_products']['encoder_per_s'] / row['instructions']['encoder_per_s']:.0%}"


def window_s(samples: Sequence[int], seconds: float) -> float:
    """Return the length in seconds of the shortest window of at least `seconds`."""
    return min(n for n in samples if n >= round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
