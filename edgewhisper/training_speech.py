"""Choose the clips that `compress` trains on and the dev clips that it evaluates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import score
from edgewhisper.shipped import COMMON_VOICE, DEFAULT_MODEL, SPEECH
from edgewhisper.transcripts import transcripts
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

SHIPPED = (
    "60 + 60 English clips of Mozilla Common Voice (CC0 1.0), shipped with EdgeWhisper in "
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
    models, gets English clips of Common Voice. Raises Problem for other models without clips, for
    clips without texts, and if there are too few clips to hold out a dev set.
    """
    if speech is None and dev is None and Path(source) == DEFAULT_MODEL:
        speech, dev = SPEECH / "train.jsonl", SPEECH / "dev.jsonl"
    elif speech is None and general:
        dev_clips = with_texts(dev or COMMON_VOICE / "dev.jsonl")
        return Speech(with_texts(COMMON_VOICE / "calibration.jsonl"), dev_clips, SHIPPED)
    if speech is None:
        raise Problem(
            f"{source}: no speech to compress it with",
            hint="give a manifest with --speech; best are a few hours in the model's language",
        )
    clips = with_texts(speech)
    if dev is not None:
        return Speech(clips, with_texts(dev))
    if len(clips) < 2 * DEV_SHARE:
        raise Problem(
            f"{speech} has {len(clips)} clips: too few to hold out a dev set",
            hint=f"give at least {2 * DEV_SHARE} clips, or a separate dev manifest with --dev",
        )
    held_out = clips[::DEV_SHARE]
    return Speech([clip for clip in clips if clip not in held_out], held_out)


def with_texts(speech: Path) -> list[Clip]:
    """Return the clips of a manifest. Raises Problem if the texts of all clips are empty."""
    clips = read_manifest(speech)
    if not any(clip.text.strip() for clip in clips):
        raise Problem(
            f"{speech}: the text of all {len(clips)} clips is empty, so there is nothing to learn",
            hint="write the spoken words into `text`; single clips without speech are allowed",
        )
    return clips


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
