"""The model card of a compressed checkpoint: a README.md for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card_of(record: Mapping[str, Any]) -> str:
    """Return the text of README.md for a compression.json."""
    base, recipe = record["base"]["source"], record["recipe"]["name"]
    before, after = record["before"], record["after"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [whisper, automatic-speech-recognition, edgewhisper]",
        "---",
        "",
        f"# {base}, compressed with the recipe {recipe}",
        "",
        "Made by `edgewhisper compress`. compression.json records how, with the full recipe.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| parameters | {parameters(before)} | {parameters(after)} |",
        f"| dev WER | {wer(before)} | {wer(after)} |",
        "",
        *speech_lines(record["speech"]),
        *loss_lines(record.get("dev_wer") or {}),
    ]
    return "\n".join(lines) + "\n"


def parameters(measured: Mapping[str, Any]) -> str:
    return f"{measured['parameters']['total']:,}"


def wer(measured: Mapping[str, Any]) -> str:
    dev = measured["dev"]
    return f"{100 * dev['wer']:.1f} % of {dev['words']} words, normalizer {dev['normalizer']}"


def speech_lines(speech: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Trained or calibrated on {speech['train']['clips']} clips, dev WER on "
        f"{speech['dev']['clips']} others."
    ]
    if speech.get("source"):
        lines.append(f"The speech: {speech['source']}")
    if speech.get("texts"):
        lines.append(f"The texts: {speech['texts']}")
    if speech.get("dev_texts"):
        lines.append(f"The reference texts of the WER: {speech['dev_texts']}")
    return lines


def loss_lines(dev_wer: Mapping[str, Any]) -> list[str]:
    """Return the change of dev WER and its limit, as a warning if a step lost more than that."""
    if not dev_wer.get("losses"):
        return []
    limit, losses = dev_wer["max_wer_loss"], dev_wer["losses"]
    if not dev_wer["exceeded"]:
        change = losses[-1]["points"]
        return [f"Dev WER changed by {change:+.1f} points; the recipe allows a loss of {limit:g}."]
    worst = max(losses, key=lambda loss: loss["points"])
    what = "the whole recipe" if worst["step"] is None else f"step {worst['step']}"
    return [
        "",
        f"**This checkpoint lost more than the recipe allows ({limit:g} points of dev WER):** "
        f"{what} ({worst['method']}) cost {worst['points']:.1f} points.",
    ]
