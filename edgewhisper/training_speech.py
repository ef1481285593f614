"""Choose the clips that `compress` trains on and the dev clips that it evaluates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import score
from edgewhisper.pseudo_labels import pseudo_labelled, reasons
from edgewhisper.shipped import COMMON_VOICE, DEFAULT_MODEL, SPEECH
from edgewhisper.transcripts import transcripts
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

SHIPPED = (
    "60 + 60 English clips of Mozilla Common Voice (CC0 1.0), included with EdgeWhisper in "
    "edgewhisper/assets/common-voice"
)
OWN_WORDS = "the model's own transcripts, or the reference where the two differ much"
AGREES = 0.3
"""Train on the model's transcript if its WER against the reference is at most this."""
DEV_SHARE = 10
"""Every tenth clip becomes a dev clip if the user gives no dev clips."""


@dataclass(frozen=True)
class Speech:
    """Training clips and dev clips. Thresholds are chosen on the dev clips."""

    train: list[Clip]
    dev: list[Clip]
    source: str | None = None
    """Where the clips come from, for the model card. None: the user's own clips."""


def choose_speech(
    source: str, speech: Path | None, dev: Path | None, general: bool = False
) -> Speech:
    """Return the user's clips, or shipped clips if the user gives none.

    The embedded model gets spoken digits. A `general` model, with the vocabulary of OpenAI's
    models, gets English clips of Common Voice. The texts of the user's clips are all empty if they
    have none. Raises Problem for other models without clips, and if there are too few clips to hold
    out a dev set.
    """
    if speech is None and dev is None and Path(source) == DEFAULT_MODEL:
        speech, dev = SPEECH / "train.jsonl", SPEECH / "dev.jsonl"
    elif speech is None and general:
        dev_clips = clips_of(dev or COMMON_VOICE / "dev.jsonl")
        return Speech(clips_of(COMMON_VOICE / "calibration.jsonl"), dev_clips, SHIPPED)
    if speech is None:
        raise Problem(
            f"{source}: no speech to compress it with",
            hint="give a manifest with --speech; best are a few hours in the model's language",
        )
    clips = clips_of(speech)
    if dev is not None:
        return Speech(clips, clips_of(dev))
    if len(clips) < 2 * DEV_SHARE:
        raise Problem(
            f"{speech} has {len(clips)} clips: too few to hold out a dev set",
            hint=f"give at least {2 * DEV_SHARE} clips, or a separate dev manifest with --dev",
        )
    held_out = clips[::DEV_SHARE]
    return Speech([clip for clip in clips if clip not in held_out], held_out)


def clips_of(speech: Path) -> list[Clip]:
    """Return the clips of a manifest. Either all of them need a text, or none of them has one."""
    clips = read_manifest(speech, need_texts=False)
    return read_manifest(speech) if has_texts(clips) else clips


def has_texts(clips: Sequence[Clip]) -> bool:
    return any(clip.text.strip() for clip in clips)


def with_pseudo_labels(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    speech: Speech,
    cache: Path,
) -> tuple[Speech, dict[str, str]]:
    """Return the speech with the model's transcripts as texts of clips that have none, and what
    was labelled: "train" or "dev" -> a description with the number of clips left out."""
    parts, labelled = {"train": speech.train, "dev": speech.dev}, {}
    for part, clips in parts.items():
        if not has_texts(clips):
            path = cache / f"{part}-transcripts.json"
            parts[part], left_out = pseudo_labelled(model, processor, clips, path)
            labelled[part] = (
                f"the uncompressed model's transcripts of {len(parts[part])} of {len(clips)} clips "
                f"(left out: {reasons(left_out)})"
            )
    return replace(speech, train=parts["train"], dev=parts["dev"]), labelled


def with_own_transcripts(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clips: Sequence[Clip]
) -> list[Clip]:
    """Return the clips with the model's own transcripts where these agree with the references.

    The references of Common Voice lack case and punctuation. A model trained on them would lose
    both. Distil-Whisper (arXiv:2311.00430) trains on transcripts for the same reason.
    """
    limit = 4 * max(len(clip.text.split()) for clip in clips)
    texts = transcripts(model, processor, clips, "transcripts to train on", limit)
    return [
        replace(clip, text=text) if text and agrees(clip, text) else clip
        for clip, text in zip(clips, texts, strict=True)
    ]


def agrees(clip: Clip, transcript: str) -> bool:
    """Return whether the WER of a transcript is low enough to train on it."""
    return bool(clip.text.strip()) and score([clip.text], [transcript]).wer <= AGREES
