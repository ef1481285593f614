"""Options of a transcription, and what an artifact must have for them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from ..artifact.manifest import AUTO
from ..problem import RunnerProblem
from .rules import Rules

ENGLISH = "en"
MOST_BEAMS = 32


@dataclass(frozen=True)
class Options:
    """Options of a transcription; the gate checks the defaults."""

    language: str | None = None
    """A code such as "hi"; "auto" detects it in the first window with speech; None is the
    checkpoint's language, or "auto" if it has none."""
    task: str | None = None
    """transcribe, or translate into English."""
    timestamps: bool = False
    """Use the model's timestamps for segments, and to split long recordings, as Whisper does.
    Otherwise a segment is a piece between pauses, of at most one window."""
    beams: int = 1
    """Beam width; 1 is greedy."""
    fallback: bool = False
    """Decode failed windows again at higher temperatures."""
    seed: int = 0
    """Random seed of sampling at higher temperatures."""
    previous: bool = False
    """Prompt every window with the text before it. Names and style carry over, and so do errors. A
    model that was not trained for it may return nothing or repeat itself."""
    prompt: str | None = None
    """Text before the recording, such as names and their spelling. It prompts the first window
    only, or with `previous` all windows that it and the previous text fit in."""
    hotwords: str | None = None
    """Words that prompt every window."""
    confidence: bool = False
    """Set avg_logprob and no_speech_prob of the segments."""
    word_timestamps: bool = False
    """Set the words of the segments, with their times and probabilities."""
    vad: bool = False
    """Decode only what Silero's voice activity detector takes for speech; needs silero-vad."""


def check(options: Options, rules: Rules) -> None:
    """Raise RunnerProblem for options that the artifact's model does not support."""
    if not 1 <= options.beams <= MOST_BEAMS:
        raise RunnerProblem(
            f"beams = {options.beams}: must be 1 to {MOST_BEAMS}",
            "use 1 for greedy decoding, or 5, the default of OpenAI's program",
        )
    if options.timestamps and rules.timestamp_begin is None:
        raise RunnerProblem(
            "timestamps: the artifact's model has no timestamp tokens",
            "leave them out, or start from a checkpoint whose generation_config.json has "
            "no_timestamps_token_id",
        )
    if options.word_timestamps and not rules.aligns:
        raise RunnerProblem(
            "word_timestamps: the artifact does not output what they are computed from",
            "export the checkpoint again, with `--target onnx` and the layout `native`",
        )
    needing = [name for name in ("previous", "prompt", "hotwords") if getattr(options, name)]
    if needing and rules.previous is None:
        raise RunnerProblem(
            f"{needing[0]}: the artifact has no token for prompting with the previous text",
            "leave it out, or export a checkpoint whose generation_config.json has "
            "prev_sot_token_id",
        )
    if options.task not in (None, "transcribe", "translate", *rules.tasks):
        choices = " or ".join(rules.tasks) or "transcribe"
        raise RunnerProblem(f"unknown task {options.task!r}", f"choose {choices}, or leave it out")
    if options.task not in (None, "transcribe") and not rules.languages:
        raise RunnerProblem(
            f"task {options.task!r}: the artifact's model knows English only",
            "leave it out, or export a multilingual checkpoint",
        )
    if options.task is not None and rules.languages and options.task not in rules.tasks:
        raise RunnerProblem(
            f"task {options.task!r}: the artifact's tasks are {', '.join(rules.tasks) or 'none'}",
            "leave it out, or choose one of these",
        )


def code(language: str | None, rules: Rules) -> str | None:
    """Return the artifact's code for hi, HI, hi_in, hi-IN or <|hi|>, or AUTO.

    Returns None for English in an English-only model. Raises RunnerProblem for other languages that
    the model does not know.
    """
    if language is None:
        return None
    asked = plain(language)
    known = list(rules.languages)
    if asked in known or (asked == AUTO and known):
        return asked
    if not known:
        if asked in (ENGLISH, AUTO):
            return None
        raise RunnerProblem(
            f"language {language!r}: the artifact's model knows English only",
            "leave it out, or export a multilingual checkpoint",
        )
    similar = get_close_matches(asked, known, n=1) or known[:1]
    raise RunnerProblem(
        f"language {language!r}: not among the {len(known)} languages of the artifact's model",
        f"use a code such as {similar[0]!r}, or 'auto' to detect the language",
    )


def plain(language: str) -> str:
    """Return a code in lower case, without a region and without Whisper's brackets."""
    bare = language.strip().lower().removeprefix("<|").removesuffix("|>")
    return bare.replace("_", "-").split("-")[0]
