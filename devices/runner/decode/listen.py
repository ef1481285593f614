"""From sound of any length to segments: which window is decoded next, under which rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..audio import SAMPLING_RATE, Pcm, find_cut, is_hum, is_silent, split
from ..problem import RunnerProblem
from .rules import AUTO, MOST_NO_SPEECH, Filter, Rules, detect, probability, say, without_loop
from .text import join
from .timestamps import STEP_SAMPLES, parts

if TYPE_CHECKING:
    from ..recognizer import Decoder, Recognizer, Transcript
    from .fallback import Attempt

ENGLISH = "en"

MOST_BEAMS = 32

HOT = 0.5
"""What was drawn at a higher temperature prompts nothing, as in Whisper."""

LEAST_STEPS = 50
"""A window that would move on by less than a second keeps its unfinished text instead: a model that
goes on in steps of 0.02 s would take hours."""


@dataclass(frozen=True)
class Options:
    """How a recording is to be heard; the defaults are what the gate has checked."""

    language: str | None = None
    """A code such as "hi"; "auto": the likeliest by the first window with sound; None: the one
    that the checkpoint names, or "auto" where it names none."""
    task: str | None = None
    """transcribe, or translate into English."""
    timestamps: bool = False
    """Segments as the model times them, and long recordings cut there, as Whisper does; otherwise
    a segment is a piece between pauses, of a window at most."""
    beams: int = 1
    """Texts that are followed at once; 1 is greedy."""
    fallback: bool = False
    """Decode again, at higher temperatures, what reads like a failure, and leave out what sounds
    like no speech."""
    seed: int = 0
    """Of the random numbers at higher temperatures."""
    previous: bool = False
    """Prompt every window with what was said before it. Names and style go on over seams, and so do
    errors; a model that was never trained so may fall silent or repeat itself."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording, in seconds from its begin, and what is said there."""

    start_s: float
    end_s: float
    text: str
    tokens: list[int]

    def as_dict(self) -> dict[str, float | str]:
        """Return what is printed of it."""
        return {"start_s": self.start_s, "end_s": self.end_s, "text": self.text}


class Listener:
    """One recording's way through a recognizer; it notes times and language in a transcript."""

    def __init__(self, recognizer: Recognizer, options: Options, transcript: Transcript) -> None:
        self.recognizer, self.options, self.transcript = recognizer, options, transcript
        self.rng = np.random.default_rng(options.seed)
        check(options, recognizer.rules)
        language = code(options.language, recognizer.rules)
        self.detects = language == AUTO or (language is None and recognizer.rules.auto)
        self.rules = recognizer.rules.told(
            None if self.detects else language, options.task, options.timestamps
        )
        transcript.language = None if self.detects else self.rules.language
        self.prompted, self.doubtful = self.rules, False
        self.since = len(transcript.tokens)
        """From here on, what is said may prompt the next window."""

    def segments(self, pcm: Pcm) -> Iterator[Segment]:
        """Yield what is said, segment by segment, and write it into the transcript."""
        for window in self.windows(pcm):
            tokens = [token for segment in window for token in segment.tokens]
            spoken = [segment for segment in window if segment.text]
            said = self.recognizer.text(tokens)
            self.transcript.text = join([self.transcript.text, said])
            self.transcript.tokens += tokens
            self.transcript.segments += spoken
            if self.doubtful:
                self.since = len(self.transcript.tokens)
            yield from spoken

    def windows(self, pcm: Pcm) -> Iterator[list[Segment]]:
        """Yield the segments of one window after the other, as soon as it is decoded."""
        return self.by_timestamps(pcm) if self.options.timestamps else self.by_pauses(pcm)

    def by_pauses(self, pcm: Pcm) -> Iterator[list[Segment]]:
        """Yield one segment a window; windows end in pauses."""
        for piece in split(pcm, self.recognizer.window_samples):
            yield [self.segment(piece.start, piece.stop, self.window(pcm[piece]))]

    def by_timestamps(self, pcm: Pcm) -> Iterator[list[Segment]]:
        """Yield the finished segments of a window; the next one begins where they end.

        A window ends in a pause where more sound follows. Whisper's own end anywhere, and a word
        there is lost if the model leaves it out, as it does where it said everything before.
        """
        start = 0
        while start < len(pcm):
            window = first_window(pcm[start:], self.recognizer.window_samples)
            tokens, length = self.window(window), len(window) // STEP_SAMPLES
            found, steps = parts(tokens, self.rules, length) if tokens else ([], length)
            if steps < min(length, LEAST_STEPS):
                rest = tokens[sum(len(part) for _, _, part in found) :]
                found, steps = [*found, (steps, length, rest)], length
            stop = start + len(window)
            marks = [[min(start + n * STEP_SAMPLES, stop) for n in (a, b)] for a, b, _ in found]
            yield [
                self.segment(a, b, part) for (a, b), (_, _, part) in zip(marks, found, strict=True)
            ]
            start = stop if steps >= length else start + steps * STEP_SAMPLES

    def segment(self, start: int, stop: int, tokens: list[int]) -> Segment:
        """Return the segment between two samples."""
        text = self.recognizer.text(tokens)
        return Segment(start / SAMPLING_RATE, stop / SAMPLING_RATE, text, tokens)

    def window(self, pcm: Pcm) -> list[int]:
        """Return the tokens of one window, without prompt and end token."""
        guards, options = self.recognizer.guards, self.options
        if guards and is_silent(pcm):
            return []
        decoder = self.recognizer.decoder_over(pcm, self.transcript)
        self.tell_language(decoder, pcm)
        said = self.transcript.tokens[self.since :] if options.previous else []
        self.prompted, hot = self.rules.after(said), False
        if options.beams == 1 and not options.fallback:
            choose = Filter(self.prompted).likeliest
            tokens = say(decoder, choose, self.prompted, guards)
        else:
            found = self.considered(decoder) if options.fallback else self.attempt(decoder, 0.0)
            tokens, hot = found.tokens, found.temperature > HOT
        kept = without_loop(tokens) if guards else tokens
        self.doubtful = hot or len(kept) < len(tokens)
        return kept

    def tell_language(self, decoder: Decoder, pcm: Pcm) -> None:
        """Put the likeliest language into the prompt where it is to be detected: that of the first
        window with speech, and up to there each window's own."""
        if self.detects:
            detected, no_speech = detect(decoder, self.rules)
            self.rules = self.rules.told(detected, None, self.options.timestamps)
            self.transcript.language = detected
            self.detects = no_speech > MOST_NO_SPEECH or is_hum(pcm)
            self.rewind(decoder)

    def considered(self, decoder: Decoder) -> Attempt:
        """Return the first attempt that reads like a text."""
        from .fallback import best_attempt

        attempt, no_speech = partial(self.attempt, decoder), partial(self.no_speech, decoder)
        return best_attempt(attempt, self.recognizer.text, no_speech)

    def attempt(self, decoder: Decoder, temperature: float) -> Attempt:
        """Decode the window once, from the prompt on; beams are for temperature 0."""
        from .fallback import sample

        self.rewind(decoder)
        if self.options.beams == 1 or temperature:
            return sample(decoder, self.prompted, temperature, self.rng, self.recognizer.guards)
        return self.beam_search(decoder)

    def beam_search(self, decoder: Decoder) -> Attempt:
        """Decode the window once, with several beams."""
        from .beam import Branches, beam_search

        first = decoder(self.prompted.prompt).copy()
        branches = Branches(decoder, self.options.beams)
        found = beam_search(first, branches, self.prompted, self.options.beams)
        return replace(found, looped=without_loop(found.tokens) != found.tokens)

    def no_speech(self, decoder: Decoder) -> float:
        """Return the probability that nobody speaks in the window."""
        token = self.rules.no_speech
        if token is None:
            return 0.0
        self.rewind(decoder)
        before = len(self.prompted.prompt) - len(self.rules.prompt)
        return probability(decoder(self.prompted.prompt[: before + 1]), token)

    def rewind(self, decoder: Decoder) -> None:
        """Let the decoder begin again; what it is fed next counts as a prompt."""
        decoder.fed, decoder.clock = 0, self.transcript.prompt_s


def first_window(pcm: Pcm, window_samples: int) -> Pcm:
    """Return all of it, or where it is longer than a window, what stands before a pause in it."""
    if len(pcm) <= window_samples:
        return pcm
    return pcm[: find_cut(pcm[:window_samples])]


def check(options: Options, rules: Rules) -> None:
    """Raise the letter for what the artifact's model cannot do."""
    if not 1 <= options.beams <= MOST_BEAMS:
        raise RunnerProblem(
            f"beams = {options.beams}: there can be 1 to {MOST_BEAMS}",
            "take 1 for greedy decoding, or 5, which Whisper's own program takes",
        )
    if options.timestamps and rules.timestamp_begin is None:
        raise RunnerProblem(
            "timestamps are asked for, and the artifact's model has no tokens for them",
            "leave them out, or start from a checkpoint whose generation_config.json names "
            "no_timestamps_token_id",
        )
    if options.previous and rules.previous is None:
        raise RunnerProblem(
            "what was said before is to prompt each window, and the artifact has no token for that",
            "leave `previous` out, or export anew a checkpoint whose generation_config.json names "
            "prev_sot_token_id",
        )
    if options.task not in (None, "transcribe") and not rules.languages:
        raise RunnerProblem(
            f"the task {options.task!r} is asked for, and the artifact's model knows English only",
            "leave it out, or export a multilingual checkpoint",
        )
    if options.task is not None and rules.languages and options.task not in rules.tasks:
        raise RunnerProblem(
            f"the task {options.task!r} is not among the artifact's "
            f"({', '.join(rules.tasks) or 'none'})",
            "leave it out, or name one of these",
        )


def code(language: str | None, rules: Rules) -> str | None:
    """Return the artifact's code for hi, HI, hi_in, hi-IN or <|hi|>, or AUTO; None for English
    where the model knows nothing else. Raise RunnerProblem for a language that it does not know."""
    if language is None:
        return None
    found = plain(language)
    known = list(rules.languages)
    if found in known or (found == AUTO and known):
        return found
    if not known:
        if found in (ENGLISH, AUTO):
            return None
        raise RunnerProblem(
            f"the language {language!r} is asked for, and the artifact's model knows English only",
            "leave it out, or export a multilingual checkpoint",
        )
    near = get_close_matches(found, known, n=1) or known[:1]
    raise RunnerProblem(
        f"the artifact's model has no token for the language {language!r}, it knows {len(known)}",
        f"name a code such as {near[0]!r}, or 'auto' to let the model find out",
    )


def plain(language: str) -> str:
    """Return a code in lower case, without a region and without Whisper's brackets."""
    bare = language.strip().lower().removeprefix("<|").removesuffix("|>")
    return bare.replace("_", "-").split("-")[0]
